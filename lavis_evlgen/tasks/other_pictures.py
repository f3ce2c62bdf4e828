"""The blind twin of a score or loss: the same text under the visual prompt of another picture."""

from __future__ import annotations

import torch


class OtherPictures:
    """Finds for each row of a batch the prompt of another picture: of the batch, else of one seen before.

    Rows about one picture often come in a row, so the last two different pictures are remembered.
    """

    def __init__(self):
        self.seen: dict = {}  # image_id -> (visual prompt, its row)

    def of(self, image_ids: list, prompt) -> dict[int, tuple]:
        """{row: (visual prompt, row in it)} of another picture; rows of the very first picture may have none."""
        donors = {}
        for i, own in enumerate(image_ids):
            ahead = [(i + step) % len(image_ids) for step in range(1, len(image_ids))]
            found = [(prompt, j) for j in ahead if image_ids[j] != own]
            found += [kept for key, kept in self.seen.items() if key != own]
            if found:
                donors[i] = found[0]
        for j, key in enumerate(image_ids):
            self.seen.pop(key, None)
            self.seen[key] = (prompt, j)
        self.seen = dict(list(self.seen.items())[-2:])
        return donors


def prompts_of(prompt, rows: list[tuple]):
    """A visual prompt of the given (visual prompt, row) pairs, all of one length."""
    tokens = torch.stack([source.tokens[i] for source, i in rows])  # (B, L', D_l)
    mask = None if prompt.mask is None else torch.stack([source.mask[i] for source, i in rows])
    return type(prompt)(tokens, mask)


def paired_losses(rows: list[dict]) -> dict[str, float]:
    """Nats per token with the right and with another picture, over the rows that have both; {} where none has."""
    paired = [row for row in rows if row.get("loss_shuffled") is not None]
    if not paired:
        return {}
    tokens = sum(row["tokens"] for row in paired)
    right = sum(row["loss"] for row in paired) / tokens
    shuffled = sum(row["loss_shuffled"] for row in paired) / tokens
    return {"loss_right": right, "loss_shuffled": shuffled, "loss_gap": shuffled - right}
