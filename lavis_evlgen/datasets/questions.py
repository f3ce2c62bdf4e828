"""The common interface of our question data sets: a row is one question about one picture."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from lavis_evlgen.datasets.annotations.files import image_ids
from lavis_evlgen.datasets.base import ReadableRows
from lavis_evlgen.media.errors import DataError

TEMPLATE = "Question: {} Short answer:"


class Question(NamedTuple):
    """One question with its human answers (one or more, repeats kept).

    `kind` says what sort of question it is, where a benchmark does; `answer_type`, of one's own files, closed or open.
    """

    text: str
    answers: tuple[str, ...]
    question_id: int | str
    kind: str | None = None
    answer_type: str | None = None

    @property
    def scored_as(self) -> str:
        """The kind of question that its score counts for: what the file says, else closed (yes or no) or open."""
        usual = Counter(self.answers).most_common(1)[0][0]
        return self.kind or self.answer_type or ("closed" if usual.strip(" .").lower() in ("yes", "no") else "open")


class AskedImage(NamedTuple):
    """One image of a data set: what `_load` needs to find it, its id, and the questions about it."""

    image: Any
    image_id: int | str
    questions: tuple[Question, ...]


class QuestionDataset(ReadableRows):
    """Questions about images. Rows are questions, in the order of the images.

    Attributes: `name`, `split`, `is_train`, `max_bad_fraction`, `answers` {question_id: human answers}, `kinds`
    {question_id: kind}, `num_images`, `fingerprint` (sha256 hex digest of all images, questions and answers),
    `description` (one short line), `template` (what a question is asked in; the task sets it).

    A sample is a dict with `image` (3, H, W) float, `question` (through the text processor), `answer` (training:
    one of the human answers, drawn by Python's `random`, which the training loader seeds; else the most frequent),
    `question_id`, `image_id`, `instance_id` (str, the row) and `bad` as in CaptionDataset. Subclasses
    define `_load(row)`.
    """

    TEXT_KEYS = ("question", "answer", "question_id", "image_id", "instance_id")

    def __init__(self, name: str, split: str, items: Iterable[AskedImage], *, vis_processor=None, text_processor=None,
                 max_bad_fraction: float = 0.01, template: str = TEMPLATE, definition: Any = None):
        """`definition`: anything else that decides what a picture shows (JSON-able), for the fingerprint."""
        super().__init__(name, split, vis_processor, text_processor, max_bad_fraction)
        self.template = template
        self.answers: dict[int | str, list[str]] = {}
        self.kinds: dict[int | str, str] = {}
        made_of = [split] if definition is None else [split, definition]
        digest, images = hashlib.sha256(json.dumps(made_of).encode()), set()
        for item in items:
            # without the answer types: they are no part of what is asked and answered
            digest.update(json.dumps([item.image, item.image_id, [q[:4] for q in item.questions]]).encode())
            images.add(item.image_id)
            for question in item.questions:
                self._add(item, question)
        self.num_images, self.fingerprint = len(images), digest.hexdigest()
        self.description = f"{name} {split}: {self.num_images} images, {len(self)} questions"
        self._complete()

    def _add(self, item: AskedImage, question: Question):
        key = question.question_id
        if key in self.answers:
            raise DataError(
                f"{self.name}: two questions of the {self.split} split have the id {key!r}; leave out the column of "
                f"ids (datasets.{self.name}.columns.question_id), and questions are numbered"
            )
        self.answers[key] = list(question.answers)
        self.kinds[key] = question.scored_as
        row = {"image": item.image, "image_id": item.image_id, "question_id": key}
        self.annotation.append({**row, "question": question.text, "answers": question.answers})

    def _text(self, row: dict) -> dict:
        answers = row["answers"]
        answer = random.choice(answers) if self.is_train else Counter(answers).most_common(1)[0][0]
        return {
            "question": self.text_processor(row["question"]),
            "answer": answer,
            "question_id": row["question_id"],
            "image_id": row["image_id"],
            "instance_id": row["instance_id"],
        }

    def _texts(self, samples: list[dict]) -> dict[str, list]:
        """Training batches ask by `prompt`, and `text_input` is the answer that is learnt; in evaluation `text_input`
        is the question, as LAVIS's `predict_answers` reads it."""
        batch = super()._texts(samples)
        if self.is_train:
            return batch | {"text_input": batch["answer"], "prompt": self.asked(batch["question"])}
        return batch | {"text_input": batch["question"]}

    def asked(self, questions: list[str]) -> list[str]:
        """The questions in the template: what the language model reads."""
        return [self.template.format(question) for question in questions]


def group_by_image(path, questions: Iterable[tuple[str, int | str | None, Question]]) -> list[AskedImage]:
    """One item per image, in file order, from (image, image id or None: its name, question). Raises as image_ids."""
    questions = list(questions)
    ids = image_ids(path, ((image, image_id) for image, image_id, _ in questions))
    asked: dict[str, list[Question]] = {}
    for image, _, question in questions:
        asked.setdefault(image, []).append(question)
    return [AskedImage(image, ids[image], tuple(own)) for image, own in asked.items()]
