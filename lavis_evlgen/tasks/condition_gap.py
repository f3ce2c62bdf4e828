"""What merging that looks at the question is worth: the same answers while it looks at another question of the picture.

The language model reads the right question, merging another one of the same picture. Where answers then get worse, the
visual prompt held what was asked for. Which other question is a function of the data set alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def other_questions(rows: Sequence[dict]) -> list[int | None]:
    """For each row of a QuestionDataset, a row of the same picture with another question; None: there is none.

    The questions of a picture are put in an order drawn by a hash of their words, and each gets the next one: the next
    with another answer where there is such a one, for two questions with one answer may be about the same thing.
    """
    pictures: dict = {}
    for number, row in enumerate(rows):
        pictures.setdefault(row["image_id"], []).append(number)
    found: list[int | None] = [None] * len(rows)
    for own in pictures.values():
        order = sorted(own, key=lambda number: (hashlib.sha256(rows[number]["question"].encode()).digest(), number))
        for place, number in enumerate(order):
            following = [*order[place + 1 :], *order[:place]]
            others = [other for other in following if rows[other]["question"] != rows[number]["question"]]
            differing = [other for other in others if set(rows[other]["answers"]).isdisjoint(rows[number]["answers"])]
            found[number] = next(iter(differing or others), None)
    return found


def condition_gap(rows: Sequence[dict]) -> dict[str, float]:
    """Accuracy and loss (nats a token) with the right and with the swapped question, over the rows that have both; how
    many these are, and how many were measured but are of pictures without another question. {} where no row has both.

    rows: `score`, `swapped_score`, `loss`, `loss_swapped` and `tokens`, as EvlgenVqaTask's.
    """
    both = [row for row in rows if row.get("swapped_score") is not None]
    if not both:
        return {}
    tokens = sum(row["tokens"] for row in both)
    right, swapped = (sum(row[key] for row in both) / len(both) for key in ("score", "swapped_score"))
    loss, loss_swapped = (sum(row[key] for row in both) / tokens for key in ("loss", "loss_swapped"))
    return {
        "accuracy_swapped": swapped, "accuracy_same_questions": right, "gap": right - swapped,
        "loss_swapped": loss_swapped, "loss_gap": loss_swapped - loss,
        "questions": len(both), "without_another": sum(row.get("loss") is not None for row in rows) - len(both),
    }  # fmt: skip
