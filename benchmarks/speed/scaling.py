"""A training step against the size of the batch, the length of captions, what merging leaves, and frames.

    python -m benchmarks.speed.scaling                      # on a GPU opt-2.7b; on a CPU quickstart
    python -m benchmarks.speed.scaling --axes tokens_left frames

One of them changes at a time, the others stay (batch --batch, captions of 12 tokens, 29 tokens left, pictures). For
each value: the time of a step, of one picture, the FLOPs a second that come of it, and what the step holds in memory
beside weights and AdamW's moments: counted without numbers as by `evlgen estimate`, and on a GPU measured. Random
weights, nothing is downloaded.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable

import torch

from benchmarks.common.random_models import build, samples, scales
from benchmarks.common.timing import alternate, parser, write
from benchmarks.speed.step import peak_gb
from lavis_evlgen.models.precision import AMP
from lavis_evlgen.runners.cost import flops_per_image
from lavis_evlgen.runners.optim import adamw
from lavis_evlgen.runners.step import TrainingStep
from lavis_evlgen.tools.cost.step_memory import step_memory

TEXT = 12  # tokens of a caption where its length is not what changes


@dataclasses.dataclass(frozen=True)
class Point:
    """One step that is timed."""

    axis: str
    value: int
    batch: int
    text: int = TEXT
    left: int | None = None  # tokens that merging leaves; None: the scale's own
    frames: int | None = None


def points(axis: str, batch: int, visual: int, least: int) -> list[Point]:
    """The values of one axis; visual: the ViT's tokens; least: the fewest that the connector's layers can leave."""
    if axis == "batch":
        return [Point(axis, n, n) for n in sorted({1, 2, 4, 8, batch, 2 * batch, 4 * batch})]
    if axis == "text":
        return [Point(axis, n, batch, text=n) for n in (4, 8, 16, 28)]
    if axis == "tokens_left":
        left = sorted({max(least, visual // part) for part in (16, 9, 4, 2, 1)})
        return [Point(axis, n, batch, left=n) for n in left]
    fewer = max(1, batch // 4)
    return [Point(axis, n, fewer, frames=n) for n in (1, 4, 8, 16)]


AXES = ("batch", "text", "tokens_left", "frames")


class Models:
    """The models of one axis: points that differ in their batch only share one."""

    def __init__(self, args):
        self.args, self.device, self.scale, self.made = args, torch.device(args.device), scales()[args.scale], {}

    def step(self, point: Point) -> TrainingStep:
        key = (point.left, point.frames)
        if key not in self.made:
            scale = self.scale
            if point.left is not None:
                scale = dataclasses.replace(scale, connector={**scale.connector, "tome_r": {"target": point.left}})
            model = build(scale, self.args.dtype, self.device, frames=point.frames)
            optimizer = adamw(model, 1e-5, 0.05, 0.999)
            self.made[key] = TrainingStep(model, optimizer, self.device, {"amp": self.args.dtype})
        return self.made[key]

    def row(self, point: Point) -> tuple[Callable, dict]:
        """(call of one step, what is known of it before it is timed)."""
        step = self.step(point)
        batch = samples(self.scale, point.batch, self.device, tokens=point.text, frames=point.frames)
        text = point.text + 2  # BOS and end
        empty = copy.deepcopy(step.model).to("meta")
        counted = step_memory(empty, tuple(batch["image"].shape), text, AMP[self.args.dtype]).working / 1e9
        flops, batches = flops_per_image(step, batch), itertools.repeat(batch)
        call = lambda: step(batches)  # noqa: E731
        call()  # AdamW's moments are there
        held = torch.cuda.memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else 0.0
        peak = peak_gb(self.device, call)
        measured = None if peak is None else peak - held
        print(f"{point.axis} {point.value}: {flops / 1e9:.1f} GFLOPs each, {counted:.2f} GB", flush=True)
        return call, {**dataclasses.asdict(point), "flops": flops, "working_gb": counted, "measured_gb": measured}


def measure(axis: str, args) -> list[dict]:
    """Rows of one axis, whose steps run in turn."""
    models = Models(args)
    vit = models.scale.vit
    visual = (models.scale.image_size // (vit.patch_size if vit else 14)) ** 2 + 1
    least = 2 + visual // 2 ** models.scale.connector.get("num_layers", 12)  # a layer merges at most half
    found = {point.value: models.row(point) for point in points(axis, args.batch, visual, least)}
    calls = {value: call for value, (call, _) in found.items()}
    times = alternate(calls, models.device, args.repetitions, args.seconds)
    return [{**row, "seconds": times[value]} for value, (_, row) in found.items()]


def main():
    on_gpu = torch.cuda.is_available()
    args_of = parser(__doc__, repetitions=20 if on_gpu else 3, seconds=60)
    args_of.add_argument("--scale", choices=scales(), default="opt-2.7b" if on_gpu else "quickstart")
    args_of.add_argument("--batch", type=int, default=64 if on_gpu else 4, help="pictures (GPU 64, CPU 4)")
    args_of.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="autocast, frozen parts")
    args_of.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    args = args_of.parse_args()
    rows = [row for axis in args.axes for row in measure(axis, args)]
    write(f"scaling-{args.scale}", args, rows)


if __name__ == "__main__":
    main()
