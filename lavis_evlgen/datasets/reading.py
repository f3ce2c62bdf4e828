"""Rows whose pictures may not be readable: training goes on with the next one, evaluation leaves it out and says so."""

from collections.abc import Hashable, Iterable

import torch
from lavis.datasets.datasets.base_dataset import BaseDataset
from PIL import Image
from torch import Tensor

from lavis_evlgen.media.errors import DataError
from lavis_evlgen.media.file_checks import Unreadable

MAX_TRIES = 64  # distinct unreadable images in a row before a training sample is given up


class ReadableRows(BaseDataset):
    """The reading half of our data sets: row number in, sample out.

    Needs `name`, `split`, `is_train` and `annotation`, a list of rows with `image_id`. Subclasses say in
    `_load(row)` how a picture or clip is had, or raise Unreadable, and in `_text(row)` what a sample holds besides
    `image` and `bad`: the keys `TEXT_KEYS`.
    """

    TEXT_KEYS: tuple[str, ...]

    noun = "images"  # what the rows are about, in messages

    def _load(self, row: dict) -> Image.Image | Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say how a row's picture is loaded")

    def _text(self, row: dict) -> dict:
        raise NotImplementedError(f"{type(self).__name__} must say what a row's sample holds besides its picture")

    def _sample(self, row: dict, image: Image.Image | None, bad: list[dict]) -> dict:
        text = self._text(row)
        return {"image": None if image is None else self.vis_processor(image), **text, "bad": bad}

    def collater(self, samples: list[dict]) -> dict:
        """Stack samples into a batch: `image` (B, 3, H, W), or None where none could be read; the rest lists of
        length B, except `bad`: every unreadable image met, those of dropped samples included."""
        kept = [sample for sample in samples if sample["image"] is not None]
        return {
            **self._texts(kept),
            "image": torch.stack([sample["image"] for sample in kept]) if kept else None,  # (B, 3, H, W)
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
        bad, failed = [], set()
        for step in range(len(self)):
            row = self.annotation[(index + step) % len(self)]
            if row["image_id"] in failed:  # the neighbouring rows are often captions of the same broken image
                continue
            try:
                return self._sample(row, self._load(row), bad)
            except Unreadable as error:
                failed.add(row["image_id"])
                bad.append({"image": error.path, "reason": error.reason})
            if len(failed) == MAX_TRIES:
                break
        raise DataError(
            f"{self.name}: {len(bad)} {self.noun} in a row cannot be read, from row {index} of {self.split} "
            f"on; the first is {bad[0]['image']} ({bad[0]['reason']}). Check the {self.noun} folder."
        )

    def _eval_sample(self, row: dict) -> dict:
        try:
            return self._sample(row, self._load(row), [])
        except Unreadable as error:  # another picture would be scored against the wrong references
            return self._sample(row, None, [{"image": error.path, "reason": error.reason}])
