"""One tar shard, whole and broken: every good sample comes once, every problem is one item."""

import io
import json
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_evlgen.datasets.shards.reader import ShardIndex, read_shard
from tests.datasets.shard_tools import sample, write_shard

BLOCK = 512


def four(path):
    """Four samples whose members take a block of header and one or two of content each."""
    members = {}
    for n in range(4):
        members |= sample(f"{n}", f"picture {n}", bytes([n + 1]) * 700)
    return write_shard(path, members)


def offset_of(path, name) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


def read(path, start=0):
    """(keys of the samples, problems)."""
    items = list(read_shard(path, start))
    index = ShardIndex(path)  # the same items, read by their numbers
    assert [index[number] for number in range(start, len(index))] == items
    assert [item.index for item in items] == list(range(start, start + len(items)))
    return [item.key for item in items if item.problem is None], [i.problem for i in items if i.problem is not None]


def test_samples_with_their_members(tmp_path):
    items = list(read_shard(four(tmp_path / "x.tar")))
    assert [item.key for item in items] == ["0", "1", "2", "3"] and {item.problem for item in items} == {None}
    assert items[2].files["jpg"] == b"\x03" * 700
    assert json.loads(items[2].files["json"]) == {"caption": "picture 2"}


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_a_start_in_the_middle(tmp_path, start):
    path = four(tmp_path / "x.tar")
    assert [i.key for i in read_shard(path, start)] == ["0", "1", "2", "3"][start:]


def test_a_start_reads_only_headers_of_what_it_skips(tmp_path, monkeypatch):
    members = {}
    for n in range(50):
        members |= sample(f"{n}", "x", bytes(20_000))
    path, taken = write_shard(tmp_path / "x.tar", members), [0]

    class Counting(io.FileIO):
        def readinto(self, buffer):
            taken[0] += (got := super().readinto(buffer))
            return got

    monkeypatch.setattr("builtins.open", lambda path, mode: io.BufferedReader(Counting(path), BLOCK))
    assert [item.key for item in read_shard(path, 48)] == ["48", "49"]
    assert taken[0] < 200_000 and path.stat().st_size > 1_000_000


def test_names_as_webdataset_reads_them(tmp_path):
    members = {
        "BZ.jpg": b"0", "d.v1/a.JPG": b"1", "d.v1/a.json": b"2", "d.v1/a.cls": b"3", "d.v1/b.seg.png": b"4",
        "d.v1/b.png": b"5", "d.v1/b.txt": b"6", "._a.jpg": b"7", "README": b"8",
    }  # fmt: skip
    items = list(read_shard(write_shard(tmp_path / "x.tar", members)))
    assert [(item.key, item.files) for item in items] == [
        ("BZ", {"jpg": b"0"}), ("d.v1/a", {"jpg": b"1", "json": b"2"}), ("d.v1/b", {"png": b"5", "txt": b"6"}),
    ]  # fmt: skip


def test_long_names_and_pax_headers(tmp_path):
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path, name = tmp_path / f"{form}.tar", "ä" * 90 + "/" + "k" * 90
        with tarfile.open(path, "w", format=form) as tar:
            for end in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{name}.{end}")
                info.size = 3
                tar.addfile(info, io.BytesIO(b"abc"))
        assert read(path) == ([name], [])


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "it is empty (0 bytes)"), (b"<html>" * 200, "it is not a tar file"), (b"\x1f\x8b12", "compressed (gzip)"),
        (bytes(10_240), "it holds no sample"), (None, "it is not there"),
        ("folder", "it cannot be read (Is a directory)"),
    ],
)  # fmt: skip
def test_a_shard_that_cannot_be_opened_is_one_item(tmp_path, content, says):
    path = tmp_path / "x.tar"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    keys, problems = read(path)
    assert keys == [] and len(problems) == 1 and says in problems[0]
    assert list(read_shard(path, 1)) == []


@pytest.mark.parametrize(
    "member, beyond, keys",
    [
        ("3.json", BLOCK + 5, ["0", "1", "2", "3"]),  # in the content of 3.json: 3.jpg is there without a caption
        ("3.json", 0, ["0", "1", "2", "3"]),  # between two files
        ("3.jpg", 100, ["0", "1", "2"]),  # in a header
        ("2.jpg", BLOCK + 600, ["0", "1"]),  # in the content
    ],
)
def test_a_shard_cut_short_keeps_what_it_has(tmp_path, member, beyond, keys):
    path = four(tmp_path / "x.tar")
    path.write_bytes(path.read_bytes()[: offset_of(path, member) + beyond])
    found, problems = read(path)
    assert found == keys and len(problems) == 1 and "cut short" in problems[0]


def test_a_shard_without_its_end_mark_is_cut_short_but_loses_nothing(tmp_path):
    path = four(tmp_path / "x.tar")
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    path.write_bytes(whole[: -(-end // BLOCK) * BLOCK])
    assert read(path) == (["0", "1", "2", "3"], ["it is cut short (the end mark is missing)"])


@pytest.mark.parametrize("junk", [b"\xff", b"\0"])
def test_a_broken_header_ends_the_shard(tmp_path, junk):
    path = four(tmp_path / "x.tar")
    at = offset_of(path, "1.json")
    content = bytearray(path.read_bytes())
    content[at : at + BLOCK] = junk * BLOCK
    path.write_bytes(content)
    items = list(read_shard(path))
    assert [(i.key, sorted(i.files), bool(i.problem)) for i in items] == [
        ("0", ["jpg", "json"], False), ("1", ["jpg"], False), ("", [], True),
    ]  # fmt: skip
    assert "broken in the middle" in items[2].problem
    assert list(read_shard(path, 3)) == []


def test_more_zeros_at_the_end_than_tar_writes_are_no_problem(tmp_path):
    path = four(tmp_path / "x.tar")
    path.write_bytes(path.read_bytes() + bytes(20_480))
    assert read(path) == (["0", "1", "2", "3"], [])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_broken_reading_ends_and_is_the_same_from_any_start(tmp_path, data):
    content = bytearray(four(tmp_path / "x.tar").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at, length = data.draw(st.integers(0, 9000)), data.draw(st.sampled_from([1, 8, 512, 1500]))
        content[at : at + length] = data.draw(st.sampled_from([b"", b"\0", b"\xff", b"0", b"7"])) * length
    path = tmp_path / "broken.tar"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    items = list(read_shard(path))
    assert items and [item.index for item in items] == list(range(len(items)))
    start = data.draw(st.integers(0, len(items)))
    assert list(read_shard(path, start)) == items[start:]
