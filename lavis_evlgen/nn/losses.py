"""The one loss: next-token cross-entropy of the caption, computed only where there is a label."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def prefix_lm_loss(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Per sample: sum of the cross-entropies (B,) in nats, float32, and number of supervised tokens (B,).

    hidden (B, T, D): last hidden states; labels (B, T) long aligned with the *inputs* (position t is the
    token at t; -100 where unsupervised); head maps (N, D) -> (N, V) logits and runs only on the N supervised
    positions, so neither the visual prompt nor the padding costs a vocabulary-wide row. EVLGen, eq. 3.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE  # (B, T - 1)
    logits = head(hidden[:, :-1][supervised])  # (N, V)
    losses = F.cross_entropy(logits.float(), targets[supervised], reduction="none")  # (N,)
    sums = losses.new_zeros(supervised.shape).masked_scatter(supervised, losses).sum(1)
    return sums, supervised.sum(1).float()


@torch.no_grad()
def across_picture_share(prompt: Tensor, mask: Tensor | None = None) -> Tensor:
    """Share of the visual prompt's power that is variance across pictures, in [0, 1] (scalar); 0 = collapsed.

    prompt (B, P, D); NaN for B = 1. Variance over the batch at each position and channel, against the mean square:
    a connector that answers (nearly) the same prompt to every picture has (nearly) 0, whether or not its tokens differ.
    mask (B, P): of prompts of different length, true for their tokens; then over those pictures, and at those positions
    that at least two pictures have.
    """
    prompt = prompt.float()
    if len(prompt) < 2:
        return prompt.new_tensor(float("nan"))
    if mask is not None:
        shared = (mask & (mask.sum(0) > 1)).unsqueeze(2).float()  # (B, P, 1)
        mean = (prompt * shared).sum(0) / shared.sum(0).clamp_min(1)
        across, power = (((x * shared).square().sum()) for x in (prompt - mean, prompt))
        return across / power.clamp_min(torch.finfo(torch.float32).tiny)
    across = prompt.var(dim=0, unbiased=False).mean()
    return across / prompt.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
