"""What our data sets share: rows with images that may be unreadable, a collater; caption data sets."""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from lavis.datasets.datasets.base_dataset import BaseDataset
from PIL import Image
from torch import Tensor

from lavis_evlgen.datasets.cached_features import CachedFeatures
from lavis_evlgen.datasets.facts import DatasetFacts
from lavis_evlgen.datasets.packing import in_a_row
from lavis_evlgen.media.errors import DataError
from lavis_evlgen.media.file_checks import Unreadable

MAX_TRIES = 64  # distinct unreadable images in a row before a training sample is given up


class ReadableRows(DatasetFacts, BaseDataset):
    """Rows whose images may be unreadable: row number in, sample out.

    Training takes the next readable row instead, evaluation leaves the row out; both name what they could not read.
    Subclasses fill `annotation`, a list of rows with `image_id`, and then call `_complete()`. Their `_load(row)`
    returns the image or video of a row, or raises Unreadable; their `_text(row)` returns what a sample holds besides
    `image` and `bad`: the keys `TEXT_KEYS`. Raises DataError for `max_bad_fraction` outside of 0 to 1.

    With `features`, `image` is not the processed picture (3, H, W) but its stored tokens (L, D_v), those of `epoch`,
    and no picture is read.
    """

    TEXT_KEYS: tuple[str, ...]
    features: CachedFeatures | None = None
    epoch = 0  # of the training sample that is asked for next

    def __init__(self, name: str, split: str, vis_processor, text_processor, max_bad_fraction: float):
        super().__init__(vis_processor, text_processor)
        if not 0 <= max_bad_fraction <= 1:
            raise DataError(f"{name}: max_bad_fraction={max_bad_fraction} must lie between 0 and 1")
        self.name, self.split, self.is_train = name, split, split == "train"
        self.max_bad_fraction = float(max_bad_fraction)

    def _complete(self):
        if not self.annotation:
            raise DataError(f"{self.name}: the {self.split} split is empty")
        self._add_instance_ids()

    def _load(self, row: dict) -> Image.Image | Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _load")

    def _text(self, row: dict) -> dict:
        raise NotImplementedError(f"{type(self).__name__} must define _text")

    def file_of(self, row: dict) -> str | None:
        """Path of the file that is this row's picture; None where it is drawn, or inside another file."""
        return None

    def processed(self, row: dict) -> Tensor:
        """(3, H, W): the picture of a row as its processor gives it. Raises Unreadable."""
        return self.vis_processor(self._load(row))

    def _open(self, row: dict) -> Image.Image | Tensor:
        """The picture of a row, or its stored tokens, which `_ready` then makes what a sample holds."""
        return self._load(row) if self.features is None else self.features.tokens(row["image"], self.epoch)

    def _ready(self, opened: Image.Image | Tensor | None) -> Tensor | None:
        return self.vis_processor(opened) if opened is not None and self.features is None else opened

    def _sample(self, row: dict, opened: Image.Image | Tensor | None, bad: list[dict]) -> dict:
        text = self._text(row)
        return {"image": self._ready(opened), **text, "bad": bad}

    def group_sample(self, rows: list[dict], bad: list[dict]) -> dict:
        """Rows of one picture as one sample: `image`, `texts` (of each row, what `_text` returns) and `bad`."""
        opened, texts = self._open(rows[0]), [self._text(row) for row in rows]
        return {"image": self._ready(opened), "texts": texts, "bad": bad}

    def collater(self, samples: list[dict]) -> dict:
        """Stack samples into a batch: `image` (B, 3, H, W), or (B, L, D_v) of stored tokens, or None where none could
        be read; the rest lists of length B, except `bad`: every unreadable image met, those of dropped samples
        included.

        Of `group_sample`s, lists of all texts, those of a picture in a row, and `texts_per_image`: how many are whose.
        """
        kept = [sample for sample in samples if sample["image"] is not None]
        texts, counts = in_a_row(kept)
        return {
            **self._texts(texts),
            **counts,
            "image": torch.stack([sample["image"] for sample in kept]) if kept else None,
            "bad": [entry for sample in samples for entry in sample["bad"]],
        }

    def _texts(self, samples: list[dict]) -> dict[str, list]:
        return {key: [sample[key] for sample in samples] for key in self.TEXT_KEYS}

    def texts_of(self, indices: Iterable[int]) -> dict[str, list]:
        """What a batch of these rows holds besides `image` and `bad`; no picture is read."""
        return self._texts([self._text(self.annotation[index]) for index in indices])

    def source_of(self, row: dict) -> Hashable:
        """What `row` was made from: rows of one source are too alike to stand in for each other."""
        return row["image_id"]

    def pil_image(self, index: int) -> Image.Image:
        """The RGB picture of row `index`, as its processor gets it. Raises UnreadableImage."""
        picture = self._load(self.annotation[index])
        return Image.fromarray(picture.permute(1, 2, 0).numpy()) if isinstance(picture, Tensor) else picture

    def __getitem__(self, index: int) -> dict:
        if index < 0:
            index += len(self)
        if not self.is_train:
            return self._eval_sample(self.annotation[index])
        following = ([self.annotation[(index + step) % len(self)]] for step in range(len(self)))
        return self.first_readable(
            following, lambda rows, bad: self._sample(rows[0], self._open(rows[0]), bad), f"row {index}"
        )

    def first_readable(
        self, groups: Iterable[list[dict]], sample_of: Callable[[list[dict], list[dict]], dict], start: str
    ) -> dict:
        """sample_of(rows, bad) of the first group of rows (each of one picture) whose picture can be read.

        bad: the unreadable ones before it. Raises DataError after MAX_TRIES pictures; start: where that began.
        """
        bad, failed = [], set()
        for rows in groups:
            image_id = rows[0]["image_id"]
            if image_id in failed:  # the neighbouring rows are often captions of the same broken image
                continue
            try:
                return sample_of(rows, bad)
            except Unreadable as error:
                failed.add(image_id)
                bad.append({"image": error.path, "reason": error.reason})
            if len(failed) == MAX_TRIES:
                break
        raise DataError(
            f"{self.name}: {len(bad)} {self.media}s in a row cannot be read, from {start} of {self.split} "
            f"on; the first is {bad[0]['image']} ({bad[0]['reason']}). Check the {self.media}s folder."
        )

    def _eval_sample(self, row: dict) -> dict:
        try:
            return self._sample(row, self._open(row), [])
        except Unreadable as error:  # another picture would be scored against the wrong references
            return self._sample(row, None, [{"image": error.path, "reason": error.reason}])


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

    Attributes: `name`, `split`, `is_train`, `max_bad_fraction` (share of unreadable samples, 0 to 1, above which a
    run should stop), `references` {image_id: raw captions of this split}, `sources` {image_id: what it was made from,
    where known}, `num_images`, `fingerprint` (sha256 hex digest of all images, ids and captions), `description` (one
    short line).

    A sample is a dict with `image` (3, H, W) float, `text_input` str (evaluation: the first caption),
    `image_id`, `instance_id` str (the row), and `bad`, a list of {"image", "reason"} of what could not be read before
    it. In evaluation, `image` of an unreadable row is None, and the collater drops it. Subclasses define `_load(row)`.
    """

    TEXT_KEYS = ("text_input", "image_id", "instance_id")

    def __init__(self, name: str, split: str, items: Iterable[CaptionedImage], *, vis_processor=None,
                 text_processor=None, captions_per_image: int | None = None, max_bad_fraction: float = 0.01,
                 description: str = "", definition: Any = None):
        """`captions_per_image`: training uses this many captions of each image (None: all of them).
        `definition`: anything else that decides what a picture shows (JSON-able), for the fingerprint."""
        super().__init__(name, split, vis_processor, text_processor, max_bad_fraction)
        self.references: dict[int | str, list[str]] = {}
        self.sources: dict[int | str, str] = {}
        digest = hashlib.sha256(json.dumps([split, captions_per_image, definition]).encode())
        for item in items:
            digest.update(json.dumps([item.image, item.image_id, item.captions]).encode())
            self._add(name, item, captions_per_image if self.is_train else 1)
        self.num_images, self.fingerprint = len(self.references), digest.hexdigest()
        self.description = description or f"{name} {split}: {self.num_images} {self.media}s, {len(self)} rows"
        self._complete()

    def _add(self, name: str, item: CaptionedImage, captions: int | None):
        if item.image_id in self.references:
            raise DataError(f"{name}: two {self.media}s of the {self.split} split have the id {item.image_id!r}")
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

    def references_of(self, indices: Iterable[int], most: int) -> dict[str, list]:
        """A batch of the first `most` references of these evaluation rows' pictures, as TextGroups make them."""
        rows = [self.annotation[index] for index in indices]
        groups = [[{**row, "caption": text} for text in self.references[row["image_id"]][:most]] for row in rows]
        texts, counts = in_a_row([{"texts": [self._text(row) for row in group]} for group in groups])
        return {**self._texts(texts), **counts}

    def source_of(self, row: dict) -> Hashable:
        return self.sources.get(row["image_id"], row["image_id"])
