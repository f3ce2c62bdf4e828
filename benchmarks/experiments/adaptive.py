"""As many tokens as the picture needs, or as many for all: drawn scenes of one, two and more things.

    python -m benchmarks.experiments.adaptive
    python -m benchmarks.experiments.adaptive --averages 12 --steps 600 --seeds 42 --jobs 2

The quickstart on scenes of all three kinds (`datasets.scenes.kinds`: single, pair, count), with `model.tome_r:
{average, least, most}` and, with the same average, `{target}`. The scenes are stored as the frozen ViT's tokens
(run.cache_features), so all runs see the same. Of every test scene it is known how many things it shows: Spearman's
correlation of tokens and things, and the share of captions of counted things that say the right number. A run that was
cut off goes on, a finished one is not run again. Writes benchmarks/results/adaptive.json, docs/images/adaptive.png and
the table in docs/results/adaptive.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common.result_pages import put_between, spread
from benchmarks.common.training_runs import (
    ROOT,
    Run,
    last_card,
    less_than_first,
    run_folder,
    scores,
    train,
    training_seconds,
    with_other_seeds,
)
from lavis_evlgen.datasets.synthetic.scene_language import NUMBERS
from lavis_evlgen.datasets.synthetic.scenes import ScenesDataset
from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card
from lavis_evlgen.reporting.tables import markdown
from lavis_evlgen.tools.compare import read_runs

CONFIG = "projects/evlgen/quickstart.yaml"
LIMITS = {12: (6, 28), 29: (12, 64)}  # average: (least, most)
WAYS = ("fixed", "adaptive")
SAME = ["datasets.scenes.kinds={single: 1, pair: 1, count: 1}", "run.valid_splits=[]", "run.num_beams=1"]
PICTURE = "images/adaptive.png"


def plan(args, average: int, way: str, seed: int) -> Run:
    least, most = LIMITS[average]
    spec = f"{{average: {average}, least: {least}, most: {most}}}" if way == "adaptive" else f"{{target: {average}}}"
    options = [f"model.tome_r={spec}", *SAME, f"datasets.scenes.sizes={{train: 4000, test: {args.pictures}}}"]
    options += [f"run.cache_features={args.folder / 'features'}", f"run.seed={seed}", f"run.max_iters={args.steps}"]
    name = f"{way}{average}_steps{args.steps}_seed{seed}"
    return Run(CONFIG, name, [*options, f"run.iters_per_inner_epoch={args.steps}", *args.set])


def measured(folder: Path, name: str, seed: int, steps: int) -> dict:
    """What a finished run's card and result say, with what its test scenes show."""
    card = last_card(folder, name, "test")
    rows = json.loads((run_folder(folder, name) / "result" / f"test_{steps}.json").read_text())["rows"]
    drawn = card["config"]["datasets"]["scenes"]
    scenes = ScenesDataset("test", drawn["sizes"]["test"], seed=drawn["seed"], kinds=drawn["kinds"])
    shown = [scenes.scene(int(row["instance_id"])) for row in rows]
    found = {"name": name, "seed": seed, "steps": steps, **scores(card), "counts": counts_told(rows, shown)}
    found["macs"] = read_runs([run_folder(folder, name)])[0].rows[-1]["macs"]
    found["seconds"] = training_seconds(folder, name, steps)
    if "prompt_tokens" in rows[0]:
        tokens, things = [row["prompt_tokens"] for row in rows], [len(scene.things) for scene in shown]
        found |= {key: card["metrics"][key] for key in ("prompt_tokens", "prompt_tokens_p5", "prompt_tokens_p95")}
        by_things = {n: [t for t, m in zip(tokens, things, strict=True) if m == n] for n in sorted(set(things))}
        found |= {"spearman": spearman(tokens, things), "tokens_by_things": {str(n): v for n, v in by_things.items()}}
    return found


