"""Gradient checkpointing: activations of a stack are not kept but computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lavis_evlgen.config import ConfigError
from lavis_evlgen.models.compile import stack_of

KEY = "run.llm_grad_checkpoint"


def recompute_llm(model: nn.Module, wanted):
    """`run.llm_grad_checkpoint`: of the language model's blocks, only the inputs are kept. Raises ConfigError."""
    if wanted not in (True, False, None):
        raise ConfigError(f"{KEY}: {wanted!r} is not true or false")
    if not wanted:
        return
    if not hasattr(model, "language_model"):
        raise ConfigError(f"{KEY}: {type(model).__name__} has no language model; leave it out")
    recompute(stack_of(model.language_model))


def recompute(blocks: Iterable[nn.Module]):
    """Each block keeps its inputs alone where it or what is below it trains; elsewhere it runs as it is written."""
    for block in blocks:
        block.forward = partial(_forward, block)  # a partial: in a deep copy of the model it holds the copy's block


def _forward(block: nn.Module, *args, **kwargs):
    forward = partial(type(block).forward, block)
    values = (*tree_leaves((args, kwargs)), *block.parameters())
    if not torch.is_grad_enabled() or not any(map(_has_grad, values)):
        return forward(*args, **kwargs)
    # the language model is in eval mode and draws nothing
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _has_grad(value) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
