"""Drawing captions as a function of seeds: no generator is shared with dropout, data, or other pictures."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper


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


def up_to_end(ids: Tensor, end_id: int) -> list[list[int]]:
    """Generated ids (N, T) -> the ids of each row up to its first end token, that included; the rest is padding."""
    return [row[: row.index(end_id) + 1] if end_id in row else row for row in ids.tolist()]
