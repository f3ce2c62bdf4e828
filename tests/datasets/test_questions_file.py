"""Official layouts of VQAv2, OK-VQA and GQA, and one's own files, into rows of questions."""

import json

import pytest

from lavis_evlgen.datasets import DataError
from lavis_evlgen.datasets.annotations.questions import read_questions_file
from tests.datasets.helpers import write_json

# the fields that the official files have
VQA_QUESTIONS = {
    "info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": "val2014",
    "questions": [
        {"image_id": 42, "question": "What color is the cat?", "question_id": 42000},
        {"image_id": 42, "question": "How many?", "question_id": 42001},
        {"image_id": 73, "question": "Is it day?", "question_id": 73000},
    ],
}  # fmt: skip


def annotation(question_id, image_id, answers, kind):
    answers = [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)]
    return {"question_type": "what", "multiple_choice_answer": answers[0]["answer"], "answers": answers,
            "image_id": image_id, "answer_type": kind, "question_id": question_id}  # fmt: skip


VQA_ANNOTATIONS = {
    "info": {}, "license": {}, "data_subtype": "val2014",
    "annotations": [
        annotation(73000, 73, ["yes"] * 10, "yes/no"),
        annotation(42001, 42, ["2"] * 9 + ["3"], "number"),
        annotation(42000, 42, ["black"] * 6 + ["dark gray"] * 4, "other"),
    ],
}  # fmt: skip
GQA = {
    "201307251": {"semantic": [], "entailed": [], "question": "Is it overcast?", "imageId": "n161313",
                  "isBalanced": True, "types": {"structural": "verify", "semantic": "global"}, "answer": "no",
                  "fullAnswer": "No, it is clear."},
    "201640614": {"question": "Who is wearing the dress?", "imageId": "n235859", "answer": "woman", "types": {}},
}  # fmt: skip
ROWS = [("a.jpg", "what?", "red"), ("a.jpg", "how many?", "2"), ("b.jpg", "who, then?", "a man")]


def plain(found):
    return [(row.image, row.question.text, *row.question.answers) for row in found.rows]


def vqa(tmp_path, questions=VQA_QUESTIONS, annotations=VQA_ANNOTATIONS, **keys):
    files = write_json(tmp_path / "q.json", questions), write_json(tmp_path / "a.json", annotations)
    return read_questions_file(*files, **keys)


def test_vqa_joins_questions_and_annotations_by_id(tmp_path):
    found = vqa(tmp_path)
    assert found.format == "VQA JSON" and not found.problems
    first, second, third = found.rows
    assert first.image == "COCO_val2014_000000000042.jpg" and first.image_id == 42
    assert first.question.question_id == 42000 and first.question.kind == "other"
    assert first.question.answers == ("black",) * 6 + ("dark gray",) * 4
    assert second.question.answers == ("2",) * 9 + ("3",) and third.question.text == "Is it day?"
    renamed = vqa(tmp_path, image_name="{:012d}.jpg")
    assert [row.image for row in renamed.rows][2] == "000000000073.jpg"


def test_vqa_test_dev_reads_the_pictures_of_test(tmp_path):
    found = vqa(tmp_path, {**VQA_QUESTIONS, "data_subtype": "test-dev2015"})
    assert found.rows[0].image == "COCO_test2015_000000000042.jpg"


def test_gqa(tmp_path):
    found = read_questions_file(write_json(tmp_path / "g.json", GQA))
    assert found.format == "GQA JSON" and not found.problems
    assert plain(found) == [
        ("n161313.jpg", "Is it overcast?", "no"), ("n235859.jpg", "Who is wearing the dress?", "woman"),
    ]  # fmt: skip
    assert found.rows[0].question.kind == "verify" and found.rows[0].question.question_id == "201307251"


