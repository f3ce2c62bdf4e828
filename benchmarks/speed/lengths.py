"""Captions of every length under torch.compile: padded to few shapes, against one compilation for any length.

    python -m benchmarks.speed.lengths --scale opt-2.7b --batch 64          # on a GPU; also vicuna-7b
    OMP_NUM_THREADS=1 python -m benchmarks.speed.lengths --scale quickstart --batch 4

Random weights of the given sizes, nothing is downloaded. A pass is one training step with captions of each of --tokens
tokens. Either way of compiling the language model runs in turn with the same steps not compiled; its first pass, which
compiles, is timed by itself.
"""

from __future__ import annotations

import itertools
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.random_models import add_step_arguments, build, samples, scales
from benchmarks.common.timing import alternate, parser, write
from lavis_evlgen.models.compile import LENGTHS, compile_parts, eager, stack_of
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.runners.optim import adamw
from lavis_evlgen.runners.step import TrainingStep

PADDED, ANY = f"padded to multiples of {LENGTHS}", "one compilation for any length"


def compile_as(model: EVLGen, way: str):
    """Have the language model's blocks compiled when they are next called, and forget what was compiled before."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    if way == PADDED:
        compile_parts(model, ["llm"])
    else:
        for region in stack_of(model.language_model):
            region.compile(dynamic=True)


def steps_of(model: EVLGen, step: TrainingStep, batches: list[dict], multiple: int, compiled: bool):
    """One pass: a step of each batch, sequences padded to `multiple`."""

    def run():
        model.language_model.length_multiple = multiple
        for batch in batches:
            step(itertools.repeat(batch))

    return run if compiled else eager()(run)


def operations(model: EVLGen, step: TrainingStep, batches: list[dict], multiple: int) -> int:
    """FLOPs of a pass."""
    with FlopCounterMode(display=False) as counter:
        steps_of(model, step, batches, multiple, compiled=False)()
    return counter.get_total_flops()


def losses(model: EVLGen, step: TrainingStep, batches: list[dict], multiple: int, compiled: bool) -> list[float]:
    """Of each batch, without dropout."""
    model.language_model.length_multiple = multiple
    model.connector.eval()  # the rest stays as in training, where sequences are padded; nothing else has dropout

    @torch.no_grad()
    def run():
        with step.autocast():
            return [model(step.prepared(batch))["loss"].item() for batch in batches]

    found = (run if compiled else eager()(run))()
    model.connector.train()
    return found


def measure(model: EVLGen, step: TrainingStep, batches: list[dict], way: str, args) -> dict:
    """The row of one way to compile."""
    compile_as(model, way)
    sizes = {"not compiled": 1, "compiled": model.language_model.length_multiple if way == PADDED else 1}
    calls = {name: steps_of(model, step, batches, size, name == "compiled") for name, size in sizes.items()}
    started = time.perf_counter()
    calls["compiled"]()
    first, graphs = time.perf_counter() - started, torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seconds = alternate(calls, step.device, args.repetitions, args.seconds)
    row = {"way": way, "seconds": seconds, "first_pass_seconds": first, "graphs": graphs}
    row |= {"scale": args.scale, "batch": args.batch, "dtype": args.dtype, "steps": len(batches)}
    row["flops"] = {name: operations(model, step, batches, size) for name, size in sizes.items()}
    pairs = zip(*(losses(model, step, batches, size, name == "compiled") for name, size in sizes.items()), strict=True)
    row["loss_difference"] = max(abs(ours / plain - 1) for plain, ours in pairs)
    print(way, {name: f"{1e3 * each['median'] / len(batches):.0f} ms a step" for name, each in seconds.items()},
          f"first pass {first:.0f} s, {graphs} compilations", flush=True)  # fmt: skip
    return row


def main():
    on_gpu = torch.cuda.is_available()
    args_of = parser(__doc__, repetitions=9 if on_gpu else 3, seconds=300)
    add_step_arguments(args_of)
    args_of.add_argument("--tokens", type=int, nargs=2, default=[13, 20], metavar=("LEAST", "MOST"),
                         help="of captions (13 20)")  # fmt: skip
    args = args_of.parse_args()
    device, scale = torch.device(args.device), scales()[args.scale]
    model = build(scale, args.dtype, device)
    step = TrainingStep(model, adamw(model, 1e-5, 0.05, 0.999), device, {"amp": args.dtype})
    least, most = args.tokens
    batches = [samples(scale, args.batch, device, tokens=tokens) for tokens in range(least, most + 1)]
    write(f"lengths-{args.scale}", args, [measure(model, step, batches, way, args) for way in (PADDED, ANY)])


if __name__ == "__main__":
    main()
