"""Questions about image files: splits, samples and batches, with readable and unreadable pictures."""

import random
from pathlib import Path

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_evlgen.datasets import DataError, ImageQuestionsBuilder
from tests.datasets.helpers import write_json
from tests.datasets.test_questions_file import GQA, VQA_ANNOTATIONS, VQA_QUESTIONS

ROWS = [
    {"image": f"{n}.jpg", "question": f"What is in picture {n}, {way}?", "answer": [f"thing {n}"] * 2 + ["shape"]}
    for n in range(6)
    for way in ("left", "right")
]
COUNTS = {"train": 3, "val": 2, "test": 1}


def builder(tmp_path, **keys):
    config = OmegaConf.load(ImageQuestionsBuilder.default_config_path()).datasets.image_questions
    for stage in ("train", "eval"):
        config.vis_processor[stage].image_size = 16
    keys = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    return ImageQuestionsBuilder(OmegaConf.merge(config, {"images": str(tmp_path / "images"), **keys}))


def build(tmp_path, rows=ROWS, **keys):
    keys = {"split": COUNTS, **keys}
    return builder(tmp_path, questions=write_json(tmp_path / "q.json", rows), **keys).build_datasets()


def test_splits_keep_pictures_apart(tmp_path, pictures):
    found = build(tmp_path)
    assert {split: (data.num_images, len(data)) for split, data in found.items()} == {
        "train": (3, 6), "val": (2, 4), "test": (1, 2)
    }
    assert found["test"].answers == {10: ["thing 5", "thing 5", "shape"], 11: ["thing 5", "thing 5", "shape"]}
    rows = [{**row, "split": "valid" if n < 4 else "test"} for n, row in enumerate(ROWS)]
    named = build(tmp_path, rows, split="from_file")
    assert {split: len(data) for split, data in named.items()} == {"val": 4, "test": 8}


def test_a_training_sample_asks_and_learns_one_of_the_answers(tmp_path, pictures):
    train = build(tmp_path)["train"]
    assert registry.get_builder_class("image_questions") is ImageQuestionsBuilder
    random.seed(0)
    drawn = [train[0]["answer"] for _ in range(60)]
    assert 25 < drawn.count("thing 0") < 55 and set(drawn) == {"thing 0", "shape"}  # as often as given
    train.template = "Q: {} A:"
    batch = train.collater([train[0], train[3]])
    assert batch["image"].shape == (2, 3, 16, 16) and batch["image"].dtype == torch.float32
    assert batch["prompt"] == ["Q: what is in picture 0, left? A:", "Q: what is in picture 1, right? A:"]
    assert batch["text_input"] == batch["answer"] and batch["question_id"] == [0, 3]


def test_an_evaluation_batch_holds_questions_and_drops_what_it_cannot_read(tmp_path, pictures):
    (pictures / "3.jpg").write_bytes(b"")
    val = build(tmp_path)["val"]
    batch = val.collater([val[i] for i in range(4)])
    assert batch["text_input"] == ["what is in picture 4, left?", "what is in picture 4, right?"]
    assert batch["answer"] == ["thing 4"] * 2 and "prompt" not in batch  # the most frequent answer
    assert batch["bad"] == [{"image": str(pictures / "3.jpg"), "reason": "the file is empty (0 bytes)"}] * 2
    assert val.collater([val[0]])["image"] is None
    assert val.missing_files() == [] and val.num_images == 2


def test_training_takes_the_next_readable_picture(tmp_path, pictures):
    (pictures / "0.jpg").unlink()
    train = build(tmp_path)["train"]
    sample = train[0]
    assert sample["image_id"] == "1.jpg" and sample["bad"][0]["reason"] == "no such file"
    assert train.missing_files() == [str(pictures / "0.jpg")]