def test_own_files_give_the_same_rows(tmp_path):
    dicts = [dict(zip(("image", "question", "answer"), row, strict=True)) for row in ROWS]
    (tmp_path / "t.csv").write_text("image,question,answer\n" + "".join(f'{i},"{q}",{a}\n' for i, q, a in ROWS))
    (tmp_path / "t.tsv").write_text("image\tquestion\tanswer\n" + "".join("\t".join(row) + "\n" for row in ROWS))
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, dicts)))
    for path, kind in ((tmp_path / "t.csv", "CSV"), (tmp_path / "t.tsv", "TSV"), (tmp_path / "t.jsonl", "JSONL"),
                       (write_json(tmp_path / "t.json", dicts), "LAVIS JSON")):  # fmt: skip
        found = read_questions_file(path)
        assert (found.format, plain(found), found.problems) == (kind, ROWS, [])
        assert [row.question.question_id for row in found.rows] == [0, 1, 2]


def test_answers_may_be_many_numbers_or_objects(tmp_path):
    rows = [
        {"image": "a.jpg", "question": "?x", "answer": ["red", "Red "], "question_id": 7},  # LAVIS's
        {"image": "a.jpg", "question": "?y", "answers": [{"answer": "2"}, {"answer": ""}, 3], "question_id": 8},
    ]
    found = read_questions_file(write_json(tmp_path / "t.json", rows))
    assert plain(found) == [("a.jpg", "?x", "red", "Red"), ("a.jpg", "?y", "2", "3")]
    assert [row.question.question_id for row in found.rows] == [7, 8]


def test_all_humans_answers_beside_the_usual_one(tmp_path):
    rows = [
        {"image": "a.jpg", "question": "?x", "answer": "red", "answers": ["red", "blue"]},
        {"image": "a.jpg", "question": "?y", "answer": "red", "answers": []},
        {"image": "a.jpg", "question": "?z", "answer": ["green"], "answers": ["red"]},
    ]
    path = write_json(tmp_path / "t.json", rows)
    assert [row.question.answers for row in read_questions_file(path).rows] == [("red", "blue"), ("red",), ("green",)]
    given = read_questions_file(path, columns={"answer": "answer"})  # what is asked for by name is taken
    assert [row.question.answers for row in given.rows] == [("red",), ("red",), ("green",)]


def test_open_and_closed_questions(tmp_path):
    """By the file's answer_type; else yes and no are closed."""
    rows = [{"image": "a.jpg", "question": "?", "answer": answer, "answer_type": kind, "qid": qid}
            for answer, kind, qid in (("left", "CLOSED ", "1"), ("yes", "OPEN", 1), ("No.", "", 1), ("two", None, 4))]
    rows[2]["answer"] = ["no", "No.", "no", "maybe"]
    found = read_questions_file(write_json(tmp_path / "t.json", rows))
    assert [row.question.scored_as for row in found.rows] == ["closed", "open", "closed", "open"]
    assert [row.question.question_id for row in found.rows] == [0, 1, 2, 3]
    named = read_questions_file(tmp_path / "t.json", columns={"question_id": "qid", "answer_type": "image"})
    assert [row.question.question_id for row in named.rows] == ["1", 1, 1, 4]
    assert named.rows[0].question.scored_as == "a.jpg"


def test_columns_may_have_other_names(tmp_path):
    (tmp_path / "t.csv").write_text("file,q,truth\na.jpg,what?,red\n")
    with pytest.raises(DataError, match=r"no column 'image'.*'file', 'q', 'truth'.*columns\.image=NAME"):
        read_questions_file(tmp_path / "t.csv")
    columns = {"image": "file", "question": "q", "answer": "truth"}
    assert plain(read_questions_file(tmp_path / "t.csv", columns=columns)) == [("a.jpg", "what?", "red")]
    with pytest.raises(DataError, match="columns.answers is not known"):
        read_questions_file(tmp_path / "t.csv", columns={"answers": "truth"})


