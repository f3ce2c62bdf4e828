"""Checks of uploaded files: what is too large, or is no picture or clip, is refused before it is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lavis_evlgen.datasets import UnreadableImage
from lavis_evlgen.demo.describing import Refused
from lavis_evlgen.media.file_checks import EMPTY, first_bytes, wrong_content
from lavis_evlgen.media.images import open_image
from lavis_evlgen.media.video import UnreadableVideo, VideoFile, takes_clips

# formats that Pillow decodes itself; for some others (EPS) it starts a program
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# (offset, bytes) by which mp4 and mov, mkv and webm, avi are known
CONTAINERS = ((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"wide"), (0, b"\x1aE\xdf\xa3"), (8, b"AVI "))
_PREVIEW = 640  # pixels of the longer side


@dataclass(frozen=True)
class Limits:
    """Of one upload: `megabytes` of the file (10⁶ bytes), `megapixels` of the picture or of one frame of the clip."""

    megabytes: float = 20.0
    megapixels: float = 40.0


def read(path: str, processor, limits: Limits) -> Tensor:
    """(1, 3, H, W) of a picture; by a processor of clips (1, 3, T, H, W), T = 1 of a picture. Raises Refused."""
    is_picture = check(path, limits)
    clips = takes_clips(processor)
    if not clips and not is_picture:
        raise Refused(f"{Path(path).name}: a clip, and this model looks at pictures")
    if clips and is_picture and not hasattr(processor, "num_frames"):
        raise Refused(f"{Path(path).name}: a picture, and {type(processor).__name__} of this model reads clips only")
    try:
        if not clips:
            return processor(open_image(path))[None]
        return processor([open_image(path)])[None, :, :1] if is_picture else processor(path)[None]
    except (UnreadableImage, UnreadableVideo) as error:
        raise Refused(f"{Path(path).name}: {error.reason}") from error


def preview(path: str, limits: Limits) -> Image.Image:
    """A picture, or the middle frame of a clip, at most 640 pixels wide and high. Raises Refused."""
    is_picture = check(path, limits)
    try:
        if is_picture:
            image = open_image(path)
        else:
            clip = VideoFile(path)
            image = Image.fromarray(clip.frames([len(clip) // 2])[0])
    except (UnreadableImage, UnreadableVideo) as error:
        raise Refused(f"{Path(path).name}: {error.reason}") from error
    image.thumbnail((_PREVIEW, _PREVIEW))
    return image


def check(path: str, limits: Limits) -> bool:
    """Whether the file is a picture (else it is a clip), by its header alone.

    Raises Refused for what is too large, and for what is neither.
    """
    name, size = Path(path).name, Path(path).stat().st_size
    if size > limits.megabytes * 1e6:
        raise Refused(f"{name}: {size / 1e6:.1f} MB; at most {limits.megabytes:g} MB (--max-upload)")
    try:
        with Image.open(path) as image:
            kind, (width, height) = image.format, image.size
    except Image.DecompressionBombError:  # Pillow's own limit, 179 megapixels
        raise Refused(f"{name}: too many pixels; at most {limits.megapixels:g} megapixels (--max-pixels)") from None
    except UnidentifiedImageError:
        _check_clip(path, limits)
        return False
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise Refused(f"{name}: a broken picture ({type(error).__name__})") from error
    if kind not in FORMATS:
        raise Refused(f"{name}: a {kind} file; give one of {', '.join(FORMATS)}")
    _check_pixels(name, width, height, limits)
    return True


def _check_clip(path: str, limits: Limits):
    name, head = Path(path).name, first_bytes(path)
    if not head:
        raise Refused(f"{name}: {EMPTY}")
    # FFmpeg would also follow playlists, text files that name other files and addresses
    if not any(head[start : start + len(word)] == word for start, word in CONTAINERS):
        what = wrong_content(head, "picture") or "neither a picture nor a clip that can be read"
        raise Refused(f"{name}: {what}; give one of {', '.join(FORMATS)}, or a clip (mp4, mov, mkv, webm, avi)")
    header = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    width, height = (int(header.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    header.release()  # of a file that does not open both are 0, and decord will say what is wrong
    _check_pixels(name, width, height, limits)


def _check_pixels(name: str, width: int, height: int, limits: Limits):
    if width * height > limits.megapixels * 1e6:
        raise Refused(
            f"{name}: {width} × {height} are {width * height / 1e6:.1f} megapixels; at most {limits.megapixels:g} "
            "(--max-pixels)"
        )
