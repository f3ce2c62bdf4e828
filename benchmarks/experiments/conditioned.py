"""What merging that looks at the question (`model.condition: question`) is worth, at few tokens and at many.

    python -m benchmarks.experiments.conditioned
    python -m benchmarks.experiments.conditioned --tokens 5 --steps 1000 --seeds 42 1 2

projects/evlgen/scene_questions.yaml, several questions about each drawn picture, with and without, for each number of
tokens in the prompt: the same pictures, questions, order and steps. Differences in loss are of the same test pictures,
with the interval of `evlgen compare --paired`. The condition gap is accuracy with the right question in merging less
that with another question of the same picture. A run that was cut off goes on, a finished one is not run again. Writes
benchmarks/results/conditioned.json, docs/images/conditioned.png and the table in docs/results/conditioned.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from benchmarks.common.result_pages import put_between, spread
from benchmarks.common.training_runs import (
    ROOT,
    Run,
    last_card,
    less_than_first,
    train,
    training_seconds,
    with_other_seeds,
)
from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card
from lavis_evlgen.reporting.sweep_plot import sweep_plot
from lavis_evlgen.reporting.tables import markdown

CONFIG = "projects/evlgen/scene_questions.yaml"
TOKENS = (5, 10, 29)  # in the prompt
SAME = ["model.skip=pooled", "run.batch_size_train=4", "run.texts_per_image=4", "run.valid_splits=[]"]  # of all runs
CONDITIONS = {"none": "the same for all questions", "question": "looks at the question"}


def plan(args, condition: str, tokens: int, seed: int) -> Run:
    options = [f"model.condition={condition}", f"model.tome_r={{target: {tokens}}}", f"run.seed={seed}"]
    options += [f"run.max_iters={args.steps}", f"run.iters_per_inner_epoch={args.steps}"]
    options.append(f"datasets.scene_questions.sizes={{train: {args.pictures}, test: {args.scored}}}")
    return Run(CONFIG, f"{condition}_{tokens}_steps{args.steps}_seed{seed}", [*SAME, *options, *args.set])


def measured(folder: Path, name: str, seed: int, steps: int) -> dict:
    """What a finished run's card and log say; `condition` is there where merging looks at the question."""
    found = last_card(folder, name, "test")["metrics"]
    return {
        "name": name, "seed": seed, "steps": steps, "accuracy": found["metrics"]["accuracy"],
        "blind_accuracy": found["blind"]["accuracy"], "loss_right": found["loss_right"],
        "by_kind": {key: value for key, value in found["metrics"].items() if key != "accuracy"},
        **({"condition": found["condition"]} if "condition" in found else {}),
        "seconds": training_seconds(folder, name, steps),
    }  # fmt: skip


def table(found: dict[str, list[dict]], folder: Path) -> str:
    """A row for each arm: means over seeds (least to most), and its loss less that of plain merging to as many."""
    rows = []
    for tokens in dict.fromkeys(label.split(", ")[1] for label in found):
        own = {label: runs for label, runs in found.items() if label.endswith(f", {tokens}")}
        less = less_than_first(folder, own) if len(own) > 1 else [""]
        for (label, runs), difference in zip(own.items(), less, strict=True):
            gaps = [run["condition"] for run in runs if "condition" in run]
            scores = [spread([run[key] for run in runs]) for key in ("accuracy", "blind_accuracy", "loss_right")]
            twins = [spread([gap[key] for gap in gaps]) for key in ("gap", "loss_gap")]
            minutes = f"{mean(run['seconds'] for run in runs) / 60:.1f} min"
            seeds = ", ".join(str(run["seed"]) for run in runs)
            rows.append((tokens, CONDITIONS[label.split(", ")[0]], *scores, difference, *twins, minutes,
                         str(runs[0]["steps"]), seeds))  # fmt: skip
    header = ("tokens", "merging", "accuracy", "blind accuracy", "loss, right picture", "less the plain one's (95 %)",
              "condition gap", "its loss, nats/token", "time", "steps", "seeds")  # fmt: skip
    return markdown(header, rows)


def picture(path: Path, found: dict[str, list[dict]]):
    """Accuracy and training time over the number of tokens, with and without."""
    curves: dict[str, list] = {}
    for label, runs in found.items():
        condition, tokens = label.split(", ")
        seconds = [run["seconds"] for run in runs]
        curves.setdefault(CONDITIONS[condition], []).append((tokens, [run["accuracy"] for run in runs], seconds))
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_plot(path, "tokens in the prompt", curves, "accuracy")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="in the prompt (5 10 29)")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of every run (600)")
    parser.add_argument("--pictures", type=int, default=4000, help="drawn pictures to train on (4000)")
    parser.add_argument("--scored", type=int, default=100, help="test pictures, with about eight questions each (100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other (2)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further options for every run")
    parser.add_argument("--folder", type=Path, default=Path("output/conditioned"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/conditioned.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results/conditioned.md")
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    arms = [(condition, tokens) for tokens in args.tokens for condition in CONDITIONS]
    plans = {(*arm, seed): plan(args, *arm, seed) for seed in args.seeds for arm in arms}
    train(plans.values(), args.folder, args.jobs)
    found = {
        f"{condition}, {tokens}": [
            measured(args.folder, plans[condition, tokens, seed].name, seed, args.steps) for seed in args.seeds
        ]
        for condition, tokens in arms
    }
    sizes = {"pictures": args.pictures, "scored": args.scored}
    setting = {"config": CONFIG, "steps": args.steps, **sizes, "set": args.set}
    found = with_other_seeds(found, args.out, setting)
    # those of the file in their places too: fewest tokens first, plain merging before the other ("none" < "question")
    found = dict(sorted(found.items(), key=lambda arm: (int(arm[0].split(", ")[1]), arm[0])))
    write_run_card(args.out, {**setting, "results": found, **provenance()})
    image = args.page.parent.parent / "images/conditioned.png"
    picture(image, found)
    put_between(args.page, [table(found, args.folder), "![accuracy over tokens](../images/conditioned.png)"])


if __name__ == "__main__":
    main()
