"""One training step: where its time goes, and what each way of not paying for frozen parts saves.

    python -m benchmarks.speed.step --scale opt-2.7b --batch 64          # on a GPU; also vicuna-7b
    python -m benchmarks.speed.step --scale quickstart --batch 8 --dtype fp32

Random weights of the given sizes, nothing is downloaded. Measured are the whole step of the runner (images/s, memory,
MFU), its phases, and the step with one saving undone at a time, in turn: --full-logits (the head on every position),
--vit-grad and --llm-grad (gradients of weights that are frozen), --eager-attention, --dense-mask (of the padding),
--everything; and with --grad-checkpoint switched on. Without any of these flags all are tried; --only-whole tries none.
--fp32-frozen changes the whole run. --compile PART ... has the step under torch.compile and undoes that alone. The head
and the loss are also measured alone.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.random_models import add_step_arguments, build, samples, scales
from benchmarks.common.timing import alternate, held_gb, parser, spread, write
from benchmarks.speed.savings import COMPILED, TRADED, UNDONE, changed, full_logits_loss, loss_of
from lavis_evlgen.models.compile import PARTS as COMPILABLE_PARTS
from lavis_evlgen.models.compile import compile_parts, eager
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.nn.losses import IGNORE, prefix_lm_loss
from lavis_evlgen.runners.cost import flops_per_image
from lavis_evlgen.runners.optim import adamw
from lavis_evlgen.runners.step import TrainingStep
from lavis_evlgen.tools.cost.hardware import HARDWARE


def peak_gb(device: torch.device, call: Callable) -> float | None:
    """Peak memory of one call in GB, weights included; None on a CPU, which does not say."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e9


def undone(model: EVLGen, name: str, call: Callable) -> Callable:
    """`call` with one saving undone."""

    def run():
        with changed(model, name):
            call()

    return run


def whole_steps(model: EVLGen, step: TrainingStep, batch: dict, names: list[str], args) -> dict:
    """{name: time, and memory in GB} of the runner's step as it is ("whole") and with each of `names` undone."""
    batches = itertools.repeat(batch)
    calls = {"whole": lambda: step(batches)}
    calls |= {name: undone(model, name, calls["whole"]) for name in names}
    memory = {}
    for name in list(calls):
        memory[name] = fits = _memory_or_nothing(step, calls[name], name)
        if fits == OUT_OF_MEMORY:
            del calls[name]
    return {"seconds": alternate(calls, step.device, args.repetitions, args.seconds), "memory_gb": memory}


def operations(model: EVLGen, step: TrainingStep, batch: dict, names: list[str]) -> dict[str, int]:
    """{name: FLOPs of forward and backward} of the step as it is ("whole") and with each of `names` undone."""
    found = {}
    for name in ("whole", *names):
        with changed(model, name), eager(), FlopCounterMode(display=False) as counter:
            with step.autocast():
                loss = model(step.prepared(batch))["loss"]
            loss.backward()
        step.optimizer.zero_grad(set_to_none=True)
        found[name] = counter.get_total_flops()
    return found


def loss_differences(model: EVLGen, step: TrainingStep, batch: dict, names: list[str]) -> dict[str, float]:
    """{name: how far the loss with each of `names` undone is from the step's own, as a share of it}."""
    losses = {}
    model.eval()  # without dropout
    with torch.no_grad(), step.autocast():
        for name in ("whole", *names):
            with changed(model, name):
                losses[name] = model(step.prepared(batch))["loss"].item()
    model.train()
    return {name: abs(losses[name] / losses["whole"] - 1) for name in names}


OUT_OF_MEMORY = "out of memory"


def _memory_or_nothing(step: TrainingStep, call: Callable, name: str) -> float | str:
    """GB: `peak_gb`, on a CPU `held_gb` beside weights and moments; OUT_OF_MEMORY for a step that does not fit."""
    if step.device.type != "cuda":
        moments = (value for state in step.optimizer.state.values() for value in state.values())
        there = (*step.model.parameters(), *step.model.buffers(), *moments)
        return held_gb(call, there)
    try:
        return peak_gb(step.device, call)
    except torch.cuda.OutOfMemoryError:
        if name == "whole":
            raise
    # here and not above: what the error still holds is free now
    step.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    print(f"{name}: {OUT_OF_MEMORY}", flush=True)
    return OUT_OF_MEMORY


