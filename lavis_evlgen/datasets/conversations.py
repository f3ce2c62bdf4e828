"""The data set of conversations: a row is one conversation about one picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence

from lavis_evlgen.datasets.annotations.conversations import ConversationRow
from lavis_evlgen.datasets.base import ReadableRows


class ConversationDataset(ReadableRows):
    """Conversations about images.

    Attributes: as QuestionDataset's, without answers. A sample is a dict with `image` (3, H, W) float, `conversations`
    [{"role", "content"}, ...] as chat templates take them, `image_id`, `conversation_id`, `instance_id` (str, the row)
    and `bad` as in CaptionDataset. Subclasses define `_load(row)`.
    """

    TEXT_KEYS = ("conversations", "image_id", "conversation_id", "instance_id")

    def __init__(self, name: str, split: str, rows: Iterable[ConversationRow], *, vis_processor=None,
                 max_bad_fraction: float = 0.01):
        super().__init__(name, split, vis_processor, None, max_bad_fraction)
        digest = hashlib.sha256(json.dumps([split]).encode())
        for row in rows:
            digest.update(json.dumps([row.image, row.image_id, row.messages]).encode())
            messages = [{"role": role, "content": words} for role, words in row.messages]
            own = {"image": row.image, "image_id": row.image_id, "conversation_id": row.conversation_id}
            self.annotation.append({**own, "messages": messages})
        self.fingerprint = digest.hexdigest()
        self._completed()

    def _completed(self):
        self.num_images = len({row["image_id"] for row in self.annotation})
        self.description = f"{self.name} {self.split}: {self.num_images} images, {len(self)} conversations"
        self._complete()

    def shorten(self, cut: Callable[[Sequence[dict]], list[dict] | None]) -> tuple[int, int]:
        """Replace the messages of each row by cut(messages), and drop rows for which that is None.

        Returns how many were shortened and how many dropped. Raises DataError where none is left.
        """
        kept, shorter = [], 0
        for row in self.annotation:
            messages = cut(row["messages"])
            if messages is not None:
                shorter += len(messages) < len(row["messages"])
                kept.append({**row, "messages": messages})
        dropped = len(self.annotation) - len(kept)
        self.annotation = kept
        self._completed()
        return shorter, dropped

    def _text(self, row: dict) -> dict:
        return {"conversations": row["messages"], **{key: row[key] for key in self.TEXT_KEYS[1:]}}
