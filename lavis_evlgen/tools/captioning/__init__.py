"""Captions of many pictures: in batches, to a file or to new shards, resumable, by one process or several."""

from lavis_evlgen.tools.captioning.batches import Captioned, caption_images

__all__ = ["Captioned", "caption_images"]
