"""Small pictures and captions files, written where a test wants them."""

import json
import struct
import zlib
from pathlib import Path

from omegaconf import OmegaConf
from PIL import Image

from lavis_evlgen.datasets import ImageCaptionsBuilder

ROWS = [(f"{n}.jpg", f"Picture {n}, seen {way} .") for n in range(6) for way in ("once", "twice")]


def write_pictures(folder, count=6):
    folder.mkdir(exist_ok=True)
    for n in range(count):
        Image.new("RGB", (40 + n, 30), (40 * n, 10, 10)).save(folder / f"{n}.jpg")
    return folder


def write_csv(path, rows=ROWS, header="image,caption"):
    lines = [header] + [f'{image},"{caption}"' for image, caption in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def coco(rows=ROWS):
    images = [{"id": 10 + n, "file_name": name} for n, name in enumerate(dict(rows))]
    ids = {image["file_name"]: image["id"] for image in images}
    annotations = [{"image_id": ids[name], "caption": text} for name, text in rows]
    return {"images": images, "annotations": annotations}


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def builder(tmp_path, **keys):
    config = OmegaConf.load(ImageCaptionsBuilder.default_config_path()).datasets.image_captions
    for stage in ("train", "eval"):
        config.vis_processor[stage].image_size = 16
    keys = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    keys = {"images": str(tmp_path / "images"), **keys}
    return ImageCaptionsBuilder(OmegaConf.merge(config, keys))


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels; they are not there."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
