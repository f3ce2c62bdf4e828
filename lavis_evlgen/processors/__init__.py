"""Image and caption processors; importing this registers them with LAVIS."""

from lavis_evlgen.processors.captions import EvlgenCaptionProcessor
from lavis_evlgen.processors.images import EvlgenImageEvalProcessor, EvlgenImageTrainProcessor

__all__ = ["EvlgenCaptionProcessor", "EvlgenImageEvalProcessor", "EvlgenImageTrainProcessor"]
