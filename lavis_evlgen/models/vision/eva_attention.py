"""Fused attention for LAVIS's EVA-CLIP, whose own writes out the probabilities of every head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lavis.models import eva_vit
from torch import Tensor, nn


class FusedEvaAttention(eva_vit.Attention):
    """`eva_vit.Attention` with the same weights and names, by scaled_dot_product_attention.

    Equal up to rounding; of B pictures and N tokens it never holds the (B, heads, N, N) probabilities, which matters
    most where gradients pass through the blocks (clips).
    """

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        bias = None
        if self.q_bias is not None:  # keys have none
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, H, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=rel_pos_bias, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def fuse_attention(vit: nn.Module) -> nn.Module:
    """Every `eva_vit.Attention` of a frozen `vit` becomes a FusedEvaAttention; one with position biases stays."""
    for module in vit.modules():
        if type(module) is eva_vit.Attention and module.relative_position_bias_table is None:
            module.__class__ = FusedEvaAttention
    return vit
