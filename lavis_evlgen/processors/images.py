"""Image processors: a PIL picture in, a normalised (3, H, W) float tensor out.

Training crops and resizes bytes by torch's vectorised kernels, in a tenth of Pillow's time; evaluation resizes by
Pillow, to the same pixels as LAVIS's processors. The two round differently: of photographs, by a step or two of 255.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from lavis.common.registry import registry
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import v2 as transforms
from torchvision.transforms.functional import InterpolationMode

from lavis_evlgen.config.keys import Settings, key
from lavis_evlgen.config.limits import LARGEST
from lavis_evlgen.processors.base import EvlgenProcessor

# Per-channel (mean, std) of pixels in 0..1, by the name of the training that used them.
STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
RATIO = (3 / 4, 4 / 3)  # least and most width over height of a crop, torchvision's


@dataclass(kw_only=True)
class ImageSettings(Settings):
    """Keys of all processors of pictures and clips."""

    image_size: int = key("side of the square tensor in pixels", 224, at_least=1, at_most=LARGEST["image_size"])
    mean: Literal[tuple(STATISTICS)] | list[float] | None = key(
        "clip, imagenet, half, or three numbers (pixels in 0..1)", "imagenet", at_least=-1000, at_most=1000
    )
    std: Literal[tuple(STATISTICS)] | list[float] | None = key(
        "as mean; left away, it follows the name given as mean", None, at_least=-1000, at_most=1000
    )


@dataclass(kw_only=True)
class CropSettings(ImageSettings):
    """Keys of all training processors."""

    min_scale: float = key(
        "smallest share of the picture's area that a crop keeps, above 0 up to 1 (1: no crop)", 0.5, at_least=1e-6,
        at_most=1.0,
    )  # fmt: skip
    flip: bool | None = key("mirror half of the pictures left to right (not where captions say left or right)", True)


_SHRINK = ("decode large JPEGs at 1/2, 1/4 or 1/8 of their size where nothing is enlarged by it afterwards "
           "(docs/training.md says what it changes)")  # fmt: skip


@dataclass(kw_only=True)
class ImageTrainSettings(CropSettings):
    shrink_on_load: bool | None = key(_SHRINK, True)


@dataclass(kw_only=True)
class ImageEvalSettings(ImageSettings):
    shrink_on_load: bool | None = key(_SHRINK, False)


def _statistic(processor: str, key: str, value) -> list[float]:
    if isinstance(value, str):
        return list(STATISTICS[value][key == "std"])
    numbers = [float(number) for number in value]
    if len(numbers) != 3 or (key == "std" and min(numbers) <= 0):
        raise ValueError(f"{processor}: {key}={numbers} must be three numbers{' above 0' * (key == 'std')}")
    return numbers


class ImageProcessor(EvlgenProcessor):
    """Base of the processors of pictures."""

    takes_pixels = False  # whether a picture may come as uint8 (3, H, W) too
    draws = False  # whether two tensors of one picture may differ
    # (width, height) of a picture -> the least width and height that it may be decoded at; None: its own
    least_size: Callable[[int, int], tuple[int, int]] | None = None

    def _build(self, steps: list):
        mean, std = self.settings.mean, self.settings.std
        if std is None:
            if not isinstance(mean, str):
                raise ValueError(f"{self.NAME}: mean is given in numbers, so std must be too")
            std = mean
        mean, std = _statistic(self.NAME, "mean", mean), _statistic(self.NAME, "std", std)
        self.statistics = torch.tensor([mean, std])  # (2, 3) of pixels in 0..1
        self.transform = transforms.Compose([*steps, pixels, partial(normalized, self.statistics)])


def pixels(picture: Image.Image | Tensor) -> Tensor:
    """uint8 (3, H, W) of a picture, its colours side by side in memory, as torch resizes fastest; tensors stay."""
    return picture if isinstance(picture, Tensor) else torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def cropped(image_size: int, min_scale: float, flip: bool, picture: Tensor) -> Tensor:
    """(..., 3, H, W) -> (..., 3, S, S), bytes: a random crop, resized, and mirrored at random.

    Draws what torchvision's RandomResizedCrop and RandomHorizontalFlip draw. min_scale=1: no crop.
    """
    if min_scale < 1:
        top, left, height, width = RandomResizedCrop.get_params(picture, (min_scale, 1.0), RATIO)
        picture = picture[..., top : top + height, left : left + width]
    batch = picture if picture.ndim == 4 else picture[None]
    square = F.interpolate(batch, (image_size, image_size), mode="bicubic", antialias=True)
    square = square if picture.ndim == 4 else square[0]
    return square.flip(-1) if flip and torch.rand(1) < 0.5 else square


def normalized(statistics: Tensor, colours: Tensor) -> Tensor:
    """float32 (..., 3, H, W) of uint8 ones; statistics (2, 3): mean and standard deviation of pixels in 0..1."""
    mean, std = statistics[..., None, None]  # (3, 1, 1) each
    return colours.contiguous().float().div_(255).sub_(mean).div_(std)


def least_for_crops(image_size: int, min_scale: float, width: int, height: int) -> tuple[int, int]:
    """The least (width, height) of a picture at which no crop of `min_scale` of its area or more has to be enlarged.

    min_scale 1 is the whole picture. A crop's shorter side is least at the aspect ratio that is furthest from square
    (RATIO); pictures longer than that are cropped over their whole shorter side.
    """
    if min_scale == 1:
        return image_size, image_size
    shortest = min(math.sqrt(width * height * min_scale * RATIO[0]), width, height)  # side of a crop
    return math.ceil(width * image_size / shortest), math.ceil(height * image_size / shortest)


def _resize(image_size: int):
    return transforms.Resize((image_size, image_size), interpolation=InterpolationMode.BICUBIC, antialias=True)


@registry.register_processor("evlgen_image_train")
class EvlgenImageTrainProcessor(ImageProcessor):
    """Random crop, resized bicubically to a square, and mirrored at random. Randomness is torch's global one.

    min_scale=1 keeps the whole picture (a plain resize) rather than cropping it to a random aspect ratio.
    """

    NAME = "evlgen_image_train"
    takes_pixels = True
    Settings = ImageTrainSettings

    def __init__(self, image_size: int | None = None, **keys):
        """`keys`: the others of `Settings`."""
        super().__init__(image_size=image_size, **keys)
        size, min_scale = self.settings.image_size, self.settings.min_scale
        self._build([pixels, partial(cropped, size, min_scale, self.settings.flip)])
        self.draws = min_scale < 1 or bool(self.settings.flip)
        if self.settings.shrink_on_load:
            self.least_size = partial(least_for_crops, size, min_scale)


@registry.register_processor("evlgen_image_eval")
class EvlgenImageEvalProcessor(ImageProcessor):
    """The whole picture, resized bicubically to a square."""

    NAME = "evlgen_image_eval"
    Settings = ImageEvalSettings

    def __init__(self, image_size: int | None = None, **keys):
        """`keys`: the others of `Settings`."""
        super().__init__(image_size=image_size, **keys)
        self._build([_resize(self.settings.image_size)])
        if self.settings.shrink_on_load:
            self.least_size = partial(least_for_crops, self.settings.image_size, 1.0)