class Laps:
    """Seconds between calls, by name; on a GPU by events that are read at the end."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []
        self("")

    def __call__(self, name: str):
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
        self.marks.append((name, mark))

    def read(self) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = {}
        for (_, before), (name, after) in itertools.pairwise(self.marks):
            seconds = before.elapsed_time(after) / 1000 if self.device.type == "cuda" else after - before
            found[name] = found.get(name, 0.0) + seconds
        return found


def in_phases(model: EVLGen, step: TrainingStep, batch: dict) -> dict[str, float]:
    """Seconds of each phase of one step, which computes the same gradients, cut where the graph is cut."""
    lap, batch = Laps(step.device), step.prepared(batch)
    texts, no_prompts = batch["text_input"], [""] * len(batch["text_input"])
    with step.autocast():
        visual = model.visual_encoder(batch["image"])
        lap("vision encoder")
        tokens = model.llm_proj(model.connector(model.ln_vision(visual), features=visual).tokens)  # (B, L', D_l)
        lap("connector, forward")
        prompt = tokens.detach().requires_grad_()
        with loss_of(lambda hidden, labels, head: (hidden, labels)):
            counts = batch.get("texts_per_image")
            hidden, labels = model.language_model.loss(prompt, texts, no_prompts, counts=counts)
        lap("language model, forward")
        last = hidden.detach().requires_grad_()
        sums, count = prefix_lm_loss(last, labels, model.language_model._head)
        loss = sums.sum() / count.sum()
    step.scaler.scale(loss).backward()
    lap("head and loss, both passes")
    hidden.backward(last.grad)
    lap("language model, backward")
    tokens.backward(prompt.grad)
    lap("connector, backward")
    step._update()
    lap("optimizer")
    return lap.read()


def phases(model: EVLGen, step: TrainingStep, batch: dict, args) -> dict[str, dict]:
    """{phase: spread of its seconds}; the page lists them in the order of a step."""
    in_phases(model, step, batch)
    found = [in_phases(model, step, batch) for _ in range(max(3, args.repetitions // 2))]
    return {name: spread([each[name] for each in found]) for name in found[0]}


def head_and_loss(model: EVLGen, step: TrainingStep, batch: dict, args) -> dict:
    """Head and loss alone, both passes: logits where there is a label, against all of them."""
    with torch.no_grad(), step.autocast(), loss_of(lambda hidden, labels, head: (hidden, labels)):
        prompt = model.visual_prompt(step.prepared(batch)["image"]).tokens
        texts = batch["text_input"]
        hidden, labels = model.language_model.loss(prompt, texts, [""] * len(texts))
    head = model.language_model._head

    def run(function):
        leaf = hidden.detach().requires_grad_()
        with step.autocast():
            sums, count = function(leaf, labels, head)
        (sums.sum() / count.sum()).backward()

    calls = {"supervised": lambda: run(prefix_lm_loss), "full": lambda: run(full_logits_loss)}
    there = [hidden, labels, *model.language_model.llm.parameters()]
    memory = {name: held_gb(call, there) for name, call in calls.items()}
    rows = {"supervised": int((labels != IGNORE).sum()), "full": labels.numel()}
    times = alternate(calls, step.device, args.repetitions, args.seconds)
    return {"seconds": times, "held_gb": memory, "rows_of_logits": rows}


@contextlib.contextmanager
def read_batches(args, scale) -> Iterator[Iterator[dict]]:
    """Batches that `args.workers` processes read from tar shards of 640 x 480 photographs."""
    from benchmarks.speed.data import photograph, write_shards
    from lavis_evlgen.datasets import ImageShards
    from lavis_evlgen.datasets.loading import train_loader
    from lavis_evlgen.datasets.shards.names import shard_names
    from lavis_evlgen.processors import EvlgenCaptionProcessor, EvlgenImageTrainProcessor

    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), [photograph(640, 480, n) for n in range(8)], max(1, 2 * args.workers))
        processor = EvlgenImageTrainProcessor(scale.image_size, mean="clip")
        dataset = ImageShards("shards", shard_names(shards), vis_processor=processor,
                              text_processor=EvlgenCaptionProcessor())  # fmt: skip
        on_gpu = args.device != "cpu"
        loader = train_loader([dataset], None, args.batch, 0, 0, 1, 0, num_workers=args.workers, pin_memory=on_gpu)
        yield iter(loader)


def with_data(step: TrainingStep, args, scale) -> dict[str, float]:
    """Seconds of a step, and of waiting in it, when pictures are read as in a run (wall clock, means)."""
    with read_batches(args, scale) as batches:
        for _ in range(3):
            step(batches)
        started, waited = time.perf_counter(), 0.0
        for _ in range(args.repetitions):
            waited += step(batches)[1]
        if step.device.type == "cuda":
            torch.cuda.synchronize(step.device)
        seconds = (time.perf_counter() - started) / args.repetitions
    return {"seconds": seconds, "waited": waited / args.repetitions, "workers": args.workers}


def mfu(flops: float, batch: int, seconds: float, device: torch.device) -> float | None:
    """Share of the GPU's peak that a step uses; None where the peak is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((kind.half for kind in HARDWARE.values() if kind.is_called(name)), None)
    return None if peak is None else flops * batch / seconds / peak


