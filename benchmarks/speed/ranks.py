"""A training step on one GPU and on several: pictures a second, and that all compute the step that one would.

    python -m benchmarks.speed.ranks --scale opt-2.7b --batch 64            # on two GPUs or more

Every rank has --batch pictures of its own, over nccl, on a CPU over gloo. Rank 0 times its step in DDP and, by itself,
the same step without the others; in between, all their pictures in micro-steps on one rank give the loss that the ranks
together should have. Random weights, nothing is downloaded.
"""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as processes

from benchmarks.common.random_models import add_step_arguments, build, samples, scales
from benchmarks.common.timing import alternate, parser, write
from lavis_evlgen import distributed
from lavis_evlgen.runners.optim import adamw
from lavis_evlgen.runners.step import TrainingStep
from lavis_evlgen.runners.trainer import with_ddp


def batch_of(rank: int, args, device: torch.device) -> dict:
    """Captions of one length: the mean over micro-steps is then the mean over all tokens."""
    return samples(scales()[args.scale], args.batch, device, seed=rank, tokens=12)


def on_rank(rank: int, ranks: int, port: int, folder: str, args):
    """One process: `alone` is timed by rank 0 while the others wait, then all time `together`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = distributed.start(args.device)
    model = build(scales()[args.scale], args.dtype, device).eval()  # without dropout: losses are compared
    optimizer = adamw(model, 0.0, 0.0, 0.999)  # and the weights stay
    together = TrainingStep(with_ddp(model, device), optimizer, device, {"amp": args.dtype})
    mine = itertools.repeat(batch_of(rank, args, device))
    loss = distributed.sum_over_ranks(together(mine)[0]["loss"].clone()).item() / ranks
    seconds = alternate({"together": lambda: together(mine)}, device, args.repetitions, float("inf"))
    distributed.barrier()
    distributed.stop()
    if rank == 0:
        alone = TrainingStep(model, optimizer, device, {"amp": args.dtype})
        seconds |= alternate({"alone": lambda: alone(mine)}, device, args.repetitions, args.seconds)
        whole = TrainingStep(model, optimizer, device, {"amp": args.dtype, "accum_grad_iters": ranks})
        expected = whole(iter([batch_of(each, args, device) for each in range(ranks)]))[0]["loss"].item()
        found = {"seconds": seconds, "loss": loss, "loss_on_one": expected}
        torch.save(found, Path(folder) / "found.pt")


def measure(args) -> dict:
    """The row of one scale."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        how = "fork" if args.device == "cpu" else "spawn"  # CUDA does not survive a fork
        processes.start_processes(on_rank, (args.ranks, port, folder, args), args.ranks, start_method=how)
        found = torch.load(Path(folder) / "found.pt", weights_only=True)
    seconds = found["seconds"]
    rates = {name: n * args.batch / seconds[name]["median"] for name, n in (("alone", 1), ("together", args.ranks))}
    same = {"scale": args.scale, "batch": args.batch, "dtype": args.dtype, "ranks": args.ranks}
    return {**same, **found, "images_per_s": rates, "loss_difference": abs(found["loss"] / found["loss_on_one"] - 1)}


def main():
    args_of = parser(__doc__, repetitions=9, seconds=60)
    add_step_arguments(args_of)
    args_of.add_argument("--ranks", type=int, default=2, help="processes, each on a GPU of its own (2)")
    args = args_of.parse_args()
    row = measure(args)
    print({name: f"{rate:.0f} images/s" for name, rate in row["images_per_s"].items()}, row["loss_difference"])
    write(f"ranks-{args.scale}", args, [row])


if __name__ == "__main__":
    main()
