"""Who sees whom inside a causal language model: a mask of our own in the place of its causal one.

`model.prompt_attention`: which tokens of the prompt see each other in both directions.

    causal   as the language model was trained: each token sees itself and what stands before it
    visual   visual tokens also see each other
    prefix   visual tokens and the text prompt also see each other; the BOS and the caption stay causal

Segments: several texts in one row behind the front that they share (packing.py). Each text sees the front and itself,
at the positions that it has when it stands behind the front alone.

A hook in front of the decoder replaces its padding mask by one of (B, 1, T, T) wherever more than one position goes in:
in the loss, in scoring and in the prefill of generation. A cached decoding step, one position that sees everything
before it, needs none. attention_checks.py tries whether a language model obeys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lavis_evlgen.models.language.attention_checks import check_prompt_attention, check_segments

KINDS = ("causal", "visual", "prefix")


def prefix_mask(members: Tensor, real: Tensor, dtype: torch.dtype, segments: Tensor | None = None) -> Tensor:
    """members (B, T), which see each other in both directions; real (B, T), no padding; segments (B, T) long | None:
    each sees itself and segment 0 -> what is added to attention.

    (B, 1, T, T) of `dtype`, or (1, 1, T, T) where the rows of members and real agree and there are no segments: 0 where
    query i may see key j, else the least number. Padding sees itself, so that no row is without a key.
    """
    members, real = members.bool(), real.bool()
    alike = segments is None and len(members) > 1 and bool((members == members[:1]).all()) and bool(real.all())
    if alike:
        members, real = members[:1], real[:1]
    positions = torch.arange(members.shape[1], device=members.device)
    causal = positions <= positions.unsqueeze(1)  # (T, T): j <= i
    both = members.unsqueeze(2) & members.unsqueeze(1)  # (B, T, T)
    allowed = real.unsqueeze(1) & (causal | both)
    if segments is not None:
        allowed &= (segments == 0).unsqueeze(1) | (segments.unsqueeze(1) == segments.unsqueeze(2))
    allowed = allowed | torch.eye(len(positions), dtype=torch.bool, device=members.device)
    return torch.zeros(allowed.shape, dtype=dtype, device=members.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    ).unsqueeze(1)  # fmt: skip


class _Sight(NamedTuple):
    """What the hook builds masks from: (B, T) each."""

    members: Tensor
    segments: Tensor | None
    positions: Tensor | None


class PromptAttention:
    """The hook of one language model. Raises ValueError for a model that would ignore it."""

    def __init__(self, llm: nn.Module, kind: str = "causal"):
        if kind not in KINDS:
            raise ValueError(f"prompt_attention: {kind!r} is not one of {', '.join(KINDS)}")
        self.kind, self._sight, self._used, self._hooked = kind, None, False, False
        self._no_packing: str | None = None  # why texts cannot share a prompt, "": they can, None: not tried yet
        self.llm_name, self.window = type(llm).__name__, _sliding_window(llm.config)
        if kind == "causal":
            return
        self._hook(llm)
        if why := check_prompt_attention(llm, self.within):
            raise ValueError(
                f"prompt_attention={kind} has no effect that can be trusted in {self.llm_name}: {why}; "
                "set prompt_attention=causal, or use another language model"
            )

    def _hook(self, llm: nn.Module):
        if not self._hooked:
            _decoder_of(llm).register_forward_pre_hook(self._replace_mask, with_kwargs=True)
            self._hooked = True

    def why_not_packing(self, llm: nn.Module) -> str:
        """Why several texts cannot share a visual prompt in this language model; empty where they can. Tried once."""
        if self._no_packing is None:
            self._hook(llm)
            self._no_packing = check_segments(llm, self.within)
        return self._no_packing

    @contextmanager
    def within(
        self, members: Tensor, segments: Tensor | None = None, positions: Tensor | None = None
    ) -> Iterator[None]:
        """Inside, members (B, T) of every sequence see each other, and each of the segments (B, T) itself and segment
        0; with them come the positions (B, T). Raises RuntimeError where the model did not ask."""
        if self.kind == "causal" and segments is None:
            yield
            return
        self._sight, self._used = _Sight(members, segments, positions), False
        try:
            yield
            if not self._used:
                raise RuntimeError(f"{self.llm_name} ran without {self._asked()}")
        finally:
            self._sight = None

    def _replace_mask(self, decoder: nn.Module, args: tuple, kwargs: dict):
        embeds = kwargs.get("inputs_embeds")
        if self._sight is None or embeds is None or embeds.shape[1] == 1:
            return None
        members, segments, positions = self._sight
        if embeds.shape[1] != members.shape[1]:
            raise ValueError(f"{self._asked()}: a prompt must be read in one piece, not in chunks")
        self._check_window(embeds.shape[1], positions)
        members = members.repeat_interleave(len(embeds) // len(members), 0)  # a row for each beam
        real = kwargs.get("attention_mask")
        real = torch.ones_like(members) if real is None else real
        self._used = True
        changed = {"attention_mask": prefix_mask(members, real, embeds.dtype, segments)}
        if positions is not None:
            changed["position_ids"] = positions
        elif kwargs.get("position_ids") is None:
            changed["position_ids"] = (real.long().cumsum(1) - 1).clamp_min(0)
        return args, kwargs | changed

    def _check_window(self, length: int, positions: Tensor | None):
        if self.window is None or self.window >= length:  # asked first: the positions are on the device
            return
        length = length if positions is None else int(positions.max()) + 1  # of one text behind the front
        if self.window < length:
            raise ValueError(
                f"{self._asked()}: {self.llm_name} attends to the last {self.window} tokens only, and the sequence has "
                f"{length}; shorten it or set {self._off()}"
            )

    def _asked(self) -> str:
        """The key that a mask of our own is for."""
        shared = self._sight is not None and self._sight.segments is not None
        return "texts_per_image" if shared else f"prompt_attention={self.kind}"

    def _off(self) -> str:
        return "texts_per_image=1" if self._asked() == "texts_per_image" else "prompt_attention=causal"


def _decoder_of(llm: nn.Module) -> nn.Module:
    """The module that every pass goes through: OPTForCausalLM calls the decoder inside its base model. Where there is
    none such, get_decoder says None or the whole model, or is not there, by model and version of transformers."""
    decoder = llm.get_decoder() if hasattr(llm, "get_decoder") else None
    return llm.base_model if decoder is None or decoder is llm else decoder


def _sliding_window(config) -> int | None:
    """Tokens that attention reaches back where it does not reach all."""
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)
