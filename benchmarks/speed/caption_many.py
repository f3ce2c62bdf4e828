"""Pictures a second from files to captions: in batches that data workers read, against one after another.

    python -m benchmarks.speed.caption_many --scale opt-2.7b --batch 16 64 --workers 8    # on a GPU
    python -m benchmarks.speed.caption_many --scale quickstart                            # on a CPU

Random weights of the given sizes, nothing is downloaded; drawn photographs, read over and over. Every caption has
exactly --tokens new tokens. "one by one" is what `evlgen caption` does with picture files, "in batches" what it does
with --out, without writing. Both run in turn, and the wall clock counts: data workers are processes of their own.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common.random_models import build, scales
from benchmarks.common.timing import DTYPES, parser, spread, write
from benchmarks.speed.data import photograph
from lavis_evlgen.processors import EvlgenImageEvalProcessor
from lavis_evlgen.tools.caption import captions_of, pixels
from lavis_evlgen.tools.captioning import caption_images

WAYS = ("one by one", "in batches")


def photos(folder: Path, args: argparse.Namespace) -> list[Path]:
    """Files of --different photographs, named over and over."""
    width, height = map(int, args.size.split("x"))
    files = [folder / f"{n:04d}.jpg" for n in range(args.different)]
    for n, file in enumerate(files):
        file.write_bytes(photograph(width, height, n))
    return list(itertools.islice(itertools.cycle(files), args.pictures))


def calls_of(model, files: list[Path], batch: int, args: argparse.Namespace) -> dict[str, Callable[[], list[str]]]:
    """The captions of `files` in either way."""
    vis = EvlgenImageEvalProcessor(scales()[args.scale].image_size, mean="clip")
    decoding = {"num_beams": args.beams, "max_length": args.tokens, "min_length": args.tokens}
    device = torch.device(args.device)

    def one_by_one() -> list[str]:
        return [captions_of(model, pixels(vis, file)[None].to(device), None, decoding)[0] for file in files]

    def in_batches() -> list[str]:
        found = caption_images(model, vis, files, batch_size=batch, workers=args.workers, decoding=decoding)
        return [caption for _, caption, _ in found]

    return dict(zip(WAYS, (one_by_one, in_batches), strict=True))


def measure(model, files: list[Path], batch: int, args: argparse.Namespace) -> dict:
    """One row: both ways in turn, the first one first in every other repetition, after a batch of each."""
    for call in calls_of(model, files[:batch], batch, args).values():
        call()
    calls, seconds, said = calls_of(model, files, batch, args), {way: [] for way in WAYS}, {}
    began = time.perf_counter()
    for n in range(args.repetitions):
        if n and time.perf_counter() - began > args.seconds:
            break
        for way in WAYS[:: -1 if n % 2 else 1]:
            started = time.perf_counter()
            said[way] = calls[way]()
            seconds[way].append(time.perf_counter() - started)
    times = {way: spread(values) for way, values in seconds.items()}
    rates = {way: len(files) / times[way]["median"] for way in WAYS}
    print(batch, {way: f"{rate:.3g} pictures/s" for way, rate in rates.items()}, flush=True)
    same = sum(a == b for a, b in zip(*said.values(), strict=True))
    asked = {key: getattr(args, key) for key in ("scale", "dtype", "tokens", "beams", "workers", "pictures")}
    return {**asked, "batch": batch, "seconds": times, "pictures_per_s": rates, "same": same}


def main():
    args_of = parser(__doc__, repetitions=3, seconds=600)
    on_gpu = torch.cuda.is_available()
    args_of.add_argument("--scale", choices=scales(), default="opt-2.7b" if on_gpu else "quickstart")
    args_of.add_argument("--batch", type=int, nargs="+", default=[16, 64] if on_gpu else [16], help="pictures")
    args_of.add_argument("--workers", type=int, default=8 if on_gpu else 2, help="processes that read pictures")
    args_of.add_argument("--pictures", type=int, default=1000, help="captioned in each repetition (1000)")
    args_of.add_argument("--different", type=int, default=24, help="of them (24)")
    args_of.add_argument("--size", default="640x480", help="WIDTHxHEIGHT of the files (640x480)")
    args_of.add_argument("--tokens", type=int, default=20, help="new tokens of every caption (20)")
    args_of.add_argument("--beams", type=int, default=5, help="of the search (5)")
    args_of.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the ViT and the language model (bf16)")
    args = args_of.parse_args()
    model = build(scales()[args.scale], args.dtype, torch.device(args.device)).eval()
    with tempfile.TemporaryDirectory() as folder:
        files = photos(Path(folder), args)
        write(f"caption_many-{args.scale}", args, [measure(model, files, batch, args) for batch in args.batch])


if __name__ == "__main__":
    main()
