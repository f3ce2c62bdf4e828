"""Checkpoints hold what trains, and load strictly: exactly the frozen weights may be absent.

What one stage of a run has trained and a later one freezes is in the checkpoints of the later one too: `keep`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from lavis_evlgen.weights.integrity import first_not_finite
from lavis_evlgen.weights.sources import WeightsError, check_floating, read_state_dict
from lavis_evlgen.weights.untrusted import check_frozen_weights, checked_model

RELEASED = "VL_proj.weight"  # only checkpoints of the released implementation have a tensor of this name


def keep(parameter: nn.Parameter, kept: bool):
    """Whether checkpoints hold a parameter while it is frozen; one that has a gradient is in them anyway."""
    parameter.kept = kept


def is_kept(parameter: nn.Parameter) -> bool:
    """Whether checkpoints hold a parameter: it trains, or was kept."""
    return parameter.requires_grad or getattr(parameter, "kept", False)


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of what is kept, without the buffers of other modules; a language model's tied weights once."""
    left_out = left_out_names(model)
    return {k: v for k, v in model.state_dict().items() if k not in left_out}


def left_out_names(model: nn.Module) -> set[str]:
    """Names that a state dict has and a checkpoint has not."""
    return _names_without(model, is_kept) | second_names(model)


def second_names(model: nn.Module) -> set[str]:
    """Further names of a language model's parameters that go by several, such as a head that is the embeddings.

    BLIP-2's first stage keeps both names of its word embeddings, as LAVIS's files do.
    """
    first = {name for name, _ in model.named_parameters()}
    every = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return {name for name in every if name.startswith("language_model.") and name not in first}


def frozen_names(model: nn.Module) -> set[str]:
    """Names of parameters without gradient, and of buffers in modules that hold no trainable parameter."""
    return _names_without(model, lambda parameter: parameter.requires_grad)


def _names_without(model: nn.Module, belongs: Callable[[nn.Parameter], bool]) -> set[str]:
    """Names of parameters that do not belong, and of buffers in modules that hold none that does."""
    # tied weights (an LLM's head and its embeddings) go by both their names
    names = {n for n, p in model.named_parameters(remove_duplicate=False) if not belongs(p)}
    for prefix, module in model.named_modules():
        if not any(map(belongs, module.parameters())):
            dot = prefix + "." if prefix else ""
            names.update(dot + n for n, _ in module.named_buffers())
    return names


def load_trainable(model: nn.Module, state: dict, source: str, additions: Iterable[set[str]] = ()) -> None:
    """Load a checkpoint's tensors; a trainable tensor that is missing, unknown or misshapen is an error.

    Frozen weights in the file are loaded too (older checkpoints carry them). additions: groups of names that a
    checkpoint of a simpler model lacks; a group that is absent as a whole stays as built, and is counted in the log.
    Raises WeightsError that names what differs.
    """
    check_trainable(model, state, source, additions)
    check_numbers(state, source)
    model.load_state_dict(state, strict=False)


def check_numbers(state: dict[str, torch.Tensor], source: str) -> None:
    """Raises WeightsError that names the first tensor of `state` with a NaN or an infinity."""
    broken = first_not_finite(state)
    if broken is not None:
        raise WeightsError(
            f"checkpoint {source} holds numbers that are not finite (NaN or infinity), first in {broken}: its training "
            "had diverged. Use an earlier checkpoint"
        )


def check_trainable(
    model: nn.Module, state: dict[str, torch.Tensor], source: str, additions: Iterable[set[str]] = ()
) -> None:
    """Raises WeightsError unless `state` has every trainable tensor of `model`, in its shape, and no unknown one.

    additions: as load_trainable.
    """
    own, may_lack = model.state_dict(), left_out_names(model)
    for group in additions:
        if group and not group & set(state):
            numbers = sum(own[name].numel() for name in group)
            logging.info(
                "%s has none of %d tensors (%d numbers) such as %s: they start as built",
                source, len(group), numbers, min(group),
            )  # fmt: skip
            may_lack |= group
    check_floating(state, own, f"checkpoint {source}")
    missing = [k for k in own if k not in state and k not in may_lack]
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
        problems += _other_frozen_parts(state, own)
    if problems:
        raise WeightsError(
            f"checkpoint {source} is of another architecture than the config: {'; '.join(problems)}. "
            "Use the config that it was trained with (run.json beside it), or another checkpoint"
        )


def _other_frozen_parts(state: dict, own: dict) -> list[str]:
    """What the shapes say about the frozen parts: they are chosen by the config, not held in the checkpoint."""
    words = []
    for name, part, key in (
        ("ln_vision.bias", "vision encoder", "vit_model"),
        ("llm_proj.bias", "language model", "llm_model"),
    ):
        there, here = (tensors[name].shape[-1] if name in tensors else None for tensors in (state, own))
        if None not in (there, here) and there != here:
            words.append(f"it was trained with a {part} of width {there}, the config's has {here} (model.{key})")
    return words


def load_checkpoint_file(model: nn.Module, path: str, additions: Iterable[set[str]] = ()) -> None:
    """Load a `checkpoint_*.pth` of ours (its "model" part), a plain state dict or a bundle's folder into `model`.

    additions: as load_trainable.
    """
    if not Path(path).exists():
        raise WeightsError(f"checkpoint {path} does not exist (seen from {Path.cwd()})")
    state = read_state_dict(path, "checkpoint")
    if RELEASED in state:
        raise WeightsError(
            f"checkpoint {path} is in the released layout (it has {RELEASED}): `evlgen convert {path} OUT`, "
            "and give the folder OUT"
        )
    load_trainable(model, state, path, additions)


def config_of_checkpoint(path: str) -> dict:
    """The model section of the config that a run's checkpoint was made with; {} where a file holds none.

    Raises WeightsError for one that says what a file may not (weights/untrusted.py).
    """
    return model_section(facts_of_checkpoint(path), path)


def model_section(facts: dict, path: str) -> dict:
    """As config_of_checkpoint, of what `facts_of_checkpoint` read."""
    config = facts.get("config")
    if not isinstance(config, dict) or not config.get("model"):
        return {}
    return checked_model(config["model"], f"the config in {path}", shapes_of(facts.get("model")))


def facts_of_checkpoint(path: str) -> dict:
    """What a run's checkpoint says of itself, its tensors on the meta device; {} where a file says nothing."""
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # no file, or not one of torch's: reading its weights says what is wrong
        return {}
    if not isinstance(content, dict):
        return {}
    check_frozen_weights(content.get("frozen_weights"), path)
    return content


def shapes_of(state) -> dict[str, tuple]:
    """Shapes by name of the tensors in what should be a state dict."""
    tensors = state.items() if isinstance(state, dict) else ()
    return {name: tuple(value.shape) for name, value in tensors if isinstance(value, torch.Tensor)}
