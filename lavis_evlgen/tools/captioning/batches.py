"""`caption_images`: pictures are read and decoded in data workers, and captioned in batches, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lavis_evlgen.datasets.loading import eval_loader
from lavis_evlgen.media.file_checks import Unreadable
from lavis_evlgen.tools.caption import captions_of, pixels

BATCH_SIZE, WORKERS = 16, 2


class Captioned(NamedTuple):
    """What came of picture `number`: its `caption`, or the `error` that says why there is none, each one line."""

    number: int
    caption: str | None
    error: str | None = None


def caption_images(
    model,
    processor,
    images: Sequence,
    *,
    batch_size: int = BATCH_SIZE,
    workers: int = 0,
    prompt: str | None = None,
    decoding: dict | None = None,
    start: int = 0,
) -> Iterator[Captioned]:
    """One `Captioned` for each of `images`, in their order, as batches are done.

    model: an EVLGen in eval mode; processor: its evaluation processor, (3, H, W) of a picture or (3, T, H, W) of a
    clip. images: a sequence of paths, PIL pictures or `Encoded` (content of a file, name); item number i is asked for
    in a data worker (`workers` processes; 0: in this one). At most `batch_size` are captioned together, as one tensor
    (B, 3, H, W). prompt: what captions begin with, None: the model's. decoding: arguments of `model.generate`
    (num_beams, max_length, ...), such as `model.decoding` of a bundle. start: the number to begin at.

    A picture that cannot be read is a `Captioned` with an error, and the others of its batch are captioned without it.
    Raises ValueError for a model in training mode, a batch size below 1 and other arguments that cannot be.

    >>> for number, caption, error in caption_images(model, vis["eval"], paths, batch_size=32): ...
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before captions are made")
    if not isinstance(batch_size, int) or batch_size < 1 or workers < 0 or start < 0:
        raise ValueError(f"batch_size={batch_size}, workers={workers}, start={start}: give whole numbers, a batch size "
                         "of at least 1 and no number below 0")  # fmt: skip
    if not hasattr(images, "__len__") or isinstance(images, str | bytes):
        raise ValueError(f"images: a {type(images).__name__} is no sequence of pictures; give a list")
    if (decoding or {}).get("num_captions", 1) != 1:
        raise ValueError("decoding: num_captions must be 1, for there is one caption of each picture")
    return _batches(model, _Pictures(images, processor), batch_size, workers, prompt, decoding or {}, start)


def _batches(model, pictures, batch_size, workers, prompt, decoding, start) -> Iterator[Captioned]:
    device = next(model.parameters()).device
    loader = eval_loader(pictures, batch_size, 0, 1, workers, device.type == "cuda", slice(start, None))
    for facts, image in loader:
        captions = iter(() if image is None else captions_of(model, image.to(device), prompt, decoding))
        for number, error in facts:
            yield Captioned(number, next(captions) if error is None else None, error)


class _Pictures(Dataset):
    """Number -> (number, pixels or None, why they are None)."""

    def __init__(self, images: Sequence, processor):
        self.images, self.processor = images, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[int, Tensor | None, str | None]:
        try:
            return number, pixels(self.processor, self.images[number]), None
        except Unreadable as error:
            return number, None, " ".join(error.reason.split())

    @staticmethod
    def collater(samples: list[tuple]) -> tuple[list[tuple[int, str | None]], Tensor | None]:
        """[(number, error)] of all, and the readable ones as (B, 3, H, W), None where there is none."""
        readable = [image for _, image, _ in samples if image is not None]
        return [(number, error) for number, _, error in samples], torch.stack(readable) if readable else None
