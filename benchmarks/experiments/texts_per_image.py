"""Several captions of a photo in one step: what that teaches at equal time, on Flickr8k.

    python -m benchmarks.experiments.texts_per_image --images DIR --captions FILE --minutes 5

projects/evlgen/flickr8k.yaml (LoRA on the language model) with run.texts_per_image of 1, 2 and 5, each for as many
steps as fit --minutes, on one core, two runs beside each other: a timing pass runs a few steps of each in turn. Scored
on the first --scored test photos by name, the loss over all five captions of each. Differences are of the same photos,
with the interval of `evlgen compare --paired`. A run that was cut off goes on, a finished one is not run again. Writes
benchmarks/results/texts_per_image.json and the tables in docs/results/texts_per_image.md.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from statistics import mean

from benchmarks.common.result_pages import put_between, spread
from benchmarks.common.training_runs import ROOT, last_card, less_than_first, scores, train, training_seconds
from benchmarks.experiments.flickr8k import CONFIG, plan, steps_that_fit
from lavis_evlgen.datasets.annotations.captions import read_captions_file
from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card
from lavis_evlgen.reporting.tables import markdown

ARMS = {  # name: ((captions of a photo, photos a step), options)
    name: (sizes, [f"run.texts_per_image={sizes[0]}", f"run.batch_size_train={sizes[1]}"])
    for name, sizes in {"one": (1, 8), "two": (2, 8), "five": (5, 8), "five_of_four": (5, 4)}.items()
}
# the quickstart's connector and LoRA at 4e-4, with which it was measured
SAME = [
    "run.num_beams=1", "run.eval_texts_per_image=5", "run.warmup_steps=10", "model.skip=none",
    "model.lr_scale.language_model=0.08",
]  # fmt: skip


def with_fewer_scored(args) -> Path:
    """The captions file with the first --scored photos of its test split only."""
    rows = read_captions_file(args.captions).rows
    test = sorted({row.image for row in rows if row.split == "test"})[: args.scored]
    path = args.folder / "captions.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption", "split"))
        kept = (row for row in rows if row.split != "test" or row.image in set(test))
        table.writerows((row.image, row.caption, row.split) for row in kept)
    return path


def measured(folder: Path, name: str, arm: str, seed: int, steps: int) -> dict:
    """What a finished run's card and log say, and how many photos and captions it saw."""
    (texts, photos), card = ARMS[arm][0], last_card(folder, name, "test")
    seen = {"photos": photos * steps, "captions": texts * photos * steps}
    return {"name": name, "seed": seed, "steps": steps, "texts": texts, **seen, **scores(card),
            "seconds": training_seconds(folder, name, steps)}  # fmt: skip


def table(found: dict[str, list[dict]], folder: Path) -> str:
    """A row for each arm: means over seeds (least to most), and its loss less that of one caption a photo."""
    rows = []
    for (arm, own), less in zip(found.items(), less_than_first(folder, found), strict=True):
        texts, photos = ARMS[arm][0]
        steps, minutes = own[0]["steps"], mean(run["seconds"] for run in own) / 60
        columns = [spread([run[key] for run in own]) for key in ("loss_right", "cider", "blind_cider")]
        seen = [f"{own[0][key]:,}" for key in ("photos", "captions")]
        rows.append((str(texts), str(photos), str(steps), *seen, f"{minutes:.1f}", columns[0], less, *columns[1:]))
    header = ("captions a photo", "photos a step", "steps", "photos seen", "captions seen", "minutes",
              "loss, right picture", "less one caption's (95 %)", "CIDEr", "blind CIDEr")  # fmt: skip
    return markdown(header, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of the photos")
    parser.add_argument("--captions", type=Path, required=True, help="with the official split, as Karpathy's file has")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of a run (5)")
    parser.add_argument("--scored", type=int, default=300, help="test photos scored (300)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other, a core each (2)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further options for every run")
    parser.add_argument("--folder", type=Path, default=Path("output/texts_per_image"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/texts_per_image.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results/texts_per_image.md")
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    args.captions, args.set = with_fewer_scored(args), [*SAME, *args.set]
    steps = steps_that_fit(args, ARMS)
    plans = {(arm, seed): plan(args, arm, steps[arm], seed, ARMS) for seed in args.seeds for arm in args.arms}
    train(plans.values(), args.folder, args.jobs)
    found = {
        arm: [measured(args.folder, plans[arm, seed].name, arm, seed, steps[arm]) for seed in args.seeds]
        for arm in args.arms
    }
    setting = {"config": CONFIG, "minutes": args.minutes, "scored": args.scored, "set": args.set}
    timed = json.loads((args.folder / "seconds_per_step.json").read_text())
    write_run_card(args.out, {**setting, "seconds_per_step": timed, "results": found, **provenance()})
    put_between(args.page, [table(found, args.folder)])


if __name__ == "__main__":
    main()
