"""Conversations in LLaVA's form: what is read and refused, samples and batches, shortening."""

import json
from pathlib import Path

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_evlgen.datasets import DataError, ImageConversationsBuilder
from lavis_evlgen.datasets.annotations.conversations import read_conversations_file
from tests.datasets.helpers import write_json


def turns(*words):
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(words)]


ROWS = [
    {
        "id": f"r{n}", "image": f"{n % 4}.jpg",
        "conversations": turns("<image>\nWhat is it?", f"A {n}. ", "Sure?", "Yes."),
    }
    for n in range(8)
]


def builder(tmp_path, **keys):
    config = OmegaConf.load(ImageConversationsBuilder.default_config_path()).datasets.image_conversations
    for stage in ("train", "eval"):
        config.vis_processor[stage].image_size = 16
    keys = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    return ImageConversationsBuilder(OmegaConf.merge(config, {"images": str(tmp_path / "images"), **keys}))


def build(tmp_path, rows=ROWS, **keys):
    file = write_json(tmp_path / "c.json", rows)
    return builder(tmp_path, **{"conversations": file, "split": {"train": 3, "val": 1}, **keys}).build_datasets()


def test_samples_and_batches(tmp_path, pictures):
    found = build(tmp_path)
    train, val = found["train"], found["val"]
    assert registry.get_builder_class("image_conversations") is ImageConversationsBuilder
    assert (len(train), train.num_images, len(val), val.num_images) == (6, 3, 2, 1)
    assert train.references is None and train.answers is None
    batch = train.collater([train[0], train[1]])
    assert batch["image"].shape == (2, 3, 16, 16) and batch["conversation_id"] == ["r0", "r4"]
    assert batch["conversations"][1] == [
        {"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A 4."},
        {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."},
    ]  # fmt: skip
    assert val.texts_of([1])["conversations"][0][1]["content"] == "A 7." and val[1]["image_id"] == "3.jpg"
    (pictures / "3.jpg").write_bytes(b"")
    assert val[0]["image"] is None and val[0]["bad"][0]["reason"] == "the file is empty (0 bytes)"


def test_a_list_of_files_json_lines_and_a_file_per_split(tmp_path, pictures):
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({**row, "split": "train"}) for row in ROWS[:3]))
    files = [str(tmp_path / "b.jsonl"), str(write_json(tmp_path / "a.json", [{**ROWS[3], "split": "val"}]))]
    found = builder(tmp_path, conversations=files, split="from_file").build()
    assert {split: len(data) for split, data in found.items()} == {"train": 3, "val": 1}
    same = builder(tmp_path, annotations={"train": files[0], "val": files[1]}).build()
    assert same["train"].fingerprint == found["train"].fingerprint != found["val"].fingerprint


def test_a_system_message_may_come_first(tmp_path):
    system = {"from": "system", "value": "Be short."}
    row = {"image": "a.jpg", "conversations": [system, *turns("Why, <image>?", "So.")]}
    found = read_conversations_file(write_json(tmp_path / "c.json", [row]))
    assert [role for role, _ in found.rows[0].messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image": None}, "row 1: no picture"),
        ({"image": ["0.jpg", "1.jpg"]}, "row 1: 2 pictures; a conversation is about one"),
        ({"image": 5}, "row 1: no image name but 5"),
        ({"conversations": []}, "row 1: no conversations"),
        ({"conversations": ["hello"]}, "row 1: turn 1 is not {from, value} but 'hello'"),
        ({"conversations": [{"from": "bard", "value": "<image>"}]}, "turn 1 is from 'bard'; known are human, user,"),
        ({"conversations": [{"from": ["human"], "value": "<image>"}]}, "turn 1 is from ['human']; known are human"),
        ({"conversations": turns("<image>", " ")}, "turn 2 says nothing"),
        ({"conversations": turns("<image> \ud800", "x")}, "turn 1 says nothing that can be read"),
        ({"conversations": turns("<image> What?")}, "from user; expected human and gpt in turn, gpt last"),
        ({"conversations": turns("<image> What?", "x", "y")}, "are from user, assistant, user; expected"),
        ({"conversations": turns("What?", "x")}, "0 times <image>, or not in a human's turn"),
        ({"conversations": turns("<image>", "x", "<image>", "y")}, "2 times <image>"),
        ({"conversations": turns("What?", "<image>")}, "1 times <image>, or not in a human's turn"),
    ],
)
def test_rows_that_cannot_be_used_are_told(tmp_path, pictures, change, words):
    rows = [{**ROWS[0], **change}, *ROWS[1:]]
    with pytest.raises(DataError) as error:
        build(tmp_path, rows)
    assert words in str(error.value) and "1 of 8 rows" in str(error.value)
    assert "raise datasets.image_conversations.max_bad_fraction" in str(error.value)
    found = build(tmp_path, rows, max_bad_fraction=0.2)
    assert sum(map(len, found.values())) == 7


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"images": None}, "datasets.image_conversations.images=FOLDER"),
        ({"conversations": None}, "has neither of `conversations`"),
        ({"split": None}, "datasets.image_conversations.split.train=N"),
        ({"text_processor": {"train": {"name": "evlgen_caption"}}}, "learnt as they stand; leave it out"),
    ],
)
def test_config_errors_name_the_fix(tmp_path, pictures, keys, words):
    with pytest.raises(DataError, match=words):
        build(tmp_path, **keys)


@pytest.mark.parametrize(
    "content, words",
    [
        ([{"image": "a.jpg", "caption": "x"}], "has no column 'conversations'; its columns are 'image', 'caption'"),
        ({"images": [], "annotations": []}, "is a JSON object with 'images', 'annotations'; expected a list"),
    ],
)
def test_files_of_another_kind_say_so(tmp_path, content, words):
    path = write_json(tmp_path / "c.json", content)
    if isinstance(content, dict):
        path.write_text(json.dumps(content, indent=1))
    with pytest.raises(DataError, match=words):
        read_conversations_file(path)


def test_shortening_drops_and_counts(tmp_path, pictures):
    train = build(tmp_path)["train"]
    keep = {"A 0.": 4, "A 4.": 2, "A 1.": None}
    counts = train.shorten(lambda messages: messages[: keep.get(messages[1]["content"], 4)]
                           if keep.get(messages[1]["content"], 4) else None)  # fmt: skip
    assert counts == (1, 1) and len(train) == 5 and train.num_images == 3
    assert [row["instance_id"] for row in train.annotation] == list("01234")
    assert [len(row["messages"]) for row in train.annotation] == [4, 2, 4, 4, 4]
    with pytest.raises(DataError, match="the train split is empty"):
        train.shorten(lambda messages: None)
