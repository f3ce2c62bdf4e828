"""Shards written from captions files are read back as they were, and nothing half-written is left."""

import json
import tarfile

import pytest
from PIL import Image

from lavis_evlgen.datasets import DataError
from lavis_evlgen.datasets.shards.reader import read_shard
from lavis_evlgen.datasets.shards.stream import ShardStream
from lavis_evlgen.datasets.shards.writer import write_shards
from tests.datasets.helpers import ROWS, write_csv, write_json
from tests.datasets.shard_tools import HTML, image_shards


@pytest.fixture
def csv(tmp_path):
    return write_csv(tmp_path / "c.csv")


def write(tmp_path, csv, out="out", **keys):
    return write_shards(tmp_path / out, tmp_path / "images", csv, **keys)


def test_what_is_written_is_read_back(tmp_path, pictures, csv):
    found = write(tmp_path, csv, per_shard=4)
    assert found.shards == f"{tmp_path}/out/{{00000..00001}}.tar" and found.samples == 6 and not found.unreadable
    dataset = image_shards(found.shards)
    items = [item for path in dataset.shards for item in read_shard(path)]
    rows = [json.loads(item.files["json"]) for item in items]
    assert sorted(row["image"] for row in rows) == sorted(dict(ROWS)) != [row["image"] for row in rows]
    for item, row in zip(items, rows, strict=True):
        assert item.files["jpg"] == (pictures / row["image"]).read_bytes()
        assert row["caption"] == [text for image, text in ROWS if image == row["image"]]
    samples, tally = ShardStream(dataset, 0, 0, 1).take(6)
    assert tally.met == 6 and not tally.bad and {s["text_input"] for s in samples} < {text for _, text in ROWS}
    with tarfile.open(dataset.shards[0]) as tar:
        assert tar.getnames()[:2] == ["000000000.jpg", "000000000.json"]


def test_the_order_is_a_function_of_the_seed(tmp_path, pictures, csv):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path, csv, out, seed=seed)
    contents = [(tmp_path / out / "00000.tar").read_bytes() for out in "abc"]
    assert contents[0] == contents[1] != contents[2]


def test_other_formats_become_png_and_one_caption_is_text(tmp_path, pictures):
    Image.new("RGB", (9, 7), "teal").save(pictures / "x.bmp")
    Image.new("RGB", (9, 7), "teal").save(pictures / "named.wrongly.png", "WEBP")
    rows = [("x.bmp", "Größe"), ("named.wrongly.png", "a"), ("0.jpg", "b")]
    found = write(tmp_path, write_csv(tmp_path / "d.csv", rows))
    items = {json.loads(i.files["json"])["image"]: i.files for i in read_shard(image_shards(found.shards).shards[0])}
    assert set(items["x.bmp"]) == {"png", "json"} and set(items["named.wrongly.png"]) == {"webp", "json"}
    assert json.loads(items["x.bmp"]["json"])["caption"] == "Größe" and items["x.bmp"]["png"][:4] == b"\x89PNG"


def test_a_split_of_a_karpathy_file(tmp_path, pictures):
    images = [{"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": "Hi."}], "cocoid": n}
              for n, split in enumerate(["train", "restval", "val", "test"])]
    path = write_json(tmp_path / "k.json", {"images": images})
    assert write(tmp_path, path, split="train").samples == 2
    with pytest.raises(DataError, match="has no images of the split 'dev'; there are train, val, test"):
        write(tmp_path, path, "other", split="dev")


def test_unreadable_pictures_are_counted_and_limited(tmp_path, pictures, csv):
    (pictures / "1.jpg").write_bytes(HTML)
    (pictures / "4.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 6 images are unreadable so far, .*Nothing was written"):
        write(tmp_path, csv)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.csv", "images"]
    found = write(tmp_path, csv, max_bad_fraction=0.5, per_shard=1)
    assert sorted(error.path.rsplit("/")[-1] for error in found.unreadable) == ["1.jpg", "4.jpg"]
    assert found.samples == 4 and found.shards.endswith("{00000..00003}.tar")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{n:05d}.tar" for n in range(4)]


def test_nothing_is_overwritten_or_left_half_done(tmp_path, pictures, csv, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out is there already"):
        write(tmp_path, csv)
    (tmp_path / ".killed.unfinished").mkdir()
    with pytest.raises(DataError, match="another `evlgen shards` writes here, or was killed"):
        write(tmp_path, csv, "killed")
    assert (tmp_path / ".killed.unfinished").exists()

    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr(tarfile.TarFile, "addfile", fails)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path, csv, "full")
    assert not list(tmp_path.glob("*full*")) and not list(tmp_path.glob(".full*"))


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"images": "none"}, "--images none is not a folder here"),
        ({"captions": "none.csv"}, "there is no captions file none.csv"),
        ({"per_shard": 0}, "--per-shard 0 must be at least 1"),
        ({"columns": {"caption": "text"}}, "has no column 'text'"),
    ],
)
def test_mistakes(tmp_path, pictures, csv, keys, says):
    with pytest.raises(DataError, match=says):
        write_shards(**{"out": tmp_path / "out", "images": pictures, "captions": csv, **keys})


def test_progress_is_said_now_and_then(tmp_path, pictures, csv, monkeypatch):
    said = []
    monkeypatch.setattr("lavis_evlgen.datasets.shards.writer._SAY_EVERY", -1)
    write(tmp_path, csv, say=said.append)
    assert len(said) == 6 and said[2].startswith("3 of 6 images, 0 unreadable, ") and said[2].endswith(" s left")
