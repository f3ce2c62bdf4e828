"""Training pictures a second and core: our files and shards against LAVIS's data sets and processors.

    python -m benchmarks.speed.data

Photograph-like JPEGs are drawn into a temporary folder and read by both sides in one process without workers, from
file to batch: reading, decoding, random crop and mirroring to 224 x 224, normalising, stacking. `blip2_image_train`
does what evlgen_image_train does; `blip_image_train` adds RandAugment.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset  # noqa: F401  (what LAVIS's shards need: asked for before anything is drawn)
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.common.timing import alternate, parser, write
from lavis_evlgen.datasets import ImageShards
from lavis_evlgen.datasets.base import CaptionedImage
from lavis_evlgen.datasets.builder import registry  # LAVIS's, with its processors in it
from lavis_evlgen.datasets.builders.image_captions import ImageCaptionDataset
from lavis_evlgen.datasets.loading import train_loader
from lavis_evlgen.datasets.shards.names import shard_names
from lavis_evlgen.processors import EvlgenCaptionProcessor, EvlgenImageTrainProcessor

SIZE = 224
LAVIS_TRAIN = {"LAVIS, blip2_image_train": "blip2_image_train", "LAVIS, blip_image_train": "blip_image_train"}
SHARD = 64  # samples in a shard


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG (quality 90) of soft shapes and grain, whose size on disk is about a photograph's."""
    random = np.random.RandomState(seed)
    soft = Image.fromarray(random.randint(0, 256, (height // 32, width // 32, 3), dtype=np.uint8))
    pixels = np.asarray(soft.resize((width, height), Image.BICUBIC)).astype(np.int16)
    grain = random.randint(-8, 9, (height, width, 1))
    content = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=90)
    return content.getvalue()


def write_files(folder: Path, pictures: list[bytes]) -> list[dict]:
    """Pictures as files, and LAVIS's annotations of them as annotations.json; returns the annotations."""
    rows = []
    for n, content in enumerate(pictures):
        (folder / f"{n:04d}.jpg").write_bytes(content)
        rows.append({"image": f"{n:04d}.jpg", "image_id": n, "caption": f"a picture with the number {n}"})
    (folder / "annotations.json").write_text(json.dumps(rows))
    return rows


def write_shards(folder: Path, pictures: list[bytes], shards: int = 4) -> str:
    """Shards of SHARD samples each, the pictures over and over; their brace list."""
    numbers = itertools.cycle(range(len(pictures)))
    for s in range(shards):
        with tarfile.open(folder / f"{s:05d}.tar", "w") as tar:
            for n, number in enumerate(itertools.islice(numbers, SHARD)):
                caption = json.dumps({"caption": f"a picture with the number {number}"}).encode()
                for kind, content in (("jpg", pictures[number]), ("json", caption)):
                    info = tarfile.TarInfo(f"{n:06d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def our_processors() -> dict[str, EvlgenImageTrainProcessor]:
    """With shrink-on-load, as by default, and without."""
    found = {"ours": True, "ours, shrink_on_load: false": False}
    return {name: EvlgenImageTrainProcessor(SIZE, mean="clip", shrink_on_load=shrink) for name, shrink in found.items()}


def lavis_processors() -> dict[str, object]:
    """LAVIS's two training processors at the same size."""
    made = {name: registry.get_processor_class(key) for name, key in LAVIS_TRAIN.items()}
    return {name: processor(image_size=SIZE) for name, processor in made.items()}


def our_batches(dataset, batch: int) -> Iterator[dict]:
    """Batches as the runner gets them, without workers."""
    return iter(train_loader([dataset], None, batch, 0, 0, 1, 0, num_workers=0, pin_memory=False))


def endless(loader: DataLoader) -> Iterator[dict]:
    """Epoch after epoch."""
    while True:
        yield from loader


def of_files(folder: Path, rows: list[dict], batch: int) -> dict[str, Iterator[dict]]:
    """Batches of picture files by each side."""
    from lavis.datasets.datasets.coco_caption_datasets import COCOCapDataset

    items = [CaptionedImage(row["image"], row["image_id"], (row["caption"],)) for row in rows]
    text, found = EvlgenCaptionProcessor(), {}
    for name, processor in our_processors().items():
        same = {"images": str(folder), "vis_processor": processor, "text_processor": text}
        found[name] = our_batches(ImageCaptionDataset("files", "train", items, **same), batch)
    theirs = registry.get_processor_class("blip_caption")()
    for name, processor in lavis_processors().items():
        dataset = COCOCapDataset(processor, theirs, str(folder), [str(folder / "annotations.json")])
        found[name] = endless(DataLoader(dataset, batch, shuffle=True, drop_last=True, collate_fn=dataset.collater))
    return found


def of_shards(shards: str, batch: int) -> dict[str, Iterator[dict]]:
    """Batches of tar shards by each side."""
    from lavis.datasets.datasets.laion_dataset import LaionDataset

    text, found = EvlgenCaptionProcessor(), {}
    for name, processor in our_processors().items():
        dataset = ImageShards("shards", shard_names(shards), vis_processor=processor, text_processor=text)
        found[name] = our_batches(dataset, batch)
    theirs = registry.get_processor_class("blip_caption")()
    for name, processor in lavis_processors().items():
        found[name] = iter(DataLoader(LaionDataset(processor, theirs, shards).inner_dataset, batch))
    return found


def take(batches: Iterator[dict], count: int):
    for _ in range(count):
        next(batches)


def measure(width: int, height: int, args: argparse.Namespace) -> list[dict]:
    """A row for files and one for shards, of pictures of one size."""
    pictures = [photograph(width, height, n) for n in range(args.pictures)]
    same = {"picture": f"{width} x {height}", "bytes": sum(map(len, pictures)) // len(pictures), "batch": args.batch}
    same["timed"] = args.batch * args.batches
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files, shards = (Path(folder) / kind for kind in ("files", "shards"))
        for each in (files, shards):
            os.mkdir(each)
        both = {
            "files": of_files(files, write_files(files, pictures), args.batch),
            "shards": of_shards(write_shards(shards, pictures), args.batch),
        }
        for kind, batches in both.items():
            # a few batches at a time: a worker process runs one pipeline, whose code and memory stay in the caches
            calls = {name: lambda these=these: take(these, args.batches) for name, these in batches.items()}
            times = alternate(calls, torch.device("cpu"), args.repetitions, args.seconds, least=0)
            rows.append({"kind": kind, **same, "seconds": times})
            rates = {name: f"{same['timed'] / time['median']:.0f}/s" for name, time in times.items()}
            print(kind, same["picture"], rates, flush=True)
    return rows


def main():
    args_of = parser(__doc__, repetitions=15, seconds=20)
    args_of.set_defaults(device="cpu")
    args_of.add_argument("--batch", type=int, default=8, help="pictures (8)")
    args_of.add_argument("--batches", type=int, default=4, help="of one measurement (4)")
    args_of.add_argument("--pictures", type=int, default=24, help="different ones of each size (24)")
    args_of.add_argument("--sizes", nargs="+", default=["640x480", "1600x1200"], help="WIDTHxHEIGHT")
    args = args_of.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    write("data", args, [row for width, height in sizes for row in measure(width, height, args)])


if __name__ == "__main__":
    main()
