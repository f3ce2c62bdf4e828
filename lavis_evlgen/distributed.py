"""Processes: start them (gloo or nccl), talk between them, and behave the same when there is only one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: str = "auto") -> torch.device:
    """Join the process group when launched by torch.distributed.run; returns this rank's device.

    device: auto (CUDA where present), cuda, cpu. CPU ranks talk over gloo, CUDA ranks over nccl.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"run.device: {device!r} is not one of auto, cuda, cpu; CUDA_VISIBLE_DEVICES chooses a GPU")
    wants_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if wants_cuda and not torch.cuda.is_available():
        raise RuntimeError("run.device=cuda, but torch sees no CUDA device; set run.device=cpu or auto")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if wants_cuda:
        torch.cuda.set_device(local_rank)
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if wants_cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return torch.device("cuda", local_rank) if wants_cuda else torch.device("cpu")


def stop():
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier():
    if initialized():
        dist.barrier()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of `x` over ranks, on every rank, in place; without a process group, `x` as it is."""
    if initialized():
        dist.all_reduce(x)
    return x


def gather_lists(rows: list) -> list:
    """All ranks' rows (picklable), in rank order, on every rank."""
    if not initialized():
        return rows
    parts = [None] * world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def from_main(value):
    """The main rank's `value` (picklable) on every rank."""
    return gather_lists([value if is_main() else None])[0]


class FailedOnMain(RuntimeError):
    """What the main rank could not do, on the other ranks: they end too, and leave the message to it."""


def on_main(call: Callable):
    """`call()` on the main rank alone; its result (picklable) on every rank. Every rank calls this.

    An error is raised on all ranks together: on the main rank as it came, elsewhere as FailedOnMain.
    """
    result, error = None, None
    if is_main():
        try:
            result = call()
        except Exception as caught:
            error = caught
    failed, result = from_main((None if error is None else str(error), result))
    if error is not None:
        raise error
    if failed is not None:
        raise FailedOnMain(failed)
    return result


def on_all(call: Callable[[], object]):
    """`call()` on every rank; where one fails, all end: that rank with its error, the others with FailedOnMain."""
    error = None
    try:
        call()
    except Exception as caught:
        error = caught
    failed = gather_lists([] if error is None else [str(error)])
    if error is not None:
        raise error
    if failed:
        raise FailedOnMain(failed[0])


def max_over_ranks(values: Sequence[float]) -> list[float]:
    """The largest of each of `values` over ranks, on every rank."""
    if not initialized():
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def any_rank(flag: bool) -> bool:
    """True on every rank when it is true on one."""
    return max_over_ranks([float(flag)])[0] > 0
