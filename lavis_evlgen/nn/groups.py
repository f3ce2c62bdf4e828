"""What else reads the group of patches that each merged token stands for: its mean.

docs/merging.md has the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
