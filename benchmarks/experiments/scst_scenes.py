"""What SCST adds to a captioner of drawn scenes, beside as many more steps of cross-entropy.

    python -m benchmarks.experiments.scst_scenes
    python -m benchmarks.experiments.scst_scenes --start 120 --steps 100 --seeds 42 1 2 --jobs 2

One captioner is trained (the quickstart, `--start` steps, left while its rate is still half the highest: after the last
small steps it would say nearly the same words in every draw); from its weights, each seed trains SCST with either
baseline, and cross-entropy for the same steps at the same rates. A run that was cut off goes on, a finished one is not
run again. Nothing is chosen among checkpoints: the last weights are scored, by their greedy captions of test pictures.
Writes benchmarks/results/scst_scenes.json, docs/images/scst_scenes.png and the tables in docs/scst.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.common.result_pages import put_between, spread
from benchmarks.common.training_runs import (
    ROOT,
    Run,
    last_card,
    log_of,
    run_folder,
    scores,
    train,
    training_seconds,
)
from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card
from lavis_evlgen.reporting.tables import markdown
from lavis_evlgen.tools.compare import duration

CONFIG, QUICKSTART = "projects/evlgen/scst_quickstart.yaml", "projects/evlgen/quickstart.yaml"
PAGE, PICTURE = ROOT / "docs/scst.md", "images/scst_scenes.png"
START = "the captioner"
# keys of the scst task mean nothing to evlgen_captioning, and are refused: its arm is the quickstart at SCST's rates
START_RATES = ["run.min_lr=2.5e-3"]
RATES = ["run.init_lr=5e-4", "run.min_lr=5e-5", "run.warmup_lr=1e-6", "run.warmup_steps=10"]
SMALL = ["model.image_size=112", "run.max_len=12", "run.num_beams=1", "run.valid_splits=[]"]  # of all runs
ARMS = {
    "cross-entropy": (QUICKSTART, RATES),
    "SCST, greedy": (CONFIG, ["run.baseline=greedy", "run.num_samples=1"]),
    "SCST, leave one out of 4": (CONFIG, ["run.baseline=leave_one_out", "run.num_samples=4"]),
}


class ScstScenes:
    """All runs of one comparison, in one folder."""

    def __init__(self, args):
        self.args, self.folder = args, args.folder.absolute()
        self.start = self._plan(QUICKSTART, f"start_{args.start}", args.start, START_RATES)

    def _plan(self, config: str, name: str, steps: int, options: list[str]) -> Run:
        options = [*SMALL, *options, f"run.max_iters={steps}", f"run.iters_per_inner_epoch={steps}"]
        options.append(f"datasets.scenes.sizes={{train: 4000, test: {self.args.pictures}}}")
        return Run(config, name, [*options, *self.args.set])

    def arm(self, label: str, seed: int) -> Run:
        """One arm with one seed, from the captioner's weights."""
        config, options = ARMS[label]
        name = f"{label.lower().replace(',', '').replace(' ', '_')}_{self.args.start}_{self.args.steps}_seed{seed}"
        checkpoint = run_folder(self.folder, self.start.name) / "checkpoint_last.pth"
        options = [*options, f"run.seed={seed}", f"model.pretrained={checkpoint}"]
        return self._plan(config, name, self.args.steps, options)

    def measured(self, run: Run, steps: int) -> dict:
        """Scores and mean words of the test captions after the last step, and what the run cost."""
        card = last_card(self.folder, run.name, "test")
        result = run_folder(self.folder, run.name) / "result" / f"test_{steps}.json"
        words = statistics.mean(len(row["caption"].split()) for row in json.loads(result.read_text())["rows"])
        cost = {"steps": steps, "seconds": training_seconds(self.folder, run.name, steps)}
        return {"name": run.name, **scores(card), "words": words, **cost}

    def windows(self, run: Run) -> list[dict]:
        """Reward, entropy and length of a run's log windows; [] without SCST."""
        shown = ("step", "reward", "reward_greedy", "entropy", "length")
        windows = [{key: row[key] for key in shown if key in row} for row in log_of(self.folder, run.name)]
        return windows if "reward" in windows[0] else []

    def compare(self) -> dict[str, list[dict]]:
        """label -> what its run of every seed found; the start first."""
        args = self.args
        arms = {label: [self.arm(label, seed) for seed in args.seeds] for label in args.arms}
        train([self.start], self.folder)
        train([run for runs in arms.values() for run in runs], self.folder, args.jobs)
        found = {START: [self.measured(self.start, args.start)]}
        for label, runs in arms.items():
            found[label] = [
                {"seed": seed, **self.measured(run, args.steps), "windows": self.windows(run)}
                for seed, run in zip(args.seeds, runs, strict=True)
            ]
        return found


