"""EVLGen-Video in miniature, on drawn clips whose captions only the order of frames tells: each way to mix frames.

    bash run_scripts/video_miniature.sh                # this script with its defaults
    python -m benchmarks.experiments.video_scenes --steps 80 --seeds 42 1 2 --jobs 2

For each seed an image model is trained on drawn scenes (the quickstart, twice the steps); every way to mix frames
starts from it, on the same clips in the same order. SCST goes on from the way that SCST_FROM names. Nothing is chosen
among checkpoints: the last weights are tested. A run that was cut off goes on, a finished one is not run
again, and the results of other seeds that the file has of the same setting stay in it.
Writes benchmarks/results/video_scenes.json, docs/images/video_miniature.png and the tables in
docs/results/video.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common.training_runs import (
    ROOT,
    Run,
    last_card,
    run_folder,
    scores,
    train,
    training_seconds,
    with_other_seeds,
)
from benchmarks.common.video_tables import PAGE, write_page
from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card

IMAGE, VIDEO = "projects/evlgen/quickstart.yaml", "projects/evlgen_video/moving_scenes.yaml"


def mixing(temporal: bool, frame_pooling: str = "mean", residual: str = "gated", positions: bool = False) -> list[str]:
    """The options of one way to mix frames; all four keys, whatever the config has."""
    settings = {"temporal": temporal, "frame_pooling": frame_pooling, "residual": residual}
    settings["temporal_positions"] = positions
    return [f"model.{key}={str(value).lower()}" for key, value in settings.items()]


# of all runs: a quarter of the pixels, and the connector as released
SMALL = ["model.image_size=112", "model.skip=none", "run.max_len=12", "run.valid_splits=[]"]
START = 2  # times as many steps has the image model
SCST_FROM = "convex, with positions"
WAYS = {
    "concat": mixing(False, "concat"),
    "mean of prompts": mixing(False, "connector_mean"),
    "image model": mixing(False),
    "gated": mixing(True),
    "convex": mixing(True, residual="convex"),
    SCST_FROM: mixing(True, residual="convex", positions=True),
    "temporal Q-Former": mixing(False, "temporal_qformer"),
    "temporal queries": mixing(False, "temporal_queries"),
}
SCST = f"{SCST_FROM}, + SCST"
# a tenth of the rate
REWARDED = ["run.task=scst", "run.baseline=leave_one_out", "run.num_samples=4", "run.init_lr=2.5e-4",
            "run.min_lr=2.5e-5", "run.warmup_lr=1e-6"]  # fmt: skip


class VideoScenes:
    """All runs of one comparison, in one folder."""

    def __init__(self, args):
        self.args, self.folder = args, args.folder.absolute()

    def _plan(self, config: str, name: str, steps: int, seed: int, options: list[str]) -> Run:
        train_clips, test_clips = self.args.clips
        data = "scenes" if config == IMAGE else "moving_scenes"
        sizes = f"{{train: {train_clips}, test: {test_clips}}}"
        options = [*SMALL, *options, f"datasets.{data}.sizes={sizes}", f"run.max_iters={steps}", f"run.seed={seed}"]
        return Run(config, name, [*options, f"run.iters_per_inner_epoch={steps}", *self.args.set])

    def _name(self, label: str, seed: int) -> str:
        return f"{label.lower().replace(',', '').replace('+ ', '').replace(' ', '_')}_{self.args.steps}_seed{seed}"

    def _weights(self, label: str, seed: int) -> str:
        return f"model.pretrained={run_folder(self.folder, self._name(label, seed)) / 'checkpoint_last.pth'}"

    def start(self, seed: int) -> Run:
        """The image model that a seed's runs start from."""
        return self._plan(IMAGE, self._name("start", seed), START * self.args.steps, seed, [])

    def steps(self, label: str) -> int:
        return -(-self.args.steps // 2) if label == SCST else self.args.steps

    def way(self, label: str, seed: int) -> Run:
        """One way to mix frames, or SCST after one."""
        options = [*WAYS[SCST_FROM], *REWARDED] if label == SCST else WAYS[label]
        weights = self._weights(SCST_FROM if label == SCST else "start", seed)
        return self._plan(VIDEO, self._name(label, seed), self.steps(label), seed, [*options, weights])

    def measured(self, label: str, seed: int) -> dict:
        """What a run scores on the test clips, and what it cost."""
        name, steps = self._name(label, seed), self.steps(label)
        card = last_card(self.folder, name, "test")
        metrics = card["metrics"]
        return {
            "name": name, "seed": seed, "steps": steps, **scores(card), "clips": metrics["order_asked"],
            **{key: value for key, value in metrics.items() if key.startswith("order_accuracy")},
            "trains": card["model"]["trainable_parameters"], "seconds": training_seconds(self.folder, name, steps),
            "commit": card["commit"].get("sha"),
        }  # fmt: skip

    def compare(self) -> dict[str, list[dict]]:
        """label -> what its run of every seed found."""
        args = self.args
        labels = [*args.ways, *([SCST] if SCST_FROM in args.ways else [])]
        train([self.start(seed) for seed in args.seeds], self.folder, args.jobs)
        train([self.way(label, seed) for seed in args.seeds for label in args.ways], self.folder, args.jobs)
        if SCST in labels:
            train([self.way(SCST, seed) for seed in args.seeds], self.folder, args.jobs)
        return {label: [self.measured(label, seed) for seed in args.seeds] for label in labels}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of each run; SCST: half of them (80)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="to mix frames (all)")
    parser.add_argument("--clips", type=int, nargs=2, default=[4000, 100], metavar=("TRAIN", "TEST"), help="both even")
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other (2); 1 on a GPU")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config keys of all runs")
    parser.add_argument("--folder", type=Path, default=Path("output/video_miniature"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/video_scenes.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that has the two marks")
    args = parser.parse_args()
    found = VideoScenes(args).compare()
    setting = {key: getattr(args, key) for key in ("steps", "clips", "set")} | {"options": WAYS}
    found = with_other_seeds(found, args.out, setting)
    found = {label: found[label] for label in (*WAYS, SCST) if label in found}
    seeds = sorted({run["seed"] for runs in found.values() for run in runs})
    write_run_card(args.out, {**setting, "seeds": seeds, "jobs": args.jobs, "results": found, **provenance()})
    write_page(found, args.page)


if __name__ == "__main__":
    main()
