"""Operations counted while code runs on tensors that have a shape and no numbers, and what they make of a cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lavis_evlgen.tools.cost.meta_models import NothingIsPadded, without_weights

# products of activations with weights; whatever else is counted multiplies activations with each other
_aten = torch.ops.aten
LINEAR = {_aten.mm, _aten.addmm, _aten.convolution, _aten._convolution}
FORWARD, TRAINED, PASSED = 2, 6, 4  # FLOPs of a step per MAC: no gradient; all gradients; only those of activations


@dataclass(frozen=True)
class Part:
    """What one part costs for one picture.

    linear: MACs of linear layers and convolutions, all that the paper counts (EVLGen, table 6); products: MACs of
    activations with each other (attention), and of matching; factor: FLOPs of a training step per MAC.
    """

    name: str
    parameters: int
    trains: bool
    linear: int
    products: int
    factor: int

    @property
    def macs(self) -> int:
        return self.linear + self.products

    @property
    def flops(self) -> int:
        """Of a training step on one picture, by the formula."""
        return self.factor * self.macs


@dataclass(frozen=True)
class Cost:
    """All parts, with how they were counted. step_flops: counted on a forward and a backward pass, not by formula.

    prompt_tokens: those of an evaluation.
    """

    parts: list[Part]
    image_size: int
    visual_tokens: int
    prompt_tokens: int
    text_tokens: int
    step_flops: int
    texts: int = 1  # of so many tokens each
    drawn: list[tuple[int, ...]] = field(default_factory=list)  # ModelFacts.token_draws; parts are the mean over them
    inference: dict[int, int] = field(default_factory=dict)  # where they are drawn: MACs with so many tokens
    mean: Cost | None = None  # of a picture with the average number of tokens, where rows are padded to the most

    @property
    def macs(self) -> int:
        return sum(part.macs for part in self.parts)

    @property
    def flops(self) -> int:
        """F = 2 MAC_vit + 6 MAC_connector + 4 MAC_llm + head: what is frozen is not paid for as if it trained."""
        return sum(part.flops for part in self.parts)


@contextmanager
def without_numbers(model: nn.Module) -> Iterator[None]:
    """A model built on the meta device becomes one of fake CPU tensors, float32: all code runs, nothing is computed.

    (The meta device itself knows no autocast.) Attention is taken apart into its two products, because the fused
    kernels, which count otherwise in the backward pass, differ between machines.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), NothingIsPadded():
        without_weights(model, torch.float32)
        model.visual_encoder.precision = "fp32"
        yield


def counted(call: Callable) -> tuple:
    """(result of `call()`, (MACs of linear layers, MACs of other products))."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    flops = counter.get_flop_counts().get("Global", {})
    linear = sum(count for op, count in flops.items() if op in LINEAR) // 2
    return result, (linear, sum(flops.values()) // 2 - linear)


def flops_of_step(model: nn.Module, loss: torch.Tensor, found: dict[str, tuple[int, int]]) -> int:
    """FLOPs of the forward passes in `found`, and of a backward pass from `loss` to what trains."""
    trains = [p for p in model.parameters() if p.requires_grad]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(loss, trains, allow_unused=True)
    return backward.get_total_flops() + 2 * sum(sum(macs) for macs in found.values())
