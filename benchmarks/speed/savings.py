"""The savings of a training step, each as a context in which a step goes without it (benchmarks/speed/step.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lavis_evlgen.models.activation_checkpointing import recompute
from lavis_evlgen.models.compile import eager, stack_of
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.language import sequences
from lavis_evlgen.nn.losses import IGNORE


def full_logits_loss(hidden: Tensor, labels: Tensor, head: Callable) -> tuple[Tensor, Tensor]:
    """`prefix_lm_loss` the usual way: logits (B, T, V) of every position, most of which have no label."""
    logits, targets = head(hidden)[:, :-1].float(), labels[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view(targets.shape).sum(1), (targets != IGNORE).sum(1).float()


@contextlib.contextmanager
def loss_of(function: Callable) -> Iterator[None]:
    """The language model computes its loss by `function` of (hidden, labels, head)."""
    before, sequences.prefix_lm_loss = sequences.prefix_lm_loss, function
    try:
        yield
    finally:
        sequences.prefix_lm_loss = before


@contextlib.contextmanager
def trained(module: torch.nn.Module) -> Iterator[None]:
    """Weights get gradients, as if they were not frozen (no optimizer updates them)."""
    module.requires_grad_(True)
    try:
        yield
    finally:
        module.requires_grad_(False).zero_grad(set_to_none=True)


@contextlib.contextmanager
def vit_grad(model: EVLGen) -> Iterator[None]:
    """The vision encoder keeps what a backward pass needs, and it is made."""
    vision = model.visual_encoder
    vision.forward = vision.encode
    try:
        with trained(vision):
            yield
    finally:
        del vision.forward


@contextlib.contextmanager
def eager_attention(model: EVLGen) -> Iterator[None]:
    """Attention as two products with a softmax between them, everywhere."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextlib.contextmanager
def dense_mask(model: EVLGen) -> Iterator[None]:
    """The language model is told of the padding on the right, and masks every attention with a table."""
    text, kept = model.language_model, {}
    assemble, body = text._assemble, text.body

    def remember(*args):
        kept["assembled"] = assemble(*args)
        return kept["assembled"]

    text._assemble = remember
    text.body = lambda embeds: body(embeds, kept["assembled"][1])
    try:
        yield
    finally:
        del text._assemble, text.body


@contextlib.contextmanager
def everything(model: EVLGen) -> Iterator[None]:
    """All savings undone at once: a plain implementation, but for the precision of frozen weights."""
    with contextlib.ExitStack() as stack:
        for name, undo in UNDONE.items():
            if name != "everything":
                stack.enter_context(undo(model))
        yield


@contextlib.contextmanager
def grad_checkpoint(model: EVLGen) -> Iterator[None]:
    """The language model's activations are computed again in the backward pass."""
    blocks = stack_of(model.language_model)
    recompute(blocks)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


UNDONE = {
    "full-logits": lambda model: loss_of(full_logits_loss),
    "vit-grad": vit_grad,
    "llm-grad": lambda model: trained(model.language_model.llm),
    "eager-attention": eager_attention,
    "dense-mask": dense_mask,
    "everything": everything,
}
TRADED = {"grad-checkpoint": grad_checkpoint}  # switched on: time for memory
COMPILED = {"compile": lambda model: eager()}  # undone only where --compile does it
CHANGES = UNDONE | TRADED | COMPILED


def changed(model: EVLGen, name: str) -> contextlib.AbstractContextManager:
    """The step as one of CHANGES has it, or as it is ("whole")."""
    return contextlib.nullcontext() if name == "whole" else CHANGES[name](model)
