"""Checkpoints hold what trains, and load strictly: exactly the frozen weights may be absent."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lavis_evlgen.models.sources import WeightsError, read_state_dict


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """State dict without frozen parameters and without the buffers of frozen modules."""
    frozen = frozen_names(model)
    return {k: v for k, v in model.state_dict().items() if k not in frozen}


def frozen_names(model: nn.Module) -> set[str]:
    """Names of parameters without gradient, and of buffers in modules that hold no trainable parameter."""
    # tied weights (an LLM's head and its embeddings) go by both their names
    names = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    for prefix, module in model.named_modules():
        if not any(p.requires_grad for p in module.parameters()):
            dot = prefix + "." if prefix else ""
            names.update(dot + n for n, _ in module.named_buffers())
    return names


def load_trainable(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a checkpoint's tensors; a trainable tensor that is missing, unknown or misshapen is an error.

    Frozen weights in the file are loaded too (older checkpoints carry them). Raises WeightsError that names
    what differs.
    """
    own, frozen = model.state_dict(), frozen_names(model)
    missing = [k for k in own if k not in state and k not in frozen]
    unknown = [k for k in state if k not in own]
    shapes = [
        f"{k} is {tuple(state[k].shape)} there, {tuple(own[k].shape)} here"
        for k in state
        if k in own and state[k].shape != own[k].shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} trainable tensors are missing, first {missing[0]}")
    if unknown:
        problems.append(f"{len(unknown)} tensors have no place in this model, first {unknown[0]}")
    if shapes:
        problems.append(f"{len(shapes)} tensors differ in shape: {shapes[0]}")
    if problems:
        raise WeightsError(
            f"checkpoint {source} is of another architecture than the config: {'; '.join(problems)}. "
            "Use the config that it was trained with (run.json beside it), or another checkpoint"
        )
    model.load_state_dict(state, strict=False)


def load_checkpoint_file(model: nn.Module, path: str) -> None:
    """Load a `checkpoint_*.pth` of ours (its "model" part) or a plain state dict into `model`."""
    if not Path(path).is_file():
        raise WeightsError(f"checkpoint {path} does not exist (seen from {Path.cwd()})")
    load_trainable(model, read_state_dict(path, "checkpoint"), path)
