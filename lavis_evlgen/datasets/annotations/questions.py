"""Read a file of questions and answers into rows: the official layouts of VQAv2, OK-VQA and GQA, or one's own.

VQA: a questions JSON and an annotations JSON, joined by question id. GQA: an object of questions by id. Own files:
LAVIS JSON (a list of rows), JSONL (a row a line), CSV or TSV with a header, or Parquet with its pictures inside. The
layout is recognised by what the file contains.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lavis_evlgen.datasets.annotations.files import (
    RowsFile,
    check_column,
    encodes,
    given_columns,
    laid_out,
    quoted,
    read_rows,
)
from lavis_evlgen.datasets.annotations.parquet import Place, is_parquet, read_parquet
from lavis_evlgen.datasets.questions import Question
from lavis_evlgen.media.errors import DataError

COLUMNS = ("image", "question", "answer", "question_id", "image_id", "split", "answer_type")
_OPTIONAL = ("question_id", "image_id", "split", "answer_type")


class QuestionRow(NamedTuple):
    """One question about the picture `image`, a path below the images folder."""

    image: str
    question: Question
    image_id: int | str | None = None
    split: str | None = None


@dataclass
class QuestionsFile(RowsFile):
    """What a file of questions holds; `rows` are QuestionRows, `pictures` those inside the file by name.

    A question without an id has its number, from `first` on.
    """

    first: int = 0
    pictures: dict[str, Place] = field(default_factory=dict)

    def add(self, where: str, image, question, answers, question_id=None, image_id=None, split=None, kind=None,
            answer_type=None):  # fmt: skip
        """Keep the row, or say what is wrong with it."""
        if not isinstance(image, str) or not image.strip():
            return self.problems.append(f"{where}: no image name")
        if not isinstance(question, str) or not question.strip():
            return self.problems.append(f"{where}: no question about {image}")
        # interned: ten answers to each of 400,000 questions are few different strings
        answers = [sys.intern(answer.strip()) for answer in map(_answer_text, answers) if answer and answer.strip()]
        if not answers:
            return self.problems.append(f"{where}: no answer to {question!r}")
        if not all(map(encodes, (image, question, *answers))):
            return self.problems.append(f"{where}: half of a surrogate pair in its text")
        for what, found in (("question", question_id), ("image", image_id)):
            if found is not None and not isinstance(found, (int, str)):
                return self.problems.append(f"{where}: the {what} id is neither number nor text: {found!r}")
        question_id = self.first + len(self.rows) + len(self.problems) if question_id is None else question_id
        kind = kind if isinstance(kind, str) else None
        answer_type = None if answer_type is None else sys.intern(str(answer_type).strip().lower()) or None
        asked = Question(question.strip(), tuple(answers), question_id, kind, answer_type)
        self.rows.append(QuestionRow(image.strip(), asked, image_id, split))


def _answer_text(answer) -> str | None:
    """"red", 3 or {"answer": "red", …} as text; None for what is none, NaN among it."""
    if isinstance(answer, dict):
        answer = answer.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return str(answer) if math.isfinite(answer) else None
    return answer if isinstance(answer, str) else None


def read_questions_file(
    path, annotations=None, columns: dict[str, str] | None = None, image_name: str | None = None, first: int = 0
) -> QuestionsFile:
    """Parse `path`, and `annotations` where VQA keeps the answers in a file of their own.

    `columns` says where one's own files use other names than COLUMNS; `image_name` is the file name of a picture by
    its id, such as "COCO_val2014_{:012d}.jpg", for the official layouts; `first`: the id of the first question, where
    the file has none. Rows that cannot be used are listed in `.problems`. Raises DataError where the whole file cannot
    be used.
    """
    columns = given_columns(columns, COLUMNS)
    pictures: dict[str, Place] = {}
    if is_parquet(path):
        read = {columns.get(column, column) for column in COLUMNS} | {"answers"}
        table, pictures = read_parquet(path, columns.get("image", "image"), read)
    else:
        table = read_rows(path, "questions file", is_file=_is_official)
    if isinstance(table, dict):
        if columns:
            raise DataError(f"{path} is an official VQA or GQA file, whose fields are fixed; drop `columns`")
        return _read_official(path, table, annotations, image_name)
    for key, value in (("a second (annotations) file", annotations), ("image_name", image_name)):
        if value:
            raise DataError(f"{path} holds its answers and image names itself; drop {key}: {value}")
    if table.header:
        _check_columns(path, table.header, columns)
    found = QuestionsFile(str(path), table.format, first=first, pictures=pictures)
    _read_records(found, table.records, columns)
    found.problems[:0] = table.problems
    return found


def _is_official(content: dict) -> bool:
    return "questions" in content or "annotations" in content or all(isinstance(v, dict) for v in content.values())


def _read_official(path, content: dict, annotations, image_name: str | None) -> QuestionsFile:
    if isinstance(content.get("questions"), list):
        return _read_vqa(path, content, annotations, image_name)
    if isinstance(content.get("annotations"), list):
        raise DataError(f"{path} holds annotations only; give [QUESTIONS, ANNOTATIONS], the questions file first")
    if content and all(isinstance(entry, dict) and "imageId" in entry for entry in content.values()):
        if annotations:
            raise DataError(f"{path} is a GQA file, which holds its answers itself; drop {annotations}")
        return _read_gqa(path, content, image_name)
    raise DataError(
        f"{path} is a JSON object with {quoted(content)}; expected VQA questions (questions, with a file of "
        "annotations) or GQA questions (by id, each with imageId)"
    )


def _read_vqa(path, content: dict, annotations, image_name: str | None) -> QuestionsFile:
    if not annotations:
        raise DataError(
            f"{path} holds questions without answers; give the annotations file too: [QUESTIONS, ANNOTATIONS], such as "
            "[v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json]"
        )
    given = read_rows(annotations, "annotations file", is_file=_is_official)
    if not isinstance(given, dict) or not isinstance(given.get("annotations"), list):
        raise DataError(f"{annotations} has no list `annotations`: it is not an annotations file of VQA")
    subset = str(content.get("data_subtype", "")).replace("test-dev", "test")
    if not image_name and not subset:
        raise DataError(f"{path} has no data_subtype to name images by; set image_name=COCO_val2014_{{:012d}}.jpg")
    image_name = image_name or f"COCO_{subset}_{{:012d}}.jpg"
    found = QuestionsFile(str(path), "VQA JSON")
    with laid_out(found):
        answered = {entry.get("question_id"): entry for entry in given["annotations"]}
        for number, entry in enumerate(content["questions"], 1):
            where, key, image_id = f"question {number}", entry.get("question_id"), entry.get("image_id")
            own = answered.pop(key, None)
            if own is None:
                found.problems.append(f"{where}: {annotations} has no answers to the question {key!r}")
            elif own.get("image_id") != image_id:
                found.problems.append(f"{where}: is about image {image_id}, its answers about {own.get('image_id')}")
            else:
                image, answers = _image_name(path, image_name, image_id), own.get("answers") or []
                found.add(where, image, entry.get("question"), answers, key, image_id, kind=own.get("answer_type"))
        if answered:
            found.notes.append(f"{len(answered)} annotations belong to no question and are not used")
    return found


def _read_gqa(path, content: dict, image_name: str | None) -> QuestionsFile:
    found = QuestionsFile(str(path), "GQA JSON")
    with laid_out(found):
        for key, entry in content.items():
            image, kind = entry["imageId"], (entry.get("types") or {}).get("structural")
            name = _image_name(path, image_name or "{}.jpg", image)
            found.add(f"question {key}", name, entry.get("question"), [entry.get("answer")], key, image, kind=kind)
    return found


def _image_name(path, pattern: str, image_id) -> str:
    try:
        return pattern.format(image_id)
    except (ValueError, IndexError, KeyError) as error:
        raise DataError(f"image_name={pattern} does not fit the image id {image_id!r} of {path} ({error})") from None


def _read_records(found: QuestionsFile, records: list[tuple[str, Any]], columns: dict):
    """Rows as dicts, from a table, a list or lines; the answer may be a list of answers, and be named `answers`.

    A list `answers` beside one `answer` is what all humans said, and the one what most of them did.
    """
    seen: dict = {}
    name = {column: columns.get(column, column) for column in COLUMNS}
    for where, record in found.dicts(records, seen):
        answers, all_answers = record.get(name["answer"]), record.get("answers")
        if name["answer"] not in record or ("answer" not in columns and isinstance(all_answers, list) and all_answers
                                            and not isinstance(answers, list)):  # fmt: skip
            answers = all_answers
        answers = answers if isinstance(answers, list) else [answers]
        optional = {column: record.get(name[column]) for column in _OPTIONAL}
        optional = {column: value for column, value in optional.items() if value not in ("", None)}
        found.add(where, record.get(name["image"]), record.get(name["question"]), answers, **optional)
    if seen:
        _check_columns(found.path, seen, columns)


def _check_columns(path, header: Iterable[str], columns: dict):
    for column in COLUMNS:
        wanted = columns.get(column, column)
        if column == "answer" and column not in columns and "answers" in header:
            continue
        if column not in _OPTIONAL or column in columns:
            check_column(path, header, column, wanted, "image, question and answer", "datasets.image_questions")
