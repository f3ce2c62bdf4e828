"""A training step in bf16 and fp16 against float32: its loss, its gradients by part, and which tokens are merged.

    python -m benchmarks.speed.numerics --scale opt-2.7b --batch 16       # on a GPU; also vicuna-7b
    python -m benchmarks.speed.numerics --scale quickstart --batch 4

One set of random weights, drawn in float32 and rounded for the others as in a run: frozen parts and autocast in that
precision, what trains in float32. Without dropout. A gradient's difference is the norm of the difference over the norm
in float32. Pairs: of all pairs of visual tokens that either precision merges into one, the share that both do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common.random_models import Scale, add_step_arguments, build, samples, scales
from benchmarks.common.timing import parser, write
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.nn import MergeMap
from lavis_evlgen.runners.optim import adamw
from lavis_evlgen.runners.step import TrainingStep


class Pass(NamedTuple):
    """Loss, {part: gradient in float32, flat}, and which merged token each visual token (B, L) went to."""

    loss: float
    gradients: dict[str, Tensor]
    source: MergeMap


def passed(model: EVLGen, precision: str, batch: dict, device: torch.device) -> Pass:
    """Forward and backward as a run with `run.amp` = precision."""
    step = TrainingStep(model.eval(), adamw(model, 1e-5, 0.05, 0.999), device, {"amp": precision})
    loss = step.forward(model, batch)["loss"]
    step.scaler.scale(loss).backward()
    step.scaler.unscale_(step.optimizer)
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(model.part_of(name), []).append(parameter.grad.float().flatten())
    step.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad(), step.autocast():
        visual = model.ln_vision(model.visual_encoder(step.prepared(batch)["image"]))
        source = model.connector(visual, return_source=True).source
    return Pass(loss.item(), {part: torch.cat(gradients) for part, gradients in parts.items()}, source)


def pairs_that_agree(one: MergeMap, other: MergeMap) -> float:
    """Of the pairs of tokens that either map sends to one slot, the share that both do; 1 where nothing merges."""
    both = either = 0
    for ours, theirs in zip(one.slot, other.slot, strict=True):  # (L,) of one picture
        first, second = ((slot[:, None] == slot).triu(1) for slot in (ours, theirs))  # (L, L)
        both += int((first & second).sum())
        either += int((first | second).sum())
    return both / either if either else 1.0


def difference(exact: Pass, other: Pass, precision: str) -> dict:
    """The row of one precision."""
    gradients = {
        part: ((other.gradients[part] - gradient).norm() / gradient.norm()).item()
        for part, gradient in exact.gradients.items()
    }
    return {
        "dtype": precision, "loss": other.loss, "loss_fp32": exact.loss,
        "loss_difference": abs(other.loss / exact.loss - 1), "gradient_differences": gradients,
        "pairs_that_agree": pairs_that_agree(exact.source, other.source),
    }  # fmt: skip


def measure(scale: Scale, args) -> list[dict]:
    device = torch.device(args.device)
    batch, model = samples(scale, args.batch, device), build(scale, "fp32", device)
    exact, weights = passed(model, "fp32", batch, device), model.state_dict()
    rows = []
    for precision in ("bf16", "fp16"):
        rounded = build(scale, precision, device)
        rounded.load_state_dict(weights)
        rows.append(difference(exact, passed(rounded, precision, batch, device), precision))
        print(rows[-1], flush=True)
        del rounded
    return rows


def main():
    args_of = parser(__doc__, repetitions=1, seconds=0)
    add_step_arguments(args_of, dtype=False)
    args = args_of.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # else the patch embedding's float32 is rounded to 10 bits
    write(f"numerics-{args.scale}", args, measure(scales()[args.scale], args))


if __name__ == "__main__":
    main()
