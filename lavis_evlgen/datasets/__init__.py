"""Caption data sets and their builders; importing this registers the builders with LAVIS."""

from lavis_evlgen.datasets.base import CaptionDataset, CaptionedImage
from lavis_evlgen.datasets.errors import DataError, UnreadableImage
from lavis_evlgen.datasets.image_captions import ImageCaptionDataset, ImageCaptionsBuilder
from lavis_evlgen.datasets.scenes import ScenesBuilder, ScenesDataset

__all__ = [
    "CaptionDataset",
    "CaptionedImage",
    "DataError",
    "ImageCaptionDataset",
    "ImageCaptionsBuilder",
    "ScenesBuilder",
    "ScenesDataset",
    "UnreadableImage",
]
