"""`run.deterministic`: the same bits from the same run on the same hardware, also on CUDA."""

from __future__ import annotations

import os

import torch


def be_deterministic(device: torch.device) -> None:
    """From here on torch takes deterministic algorithms alone; an operation that has none raises RuntimeError.

    Call it before anything is computed: cuBLAS reads its setting when it is first used. On CUDA attention is computed
    by matrix products and a softmax, because the backward passes of the fused kernels add up in any order.
    """
    # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    if device.type != "cuda":  # the CPU's fused attention is deterministic, and has the same switches
        return
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    if hasattr(torch.backends.cuda, "enable_cudnn_sdp"):  # since torch 2.5
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_math_sdp(True)
