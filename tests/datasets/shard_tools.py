"""Small tar shards, good and bad, written where a test wants them."""

import io
import json
import tarfile
import zlib
from pathlib import Path

import torch
from PIL import Image

from lavis_evlgen.datasets import ImageShards
from lavis_evlgen.datasets.shards.names import shard_names

HTML = b"<!DOCTYPE html><html>Not found</html>"


def jpeg(n: int = 0, size: int = 12) -> bytes:
    content = io.BytesIO()
    Image.effect_noise((size, size), 60).convert("RGB").point(lambda v: (v + 7 * n) % 256).save(content, "JPEG")
    return content.getvalue()


def pixel_bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 400 million pixels."""
    content = io.BytesIO()
    Image.new("1", (8, 8)).save(content, "PNG")
    head = bytearray(content.getvalue())
    head[16:24] = (20_000).to_bytes(4, "big") * 2
    head[29:33] = zlib.crc32(head[12:29]).to_bytes(4, "big")
    return bytes(head)


def sample(key: str, caption="a picture", image: bytes | None = None) -> dict[str, bytes]:
    """Members of one good sample by name."""
    return {f"{key}.jpg": jpeg() if image is None else image, f"{key}.json": json.dumps({"caption": caption}).encode()}


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, lengths) -> str:
    """Shards of these many samples, captioned by shard and number; their brace list."""
    image = jpeg()
    for s, length in enumerate(lengths):
        members = {}
        for n in range(length):
            members |= sample(f"{n:06d}", f"shard {s} number {n}", image)
        write_shard(folder / f"{s:05d}.tar", members)
    return f"{folder}/{{00000..{len(lengths) - 1:05d}}}.tar"


def to_tensor(image) -> torch.Tensor:
    """(3, 1, 1): its mean colour, and a number drawn as an augmentation would."""
    mean = torch.tensor(image.resize((1, 1)).getpixel((0, 0))) / 255
    return (mean + torch.rand(())).reshape(3, 1, 1)


def image_shards(shards, name="shards", **keys) -> ImageShards:
    return ImageShards(name, shard_names(shards), vis_processor=to_tensor, text_processor=str, **keys)
