"""Drawing captions as a function of seeds: no generator is shared with dropout, data, or other pictures."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, TopPLogitsWarper

CACHE_NAMES = ("cache", "past_key_values")  # of keys and values: transformers 5.24 on; before it


class GumbelRows(LogitsProcessor):
    """Turns greedy search into sampling of some rows: the argmax of logits plus Gumbel noise is a draw from softmax.

    Rows come in one group a picture: a greedy row where `greedy` asks for it, then `num_samples` drawn ones, whose
    noise is a function of the picture's seed alone. temperature divides the logits; top_p below 1 keeps the nucleus.
    """

    def __init__(
        self, seeds: list[int], num_samples: int, greedy: bool, temperature: float, top_p: float, device: torch.device
    ):
        if not (temperature > 0 and 0 < top_p <= 1):
            raise ValueError(f"temperature={temperature} must be above 0, top_p={top_p} above 0 and at most 1")
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.first, self.group = int(greedy), int(greedy) + num_samples
        self.temperature = temperature
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.view(len(self.generators), self.group, -1)  # (B, rows, V)
        drawn = scores[:, self.first :] / self.temperature
        if self.nucleus is not None:
            drawn = self.nucleus(input_ids, drawn.flatten(0, 1)).view_as(drawn)
        noise = torch.empty_like(drawn)
        for own, generator in zip(noise, self.generators, strict=True):
            own.exponential_(generator=generator)
        drawn = drawn - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()
        return torch.cat([scores[:, : self.first], drawn], 1).flatten(0, 1)  # (B * rows, V)


def cache_key(llm: nn.Module) -> str | None:
    """By what name a language model's body takes a DynamicCache, whose rows can be copied; None where it takes none."""
    names = inspect.signature(llm.base_model.forward).parameters
    found = next((name for name in CACHE_NAMES if name in names), None)
    return found if llm._supports_default_dynamic_cache() else None


def decode(lm, embeds: Tensor, mask: Tensor, drawing: GumbelRows, max_new_tokens: int) -> Tensor:
    """Of a LanguageModel `lm` with a cache_key: ids (B * rows, T) that `drawing` chooses behind prompts (B, T', D) with
    mask (B, T'), padded on the left. A row is padded behind its end token.

    As Hugging Face's greedy search, but that a prompt is read once: its keys and values are then copied for each row.
    """
    body, text = lm.llm.base_model, lm.text
    cache, key = DynamicCache(), cache_key(lm.llm)
    counts_positions = "position_ids" in inspect.signature(body.forward).parameters

    def scores(**read: Tensor) -> Tensor:
        """Logits (rows, V) of the token behind those that are read, all in the mask."""
        (given,) = read.values()
        if counts_positions:
            read["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -given.shape[1] :]
        read |= {"attention_mask": mask, key: cache, "use_cache": True}
        return lm._head(body(**read).last_hidden_state[:, -1]).float()

    following = scores(inputs_embeds=embeds).repeat_interleave(drawing.group, 0)  # (B * rows, V)
    cache.batch_repeat_interleave(drawing.group)
    mask = mask.repeat_interleave(drawing.group, 0)
    open_, chosen = torch.ones_like(mask[:, 0], dtype=torch.bool), []
    while True:
        ids = drawing(None, following).argmax(-1)
        chosen.append(torch.where(open_, ids, text.pad_id))
        open_ = open_ & (ids != text.end_id)
        if len(chosen) == max_new_tokens or not open_.any():
            return torch.stack(chosen, 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        following = scores(input_ids=chosen[-1].unsqueeze(1))


def up_to_end(ids: Tensor, end_id: int) -> list[list[int]]:
    """Generated ids (N, T) -> the ids of each row up to its first end token, that included; the rest is padding."""
    return [row[: row.index(end_id) + 1] if end_id in row else row for row in ids.tolist()]
