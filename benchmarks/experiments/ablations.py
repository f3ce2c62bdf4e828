"""How many tokens are merged, and which layer of the ViT is read: the sweeps of the paper in miniature, on real photos.

    bash run_scripts/ablations.sh IMAGES CAPTIONS      # this script with its defaults
    python -m benchmarks.experiments.ablations --images DIR --captions FILE --sweeps tokens --steps 160

Runs `evlgen ablate` on projects/evlgen/flickr8k_mini.yaml for each sweep: the tokens that the paper's values of r leave
(figure 3), and hidden layers of the ViT. A sweep that was cut off goes on, a finished one is not run again. Writes
benchmarks/results/ablation-SWEEP.json, docs/images/ablation-SWEEP.png and the tables in docs/results/ablations.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from statistics import mean

from benchmarks.common.result_pages import put_between, spread
from benchmarks.common.training_runs import ROOT, photo_options, training_seconds
from lavis_evlgen.reporting.run_card import write_run_card
from lavis_evlgen.reporting.sweep_plot import sweep_plot
from lavis_evlgen.reporting.tables import markdown
from lavis_evlgen.tools.compare import duration

CONFIG, PAGE = "projects/evlgen/flickr8k_mini.yaml", ROOT / "docs/results/ablations.md"
GAP = "gap, nats/token"
TOKENS = {137: 10, 101: 13, 65: 16, 29: 19, 10: 22, 5: 25}  # left of 257 -> r that leaves them after 12 layers
SWEEPS = {  # name: (config key, value -> what the table calls it, columns of these names)
    "tokens": (
        "model.tome_r",
        {f"{{target: {left}}}": (left, r) for left, r in TOKENS.items()},
        ("tokens left", "r of 12 layers"),
    ),
    "vit_layer": ("model.vit_layer", {str(layer): (layer,) for layer in (3, 6, 9, 12)}, ("hidden layer",)),
}  # fmt: skip


def sweep(name: str, args) -> list[dict]:
    """The runs of a sweep, trained where they are missing; its JSON and picture are put in their places.

    Seconds are those of a run's median window, so that pauses and other work beside it do not count.
    """
    key, values, columns = SWEEPS[name]
    options = photo_options(args.images, args.captions)
    # the start and the rate that did best in docs/results/miniature.md; greedy captions; scored once, at the end
    options += ["model.connector_init=random", "run.init_lr=5e-3", "run.num_beams=1", "run.valid_splits=[]"]
    options += [f"run.max_iters={args.steps}", f"run.iters_per_inner_epoch={args.steps}"]
    out = args.folder.absolute() / name
    seeds = ",".join(map(str, args.seeds)) + ","
    command = [Path(sys.executable).with_name("evlgen"), "ablate", ROOT / CONFIG, "--out", out, "--seeds", seeds]
    command += ["--sweep", f"{key}={','.join(values)}", "--jobs", str(args.jobs), "--options", *options]
    subprocess.run(command, check=True)
    content = json.loads((out / "ablation.json").read_text())
    content |= {"config": CONFIG, "steps": args.steps, "jobs": args.jobs}
    del content["table"], content["options"]  # of other seconds, of this machine's folders
    for run in content["runs"]:
        del run["settings"]
        run["seconds"] = training_seconds(out, run["name"], args.steps)
    write_run_card(args.results / f"ablation-{name}.json", content)
    points = [
        (str(values[value][0]), gaps(runs), [run["seconds"] for run in runs])
        for value, runs in by_value(name, content["runs"])
    ]
    sweep_plot(ROOT / f"docs/images/ablation-{name}.png", columns[0], {"": points}, GAP)
    return content["runs"]


def gaps(runs: list[dict]) -> list[float]:
    """What a shuffled picture costs each run, in nats a token."""
    return [run["scores"]["loss, shuffled"] - run["scores"]["loss, right"] for run in runs]


def by_value(name: str, runs: list[dict]) -> list[tuple[str, list[dict]]]:
    """The runs of each value of a sweep."""
    return [(value, list(group)) for value, group in groupby(runs, key=lambda run: run["values"][SWEEPS[name][0]])]


def table(name: str, runs: list[dict]) -> str:
    """One row for each value: means over seeds, least and most; mean training time."""
    _, values, columns = SWEEPS[name]
    header = (*columns, "CIDEr", "blind CIDEr", "loss, right picture", GAP, "training")
    rows = []
    for value, group in by_value(name, runs):
        scores = [run["scores"] for run in group]
        numbers = [[score[one] for score in scores] for one in ("CIDEr", "blind CIDEr", "loss, right")]
        seconds = duration(mean(run["seconds"] for run in group))
        rows.append((*map(str, values[value]), *map(spread, (*numbers, gaps(group))), seconds))
    return markdown(header, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of the photos")
    parser.add_argument("--captions", type=Path, required=True, help="as datasets.image_captions reads them")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="default: all")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of a run (80)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other on a CPU (2); 1 on a GPU")
    parser.add_argument("--folder", type=Path, default=Path("output/ablations"), help="where the runs go")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="where the JSON goes")
    args = parser.parse_args()
    parts = []
    for name in args.sweeps:
        parts += [table(name, sweep(name, args)), f"![{SWEEPS[name][0]}](../images/ablation-{name}.png)"]
    if args.sweeps == list(SWEEPS):
        put_between(PAGE, parts)


if __name__ == "__main__":
    main()
