"""Write tar shards from a folder of pictures and a captions file, for `image_shards` and for webdataset."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from lavis_evlgen.datasets.annotations.captions import read_captions_file
from lavis_evlgen.datasets.base import CaptionedImage
from lavis_evlgen.datasets.builders.image_captions import group_by_image, split_items
from lavis_evlgen.datasets.seeding import shuffled
from lavis_evlgen.media.errors import DataError, UnreadableImage
from lavis_evlgen.media.images import open_image

_KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that are written as they are
_SAY_EVERY = 15.0  # seconds


@dataclass
class Written:
    """What `write_shards` wrote: the shards' brace list, how many samples, and what it left out."""

    shards: str
    samples: int = 0
    unreadable: list[UnreadableImage] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # rows of the captions file without a usable caption


def write_shards(out, images, captions, *, columns=None, split: str | None = None, per_shard: int = 1000,
                 seed: int = 0, max_bad_fraction: float = 0.01, say: Callable[[str], None] = print) -> Written:
    """Shards `out`/00000.tar, ... of KEY.jpg (png, webp) and KEY.json, `per_shard` samples each.

    images, captions, columns: as the keys of `image_captions`; split: only the images that the file puts into it.
    One sample is one image; its json holds `caption` (a list where there are several), `image` and `image_id`. The
    images are written in an order drawn from `seed`, so that a shard is a fair sample of the whole. Every picture is
    decoded once; those that cannot be are left out and counted. Nothing is left at `out` unless all went well:
    raises DataError where `out` exists, where there is nothing to write, or above `max_bad_fraction`.
    """
    out = Path(out)
    if per_shard < 1:
        raise DataError(f"--per-shard {per_shard} must be at least 1")
    if out.exists():
        raise DataError(f"{out} is there already; name a folder that is not, and it will be made")
    if not Path(images).is_dir():
        raise DataError(f"--images {images} is not a folder here ({Path.cwd()})")
    items, problems = _items(captions, columns, split)
    if len(problems) > max_bad_fraction * (len(items) + len(problems)):
        words = f"{len(problems)} rows of {captions} cannot be used, such as {problems[0]}"
        raise DataError(f"{words}; fix them, or raise --max-bad-fraction")
    count = -(-len(items) // per_shard)
    digits = max(5, len(str(count - 1)))
    temporary = out.with_name(f".{out.name}.unfinished")
    try:
        temporary.mkdir(parents=True)
    except FileExistsError:
        words = f"{temporary} is there: another `evlgen shards` writes here, or was killed"
        raise DataError(f"{words}; in the second case, remove it") from None
    try:
        found = _write(temporary, Path(images), list(shuffled(items, seed)), per_shard, digits, max_bad_fraction, say)
        found.problems = problems
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # renamed, where all went well
    last = -(-found.samples // per_shard) - 1
    found.shards = f"{out}/{{{0:0{digits}d}..{last:0{digits}d}}}.tar"
    return found


def _items(captions, columns, split) -> tuple[list[CaptionedImage], list[str]]:
    file = read_captions_file(captions, columns)
    if split is None:
        items = group_by_image(str(captions), file.rows)
    else:
        splits = split_items(str(captions), file.rows, "from_file")
        if split not in splits:
            raise DataError(f"{captions} has no images of the split {split!r}; there are {', '.join(splits)}")
        items = splits[split]
    if not items:
        raise DataError(f"{captions} holds no captioned image")
    return items, file.problems


def _write(folder: Path, images: Path, items, per_shard, digits, max_bad_fraction, say) -> Written:
    found, tar = Written(""), None
    started = said = time.monotonic()
    try:
        for done, item in enumerate(items, start=1):
            try:
                kind, content = _picture(images / item.image)
            except UnreadableImage as error:
                found.unreadable.append(error)
                _check(found, len(items), max_bad_fraction)
                continue
            if found.samples % per_shard == 0:
                if tar is not None:
                    tar.close()
                shard = folder / f"{found.samples // per_shard:0{digits}d}.tar"
                tar = tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT)
            _add(tar, f"{found.samples:09d}", kind, content, item)
            found.samples += 1
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                left = (said - started) / done * (len(items) - done)
                say(f"{done} of {len(items)} images, {len(found.unreadable)} unreadable, {left:.0f} s left")
    finally:
        if tar is not None:
            tar.close()
    if not found.samples:
        raise DataError(f"none of {len(items)} images can be read; the first is {found.unreadable[0]}")
    return found


def _check(found: Written, total: int, max_bad_fraction: float):
    if len(found.unreadable) > max_bad_fraction * total:
        raise DataError(
            f"{len(found.unreadable)} of {total} images are unreadable so far, more than --max-bad-fraction "
            f"{max_bad_fraction:g} allows; the first: {found.unreadable[0]}. Nothing was written"
        )


def _picture(path: Path) -> tuple[str, bytes]:
    """(extension, content) of the picture at `path`: as it is where shards can hold it, else as PNG."""
    image = open_image(path)
    with Image.open(path) as header:
        kind = _KEPT.get(header.format)
    if kind:
        return kind, path.read_bytes()
    content = io.BytesIO()
    image.save(content, "PNG")
    return "png", content.getvalue()


def _add(tar: tarfile.TarFile, key: str, kind: str, content: bytes, item: CaptionedImage):
    captions = item.captions[0] if len(item.captions) == 1 else list(item.captions)
    row = {"caption": captions, "image": item.image, "image_id": item.image_id}
    for extension, data in ((kind, content), ("json", json.dumps(row, ensure_ascii=False).encode())):
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