def test_rows_that_cannot_be_used_are_told(tmp_path):
    rows = [{"image": "", "question": "q", "answer": "a"}, {"image": "a.jpg", "question": " ", "answer": "a"},
            {"image": "a.jpg", "question": "q", "answer": []}, {"image": "a.jpg", "question": "q", "answer": None}, 5,
            {"image": "a.jpg", "question": "\ud800", "answer": "a"},
            {"image": "a.jpg", "question": "q", "answer": "a", "question_id": 1.5}]  # fmt: skip
    found = read_questions_file(write_json(tmp_path / "t.json", rows))
    assert not found.rows
    for problem, words in zip(found.problems, ("row 1: no image name", "row 2: no question about a.jpg",
                              "row 3: no answer to 'q'", "row 4: no answer", "row 5: not a row but 5",
                              "row 6: half of a surrogate", "row 7: the question id"), strict=True):  # fmt: skip
        assert problem.startswith(words)


def test_vqa_questions_without_their_answers_are_told(tmp_path):
    annotations = json.loads(json.dumps(VQA_ANNOTATIONS))
    annotations["annotations"][0]["question_id"] = 99
    annotations["annotations"][1]["image_id"] = 73
    found = vqa(tmp_path, annotations=annotations)
    assert [row.question.question_id for row in found.rows] == [42000]
    assert found.problems == ["question 2: is about image 42, its answers about 73",
                              f"question 3: {tmp_path / 'a.json'} has no answers to the question 73000"]
    assert found.notes == ["1 annotations belong to no question and are not used"]


@pytest.mark.parametrize(
    "content, second, words",
    [
        (VQA_QUESTIONS, None, r"without answers; give the annotations file too: \[QUESTIONS, ANNOTATIONS\]"),
        (VQA_ANNOTATIONS, None, "holds annotations only"),
        (VQA_QUESTIONS, GQA, "it is not an annotations file of VQA"),
        ({**VQA_QUESTIONS, "data_subtype": ""}, VQA_ANNOTATIONS, "no data_subtype to name images by; set image_name="),
        (GQA, VQA_ANNOTATIONS, "is a GQA file, which holds its answers itself"),
        ({"x": {"a": 1}}, None, "is a JSON object with 'x'; expected VQA questions"),
        ([{"image": "a", "question": "q", "answer": "a"}], VQA_ANNOTATIONS, "drop a second"),
    ],
)
def test_files_of_another_kind_say_so(tmp_path, content, second, words):
    second = None if second is None else write_json(tmp_path / "a.json", second)
    with pytest.raises(DataError, match=words):
        read_questions_file(write_json(tmp_path / "q.json", content), second)


def test_a_pattern_that_does_not_fit_the_ids_says_so(tmp_path):
    with pytest.raises(DataError, match=r"image_name=\{:012d\}.jpg does not fit the image id 'n161313'"):
        read_questions_file(write_json(tmp_path / "g.json", GQA), image_name="{:012d}.jpg")


@pytest.mark.parametrize("broken", [5, {"question_id": []}, {"question_id": 42000, "image_id": 42, "answers": 5}])
def test_an_official_file_of_another_layout_is_one_line(tmp_path, broken):
    questions = write_json(tmp_path / "q.json", VQA_QUESTIONS)
    answers = write_json(tmp_path / "a.json", {"annotations": [broken]})
    with pytest.raises(DataError, match="q.json is broken: it is not laid out as VQA JSON is"):
        read_questions_file(questions, answers)
    gqa = write_json(tmp_path / "g.json", {"1": {"imageId": "1", "question": "q", "answer": "a", "types": ["x"]}})
    with pytest.raises(DataError, match="g.json is broken: it is not laid out as GQA JSON is"):
        read_questions_file(gqa)


def test_nan_is_no_answer(tmp_path):
    rows = [{"image": "a.jpg", "question": "q", "answer": value} for value in (float("nan"), 2.5, float("inf"))]
    found = read_questions_file(write_json(tmp_path / "q.json", rows))
    assert [row.question.answers for row in found.rows] == [("2.5",)]
    assert found.problems == ["row 1: no answer to 'q'", "row 3: no answer to 'q'"]
