"""What else reads the group of patches that each merged token stands for: its mean, or attention over its patches.

docs/merging.md has the formulas.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_evlgen.nn.merging import MergeMap
from lavis_evlgen.nn.ragged import RaggedMap


class PooledSkip(nn.Module):
    """Group means past the body: y_s = W mean_{i in s} x_i + alpha body_s, alpha one learned number, 0 at the start.

    So training starts as average pooling over the groups. W (D_v -> D_c) starts as the identity where the widths are
    the same, else with all singular values equal, such that y is as large as the means are, which LayerNorm leaves
    near 1: the size that the body's tokens have.
    """

    def __init__(self, input_width: int, width: int):
        super().__init__()
        self.proj = nn.Linear(input_width, width, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1))
        if input_width == width:
            nn.init.eye_(self.proj.weight)
        else:
            nn.init.orthogonal_(self.proj.weight, gain=max(1.0, (width / input_width) ** 0.5))

    def forward(self, body: Tensor, means: Tensor) -> Tensor:
        """body: the body's tokens (B, L', D_c); means: of each group's patches (B, L', D_v) -> (B, L', D_c)."""
        return self.proj(means) + self.alpha.to(body.dtype) * body


class GroupReadout(nn.Module):
    """Each merged token looks once more at the patches that it stands for, and at no others:

    y_s = m_s + alpha W_o sum_{i in s} softmax_i(<W_q m_s, W_k x_i> / sqrt(d)) W_v x_i, in heads of width d.
    alpha is one learned number, 0 at the start, so that training starts with y = m.
    """

    def __init__(self, input_width: int, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        # no biases: of keys, the gradient would be 0 (softmax ignores what they share); the others' are in llm_proj's
        self.key = nn.Linear(input_width, width, bias=False)
        self.value = nn.Linear(input_width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1))
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)  # keeps the size of tokens, so alpha is what share is read anew

    def forward(self, tokens: Tensor, x: Tensor, source: MergeMap) -> Tensor:
        """tokens (B, L', D_c), x (B, L, D_v), source: which token each x is in -> (B, L', D_c)."""

        def heads(projected):
            return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, d)

        own = source.slot[:, None] == torch.arange(source.num_slots, device=x.device)[:, None]  # (B, L', L)
        if isinstance(source, RaggedMap):  # padding has no patch; a softmax over nothing would not be a number
            own = own | ~source.alive().unsqueeze(2)
        query, key, value = heads(self.query(tokens)), heads(self.key(x)), heads(self.value(x))
        read = F.scaled_dot_product_attention(query, key, value, own[:, None])  # (B, H, L', d)
        change = self.output(read.transpose(1, 2).flatten(2))  # (B, L', D_c)
        return tokens + (self.alpha * change).to(tokens.dtype)
