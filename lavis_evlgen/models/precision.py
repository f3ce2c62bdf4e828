"""Frozen means: no gradient, eval mode always. One place for it, and for the names of precisions."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import nn

from lavis_evlgen.config import ConfigError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = (*DTYPES, "auto")
# what run.amp may say, and autocast's type
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, True: torch.float16, False: None, None: None, "fp32": None}
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 and ARM processors that multiply in bf16


def freeze(module: nn.Module) -> nn.Module:
    """Turn off gradients and put in eval mode; the owner keeps it there (override `train`)."""
    return module.requires_grad_(False).eval()


def check_precision(value: str, key: str) -> str:
    """fp32, fp16 or bf16; `auto` becomes what suits this machine. Raises ValueError that names `key`."""
    if value not in PRECISIONS:
        raise ValueError(f"{key}: {value!r} is not one of {', '.join(PRECISIONS)}")
    return auto_precision() if value == "auto" else value


def autocast_type(amp) -> torch.dtype | None:
    """The type that a value of run.amp (without `auto`) asks autocast for, None for none. Raises ConfigError."""
    if amp not in AMP:
        raise ConfigError(f"run.amp: {amp!r} is not one of false, bf16, fp16, true, auto")
    return AMP[amp]


def check_halves(amp, llm_precision: str):
    """amp: false, bf16, fp16, true; llm_precision: fp32, bf16, fp16. Raises ConfigError for the two halves at once."""
    halves = {"fp16" if amp is True else amp, llm_precision}
    if halves == {"bf16", "fp16"}:
        raise ConfigError(
            f"run.amp={amp} with model.llm_precision={llm_precision}: autocast cannot mix the two half precisions; "
            "make them the same, or set model.llm_precision=fp32"
        )


def auto_precision() -> str:
    """bf16 where the GPU (without one: the processor) has instructions for it, else fp32."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if BF16_FLAGS & processor_flags() else "fp32"


@cache
def processor_flags(path: str = "/proc/cpuinfo") -> frozenset[str]:
    """Names of the processor's instruction sets as Linux gives them; empty where it does not."""
    if not Path(path).exists():
        return frozenset()
    lines = (line.partition(":") for line in Path(path).read_text().splitlines())
    return frozenset(next((value.split() for key, _, value in lines if key.strip() in ("flags", "Features")), []))
