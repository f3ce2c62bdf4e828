"""Rows into splits by what the file calls them, and captions from several files."""

import logging

import pytest

from lavis_evlgen.datasets import DataError
from lavis_evlgen.datasets.annotations.captions import CaptionRow
from lavis_evlgen.datasets.annotations.splits import split_rows
from tests.datasets.helpers import builder, coco, write_csv, write_json

AI = [(f"{n}.jpg", f"a thing of kind {n}") for n in (0, 2, 4)]
HUMAN = [(f"{n}.jpg", f"{who} sees {n}") for n in range(5) for who in ("one", "two")]


def rows(*of_splits):
    """Row n is about picture n, of the n-th split."""
    return [CaptionRow(f"{n}.jpg", "x", None, split, None, "f.csv") for n, split in enumerate(of_splits)]


def images(found):
    return {split: [row.image for row in own] for split, own in found.items()}


def test_a_mapping_names_the_files_splits(caplog):
    given = rows("train", "train-heldout", "val", "train")
    found = split_rows("f.csv", "datasets.x", given, {"train": "train", "val": "Train-Heldout"})
    assert images(found) == {"train": ["0.jpg", "3.jpg"], "val": ["1.jpg"]}  # the file's own val is another split
    assert "rows of other splits are not used: {'val': 1}" in caplog.text
    assert images(split_rows("f.csv", "x", given, "from_file")) == {"train": ["0.jpg", "3.jpg"], "val": ["2.jpg"]}


@pytest.mark.parametrize(
    "split, words",
    [
        ({"val": "heldout"}, "datasets.x.split.val=heldout: f.csv has no such split; it has train, val"),
        ({"train": 1, "val": "val"}, "mixes counts with names of the file's splits"),
        ({"dev": "val"}, "datasets.x.split.dev is unknown"),
    ],
)
def test_splits_that_are_not_there_are_told(split, words):
    with pytest.raises(DataError, match=words):
        split_rows("f.csv", "datasets.x", rows("train", "val"), split)


def test_a_picture_in_two_splits_is_an_error_unless_the_data_is_so():
    both = [*rows("train", "train"), *rows("test")]
    with pytest.raises(DataError, match="f.csv puts 0.jpg into both train and test"):
        split_rows("f.csv", "x", both, "from_file")
    found = split_rows("f.csv", "x", both, "from_file", share_images=True)
    assert images(found) == {"train": ["0.jpg", "1.jpg"], "test": ["0.jpg"]}


def two_files(tmp_path):
    """A table with a column that nobody reads, as VinVL's captions have it, and COCO JSON, which has image ids."""
    lines = [f"{image},{caption},0.7" for image, caption in AI]
    (tmp_path / "ai.csv").write_text("\n".join(["image,caption,confidence", *lines]))
    return [str(tmp_path / "ai.csv"), str(write_json(tmp_path / "human.json", coco(HUMAN)))]


def test_captions_of_several_files_come_together(tmp_path, pictures, caplog):
    files = two_files(tmp_path)
    with caplog.at_level(logging.INFO):
        found = builder(tmp_path, captions=files, split={"train": 3, "val": 2}).build_datasets()
    train, val = found["train"], found["val"]
    # ids are of the file that has some; the pictures' captions stand in the order of the files
    assert list(train.references) == [10, 11, 12] and len(train) == 8
    assert train.references[10] == ["a thing of kind 0", "one sees 0", "two sees 0"]
    assert train.references[11] == ["one sees 1", "two sees 1"]
    assert f"3 images, 8 rows; captions: 2 of {files[0]}, 6 of {files[1]}" in caplog.text
    assert val.references[14] == ["a thing of kind 4", "one sees 4", "two sees 4"]


def test_references_are_of_the_files_that_are_asked_for(tmp_path, pictures, caplog):
    files = two_files(tmp_path)
    keys = {"captions": files, "split": {"train": 3, "val": 2}}
    found = builder(tmp_path, **keys, references=files[1]).build()
    assert found["val"].references == {13: ["one sees 3", "two sees 3"], 14: ["one sees 4", "two sees 4"]}
    assert len(found["train"]) == 8
    with caplog.at_level(logging.INFO):
        found = builder(tmp_path, **keys, references=[files[0]]).build()
    assert found["val"].references == {14: ["a thing of kind 4"]} and "val: 1 images have no caption" in caplog.text
    with pytest.raises(DataError, match="image_captions.references: other.csv is none of `captions`; they are"):
        builder(tmp_path, **keys, references="other.csv").build()
    with pytest.raises(DataError, match="is none of `captions`; with `annotations`, list each split"):
        builder(tmp_path, annotations={"val": files[1]}, references=files[1]).build()


def test_a_split_may_have_several_files(tmp_path, pictures):
    files = two_files(tmp_path)
    found = builder(tmp_path, annotations={"train": files, "val": files[1]}).build()
    assert len(found["train"]) == 13 and len(found["val"].references[10]) == 2


def test_a_file_without_splits_follows_the_one_that_has_them(tmp_path, pictures):
    images = [{"filename": image, "split": "val" if image == "4.jpg" else "train", "sentences": [{"raw": text}]}
              for image, text in dict(HUMAN).items()]  # fmt: skip
    files = [str(write_json(tmp_path / "k.json", {"images": images})), str(write_csv(tmp_path / "ai.csv", AI))]
    found = builder(tmp_path, captions=files, split="from_file").build()
    assert found["val"].references == {"4.jpg": ["two sees 4", "a thing of kind 4"]} and len(found["train"]) == 6
    write_csv(tmp_path / "ai.csv", [*AI, ("5.jpg", "nobody knows")])
    with pytest.raises(DataError, match="names no split for 5.jpg"):
        builder(tmp_path, captions=files, split="from_file").build()
