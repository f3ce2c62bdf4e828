"""Open one image file completely, or say in one line why it cannot be opened."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from lavis_evlgen.datasets.errors import UnreadableImage


def open_image(path) -> Image.Image:
    """The picture at `path`, fully decoded, as RGB (8 bits). Raises UnreadableImage, whatever is wrong.

    Decoding happens here and not later, so that a truncated file fails where it can still be counted.
    """
    _check_file(path)
    try:
        with _whole_files_only(), Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnreadableImage as error:
        raise UnreadableImage(path, error.reason) from None
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(path, _what_it_looks_like(path)) from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(path, f"too many pixels to open safely ({error})") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise UnreadableImage(path, f"broken or truncated ({type(error).__name__}: {error})") from None


_PILLOW_SWITCH = Lock()


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """LAVIS tells Pillow, process-wide, to fill the rest of a truncated file with grey; not us."""
    with _PILLOW_SWITCH:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _check_file(path):
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise UnreadableImage(path, "no such file") from None
    except (OSError, ValueError) as error:
        raise UnreadableImage(path, str(error)) from None
    if os.path.isdir(path):
        raise UnreadableImage(path, "a folder, not a file")
    if size == 0:
        raise UnreadableImage(path, "the file is empty (0 bytes)")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB of 8 bits; what is transparent becomes white, and 16 bits are scaled, where Pillow would clip."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UnreadableImage("", f"Pillow mode {image.mode}, whose range is not known; save it with 8 bits")
        return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def _what_it_looks_like(path) -> str:
    with open(path, "rb") as file:
        head = file.read(512)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<body")):
        return "looks like HTML, perhaps an error page saved by a downloader"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the picture; run `git lfs pull` in that folder"
    if head and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return "looks like text, not a picture"
    return "not an image format that Pillow can read"
