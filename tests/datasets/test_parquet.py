"""Questions in Parquet files with their pictures inside, in the form of PathVQA's on the hub."""

import io
import logging
import pickle
import sys

import pytest
import torch
from PIL import Image

from lavis_evlgen.datasets import DataError, UnreadableImage
from lavis_evlgen.datasets.annotations import parquet
from tests.datasets.test_image_questions import builder

KINDS = ["closed", "open", "open"]


def content(n: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (40 * n, 10, 10)).save(file, "PNG")
    return file.getvalue()


def write(path, rows, group=3):
    """rows: (picture's content or None, its path or None, question, answer)."""
    pyarrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    pictures = pyarrow.array([{"bytes": row[0], "path": row[1]} for row in rows], kind)
    table = pyarrow.table(
        {"image": pictures, "question": [row[2] for row in rows], "answer": [row[3] for row in rows]}
    )
    pq.write_table(table, path, row_group_size=group)
    return str(path)


def rows_of(first, count):
    """Three questions about each picture, a yes among their answers."""
    asked = (("is it red?", "Yes"), ("what is it?", "a field"), ("which?", "left"))
    return [(content(n), None, *pair) for n in range(first, first + count) for pair in asked]


@pytest.fixture
def files(tmp_path):
    train = [write(tmp_path / f"train-{n}.parquet", rows_of(2 * n, 2)) for n in range(2)]
    return {"train": train, "val": write(tmp_path / "val.parquet", rows_of(3, 2), group=4)}


