"""Image, video and caption processors; importing this registers them with LAVIS."""

from lavis_evlgen.processors.captions import EvlgenCaptionProcessor
from lavis_evlgen.processors.images import EvlgenImageEvalProcessor, EvlgenImageTrainProcessor
from lavis_evlgen.processors.videos import EvlgenVideoEvalProcessor, EvlgenVideoTrainProcessor

__all__ = [
    "EvlgenCaptionProcessor",
    "EvlgenImageEvalProcessor",
    "EvlgenImageTrainProcessor",
    "EvlgenVideoEvalProcessor",
    "EvlgenVideoTrainProcessor",
]
