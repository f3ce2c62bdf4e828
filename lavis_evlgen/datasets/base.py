"""The common interface of our caption data sets: rows, references, counted losses, one collater."""

import hashlib
import json
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

from lavis_evlgen.datasets.reading import ReadableRows
from lavis_evlgen.media.errors import DataError


class CaptionedImage(NamedTuple):
    """One image of a data set: what `_load` needs to find it, its id, and its raw captions, best first.

    source: names what it was made from, such as the film of a clip, where the annotations say so.
    """

    image: Any
    image_id: int | str
    captions: tuple[str, ...]
    source: str | None = None


class CaptionDataset(ReadableRows):
    """Images with captions. Training rows are (image, caption) pairs, evaluation rows are images.

    Attributes: `name`, `split`, `is_train`, `max_bad_fraction` (share of unreadable samples, 0 to 1, above
    which a run should stop), `references` {image_id: raw captions of this split}, `sources` {image_id: what it was
    made from, where known}, `num_images`, `fingerprint`
    (sha256 hex digest of all images, ids and captions), `description` (one short line).

    A sample is a dict with `image` (3, H, W) float, `text_input` str (evaluation: the first caption),
    `image_id`, `instance_id` str (the row), and `bad`, a list of {"image", "reason"} for what could not be
    read on the way: training takes the next readable row instead, evaluation gives `image` None, which the
    collater drops. Subclasses say in `_load(row)` how a picture is had, or raise UnreadableImage.
    """

    TEXT_KEYS = ("text_input", "image_id", "instance_id")

    def __init__(self, name: str, split: str, items: Iterable[CaptionedImage], *, vis_processor=None,
                 text_processor=None, captions_per_image: int | None = None, max_bad_fraction: float = 0.01,
                 description: str = "", definition: Any = None):
        """`captions_per_image`: training uses this many captions of each image (None: all of them).
        `definition`: anything else that decides what a picture shows (JSON-able), for the fingerprint."""
        super().__init__(vis_processor, text_processor)
        if not 0 <= max_bad_fraction <= 1:
            raise DataError(f"{name}: max_bad_fraction={max_bad_fraction} must lie between 0 and 1")
        self.name, self.split, self.is_train = name, split, split == "train"
        self.max_bad_fraction = float(max_bad_fraction)
        self.references: dict[int | str, list[str]] = {}
        self.sources: dict[int | str, str] = {}
        digest = hashlib.sha256(json.dumps([split, captions_per_image, definition]).encode())
        for item in items:
            digest.update(json.dumps([item.image, item.image_id, item.captions]).encode())
            self._add(name, item, captions_per_image if self.is_train else 1)
        if not self.annotation:
            raise DataError(f"{name}: the {split} split is empty")
        self.num_images = len(self.references)
        self.fingerprint = digest.hexdigest()
        self.description = description or f"{name} {split}: {self.num_images} {self.noun}, {len(self)} rows"
        self._add_instance_ids()

    def _add(self, name: str, item: CaptionedImage, captions: int | None):
        if item.image_id in self.references:
            raise DataError(f"{name}: two {self.noun} of the {self.split} split have the id {item.image_id!r}")
        self.references[item.image_id] = list(item.captions)
        if item.source is not None:
            self.sources[item.image_id] = item.source
        for caption in item.captions[:captions]:
            self.annotation.append({"image": item.image, "image_id": item.image_id, "caption": caption})

    def _text(self, row: dict) -> dict:
        return {
            "text_input": self.text_processor(row["caption"]),
            "image_id": row["image_id"],
            "instance_id": row["instance_id"],
        }

    def source_of(self, row: dict) -> Hashable:
        return self.sources.get(row["image_id"], row["image_id"])
