"""The comparison of connectors (benchmarks/experiments/miniature.py) with fifty times the steps' pictures of the CPU's.

    python -m benchmarks.gpu.miniature --out benchmarks/results/miniature-nvidia-h200.json

One seed, with the settings that the short runs on the CPU chose (benchmarks/results/miniature.json). Photos and weights
are those of benchmarks/gpu_pack.sh. First a short run of the cheapest and of the costliest connector beside each other
says how many steps fit into --seconds; all then make the same number, at most what fifty times the CPU's pictures are.
A run that was cut off goes on when called again, with the number of steps found then.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from pathlib import Path

from PIL import Image

from benchmarks.common.miniature_tables import costs_table, scores_table
from benchmarks.common.training_runs import ROOT, Run, log_of, train
from benchmarks.experiments.miniature import CONNECTORS, SAME, Miniature, Setting
from lavis_evlgen.errors import UserError
from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card

ON_CPU = ROOT / "benchmarks/results/miniature.json"
BATCH_ON_CPU, TIMES = 8, 50
TIMED = ("TomeFormer, one stage", "linear")  # a run like most, and the costliest
TIMING_STEPS, LEAST_STEPS = 40, 20
SPARE = 0.85  # of the time that is left is planned with
BESIDE = 2  # a full run starts once and evaluates three times, a timed one once: at most twice its time beside steps


def photos(folder: Path) -> tuple[Path, Path, int]:
    """(folder of the photos, file of their captions, how many there are). Raises UserError where they are not."""
    images, captions = folder / "photos", folder / "captions.csv"
    if not images.is_dir() or not captions.exists():
        raise UserError(f"{images} and {captions} are not here: benchmarks/gpu_pack.sh --photos packs them, "
                        "benchmarks/gpu_setup.sh unpacks them")  # fmt: skip
    with open(captions, newline="") as file:
        return images, captions, len({row["image"] for row in csv.DictReader(file)})


def rehearse(args):
    """Two steps of two drawn pictures for every run, in a folder beside the results."""
    args.folder = args.out.absolute().parent / "gpu-miniature"
    args.parts = args.folder / "parts"
    args.steps = args.timing_steps = args.batch = args.jobs = 2
    args.workers = 1
    images = args.parts / "photos"
    images.mkdir(parents=True, exist_ok=True)
    with open(args.parts / "captions.csv", "w") as file:
        file.write("image,caption\n")
        for n in range(12):
            Image.new("RGB", (64, 64), (20 * n, 120, 255 - 20 * n)).save(images / f"{n:02}.jpg")
            file.write(f"{n:02}.jpg,picture number {n}\n")


def options_of(args, count: int) -> list[str]:
    """--options of every run: the batch, and an evaluation on as much as there is time for."""
    held_out = max(2, min(200, count // 8))
    split = {"train": count - 2 * held_out, "val": held_out, "test": held_out}
    options = [f"datasets.image_captions.split.{name}={size}" for name, size in split.items()]
    run = {"batch_size_train": args.batch, "batch_size_eval": args.batch, "num_workers": args.workers}
    return options + [f"run.{key}={value}" for key, value in run.items()] + args.options


def chosen_on_cpu() -> dict[str, Setting]:
    """label -> the setting that did best in the short runs on the CPU."""
    found = json.loads(ON_CPU.read_text())["results"]
    return {label: Setting(*(found[label]["setting"][key] for key in Setting._fields)) for label in CONNECTORS}


class Timed:
    """How long runs take when `jobs` of them share the device."""

    def __init__(self, comparison: Miniature, steps: int):
        self.comparison, self.steps = comparison, steps

    def runs(self) -> list[Run]:
        """`jobs` runs, of which one is the costliest."""
        common, costly = TIMED
        labels = [costly, *[common] * (self.comparison.args.jobs - 1)]
        return [self._run(label, seed) for seed, label in enumerate(labels)]

    def _run(self, label: str, seed: int) -> Run:
        options = [f"run.iters_per_inner_epoch={self.steps}", "run.log_freq=5", "run.test_splits=[]"]
        run = self.comparison.plan(label, self.comparison.chosen[label], seed, self.steps, options).run
        return run._replace(name=f"timing_{run.name}")

    def measure(self) -> dict[str, float]:
        """Seconds of a step of either kind, and of all that a run does beside its steps."""
        started = time.monotonic()
        runs = self.runs()
        train(runs, self.comparison.folder, self.comparison.args.jobs)
        wall = time.monotonic() - started
        costly, common = (self._step(run.name) for run in (runs[0], runs[-1]))
        return {"costly": costly, "common": common, "beside": max(0.0, wall - self.steps * costly)}

    def _step(self, name: str) -> float:
        """The median window: the first one has what is done once."""
        windows = sorted(row["seconds_per_step"] for row in log_of(self.comparison.folder, name))
        return windows[len(windows) // 2]


def steps_that_fit(timed: dict[str, float], seconds: float, jobs: int, most: int) -> int:
    """Steps for every run, so that all end in `seconds`; two stages together cost what a common run does."""
    runs = len(CONNECTORS) + 1  # and stage 1
    of_steps = seconds * SPARE - math.ceil(runs / jobs) * BESIDE * timed["beside"]
    one_step = ((len(CONNECTORS) - 1) * timed["common"] + timed["costly"]) / jobs
    return min(most, int(of_steps / one_step))


def plan_steps(comparison: Miniature, args, started: float) -> dict:
    """{"steps", and what they follow from}: of an earlier call where there was one, for runs that go on."""
    file = comparison.folder / "steps.json"
    if file.exists():
        return json.loads(file.read_text())
    timed = Timed(comparison, args.timing_steps).measure()
    most = TIMES * json.loads(ON_CPU.read_text())["steps"] * BATCH_ON_CPU // args.batch
    left = args.seconds - (time.monotonic() - started)
    steps = args.steps or steps_that_fit(timed, left, args.jobs, most)
    found = {"steps": steps, "timed": timed, "fifty_times": most, "share_of_fifty_times": steps / most}
    print(f"{steps} steps of {args.batch} pictures, {steps / most:.0%} of fifty times the CPU's: {timed}", flush=True)
    if steps < LEAST_STEPS and not args.steps:
        raise UserError(f"--seconds {args.seconds:g}: only {steps} steps fit, {LEAST_STEPS} is the least; give it more")
    write_run_card(file, found)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, default=ROOT / "build/gpu", help="where photos and captions.csv are")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step (64)")
    parser.add_argument("--workers", type=int, default=4, help="data processes of a run (4)")
    parser.add_argument("--jobs", type=int, default=3, help="runs beside each other on the device (3)")
    parser.add_argument("--seconds", type=float, default=540, help="for all (540)")
    parser.add_argument("--steps", type=int, help="instead of as many as fit")
    parser.add_argument("--timing-steps", type=int, default=TIMING_STEPS, help=f"of the runs timed ({TIMING_STEPS})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--folder", type=Path, default=ROOT / "output/gpu-miniature", help="where the runs go")
    parser.add_argument("--out", type=Path, required=True, help="results file")
    parser.add_argument("--options", nargs="+", default=[], help="KEY=VALUE of every run")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on drawn pictures")
    args = parser.parse_args()
    if args.tiny:
        rehearse(args)
    started = time.monotonic()
    args.options.append(f"run.device={args.device}")
    args.images, args.captions, count = photos(args.parts)
    comparison = Miniature(args, options_of(args, count), chosen_on_cpu())
    plan = plan_steps(comparison, args, started)
    args.steps = plan["steps"]
    found = comparison.compare()
    setting = {"batch": args.batch, "seeds": args.seeds, "photos": count, "jobs": args.jobs, "options": SAME, **plan}
    print(f"-> {write_run_card(args.out, {**setting, 'results': found, **provenance()})}")
    print(scores_table(found), costs_table(found), sep="\n\n")


if __name__ == "__main__":
    main()
