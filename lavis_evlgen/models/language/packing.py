"""Several texts of a picture in one row of the language model, behind the one front that they share.

    [front][text 1][text 2]...[text N]      front: the visual prompt, and the BOS where it stands before that

Each text sees the front and itself (prompt_attention.py), at the positions that it has when it stands behind the front
alone; the token that predicts its first one is the front's last. So its loss is what it is in a row of its own, and
gradients of all texts meet in the front, which is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_evlgen.models.language.tokenizer import pad_rows
from lavis_evlgen.nn.losses import IGNORE


def checked_counts(counts: Iterable[int] | None, pictures: int, texts: int) -> list[int] | None:
    """texts_per_image as a list, None where every picture has one text. Raises ValueError unless it gives each of the
    pictures at least one of the texts, and all are given."""
    if counts is None:
        return None
    counts = [int(count) for count in counts]
    if len(counts) != pictures or sum(counts) != texts or min(counts, default=1) < 1:
        raise ValueError(
            f"texts_per_image: {counts} for {pictures} pictures and {texts} texts; give each picture its number of "
            "texts, at least 1, and their sum is that of the texts"
        )
    return counts if max(counts, default=1) > 1 else None


def own_rows(visual: Tensor, mask: Tensor | None, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """visual (B, P, D), mask (B, P) | None -> the same for each of the N texts: (N, P, D), (N, P) | None."""
    repeats, total = torch.tensor(counts, device=visual.device), sum(counts)
    visual = visual.repeat_interleave(repeats, 0, output_size=total)
    return visual, None if mask is None else mask.repeat_interleave(repeats, 0, output_size=total)


class TextRows:
    """N texts, each a list of ids, as B rows. ids: of each row; counts: texts of each row."""

    def __init__(self, texts: Sequence[list[int]], counts: Sequence[int]):
        self.counts, self.ids, self.segments, self.places, self.starts = counts, [], [], [], []
        left = iter(texts)
        for count in counts:
            row, segments, places = [], [], []
            for number in range(1, count + 1):
                text = next(left)
                self.starts.append(len(row))
                row, segments, places = row + text, segments + [number] * len(text), [*places, *range(len(text))]
            self.ids.append(row)
            self.segments.append(segments)
            self.places.append(places)

    def segments_and_positions(self, front: Tensor) -> tuple[Tensor, Tensor]:
        """front (B, F): its mask -> (B, F + T) long each: 0 for the front and 1, 2, ... for the texts; positions."""
        segments = pad_rows(self.segments, 0, "right", front.device)  # (B, T)
        places = pad_rows(self.places, 0, "right", front.device)
        in_front = (front.cumsum(1) - 1).clamp_min(0)
        return (
            torch.cat([torch.zeros_like(front), segments], 1),
            torch.cat([in_front, front.sum(1, keepdim=True) + places], 1),
        )

    def of_each_text(self, hidden: Tensor, front: Tensor, labels: list[list[int]]) -> tuple[Tensor, Tensor]:
        """hidden (B, F + T, D), the front's mask (B, F), labels of the N texts -> hidden states (N, 1 + S, D), of the
        front's last token and of each text's, and labels (N, 1 + S) aligned with them; S: the longest text."""
        width, repeats = front.shape[1], torch.tensor(self.counts, device=front.device)
        last = width - 1 - front.flip(1).argmax(1)  # (B,): of each front's tokens that are none of padding
        own = [[width + start + n for n in range(len(text))] for start, text in zip(self.starts, labels, strict=True)]
        columns = pad_rows(own, 0, "right", front.device)  # (N, S)
        of_row = {"repeats": repeats, "output_size": len(labels)}
        columns = torch.cat([last.repeat_interleave(**of_row).unsqueeze(1), columns], 1)
        rows = torch.arange(len(front), device=front.device).repeat_interleave(**of_row).unsqueeze(1)  # (N, 1)
        return hidden[rows, columns], F.pad(pad_rows(labels, IGNORE, "right", front.device), (1, 0), value=IGNORE)