def test_official_files(tmp_path, pictures):
    for name in ("COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg", "n161313.jpg", "n235859.jpg"):
        (pictures / name).write_bytes((pictures / "0.jpg").read_bytes())
    files = [str(write_json(tmp_path / "q.json", VQA_QUESTIONS)), str(write_json(tmp_path / "a.json", VQA_ANNOTATIONS))]
    val = builder(tmp_path, annotations={"val": files}).build()["val"]
    assert (len(val), val.num_images, val.missing_files()) == (3, 2, [])
    assert val.kinds == {42000: "other", 42001: "number", 73000: "yes/no"} and len(val.answers[42000]) == 10
    gqa = builder(tmp_path, annotations={"test": str(write_json(tmp_path / "g.json", GQA))}).build()["test"]
    assert gqa[1]["question"] == "who is wearing the dress?" and gqa.answers["201640614"] == ["woman"]


def test_a_picture_may_be_asked_about_in_training_and_in_test(tmp_path, pictures, caplog):
    """As VQA-RAD does: by question, with a warning."""
    rows = [{**row, "split": ("train", "test")[n % 2], "answer_type": "OPEN"} for n, row in enumerate(ROWS)]
    found = build(tmp_path, rows, split="from_file")
    assert {split: (data.num_images, len(data)) for split, data in found.items()} == {"train": (6, 6), "test": (6, 6)}
    assert "6 of test are also in train: its scores will flatter" in caplog.text
    assert set(found["test"].answers) == {1, 3, 5, 7, 9, 11} and set(found["test"].kinds.values()) == {"open"}
    plain = build(tmp_path, [{**row, "answer_type": None} for row in rows], split="from_file")
    assert plain["test"].fingerprint == found["test"].fingerprint  # of questions and answers


def test_pictures_are_spread_evenly(tmp_path, pictures):
    found = build(tmp_path, split={"train": 6}, pictures={"train": 3})["train"]
    assert [row["image"] for row in found.annotation[::2]] == ["0.jpg", "2.jpg", "4.jpg"]


def test_fingerprint_follows_the_data(tmp_path, pictures):
    same, again = build(tmp_path)["train"], build(tmp_path)["train"]
    rows = [{**ROWS[0], "answer": "other"}, *ROWS[1:]]
    assert same.fingerprint == again.fingerprint != build(tmp_path, rows)["train"].fingerprint


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"questions": None}, "datasets.image_questions has neither of `questions`"),
        ({"annotations": {"val": "x"}}, "has both of `questions`"),
        ({"images": "nowhere"}, "datasets.image_questions.images=nowhere is not a folder"),
        ({"questions": "none.json"}, "there is no questions file none.json .*docs/evaluation.md says where"),
        ({"split": None}, "datasets.image_questions.split.train=N"),
        ({"split": {"train": 99}}, "datasets.image_questions.split asks for"),
        ({"pictures": {"train": 9}}, r"datasets.image_questions.pictures.train=9 must be a number from 1 to 3"),
        ({"pictures": {"dev": 9}}, r"unknown key datasets.image_questions.pictures.dev; known"),
        ({"questions": None, "annotations": {"val": ["a", "b", "c"]}}, "are too many"),
    ],
)
def test_config_errors_name_the_mend(tmp_path, pictures, keys, words):
    with pytest.raises(DataError, match=words):
        builder(tmp_path, **{"questions": write_json(tmp_path / "q.json", ROWS), "split": COUNTS, **keys}).build()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"question_id": 1}, "two questions of the train split have the id 1; leave out the column of ids"),
        ({"image_id": 7}, "gives the id 7 to two images: 0.jpg and 2.jpg"),
    ],
)
def test_conflicting_ids_are_errors(tmp_path, pictures, change, words):
    rows = [{**row, **(change if n in (0, 4) else {})} for n, row in enumerate(ROWS)]
    rows[1] |= {"image_id": change.get("image_id")}
    with pytest.raises(DataError, match=words):
        build(tmp_path, rows, split={"train": 6})


def test_more_bad_rows_than_tolerated_stop(tmp_path, pictures):
    rows = [*ROWS, {"image": "5.jpg", "question": "why?", "answer": ""}]
    with pytest.raises(DataError, match="1 of 13 rows .* no answer to 'why[?]'.*image_questions.max_bad_fraction"):
        build(tmp_path, rows)
    assert len(build(tmp_path, rows, max_bad_fraction=0.1)["test"]) == 2
