"""Visual prompts of different length (`model.tome_r: {average, least, most}`): what a model does about them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lavis_evlgen.models.connectors import VisualPrompt


class PromptLengths:
    """Of a model with `ln_vision`, `connector` and `visual_tokens(image)`."""

    def read_by_connector(self, seen: Tensor) -> Tensor:
        """Of what `visual_tokens` gives, what goes to ln_vision, and behind it to the connector: (B, L, D_v)."""
        return seen

    def mean_words(self) -> str:
        """Behind the most tokens of a prompt, of a picture or frame: what they are in the mean, where that differs."""
        return f" at most, {self.connector.average_tokens} on average" if self.connector.lengths_differ else ""

    @property
    def calibration_pictures(self) -> int:
        return self.connector.calibration_pictures

    @torch.no_grad()
    def calibrate(self, images: Iterable[Tensor]):
        seen = (self.read_by_connector(self.visual_tokens(image)) for image in images)
        self.connector.calibrate(map(self.ln_vision, seen))

    def check_calibrated(self):
        if not self.connector.calibrated():
            raise ValueError(
                "model.tome_r: the weights have no thresholds for {average, least, most}, which training finds (they "
                "are new, or were trained with another tome_r): train with it, from these weights by model.pretrained, "
                "or evaluate with the tome_r that they were trained with"
            )

    def histogram(self, prompt: VisualPrompt) -> dict[str, Tensor]:
        """`prompt_lengths` (L' + 1,): how many of the batch's pictures, of clips frames, have 0, 1, ... tokens; nothing
        where all have as many."""
        if not self.connector.lengths_differ:
            return {}
        most = self.connector.num_output_tokens
        lengths = prompt.mask.unflatten(1, (-1, most)).sum(2)  # (B, T), T: frames whose tokens stand in one prompt
        numbers = torch.arange(most + 1, device=lengths.device)
        return {"prompt_lengths": (lengths.flatten().unsqueeze(1) == numbers).sum(0).float()}


def of_histogram(counts: Tensor) -> dict[str, float]:
    """Mean, 5th and 95th percentile of the prompt's tokens, from how many pictures have 0, 1, ... of them (L' + 1,)."""
    counts = counts.double().cpu()
    total = counts.sum()
    mean = (counts * torch.arange(len(counts))).sum() / total
    least, most = (int((counts.cumsum(0) < share * total).sum()) for share in (0.05, 0.95))
    return {"prompt_tokens": mean.item(), "prompt_tokens_p5": least, "prompt_tokens_p95": most}


def tokens_of(prompt: VisualPrompt) -> list[dict[str, int]]:
    """Of each row of an evaluation's batch, `prompt_tokens`; nothing where all have as many."""
    if prompt.mask is None:
        return [{} for _ in prompt.tokens]
    return [{"prompt_tokens": count} for count in prompt.mask.sum(1).tolist()]


def summary_of(rows: list[dict]) -> dict[str, float]:
    """As `of_histogram`, over the rows of an evaluation; nothing where they have no `prompt_tokens`."""
    found = [row["prompt_tokens"] for row in rows if "prompt_tokens" in row]
    return of_histogram(torch.bincount(torch.tensor(found))) if found else {}
