"""Decode one image completely, of a file or of bytes, or say in one line why it cannot be read."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from lavis_evlgen.media.errors import UnreadableImage
from lavis_evlgen.media.file_checks import EMPTY, first_bytes, problem_with, wrong_content

ORIENTATION = ExifTags.Base.Orientation
# above every camera's own (100-megapixel backs give 102, phones 108); 360 MB once decoded, in each data worker
MOST_MEGAPIXELS = 120
# Pillow starts Ghostscript for it
STARTS_A_PROGRAM = ("EPS",)


def open_image(path, processor=None) -> Image.Image | Tensor:
    """The picture at `path`, fully decoded, as RGB (8 bits). Raises UnreadableImage, whatever is wrong.

    One of more than 120 million pixels (MOST_MEGAPIXELS) is refused by its header, before anything is decoded.
    Decoding happens here and not later, so that a truncated file fails where it can still be counted. A
    `processor` that says by `least_size(width, height)` how little it needs gets a JPEG decoded at 1/2, 1/4 or 1/8 of
    its size where that is enough: most of the decoder's work is then not done. One that `takes_pixels` may get a
    picture's pixels, uint8 (3, H, W), the same that Pillow would give, in less time.
    """
    if problem := problem_with(path):
        raise UnreadableImage(path, problem)
    return _decode(path, path, processor)


def decode_image(content: bytes, name: str, processor=None) -> Image.Image | Tensor:
    """As `open_image`, of a file's content; `name` says which in the error."""
    if not content:
        raise UnreadableImage(name, EMPTY)
    return _decode(io.BytesIO(content), name, processor)


def _decode(source, name, processor) -> Image.Image | Tensor:
    """source: a path, or bytes in memory."""
    least_size = getattr(processor, "least_size", None)  # LAVIS's processors have none and get the whole picture
    try:
        with _whole_files_only(), _opened(source) as image:
            whole = image.size
            if least_size is not None:
                image.draft(None, least_size(*image.size))  # does nothing to what is no JPEG
            if getattr(processor, "takes_pixels", False) and image.size == whole and _is_plain_jpeg(image):
                return _pixels_of_jpeg(source)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except UnreadableImage as error:
        raise UnreadableImage(name, error.reason) from None
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(name, _what_it_looks_like(source)) from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(name, f"too many pixels to open safely ({error})") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise UnreadableImage(name, f"broken or truncated ({type(error).__name__}: {error})") from None


@contextmanager
def _opened(source) -> Iterator[Image.Image]:
    """A picture whose header has been read. Raises UnreadableImage without a name for what is not to be decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from 89 megapixels on; ours is below
        opened = Image.open(source)
    with opened as image:
        width, height = image.size
        if width * height > MOST_MEGAPIXELS * 1e6:
            raise UnreadableImage(
                "", f"too many pixels to open safely ({width} x {height} are {width * height / 1e6:.1f} megapixels; at "
                f"most {MOST_MEGAPIXELS})"
            )  # fmt: skip
        if image.format in STARTS_A_PROGRAM:
            raise UnreadableImage("", f"{image.format}, which another program would have to draw; save it as PNG")
        yield image


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Whether an opened picture is a JPEG whose pixels are upright RGB as they are stored."""
    upright_rgb = image.mode == "RGB" and image.getexif().get(ORIENTATION, 1) == 1
    return image.format == "JPEG" and upright_rgb and _torch_decodes_jpeg()


def _pixels_of_jpeg(source) -> Tensor:
    """uint8 (3, H, W) of a JPEG. Raises UnreadableImage without a name."""
    content = source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
    try:
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition(", ")[2]  # behind the position in torchvision's source
        raise UnreadableImage("", f"broken or truncated ({reason})") from None


@cache
def _torch_decodes_jpeg() -> bool:
    """Whether this torchvision was built with a JPEG decoder, as all of its released wheels are."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "JPEG")
    try:
        _pixels_of_jpeg(content)
    except UnreadableImage:
        return False
    return True


_PILLOW_SWITCH = Lock()


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """LAVIS lets Pillow, process-wide, fill the rest of a truncated file with grey; here that is an error."""
    with _PILLOW_SWITCH:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits; what is transparent becomes white, and 16 bits are scaled, where Pillow would clip. Raises
    UnreadableImage, without a name, for numbers of unknown range."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UnreadableImage("", f"Pillow mode {image.mode}, whose range is not known; save it with 8 bits")
        return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _what_it_looks_like(source) -> str:
    head = first_bytes(source.getvalue() if isinstance(source, io.BytesIO) else source)
    return wrong_content(head, "picture") or "not an image format that Pillow can read"
