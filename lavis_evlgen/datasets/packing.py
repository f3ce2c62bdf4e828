"""Several texts of one picture as one training sample: the picture is read, augmented and encoded once for all of them.

The stream is one of groups: a picture with n texts has ceil(n / N) groups of up to N. Which texts stand together is a
function of (seed, epoch, picture), and each text is in one group of an epoch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from lavis_evlgen.datasets.seeding import mix, shuffled

if TYPE_CHECKING:
    from lavis_evlgen.datasets.base import ReadableRows


class TextGroups(Dataset):
    """The training rows of `dataset` in groups of up to `most` rows of one picture: (epoch, group) in, sample out.

    seed: of the order, the data set's own. A sample is that of ReadableRows.group_sample; in place of a group whose
    picture cannot be read stands the next one that can.
    """

    def __init__(self, dataset: ReadableRows, most: int, seed: int):
        self.dataset, self.most, self.seed, self.collater = dataset, most, seed, dataset.collater
        rows: dict = {}
        for number, row in enumerate(dataset.annotation):
            rows.setdefault(row["image_id"], []).append(number)
        # arrays: every data worker would get a copy of lists of millions of numbers
        self._rows = np.concatenate([np.asarray(own, dtype=np.int64) for own in rows.values()])  # picture by picture
        counts = [len(own) for own in rows.values()]
        self._first_row = np.cumsum([0, *counts])  # in _rows, of each picture
        self._first_group = np.cumsum([0, *(-(-count // most) for count in counts)])

    def __len__(self) -> int:
        return int(self._first_group[-1])

    @property
    def pictures(self) -> int:
        return len(self._first_group) - 1

    def rows(self, epoch: int, group: int) -> list[int]:
        """Numbers of the rows of a group."""
        picture = int(np.searchsorted(self._first_group, group, side="right")) - 1
        own = self._rows[self._first_row[picture] : self._first_row[picture + 1]].tolist()
        order = list(shuffled(own, mix(self.seed, epoch, picture)))
        first = (group - int(self._first_group[picture])) * self.most
        return order[first : first + self.most]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, group = key
        numbers = (self.rows(epoch, (group + step) % len(self)) for step in range(len(self)))
        groups = ([self.dataset.annotation[number] for number in own] for own in numbers)
        return self.dataset.first_readable(groups, self.dataset.group_sample, f"group {group}")


def in_a_row(samples: list[dict]) -> tuple[list[dict], dict[str, list[int]]]:
    """(what each text of a batch says, {`texts_per_image`: B numbers of 1 or more}).

    Samples without `texts` are of one text each and say it themselves; the batch then has no `texts_per_image`.
    """
    if not samples or "texts" not in samples[0]:
        return samples, {}
    texts = [text for sample in samples for text in sample["texts"]]
    return texts, {"texts_per_image": [len(sample["texts"]) for sample in samples]}