def counts_told(rows: Sequence[dict], shown: Sequence) -> float:
    """Share of the scenes of counted things whose caption says their number, and says it first of all numbers."""
    right = []
    for row, scene in zip(rows, shown, strict=True):
        if scene.kind == "count":
            said = re.findall(r"\b(?:one|two|three|four|five|six)\b", row["caption"].lower())
            right.append(said[:1] == [NUMBERS[len(scene.things)]])
    return mean(right) if right else float("nan")


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of ranks, those of equal values their mean; 0 where one of the two does not vary."""
    ranks = []
    for values in map(np.asarray, (first, second)):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])
    if min(rank.std() for rank in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def table(found: dict[str, list[dict]], folder: Path) -> str:
    """A row for each average and way: means over seeds (least to most); losses less those of the fixed number."""
    rows = []
    for average in LIMITS:
        pair = {label: found[label] for way in WAYS if (label := f"{way} {average}") in found}
        for (label, runs), less in zip(pair.items(), less_than_first(folder, pair) if pair else (), strict=True):
            tokens = str(average)
            if "prompt_tokens" in runs[0]:
                ends = [round(mean(run[f"prompt_tokens_p{n}"] for run in runs)) for n in (5, 95)]
                tokens = f"{mean(run['prompt_tokens'] for run in runs):.1f} ({ends[0]} to {ends[1]})"
            columns = [spread([run[key] for run in runs if key in run]) for key in ("spearman", "counts", "cider")]
            columns += [spread([run["loss_right"] for run in runs]), less]
            cost = [f"{runs[0]['macs'] / 1e12:.0f} T", f"{mean(run['seconds'] for run in runs) / 60:.0f} min"]
            rows.append((label, tokens, *columns, *cost, ", ".join(str(run["seed"]) for run in runs)))
    header = ("tokens are", "mean (5 % to 95 %)", "Spearman, tokens and things", "counts told", "CIDEr",
              "loss, right picture", "less fixed (95 %)", "MACs, training", "time", "seeds")  # fmt: skip
    return markdown(header, rows)


def draw(found: dict[str, list[dict]], path: Path):
    """Tokens by number of things, a line a seed and average; and counts told, a dot a seed."""
    figure = Figure(figsize=(9, 3.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = dict(zip(LIMITS, ("#b4531f", "#2563a8"), strict=False))
    for row, (label, runs) in enumerate(found.items()):
        average = int(label.split()[-1])
        for run in runs:
            for_things = run.get("tokens_by_things", {})
            means = [mean(tokens) for tokens in for_things.values()]
            left.plot([int(n) for n in for_things], means, "o-", color=colours[average], alpha=0.7)
        right.plot([run["counts"] for run in runs], [row] * len(runs), "o", color=colours[average], alpha=0.7)
    for average, colour in colours.items():
        left.axhline(average, color=colour, linewidth=0.8, linestyle=":", label=f"average {average}")
    left.set_xlabel("things in the scene")
    left.set_ylabel("tokens, mean")
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    right.set_yticks(range(len(found)), list(found))
    right.invert_yaxis()
    right.set_xlabel("counts told")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--averages", type=int, nargs="+", choices=LIMITS, default=list(LIMITS), help="default: all")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of every run (600)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--pictures", type=int, default=400, help="test scenes (400)")
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other (2); 1 on a GPU")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further options for every run")
    parser.add_argument("--folder", type=Path, default=Path("output/adaptive"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/adaptive.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results/adaptive.md")
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    arms = [(average, way) for average in args.averages for way in WAYS]
    plans = {(*arm, seed): plan(args, *arm, seed) for seed in args.seeds for arm in arms}
    first, *others = plans.values()
    train([first], args.folder)  # fills the cache for the others
    train(others, args.folder, args.jobs)
    found = {
        f"{way} {average}": [
            measured(args.folder, plans[average, way, seed].name, seed, args.steps) for seed in args.seeds
        ]
        for average, way in arms
    }
    setting = {"config": CONFIG, "steps": args.steps, "pictures": args.pictures, "set": args.set}
    found = with_other_seeds(found, args.out, setting)
    labels = [f"{way} {average}" for average in LIMITS for way in WAYS]
    found = {label: found[label] for label in labels if label in found}  # those of the file in their places too
    write_run_card(args.out, {**setting, "results": found, **provenance()})
    draw(found, args.page.resolve().parent.parent / PICTURE)
    put_between(args.page, [table(found, args.folder), f"![Tokens by things, and counts told](../{PICTURE})"])


if __name__ == "__main__":
    main()
