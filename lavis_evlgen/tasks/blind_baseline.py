"""The blind baseline of a loss or an answer: the same text under the visual prompt of another row's picture.

Which other row is a function of the data set alone, so neither batch size nor ranks change it. Each picture is paired
with the *text* of another row, which is cheap to have anywhere; no prompt has to be kept or sent. The measurement then
belongs to the row that the text is of, and `assign` hands it over once the rows of all ranks are together.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from lavis_evlgen.models.facts import facts_of
from lavis_evlgen.models.questions import questions_of


def partners(sources: Sequence[Hashable]) -> list[int | None]:
    """For each row, the row whose text goes under its picture: one of another source, each row at most once.

    Rows are put in an order drawn by a hash of their sources, those of one source together, and paired half a turn
    apart. None where that is a row of the same source, which needs a source with more than half of all rows.
    """
    names = [repr(source) for source in sources]
    digests = {name: hashlib.sha256(name.encode()).digest() for name in set(names)}
    order = sorted(range(len(names)), key=lambda row: (digests[names[row]], row))
    half = max(len(order) // 2, Counter(names).most_common(1)[0][1] if names else 0)
    found: list[int | None] = [None] * len(order)
    for position, row in enumerate(order):
        other = order[(position + half) % len(order)]
        found[row] = None if names[other] == names[row] else other
    return found


class BlindPairs:
    """The pairs of one data set (a ReadableRows), for the batches of an evaluation.

    texts: of each picture, how many references a loss is over, where the data set has so many (a CaptionDataset above
    1); their nats and tokens are summed.
    """

    def __init__(self, dataset, texts: int = 1):
        self.dataset, self.texts = dataset, texts
        self.partner = partners([dataset.source_of(row) for row in dataset.annotation])

    def __len__(self) -> int:
        return sum(other is not None for other in self.partner)

    def of(self, instance_ids: Iterable[str], wanted=lambda row: True) -> tuple[list[int], list[int]]:
        """(positions in the batch, rows whose text goes under the pictures there) for the pairs with wanted(row)."""
        pairs = [(position, self.partner[int(own)]) for position, own in enumerate(instance_ids)]
        pairs = [(position, row) for position, row in pairs if row is not None and wanted(row)]
        return [position for position, _ in pairs], [row for _, row in pairs]

    def losses(self, model, prompt, rows: Sequence[int]) -> tuple[list[float], list[int]]:
        """Nats and tokens of the texts of `rows` of the data set, under as many visual prompts."""
        if self.texts == 1:
            nats, tokens = model.loss_of(prompt, self.dataset.texts_of(rows))
        else:
            texts = self.dataset.references_of(rows, self.texts)
            found = model.loss_of(prompt, texts)  # of each text
            nats, tokens = (sums_of(values, texts["texts_per_image"]) for values in found)
        return nats.tolist(), tokens.tolist()

    def measure_losses(self, model, prompt, rows: list[dict]):
        """Put into each row of a batch, under "blind", the loss (nats) of its partner's text under its own picture.

        prompt: the batch's visual prompts, or its SeenPictures; rows have `instance_id`.
        """
        positions, others = self.of(row["instance_id"] for row in rows)
        if positions:
            if isinstance(prompt, SeenPictures):
                under = prompt.prompts(positions, self.dataset.texts_of(others))
            else:
                under = prompts_of(prompt, positions)
            shuffled, _ = self.losses(model, under, others)
            for position, other, nats in zip(positions, others, shuffled, strict=True):
                rows[position]["blind"] = {str(other): {"loss_shuffled": nats}}


def sums_of(values: Tensor, counts: list[int]) -> Tensor:
    """values (sum of counts,) -> (B,): the sum over each `counts[b]` in a row."""
    return torch.stack([own.sum() for own in values.split(counts)])


class SeenPictures:
    """The pictures of a batch, each (by its image_id) put through the model's frozen ViT once.

    Where merging looks at no question, also through the connector once.
    """

    def __init__(self, model, samples: dict):
        place: dict[Hashable, int] = {}
        self.rows = [place.setdefault(image_id, len(place)) for image_id in samples["image_id"]]
        images = samples["image"]
        if len(place) < len(self.rows):
            images = images[[self.rows.index(n) for n in range(len(place))]]
        self.model, self.asks = model, facts_of(model).reads_questions
        self.seen = model.visual_tokens(images) if self.asks else model.visual_prompt(images)

    def prompts(self, positions: Sequence[int], texts: dict):
        """The visual prompts for `texts` (a batch without pictures) about the pictures at these positions."""
        pictures = [self.rows[position] for position in positions]
        if self.asks:
            return self.model.visual_prompt(self.seen, questions=questions_of(texts), pictures=pictures)
        return prompts_of(self.seen, pictures)


def prompts_of(prompt, positions: Sequence[int]):
    """The visual prompts at these positions of a batch."""
    rows = list(positions)
    if rows == list(range(len(prompt.tokens))):
        return prompt
    return type(prompt)(prompt.tokens[rows], None if prompt.mask is None else prompt.mask[rows])


def assign(rows: list[dict]):
    """Move what each row's picture measured on another row's text, under "blind", to the row that the text is of.

    Nothing is kept for the text of a row that is not among `rows` (its own picture could not be read).
    """
    by_instance = {row["instance_id"]: row for row in rows}
    for row in rows:
        for instance_id, measured in row.pop("blind", {}).items():
            if instance_id in by_instance:
                by_instance[instance_id] |= measured


def paired_losses(rows: list[dict]) -> dict[str, float]:
    """Nats per token with the right and with another picture, over the rows that have both; {} where none has."""
    paired = [row for row in rows if row.get("loss") is not None and row.get("loss_shuffled") is not None]
    if not paired:
        return {}
    tokens = sum(row["tokens"] for row in paired)
    right = sum(row["loss"] for row in paired) / tokens
    shuffled = sum(row["loss_shuffled"] for row in paired) / tokens
    return {"loss_right": right, "loss_shuffled": shuffled, "loss_gap": shuffled - right}
