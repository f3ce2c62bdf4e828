"""Temporal attentive soft token contextualizing: each spatial position looks at itself in the other frames.

EVLGen, section 3.3 and eq. 7. Queries and keys are learned; the values are the tokens themselves, so the module can
only blend frames, never invent features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESIDUALS = ("gated", "convex", "paper")


class TemporalMixing(nn.Module):
    """(B, T, L, D) tokens of T frames -> the same shape, each blended with its own position in all frames.

    mixed = softmax(q k / sqrt(qk_width)) x over frames, in `num_heads` groups of channels. The scale is that of the
    whole width of queries and keys, not of a head, as the released weights were trained. `residual`:

    * `gated`: x + alpha * mixed (the released code). Identity at its start, alpha = 0; a static clip becomes
      (1 + alpha) x.
    * `convex`: x + alpha * (mixed - x). Identity on static clips for every alpha.
    * `paper`: x + mixed (eq. 7 as printed). No alpha; a static clip is doubled.

    max_frames: give each of so many frames a position embedding, zero at the start, added where queries and keys are
    computed and *not* to the values. Attention weights can then follow the order of frames (a frame may look at the
    one before it), so that what a frame holds after the MLP depends on its neighbours in time, and shows in a mean
    over frames; yet a static clip, whose frames are all alike, comes out as without the embedding whatever it learns.
    None: no embedding; permuting the frames permutes the result. Raises ValueError for sizes that cannot be.
    """

    def __init__(
        self,
        width: int,
        residual: str = "gated",
        max_frames: int | None = None,
        qk_width: int = 256,
        num_heads: int = 8,
    ):
        super().__init__()
        if residual not in RESIDUALS:
            raise ValueError(f"residual: {residual!r} is not one of {', '.join(RESIDUALS)}")
        if width % num_heads or qk_width % num_heads:
            raise ValueError(f"temporal mixing: widths {width} and {qk_width} do not divide into {num_heads} heads")
        self.residual, self.num_heads, self.scale = residual, num_heads, qk_width**-0.5
        self.query = nn.Linear(width, qk_width)
        self.key = nn.Linear(width, qk_width)
        self.alpha = None if residual == "paper" else nn.Parameter(torch.zeros(1))
        self.positions = None if max_frames is None else nn.Parameter(torch.zeros(max_frames, width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, L, D) -> (B, T, L, D). Raises ValueError for more frames than there are positions for."""
        return x + self.change(x)

    def change(self, x: Tensor) -> Tensor:
        """What `forward` adds to x (B, T, L, D), in x's dtype."""
        weights = self.weights(x)
        with torch.autocast(x.device.type, enabled=False):  # a blend keeps the precision of its tokens
            values = x.unflatten(-1, (self.num_heads, -1))  # (B, T, L, h, D/h)
            mixed = torch.einsum("blhts,bslhc->btlhc", weights.to(x.dtype), values).flatten(-2)  # (B, T, L, D)
        if self.residual == "paper":
            return mixed
        alpha = self.alpha.to(x.dtype)
        return alpha * (mixed - x if self.residual == "convex" else mixed)

    def weights(self, x: Tensor) -> Tensor:
        """How much frame t takes of frame s: (B, T, L, D) -> (B, L, heads, T, T), each row sums to 1."""
        if self.positions is not None:
            x = x + self._positions(x.shape[1]).to(x.dtype)
        # softmax ignores what all keys share: the true gradient of this bias is 0, Adam would follow its rounding
        bias = self.key.bias.detach() + 0 * self.key.bias
        query = self.query(x).unflatten(-1, (self.num_heads, -1))  # (B, T, L, h, 256/h)
        key = F.linear(x, self.key.weight, bias).unflatten(-1, (self.num_heads, -1))
        logits = torch.einsum("btlhc,bslhc->blhts", query * self.scale, key)
        return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def _positions(self, frames: int) -> Tensor:
        if frames > len(self.positions):
            raise ValueError(
                f"a clip of {frames} frames, but there are temporal positions for {len(self.positions)}: give fewer "
                "frames, or train with a larger num_frames"
            )
        return self.positions[:frames, None]  # (T, 1, D)
