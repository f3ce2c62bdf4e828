"""Merging that looks at a question: how much each token matters to it, as weights of means and a price of pairs.

    rho_i = tanh(alpha) (<W_q q, W_k x_i> / sqrt(d) - mean over i), clamped to +-4
    merge: sum w x / sum w, w = size^[merge_mean: size] exp(rho)
    match: cosine_ab - STRENGTH max(rho_a, rho_b)

A merged token's exp(rho) is the mean of its patches'. docs/merging.md has the why.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_evlgen.nn.merging import MergeMap

LARGEST = 4.0  # of |rho|: a patch counts for at most exp(4), 55 times, and at least a 55th of one that is indifferent
STRENGTH = 0.1  # how far rho = 1 moves a cosine: about as far as cosines of good and poor pairs lie apart


@dataclass(frozen=True)
class Relevance:
    """Of T tokens: `mass` (B, T), the sum of exp(rho) over the patches of each, and `sizes` (B, T), their number."""

    mass: Tensor
    sizes: Tensor

    @staticmethod
    def of(rho: Tensor) -> Relevance:
        """rho (B, T): of tokens that are a patch each."""
        return Relevance(rho.exp(), torch.ones_like(rho))

    @property
    def price(self) -> Tensor:
        """(B, T): what `match` takes off a pair for each of its two tokens, the larger one counts. No gradient."""
        return STRENGTH * (self.mass / self.sizes).log().detach()

    def weights(self, by_size: bool) -> Tensor:
        """(B, T): of each token in a mean; by_size: it counts as often as it has patches (merge_mean: size)."""
        return self.mass if by_size else self.mass / self.sizes

    def after(self, step: MergeMap) -> Relevance:
        """Of the tokens that `step` leaves."""
        return Relevance(_sums(step, self.mass.unsqueeze(-1)).squeeze(-1), step.sizes(self.sizes))


class QuestionRelevance(nn.Module):
    """rho (B, L) of visual tokens (B, L, D_v) for questions (B, D_q), the means of their tokens' embeddings.

    alpha is one learned number and starts at 0, and so does rho, bit for bit. W_q and W_k have no gradient before alpha
    has moved. q is brought to a root mean square of 1 (a LayerNorm without weights), since embedding tables differ in
    size by orders of magnitude; of no question (q = 0) rho is 0.
    """

    def __init__(self, input_width: int, question_width: int, width: int):
        super().__init__()
        self.query = nn.Linear(question_width, width, bias=False)
        self.key = nn.Linear(input_width, width, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1))
        for linear in (self.query, self.key):
            nn.init.xavier_uniform_(linear.weight)  # products near 1 for tokens and questions near 1

    def forward(self, x: Tensor, question: Tensor) -> Tensor:
        """Float32 whatever the autocast, as the keys that merging compares."""
        with torch.autocast(x.device.type, enabled=False):
            query = self.query(F.layer_norm(question.to(self.query.weight.dtype), question.shape[-1:]))  # (B, d)
            # <W_q q, W_k x> = <W_k' W_q q, x>: a product of each picture, not of each of its tokens
            at_tokens = query @ self.key.weight  # (B, D_v)
            found = torch.einsum("bld,bd->bl", x.to(at_tokens.dtype), at_tokens) / query.shape[-1] ** 0.5
            centred = found - found.mean(1, keepdim=True)
            return (torch.tanh(self.alpha) * centred).clamp(-LARGEST, LARGEST)


def weighted_mean(step: MergeMap, x: Tensor, weights: Tensor) -> Tensor:
    """sum w x / sum w over the tokens in each slot: x (B, T, D), weights (B, T) > 0 -> (B, T', D).

    Differentiable in both. Equal weights give the plain mean, bit for bit.
    """
    weights = weights.to(x.dtype).unsqueeze(-1)  # as they multiply x, so that a mean stays between its members
    return _sums(step, x * weights) / _sums(step, weights)


def _sums(step: MergeMap, x: Tensor) -> Tensor:
    return step.sums_by_index(x) if x.device.type == "cpu" else step.sums_by_product(x)