def table(found: dict[str, list[dict]]) -> str:
    """Mean over seeds, least and most."""
    columns = {"CIDEr": "cider", "blind CIDEr": "blind_cider", "words a caption": "words", "loss, right": "loss_right",
               "loss, shuffled": "loss_shuffled"}  # fmt: skip
    rows = []
    for label, runs in found.items():
        times = duration(statistics.median(run["seconds"] for run in runs))
        values = [spread([run[key] for run in runs]) if len(runs) > 1 else f"{runs[0][key]:.3f}"
                  for key in columns.values()]  # fmt: skip
        rows.append((label, *values, str(runs[0]["steps"]), times))
    return markdown(("weights", *columns, "steps", "training"), rows)


def draw(found: dict[str, list[dict]], path: Path):
    """CIDEr, a dot a seed; and reward, entropy and length of drawn captions over the steps, a line a seed."""
    figure = Figure(figsize=(12, 3.2), dpi=100, layout="constrained")
    first, *panels = figure.subplots(1, 4, width_ratios=[1.6, 1, 1, 1])
    for row, runs in enumerate(found.values()):
        first.plot([run["cider"] for run in runs], [row] * len(runs), "o", color="#2563a8", markersize=5, alpha=0.7)
    first.set_yticks(range(len(found)), list(found))
    first.invert_yaxis()
    first.set_xlabel("CIDEr (1.0 = 100 in papers)")
    colours = dict(zip(ARMS, ("#8a8f98", "#b4531f", "#2563a8"), strict=True))
    for panel, key in zip(panels, ("reward", "entropy", "length"), strict=True):
        for label, runs in found.items():
            for run in (run for run in runs if run.get("windows")):
                steps, values = zip(*((row["step"], row[key]) for row in run["windows"]), strict=True)
                panel.plot(steps, values, color=colours[label], label=label if run is runs[0] else None, alpha=0.8)
        panel.set_xlabel("step")
        panel.set_title({"length": "words of a drawn caption"}.get(key, key), fontsize=10)
        panel.set_ylim(bottom=0)
    if panels[0].lines:
        panels[0].legend(frameon=False, fontsize=8)
    for panel in (first, *panels):
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=int, default=120, help="steps of the captioner that all start from (120)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run after it (100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what to compare (all)")
    parser.add_argument("--pictures", type=int, default=400, help="test pictures (400)")
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other (2); 1 on a GPU")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config keys of all runs")
    parser.add_argument("--folder", type=Path, default=Path("output/scst_scenes"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/scst_scenes.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that has the two marks")
    args = parser.parse_args()
    found = ScstScenes(args).compare()
    setting = {key: getattr(args, key) for key in ("start", "steps", "seeds", "pictures", "jobs", "set")}
    write_run_card(args.out, {**setting, "options": ARMS, "results": found, **provenance()})
    draw(found, args.page.resolve().parent / PICTURE)
    picture = f"![CIDEr, and reward, entropy and length over the steps]({PICTURE})"
    put_between(args.page, [table(found), picture])


if __name__ == "__main__":
    main()
