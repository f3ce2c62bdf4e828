"""Real photos in an hour: a frozen language model, LoRA, and all of it learning, on Flickr8k's official split.

    bash run_scripts/flickr8k.sh IMAGES CAPTIONS        # this script with its defaults
    python -m benchmarks.experiments.flickr8k --images DIR --captions FILE --arms lora --steps 1000 --seeds 42

projects/evlgen/flickr8k.yaml, each arm for as many steps as fit --minutes: a timing pass (`--steps` leaves it out) runs
a few steps of every arm in turn and takes the median; run it with nothing beside. All test photos are captioned with
three beams. A run that was cut off goes on, a finished one is not run again. Writes benchmarks/results/flickr8k.json
and the tables in docs/results/flickr8k.md; a sheet of the first 24 test photos is each run's captions.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, median

from benchmarks.common.result_pages import put_between, spread
from benchmarks.common.training_runs import (
    ROOT,
    Run,
    last_card,
    log_of,
    photo_options,
    run_folder,
    scores,
    train,
    training_seconds,
    with_other_seeds,
)
from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card
from lavis_evlgen.reporting.tables import markdown
from lavis_evlgen.tools.compare import duration

CONFIG, PAGE = "projects/evlgen/flickr8k.yaml", ROOT / "docs/results/flickr8k.md"
ARMS = {  # name: (what the table calls it, options)
    "frozen": ("frozen", ["model.llm_train=null"]),
    "lora": ("LoRA, rank 16", []),
    "full": ("full", ["model.llm_train=full", "model.lr_scale.language_model=0.01"]),
    "frozen_visual": ("frozen, visual attention", ["model.llm_train=null", "model.prompt_attention=visual"]),
    "lora_visual": ("LoRA, visual attention", ["model.prompt_attention=visual"]),
}
HOUR = ("frozen", "lora", "full")  # compared at equal time by default
TIMING_STEPS, TIMING_ROUNDS = 8, 2
SHOWN = 24  # test photos whose captions the page has: the first in the order of their names


def options_of(args, seed: int, steps: int) -> list[str]:
    options = photo_options(args.images, args.captions)
    return [*options, f"run.seed={seed}", f"run.max_iters={steps}", f"run.iters_per_inner_epoch={steps}", *args.set]


def plan(args, arm: str, steps: int, seed: int, arms=ARMS) -> Run:
    name = f"{arm}_steps{steps}_seed{seed}"
    return Run(CONFIG, name, [*arms[arm][1], *options_of(args, seed, steps)])


def steps_that_fit(args, arms=ARMS) -> dict[str, int]:
    """arm -> optimizer steps in --minutes, by the median step of runs made in turn; kept in the folder."""
    path = args.folder / "seconds_per_step.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    if set(args.arms) - set(seconds):
        windows: dict[str, list[float]] = {arm: [] for arm in args.arms}
        for turn in range(TIMING_ROUNDS):
            for arm in args.arms:
                more = ["run.log_freq=1", "datasets.image_captions.split={train: 8, test: 2}"]  # scored in a second
                run = Run(CONFIG, f"time{turn}_{arm}", [*arms[arm][1], *options_of(args, 42, TIMING_STEPS), *more])
                train([run], args.folder)
                windows[arm] += [row["seconds_per_step"] for row in log_of(args.folder, run.name)[1:]]
        seconds |= {arm: median(values) for arm, values in windows.items()}
        path.write_text(json.dumps(seconds, indent=1))
    return {arm: round(60 * args.minutes / seconds[arm]) for arm in args.arms}


def measured(folder: Path, name: str, seed: int, steps: int) -> dict:
    """What a finished run's cards and log say."""
    card = last_card(folder, name, "test")
    return {
        "name": name, "seed": seed, "steps": steps, **scores(card), "bleu4": card["metrics"]["metrics"]["BLEU-4"],
        "text_loss": card.get("text_loss"), "trains": card["model"]["trainable_parameters"],
        "photos": card["data"]["size"], "tokenizer": card["scoring_tokenizer"], "decoding": card["decoding"],
        "seconds": training_seconds(folder, name, steps),
    }  # fmt: skip


def table(found: dict[str, list[dict]]) -> str:
    """One row for each arm: means over seeds, least and most."""
    header = ("language model", "CIDEr", "BLEU-4", "blind CIDEr", "loss, right picture", "gap, nats/token",
              "text, nats/token: before → after", "trains", "steps", "seeds")  # fmt: skip
    rows = []
    for arm, runs in found.items():
        columns = [[run[key] for run in runs] for key in ("cider", "bleu4", "blind_cider", "loss_right")]
        gaps = [run["loss_shuffled"] - run["loss_right"] for run in runs]
        texts = [run["text_loss"] for run in runs if run["text_loss"]]
        before, now = ([text[when]["nats_per_token"] for text in texts if text[when]] for when in ("before", "now"))
        unchanged = "does not change" if arm.startswith("frozen") else ""
        forgets = f"{mean(before):.3f} → {mean(now):.3f}" if before else unchanged
        trains, steps = f"{runs[0]['trains'] / 1e6:.1f}M", ", ".join(sorted({str(run["steps"]) for run in runs}))
        seeds = ", ".join(str(run["seed"]) for run in runs)
        rows.append((ARMS[arm][0], *map(spread, columns), spread(gaps), forgets, trains, steps, seeds))
    return markdown(header, rows)


def times(found: dict[str, list[dict]]) -> str:
    """Training time of each run, by its median window."""
    said = (f"{ARMS[arm][0]}: {', '.join(duration(run['seconds']) for run in runs)}" for arm, runs in found.items())
    return f"Training time, by a run's median window (evaluation left out): {'; '.join(said)}."


def captions(folder: Path, name: str) -> str:
    """The first test photos in the order of their names, and what the model says."""
    path = next((run_folder(folder, name) / "result").glob("test_*[0-9].json"))
    rows = sorted(json.loads(path.read_text())["rows"], key=lambda row: str(row["image_id"]))
    return markdown(("photo", "caption"), [(str(row["image_id"]), row["caption"]) for row in rows[:SHOWN]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of the photos")
    parser.add_argument("--captions", type=Path, required=True, help="with the official split, as Karpathy's file has")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(HOUR), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time of a run (60)")
    parser.add_argument("--steps", type=int, default=None, help="the same steps for every arm, in place of --minutes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further options for every run")
    parser.add_argument("--folder", type=Path, default=Path("output/flickr8k"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/flickr8k.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose tables are written")
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    steps = dict.fromkeys(args.arms, args.steps) if args.steps else steps_that_fit(args)
    plans = {(arm, seed): plan(args, arm, steps[arm], seed) for seed in args.seeds for arm in args.arms}
    train(plans.values(), args.folder)
    found = {
        arm: [measured(args.folder, plans[arm, seed].name, seed, steps[arm]) for seed in args.seeds]
        for arm in args.arms
    }
    setting = {"config": CONFIG, "minutes": None if args.steps else args.minutes, "set": args.set}
    found = with_other_seeds(found, args.out, setting)
    write_run_card(args.out, {**setting, "results": found, **provenance()})
    shown = "lora" if "lora" in args.arms else args.arms[0]
    put_between(args.page, [table(found), times(found), captions(args.folder, plans[shown, args.seeds[0]].name)])


if __name__ == "__main__":
    main()