def measure(args) -> dict:
    """The row of one model."""
    device, scale = torch.device(args.device), scales()[args.scale]
    frozen = "fp32" if args.fp32_frozen else args.dtype
    model = build(scale, frozen, device)
    step = TrainingStep(model, adamw(model, 1e-5, 0.05, 0.999), device, {"amp": args.dtype})
    batch = samples(scale, args.batch, device)
    names = [] if args.only_whole else args.undo or list(COMPILED if args.compile else UNDONE | TRADED)
    flops = flops_per_image(step, batch)
    compile_parts(model, args.compile)
    step(itertools.repeat(batch))  # Adam's state is there before memory is measured
    row = {"scale": args.scale, "batch": args.batch, "dtype": args.dtype, "frozen": frozen, "compile": args.compile}
    row["flops"] = operations(model, step, batch, names)
    row["loss_differences"] = loss_differences(model, step, batch, names)
    row |= whole_steps(model, step, batch, names, args)
    seconds = row["seconds"]["whole"]["median"]
    row |= {"images_per_s": args.batch / seconds, "flops_per_image": flops}
    row["mfu"] = mfu(flops, args.batch, seconds, device)
    row["phases"] = phases(model, step, batch, args)
    row["head_and_loss"] = head_and_loss(model, step, batch, args)
    row["with_data"] = with_data(step, args, scale) if args.workers else None
    return row


def main():
    on_gpu = torch.cuda.is_available()
    args_of = parser(__doc__, repetitions=20 if on_gpu else 3, seconds=120)
    add_step_arguments(args_of)
    for name in UNDONE | TRADED:
        words = "this saving undone" if name in UNDONE else "this switched on"
        args_of.add_argument(f"--{name}", dest="undo", action="append_const", const=name, help=f"{words}, alone")
    args_of.add_argument("--only-whole", action="store_true", help="no saving undone")
    args_of.add_argument("--fp32-frozen", action="store_true", help="frozen parts in float32")
    args_of.add_argument("--compile", nargs="+", choices=COMPILABLE_PARTS, default=[],
                         help="these parts under torch.compile")  # fmt: skip
    args_of.add_argument("--workers", type=int, default=0, help="also step on data that so many processes read")
    args = args_of.parse_args()
    row = measure(args)
    print({name: f"{1e3 * time['median']:.1f} ms" for name, time in row["seconds"].items()}, row["memory_gb"])
    write(f"step-{args.scale}" + "-fp32" * args.fp32_frozen + "-compiled" * bool(args.compile), args, [row])


if __name__ == "__main__":
    main()
