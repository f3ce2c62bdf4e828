"""From the official VQA files to accuracies: what LAVIS's reader and evaluation make of the same files."""

import contextlib
import io
import json

import numpy as np
import pytest
from lavis.common.vqa_tools.vqa import VQA
from lavis.common.vqa_tools.vqa_eval import VQAEval

from lavis_evlgen.datasets.annotations.questions import read_questions_file
from lavis_evlgen.evaluation.vqa_metrics import score_answers

POOL = {"yes/no": ["yes", "no", "Yes.", "maybe"], "number": ["2", "two", "10", "none"],
        "other": ["t-shirt", "the cat", "cat", "red, white", "dont know", "p.m."]}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """60 questions with ten answers each, from people who do not quite agree, and a model's answers."""
    rng = np.random.default_rng(3)
    questions, annotations, results = [], [], []
    for number in range(60):
        kind = str(rng.choice(list(POOL)))
        ids = {"question_id": 1000 + number, "image_id": number // 3}
        said = [str(answer) for answer in rng.choice(POOL[kind], 10, p=rng.dirichlet(np.full(len(POOL[kind]), 0.5)))]
        answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(said, 1)]
        questions.append({**ids, "question": "What?"})
        annotations.append({**ids, "answers": answers, "answer_type": kind, "question_type": "what"})
        results.append({"question_id": ids["question_id"], "answer": str(rng.choice(POOL[kind]))})
    head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": "val2014"}
    contents = {"questions": {**head, "questions": questions}, "annotations": {**head, "annotations": annotations},
                "results": results}  # fmt: skip
    paths = {name: tmp_path / f"{name}.json" for name in contents}
    for name, content in contents.items():
        paths[name].write_text(json.dumps(content))
    return paths


def test_accuracies_equal_those_of_lavis(files):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = VQA(str(files["annotations"]), str(files["questions"]))
        official = VQAEval(truth, truth.loadRes(str(files["results"]), str(files["questions"])), n=6)
        official.evaluate()
    rows = read_questions_file(files["questions"], files["annotations"]).rows
    answers = {row.question.question_id: row.question.answers for row in rows}
    kinds = {row.question.question_id: row.question.kind for row in rows}
    said = {row["question_id"]: row["answer"] for row in json.loads(files["results"].read_text())}
    mine = score_answers(said, answers, "vqa", kinds)
    assert 100 * mine.accuracy == pytest.approx(official.accuracy["overall"], abs=1e-5) and 0.1 < mine.accuracy < 0.9
    by_kind = {kind: 100 * value for kind, value in mine.by_kind.items()}
    assert by_kind == pytest.approx(official.accuracy["perAnswerType"], abs=1e-5) and len(by_kind) == 3
    each = {key: 100 * value for key, value in mine.per_sample.items()}
    assert each == pytest.approx(official.evalQA, abs=1e-5)