def test_rows_and_pictures(tmp_path, files, caplog):
    found = builder(tmp_path, images=None, annotations=files).build()
    train, val = found["train"], found["val"]
    assert (len(train), train.num_images, len(val), val.num_images) == (12, 4, 6, 2)
    assert list(train.answers) == list(range(12)) and train.answers[7] == ["a field"]
    assert [train.kinds[n] for n in range(3)] == KINDS and train.missing_files() == []
    assert "1 of val are also in train" in caplog.text  # picture 3, by its content
    for row in (0, 11, 4, 5, 3):  # out of order, over files and row groups
        expected = train.vis_processor(Image.open(io.BytesIO(content(row // 3))))
        assert train.pil_image(row).getpixel((0, 0)) == (40 * (row // 3), 10, 10)
        assert train[row]["image"].shape == expected.shape and train[row]["question"] == val[row % 3]["question"]
    assert torch.equal(val[0]["image"], val.vis_processor(Image.open(io.BytesIO(content(3)))))


def test_a_glob_names_the_files_of_a_split(tmp_path, files):
    globbed = builder(tmp_path, images=None, annotations={"train": str(tmp_path / "train-*.parquet")}).build()["train"]
    listed = builder(tmp_path, images=None, annotations=files).build()["train"]
    assert globbed.fingerprint == listed.fingerprint and len(globbed) == 12


def test_workers_read_for_themselves(tmp_path, files):
    val = builder(tmp_path, images=None, annotations=files).build()["val"]
    val[0]  # the main process has read a row group
    loader = torch.utils.data.DataLoader(val, batch_size=2, collate_fn=val.collater, num_workers=2)
    alone = torch.stack([val[n]["image"] for n in range(6)])
    assert torch.equal(torch.cat([batch["image"] for batch in loader]), alone)
    again = pickle.loads(pickle.dumps(val.pictures))
    assert again.places == val.pictures.places and again.content(val.annotation[0]["image"])[0] == content(3)


def test_one_row_group_is_held_at_a_time(tmp_path, files, monkeypatch):
    train = builder(tmp_path, images=None, annotations=files).build()["train"]
    read, pictures_of = [], parquet._pictures
    monkeypatch.setattr(parquet, "_pictures", lambda *args: read.append(args[2]) or pictures_of(*args))
    for row in (0, 1, 2, 3, 4, 0):
        train.pil_image(row)
    assert read == [0, 1, 0]


def test_pictures_that_cannot_be_used_are_told_by_row(tmp_path, pictures):
    rows = [(content(0), None, "what?", "red"), (b"<html>", None, "what?", "red"), (None, "3.jpg", "what?", "x"),
            (None, None, "what?", "x")]  # fmt: skip
    path = write(tmp_path / "q.parquet", rows)
    val = builder(tmp_path, annotations={"val": path}, max_bad_fraction=0.5).build()["val"]
    assert len(val) == 3 and val.missing_files() == []
    with pytest.raises(UnreadableImage, match=r"q.parquet row 2: looks like HTML"):
        val.pil_image(1)
    assert val.pil_image(2).size == (43, 30)  # a file of the folder
    with pytest.raises(DataError, match="1 of 4 rows of .*q.parquet cannot be used, such as row 4: no image name"):
        builder(tmp_path, annotations={"val": path}).build()
    with pytest.raises(DataError, match="the images folder is not given"):
        builder(tmp_path, images=None, annotations={"val": path}, max_bad_fraction=0.5).build()


def test_a_broken_file_is_one_line(tmp_path, files):
    whole = (tmp_path / "val.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cut.parquet is not a Parquet file that can be read"):
        builder(tmp_path, images=None, annotations={"val": str(tmp_path / "cut.parquet")}).build()
    val = builder(tmp_path, images=None, annotations=files).build()["val"]
    (tmp_path / "val.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableImage, match="val.parquet row 1: broken or truncated"):
        val.pil_image(0)


def test_columns_that_no_question_needs_are_not_read(tmp_path):
    """A picture of another kind, and a time that Python has no value for."""
    pyarrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": ["0.jpg"], "question": ["what?"], "answer": ["red"],
               "taken": pyarrow.array([2**62], pyarrow.timestamp("ms"))}  # fmt: skip
    pq.write_table(pyarrow.table(columns), tmp_path / "q.parquet")
    table, _ = parquet.read_parquet(str(tmp_path / "q.parquet"), "image", {"image", "question", "answer"})
    assert table.header == list(columns) and table.records[0][1]["question"] == "what?"
    assert "taken" not in table.records[0][1]


@pytest.mark.parametrize("kind", ["text", "list"])
def test_bytes_that_are_no_bytes_are_no_picture(tmp_path, kind):
    pyarrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    held = {"text": "abc", "list": [1, 2]}[kind]
    pq.write_table(pyarrow.table({"image": [{"bytes": held}], "question": ["q"], "answer": ["a"]}),
                   tmp_path / "q.parquet")  # fmt: skip
    with pytest.raises(DataError, match="1 of 1 rows of .*q.parquet cannot be used, such as row 1: no image name"):
        builder(tmp_path, annotations={"val": str(tmp_path / "q.parquet")}).build()


def test_text_that_is_not_utf8_is_one_line(tmp_path):
    pyarrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"]).buffers())
    pq.write_table(pyarrow.table({"image": ["0.jpg"], "question": broken, "answer": ["a"]}), tmp_path / "q.parquet")
    with pytest.raises(DataError, match="q.parquet is not a Parquet file that can be read .*utf-8"):
        builder(tmp_path, annotations={"val": str(tmp_path / "q.parquet")}).build()


def test_large_row_groups_are_told(tmp_path, files, monkeypatch, caplog):
    monkeypatch.setattr(parquet, "LARGE", 100)
    with caplog.at_level(logging.WARNING):
        builder(tmp_path, images=None, annotations=files).build()
    assert "each picture costs reading one; write it with smaller ones" in caplog.text


def test_columns_may_have_other_names(tmp_path):
    pyarrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pyarrow.table({"img": [{"bytes": content(1)}], "q": ["what?"], "a": [["red", "blue"]]}),
                   tmp_path / "x.parquet")  # fmt: skip
    keys = {"images": None, "annotations": {"val": str(tmp_path / "x.parquet")}}
    val = builder(tmp_path, **keys, columns={"image": "img", "question": "q", "answer": "a"}).build()["val"]
    assert val.answers == {0: ["red", "blue"]} and val[0]["image"] is not None
    with pytest.raises(DataError, match="no column 'image'; its columns are 'img', 'q', 'a'"):
        builder(tmp_path, **keys).build()


def test_without_pyarrow_one_line_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="Parquet files are read by the package pyarrow .*`pip install pyarrow`"):
        builder(tmp_path, annotations={"val": str(tmp_path / "x.parquet")}).build()
