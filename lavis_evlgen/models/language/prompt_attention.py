"""`model.prompt_attention`: tokens of the prompt see each other in both directions inside a causal language model.

    causal   as the language model was trained: each token sees itself and what stands before it
    visual   visual tokens also see each other
    prefix   visual tokens and the text prompt also see each other; the BOS and the caption stay causal

A hook in front of the decoder replaces its padding mask by one of (B, 1, T, T) wherever more than one position goes in:
in the loss, in scoring and in the prefill of generation. A cached decoding step, one position that sees everything
before it, needs none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

KINDS = ("causal", "visual", "prefix")


def prefix_mask(members: Tensor, real: Tensor, dtype: torch.dtype) -> Tensor:
    """members (B, T), which see each other in both directions; real (B, T), no padding -> what is added to attention.

    (B, 1, T, T) of `dtype`, or (1, 1, T, T) where the rows agree: 0 where query i may see key j, else the least number.
    Padding sees itself, so that no row is without a key.
    """
    members, real = members.bool(), real.bool()
    if len(members) > 1 and bool((members == members[:1]).all()) and bool(real.all()):
        members, real = members[:1], real[:1]
    positions = torch.arange(members.shape[1], device=members.device)
    causal = positions <= positions.unsqueeze(1)  # (T, T): j <= i
    both = members.unsqueeze(2) & members.unsqueeze(1)  # (B, T, T)
    allowed = (real.unsqueeze(1) & (causal | both)) | torch.eye(len(positions), dtype=torch.bool, device=members.device)
    return torch.zeros(allowed.shape, dtype=dtype, device=members.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    ).unsqueeze(1)  # fmt: skip


class PromptAttention:
    """The hook of one language model. Raises ValueError for a model that would ignore it."""

    def __init__(self, llm: nn.Module, kind: str = "causal"):
        if kind not in KINDS:
            raise ValueError(f"prompt_attention: {kind!r} is not one of {', '.join(KINDS)}")
        self.kind, self._members, self._used = kind, None, False
        if kind == "causal":
            return
        self.llm_name, self.window = type(llm).__name__, _sliding_window(llm.config)
        # OPTForCausalLM calls the decoder inside its base model, so a hook on that would miss generation
        decoder = llm.get_decoder() or llm.base_model
        decoder.register_forward_pre_hook(self._replace_mask, with_kwargs=True)
        if decoder.get_input_embeddings().weight.device.type != "meta":
            self._check(llm)

    @contextmanager
    def within(self, members: Tensor) -> Iterator[None]:
        """Inside, members (B, T) of every sequence see each other. Raises RuntimeError where the model did not ask."""
        if self.kind == "causal":
            yield
            return
        self._members, self._used = members, False
        try:
            yield
            if not self._used:
                raise RuntimeError(f"{self.llm_name} ran without prompt_attention={self.kind}")
        finally:
            self._members = None

    def _replace_mask(self, decoder: nn.Module, args: tuple, kwargs: dict):
        embeds = kwargs.get("inputs_embeds")
        if self._members is None or embeds is None or embeds.shape[1] == 1:
            return None
        members = self._members
        if embeds.shape[1] != members.shape[1]:
            raise ValueError(f"prompt_attention={self.kind}: a prompt must be read in one piece, not in chunks")
        if self.window is not None and self.window < embeds.shape[1]:
            raise ValueError(
                f"prompt_attention={self.kind}: {self.llm_name} attends to the last {self.window} tokens only, and the "
                f"sequence has {embeds.shape[1]}; shorten it or set prompt_attention=causal"
            )
        members = members.repeat_interleave(len(embeds) // len(members), 0)  # a row for each beam
        real = kwargs.get("attention_mask")
        real = torch.ones_like(members) if real is None else real
        self._used = True
        changed = {"attention_mask": prefix_mask(members, real, embeds.dtype)}
        if kwargs.get("position_ids") is None:
            changed["position_ids"] = (real.long().cumsum(1) - 1).clamp_min(0)
        return args, kwargs | changed

    @torch.no_grad()
    def _check(self, llm: nn.Module):
        """Perturb tokens at random (LayerNorm hides a constant shift) and see which hidden states move."""
        table = llm.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(3, 6, table.shape[1], generator=generator)
        noise = (noise * table.float().std().item()).to(table)  # (3, T, D)
        embeds = noise[:1].repeat(3, 1, 1)
        embeds[1, 2], embeds[2, 4] = noise[1, 2], noise[2, 4]  # the last visual token; a token of the text
        members = torch.tensor([[True] * 3 + [False] * 3], device=table.device).repeat(3, 1)
        mask = torch.ones(members.shape, dtype=torch.long, device=table.device)
        try:
            with self.within(members):
                hidden = llm.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(self._refusal(f"it does not take a mask of its own ({reason})")) from error
        moved = (hidden.float() - hidden[:1].float()).abs().amax(-1) > 0  # (3, T)
        if not moved[1, 0]:
            raise ValueError(self._refusal("its tokens go on seeing only what stands before them"))
        if moved[2, :4].any():
            raise ValueError(self._refusal("its visual prompt would see the caption"))

    def _refusal(self, why: str) -> str:
        return (
            f"prompt_attention={self.kind} has no effect that can be trusted in {self.llm_name}: {why}; "
            "set prompt_attention=causal, or use another language model"
        )


def _sliding_window(config) -> int | None:
    """Tokens that attention reaches back where it does not reach all."""
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)
