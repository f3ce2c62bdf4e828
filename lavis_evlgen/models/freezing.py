"""Frozen means: no gradient, eval mode always. One place for it, and for the names of precisions."""

from __future__ import annotations

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def freeze(module: nn.Module) -> nn.Module:
    """Turn off gradients and put in eval mode; the owner keeps it there (override `train`)."""
    return module.requires_grad_(False).eval()


def check_precision(value: str, key: str) -> str:
    if value not in DTYPES:
        raise ValueError(f"{key}: {value!r} is not one of {', '.join(DTYPES)}")
    return value
