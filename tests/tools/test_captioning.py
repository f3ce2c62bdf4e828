"""`evlgen caption --out`: whatever the input and the output, each picture is captioned once, as it is alone."""

import contextlib
import csv
import io
import json
import os
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lavis_evlgen import cli
from lavis_evlgen.datasets import ImageShards
from lavis_evlgen.datasets.shards.reader import read_shard
from lavis_evlgen.processors.images import EvlgenImageEvalProcessor
from lavis_evlgen.processors.videos import EvlgenVideoEvalProcessor
from lavis_evlgen.tools.caption import Encoded
from lavis_evlgen.tools.captioning import batches, caption_images, command
from lavis_evlgen.tools.captioning.output import Output
from tests.clip_tools import write_clip
from tests.datasets.shard_tools import HTML, write_shard
from tests.processes import forked
from tests.run_tools import free_port
from tests.tiny import IMAGE_SIZE, tiny_evlgen, tiny_evlgen_video

DECODING = {"num_beams": 1, "min_length": 1, "max_length": 6}


def picture(seed: int, kind: str = "PNG") -> bytes:
    """A file of coarse coloured noise, whose captions differ."""
    noise = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).resize((40, 30), Image.NEAREST).save(content, kind)
    return content.getvalue()


@pytest.fixture(scope="module")
def tiny():
    """(model, processor)"""
    return tiny_evlgen(max_txt_len=64).eval(), EvlgenImageEvalProcessor(IMAGE_SIZE, mean="half")


@pytest.fixture
def evlgen(tiny, monkeypatch):
    """The command on the tiny model, in this process: its exit code."""
    monkeypatch.setattr(command, "load", lambda args: (*tiny, dict(DECODING), torch.device("cpu"), None))

    def run(*arguments) -> int:
        with pytest.raises(SystemExit) as end:
            cli.main(["caption", *map(str, arguments), "--run", "tiny", "--workers", "0"])
        return end.value.code

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven pictures in two folders, and files that are none."""
    root = tmp_path / "photos"
    (root / "b").mkdir(parents=True)
    for n, name in enumerate(("0.png", "1.PNG", "2.png", "b/3.png", "b/4.png", "b/5.png", "b.png")):
        (root / name).write_bytes(picture(n))
    (root / "notes.txt").write_text("none")
    (root / "._0.png").write_bytes(b"of another system")
    return root


def alone(tiny, paths) -> list[str]:
    """Captions one by one, as the command prints them of single pictures."""
    model, vis = tiny
    tensors = (vis(Image.open(path).convert("RGB"))[None] for path in paths)
    return [" ".join(model.generate({"image": image}, **DECODING)[0].split()) for image in tensors]


def records(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def shard_members(count: int, first: int = 0) -> dict[str, bytes]:
    """Samples with a json, with a txt, with neither, in turn; each with a file of another kind."""
    members = {}
    for n in range(count):
        key = f"{n:04d}"
        members[f"{key}.cls"] = str(n).encode()
        members[f"{key}.jpg"] = picture(first + n, "JPEG")
        if n % 3 == 0:
            members[f"{key}.json"] = json.dumps({"caption": f"old {n}", "url": "ü"}).encode()
        elif n % 3 == 1:
            members[f"{key}.txt"] = f"old {n}\n".encode()
    return members


def unpacked(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


@pytest.mark.parametrize("end", ["jsonl", "csv"])
@pytest.mark.parametrize("kind", ["folder", "table", "files"])
def test_pictures_in_captions_out(evlgen, tiny, folder, tmp_path, kind, end, capsys):
    out = tmp_path / "new" / f"captions.{end}"
    names = ["0.png", "1.PNG", "2.png", "b.png", "b/3.png", "b/4.png", "b/5.png"]
    given, more = [folder], []
    if kind == "table":
        rows = "".join(f"{n},{name}\n" for n, name in enumerate([*names, names[0]]))  # the first one twice
        (tmp_path / "t.csv").write_text("number,photo\n" + rows)
        given, more = [tmp_path / "t.csv"], ["--column", "photo", "--images", folder]
    elif kind == "files":
        given = names = [str(folder / name) for name in names]
    assert evlgen(*given, "--out", out, "--batch-size", 3, *more) == 0
    captions = alone(tiny, [folder / name for name in names])
    assert len(set(captions)) > 4  # else any order would do
    assert records(out) == [{"image": n, "caption": c} for n, c in zip(names, captions, strict=True)]
    assert f"{out}: 7 captions; settings in captions.{end}.card.json" in capsys.readouterr().out
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name, f"{out.name}.card.json"]
    card = json.loads((out.parent / f"{out.name}.card.json").read_text())
    assert card["metrics"] == {"captions": 7, "unreadable": 0, "rows_left_out": 0} and card["data"]["size"] == 7
    assert card["decoding"] == DECODING and card["prompt"] == "" and "torch" in card["versions"]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_says_what_each_picture_says_alone(tiny, folder, beams):
    model, vis = tiny
    paths = sorted(folder.rglob("*.png"))
    given = [*paths[:3], Encoded(paths[3].read_bytes(), "x"), Image.open(paths[4]), str(paths[5])]
    decoding = {**DECODING, "num_beams": beams}
    one = list(caption_images(model, vis, given, batch_size=1, decoding=decoding))
    assert [n for n, _, _ in one] == list(range(6)) and len({caption for _, caption, _ in one}) > 3
    assert list(caption_images(model, vis, given, batch_size=4, decoding=decoding)) == one
    assert list(caption_images(model, vis, given, batch_size=4, decoding=decoding, start=3)) == one[3:]
    assert list(caption_images(model, vis, given, batch_size=4, decoding=decoding, workers=2)) == one
    prompted = list(caption_images(model, vis, given, batch_size=6, decoding=decoding, prompt="a photo of"))
    assert [caption for _, caption, _ in prompted] != [caption for _, caption, _ in one]


def test_arguments_that_cannot_be(tiny):
    model, vis = tiny
    for wrong in ({"batch_size": 0}, {"workers": -1}, {"start": -1}, {"images": iter("a")}, {"images": "a.png"},
                  {"decoding": {"num_captions": 2}}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            caption_images(model, vis, **{"images": ["a.png"], **wrong})
    with pytest.raises(ValueError, match="training mode"):
        caption_images(tiny_evlgen(), vis, ["a.png"])


def test_clips_of_a_folder(tmp_path):
    model, vis = tiny_evlgen_video().eval(), EvlgenVideoEvalProcessor(3, image_size=IMAGE_SIZE, mean="half")
    paths = [write_clip(tmp_path / "c" / f"{n}.avi", 6 + 9 * n) for n in range(2)]
    given = [paths[0], tmp_path / "none.avi", Encoded(paths[1].read_bytes(), "x")]
    found = list(caption_images(model, vis, given, batch_size=3, decoding=DECODING))
    expected = [model.generate({"image": vis(str(path))[None]}, **DECODING)[0] for path in paths]
    assert [found[0].caption, found[2].caption] == [" ".join(text.split()) for text in expected]
    assert found[1].caption is None and found[1].error == "no such file"


def test_what_cannot_be_read_is_a_record_that_says_why(evlgen, tiny, folder, tmp_path, capsys):
    (folder / "1.PNG").write_bytes(HTML)
    (folder / "2.png").write_bytes(picture(2)[:-40])
    (folder / "b" / "3.png").write_bytes(b"")
    out = tmp_path / "captions.jsonl"
    assert evlgen(folder, "--out", out, "--batch-size", 2) == 1
    words, found = capsys.readouterr(), records(out)
    assert [row["image"] for row in found] == ["0.png", "1.PNG", "2.png", "b.png", "b/3.png", "b/4.png", "b/5.png"]
    reasons = {row["image"]: row["error"] for row in found if "error" in row}
    assert "HTML" in reasons["1.PNG"] and "truncated" in reasons["2.png"] and "empty" in reasons["b/3.png"]
    good = [row for row in found if "error" not in row]
    assert [row["caption"] for row in good] == alone(tiny, [folder / row["image"] for row in good])
    assert "4 captions, 3 pictures that could not be read, whose `error` says why" in words.out
    for name, reason in reasons.items():
        assert f"evlgen caption: cannot read {name}: {reason}\n" in words.err
    assert evlgen(folder, "--out", out) == 1  # complete: nothing is done, and it says the same
    assert "4 captions, 3 pictures" in capsys.readouterr().out


def test_rows_of_a_table_without_a_picture_are_told(evlgen, folder, tmp_path, capsys):
    (folder / "t.csv").write_text("file,n\n0.png,1\n,2\nb.png\n2.png,4\n")
    assert evlgen(folder / "t.csv", "--out", tmp_path / "c.csv") == 1
    words = capsys.readouterr()
    assert [row["image"] for row in records(tmp_path / "c.csv")] == ["0.png", "2.png"]
    assert "line 3: no name of a picture in 'file'" in words.err and "line 4: 1 fields" in words.err
    assert "2 captions, 2 rows without a picture left out" in words.out
    (folder / "t.jsonl").write_text('{"image": "b/3.png"}\n{"image": 3}\n')
    assert evlgen(folder / "t.jsonl", "--out", tmp_path / "c.jsonl") == 1
    assert [row["image"] for row in records(tmp_path / "c.jsonl")] == ["b/3.png"]


def test_shards_in_captions_and_shards_out(evlgen, tiny, tmp_path):
    counts = (5, 2)
    for s, count in enumerate(counts):
        write_shard(tmp_path / "in" / f"s-{s}.tar", shard_members(count, 10 * s))
    given = f"{tmp_path}/in/s-{{0..1}}.tar"
    assert evlgen(given, "--out", tmp_path / "c.jsonl", "--batch-size", 2) == 0
    model, vis = tiny
    content = [Encoded(picture(10 * s + n, "JPEG"), "") for s, count in enumerate(counts) for n in range(count)]
    captions = [caption for _, caption, _ in caption_images(model, vis, content, batch_size=1, decoding=DECODING)]
    keys = [(f"{tmp_path}/in/s-{s}.tar", f"{n:04d}") for s, count in enumerate(counts) for n in range(count)]
    expected = [{"shard": s, "image": n, "caption": c} for (s, n), c in zip(keys, captions, strict=True)]
    assert records(tmp_path / "c.jsonl") == expected

    out = tmp_path / "out"
    assert evlgen(given, "--out-shards", out, "--batch-size", 3) == 0
    assert records(out / "captions.jsonl") == expected
    assert sorted(path.name for path in out.glob("*.tar")) == ["s-0.tar", "s-1.tar"]
    texts = iter(captions)
    for s, count in enumerate(counts):
        old, new = (unpacked(tmp_path / place / f"s-{s}.tar") for place in ("in", "out"))
        jsons = {name: json.loads(new.pop(name)) for name in sorted(new) if name.endswith(".json")}
        assert new == {name: content for name, content in old.items() if not name.endswith(".json")}
        for n, (name, row) in enumerate(jsons.items()):
            assert name == f"{n:04d}.json" and row.pop("generated_caption") == next(texts)
            assert row == [{"caption": f"old {n}", "url": "ü"}, {"caption": f"old {n}"}, {}][n % 3]
        assert len(jsons) == count


def test_new_shards_are_data_to_train_on(evlgen, tiny, tmp_path, monkeypatch):
    write_shard(tmp_path / "in" / "x.tar", shard_members(3))
    monkeypatch.setattr(batches, "captions_of", lambda model, image, *_: [f"a red dog of {len(image)}"] * len(image))
    out = tmp_path / "out"
    assert evlgen(tmp_path / "in" / "x.tar", "--out-shards", out, "--batch-size", 2, "--caption-key", "short") == 0
    new, old = ["a red dog of 2", "a red dog of 2", "a red dog of 1"], ["old 0", "old 1"]
    for key, texts in (("short", new), ("caption", old)):
        shards = ImageShards("x", [str(out / "x.tar")], vis_processor=tiny[1], text_processor=str, caption_key=key)
        items = list(read_shard(shards.shards[0]))[: len(texts)]  # the third one never had another caption
        assert [shards.sample(0, item)["text_input"] for item in items] == texts


def test_broken_samples_and_shards(evlgen, tmp_path, capsys):
    members = shard_members(4)
    members["0000.json"], members["0001.jpg"] = b"{", HTML
    del members["0002.jpg"]
    whole = write_shard(tmp_path / "in" / "0.tar", members | {"LICENSE.md": b"free"})
    cut = write_shard(tmp_path / "in" / "1.tar", shard_members(3))
    with tarfile.open(cut) as tar:
        end = tar.getmember("0002.jpg").offset_data + 50
    cut.write_bytes(cut.read_bytes()[:end])
    (tmp_path / "in" / "2.tar").write_bytes(HTML)
    assert evlgen(tmp_path / "in" / "*.tar", "--out-shards", tmp_path / "out") == 1
    found = records(tmp_path / "out" / "captions.jsonl")
    of_first = [row for row in found if row["shard"] == str(whole)]
    assert [row["image"] for row in of_first] == ["0000", "0001", "0003"]  # 0002 has neither picture nor text
    assert "its json cannot be read" in of_first[0]["error"] and "HTML" in of_first[1]["error"]
    assert set(unpacked(tmp_path / "out" / "0.tar")) == {"0002.cls", "0003.cls", "0003.jpg", "0003.json", "LICENSE.md"}
    last = [row for row in found if row["shard"] != str(whole)]
    assert any("it is cut short" in row.get("error", "") for row in last) and "not a tar" in last[-1]["error"]
    assert not (tmp_path / "out" / "2.tar").exists() and "captions" in capsys.readouterr().out


def test_names_that_lead_elsewhere(evlgen, folder, tmp_path):
    """Of a tar they are refused; of a table they are read, and nothing but the output is written."""
    bad = {"../../evil": 0, "/abs/evil": 1, "a/../../evil": 2, "fine": 3}
    members = {f"{key}.jpg": picture(n, "JPEG") for key, n in bad.items()} | {"../loose.cls": b"x"}
    write_shard(tmp_path / "deep" / "in" / "x.tar", members)
    out = tmp_path / "deep" / "out"
    before = set(tmp_path.rglob("*"))
    assert evlgen(tmp_path / "deep" / "in" / "x.tar", "--out-shards", out) == 1
    assert set(tmp_path.rglob("*")) - before == {
        out, out / "x.tar", out / "captions.jsonl", out / "captions.jsonl.card.json"
    }  # fmt: skip
    assert set(unpacked(out / "x.tar")) == {"fine.jpg", "fine.json"}
    leading = [row["image"] for row in records(out / "captions.jsonl") if "leads out" in row.get("error", "")]
    assert leading == [key for key in bad if key != "fine"]
    (tmp_path / "t.csv").write_text(f"image\n{folder}/0.png\nphotos/../photos/b.png\n")
    assert evlgen(tmp_path / "t.csv", "--out", out / "c.jsonl") == 0
    assert [row["image"] for row in records(out / "c.jsonl")] == [f"{folder}/0.png", "photos/../photos/b.png"]


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_what_was_killed_goes_on_where_it_was(evlgen, folder, tmp_path, monkeypatch, kind):
    """kill -9 in the middle, and half a line on disk: nothing twice, nothing missing, the same bytes at the end."""
    given, name, option = folder, "captions.jsonl", "--out"
    if kind == "shards":
        for s in range(2):
            write_shard(tmp_path / "in" / f"{s}.tar", shard_members(4, 10 * s))
        given, option = tmp_path / "in" / "*.tar", "--out-shards"
    whole, killed = (tmp_path / place for place in ("whole", "killed"))
    target = {"--out": lambda place: place / name, "--out-shards": lambda place: place}[option]
    assert evlgen(given, option, target(whole), "--batch-size", 1) == 0
    says, said = batches.captions_of, []
    parts, least = killed / f"{name}.parts", 3 if kind == "folder" else 6

    def stops(*arguments):
        said.append(1)
        if len(said) > least:
            time.sleep(60)
        return says(*arguments)

    monkeypatch.setattr(batches, "captions_of", stops)
    with forked(lambda: evlgen(given, option, target(killed), "--batch-size", 1), tmp_path / "words.txt") as process:
        process.wait_for(lambda: sum(_rows(path) for path in parts.glob("*.jsonl")) >= least)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (killed / name).exists()
    unfinished = next(parts.glob("*.partial.jsonl"))
    done = sum(_rows(path) for path in parts.glob("*.jsonl"))
    assert done == least
    with open(unfinished, "a") as file:
        file.write('{"rows": [{"image": "x", "capt')
    made = []
    monkeypatch.setattr(batches, "captions_of", lambda *a: made.append(len(a[1])) or says(*a))
    assert evlgen(given, option, target(killed), "--batch-size", 2) == 0
    assert sum(made) == (7 if kind == "folder" else 8) - done
    written = {path.relative_to(whole): path.read_bytes() for path in whole.iterdir() if "card" not in path.name}
    assert {p.relative_to(killed): p.read_bytes() for p in killed.iterdir() if "card" not in p.name} == written


def _rows(path: Path) -> int:
    """Captions in a file of a piece, done or not; half a line is none."""
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1].splitlines()
    return len(whole) - path.name.endswith(".partial.jsonl")


@pytest.mark.parametrize("change", [("--prompt", "a photo of"), ("--num-beams", 2), "a model", "a picture"])
def test_another_setting_does_not_go_on(evlgen, tiny, folder, tmp_path, monkeypatch, capsys, change):
    out = tmp_path / "captions.jsonl"
    assert evlgen(folder, "--out", out) == 0
    written = out.read_bytes()
    capsys.readouterr()
    more, says = change if isinstance(change, tuple) else (), "decoding, num_beams (1 there, 2 now)"
    if change == "a model":
        other = (tiny_evlgen(seed=1, max_txt_len=64).eval(), tiny[1])
        monkeypatch.setattr(command, "load", lambda args: (*other, dict(DECODING), torch.device("cpu"), None))
        says = "model (trained weights)"
    elif change == "a picture":
        (folder / "new.png").write_bytes(picture(9))
        says = "list of pictures"
    elif "--prompt" in change:
        says = "prompt ( there, a photo of now)"
    assert evlgen(folder, "--out", out, *more) == 2
    words = capsys.readouterr().err.splitlines()
    assert len(words) == 1 and f"{out} was begun with another " in words[0] and says in words[0]
    assert out.read_bytes() == written and not (tmp_path / "captions.jsonl.parts").exists()


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_two_ranks_write_what_one_writes(evlgen, folder, tmp_path, kind):
    given, option = folder, "--out"
    (folder / "2.png").write_bytes(HTML)
    if kind == "shards":
        for s, count in enumerate((3, 1, 2)):
            write_shard(tmp_path / "in" / f"{s}.tar", shard_members(count, 10 * s))
        given, option = tmp_path / "in" / "*.tar", "--out-shards"
    one, two = (tmp_path / place / "captions.csv" if option == "--out" else tmp_path / place for place in ("1", "2"))
    code = evlgen(given, option, one, "--batch-size", 2)
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                forked(lambda: evlgen(given, option, two, "--batch-size", 2), tmp_path / f"rank{rank}.txt",
                       RANK=str(rank), LOCAL_RANK=str(rank), **where)
            )
            for rank in range(2)
        ]  # fmt: skip
        assert [process.wait() for process in ranks] == [code, code], ranks[0].words + ranks[1].words
    assert code == (1 if kind == "folder" else 0)
    folders = (one.parent, two.parent) if option == "--out" else (one, two)
    a, b = ({p.name: p.read_bytes() for p in place.iterdir() if "card" not in p.name} for place in folders)
    assert a == b and len(a) == (1 if kind == "folder" else 4)
    assert json.loads(next(folders[1].glob("*.card.json")).read_text())["processes"] == 2


BAD = [
    ("{folder} --out x.txt", "--out x.txt: give a file that ends with .jsonl or .csv"),
    ("{folder} {folder}/0.png --out x.jsonl", "0.png is a picture file"),
    ("{folder} {folder}/b --out x.jsonl", "is a folder, and"),
    ("{folder} --out-shards x", "--out-shards is for tar shards"),
    ("{folder} --out x.jsonl --column a", "--column is for a table of pictures"),
    ("{folder} --out x.jsonl --caption-key a", "--caption-key is for new shards"),
    ("{folder}/0.png {tmp}/none --out x.jsonl", None),  # one of several that is not there: a record
    ("{tmp}/none --out x.jsonl", "none: no such file or folder here"),
    ("{tmp}/none.csv --out x.jsonl", "there is no table of pictures"),
    ("{tmp}/empty --out x.jsonl", "no file in it or below it ends with jpg, jpeg, png"),
    ("{tmp}/t.csv --out x.jsonl", "none of the usual columns"),
    ("{tmp}/t.csv --out x.jsonl --column b", "has no column 'b'; it has 'a'"),
    ("{tmp}/twice.csv --out x.jsonl", "has 2 columns 'image'"),
    ("{tmp}/t.csv --out x.jsonl --column a --images {tmp}/none", "is not a folder here"),
    ("{tmp}/in/{{0..3}}.tar --out x.jsonl", "2 of 4 shards are not there"),
    ("{tmp}/in/*.tar.gz --out x.jsonl", "no file matches"),
    ("{tmp}/in/*.tar --out-shards {tmp}/in", "which would be replaced"),
    ("{tmp}/in/0.tar {tmp}/empty/../other/0.tar --out-shards x", "would be written to one file"),
    ("{tmp}/in/*.tar --out-shards {folder}", "is there, and no captions.jsonl.card.json"),
    ("{tmp}/in/*.tar --out-shards x --caption-key caption", "has a key 'caption' already"),
    ("{folder} --out {tmp}/there.jsonl", "there.jsonl is there, and no there.jsonl.card.json"),
    ("{folder} --out {tmp}/carded.jsonl", "is not a card that evlgen caption wrote"),
    ("{folder} --out x.jsonl --out-shards y", "not allowed with"),
    ("{folder} --out x.jsonl --batch-size 0", "invalid _positive value"),
    ("{folder}", "--workers is for many pictures at once"),
]


@pytest.mark.parametrize("words, says", BAD, ids=[str(says) for _, says in BAD])
def test_bad_arguments_are_one_clear_error(evlgen, folder, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "in", "other"):
        (tmp_path / name).mkdir()
    for path in ("in/0.tar", "in/1.tar", "other/0.tar"):
        write_shard(tmp_path / path, shard_members(1))
    (tmp_path / "t.csv").write_text("a,c\n0.png,1\n")
    (tmp_path / "twice.csv").write_text("image,image\n0.png,1.png\n")
    (tmp_path / "there.jsonl").write_text("mine")
    (tmp_path / "carded.jsonl.card.json").write_text("{}")
    code = evlgen(*(word.format(folder=folder, tmp=tmp_path) for word in words.split()))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evlgen caption: ")]
    if says is None:
        assert code == 1 and "no such file" in records(tmp_path / "x.jsonl")[1]["error"]
        return
    assert code == 2 and len(lines) == 1 and says in lines[0], lines
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("x", "y"))]  # nothing that is in the way


def test_a_kill_before_the_card_was_written_is_in_nobodys_way(evlgen, tmp_path):
    write_shard(tmp_path / "in" / "x.tar", shard_members(1))
    (tmp_path / "out" / "captions.jsonl.parts").mkdir(parents=True)
    (tmp_path / "out" / ".captions.jsonl.card.json.7.tmp").write_text("{")
    assert evlgen(tmp_path / "in" / "x.tar", "--out-shards", tmp_path / "out") == 0
    assert len(records(tmp_path / "out" / "captions.jsonl")) == 1


def test_a_file_of_others_is_not_replaced_by_what_is_unfinished(evlgen, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "captions.jsonl"
    monkeypatch.setattr(command, "_own_pieces", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["caption", str(folder), "--run", "tiny", "--out", str(out)])
    out.write_text("mine")
    assert evlgen(folder, "--out", out) == 2
    assert "captions.jsonl is there, and no" in capsys.readouterr().err and out.read_text() == "mine"


def test_pieces_whose_card_is_gone_are_not_used(evlgen, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "captions.jsonl"
    monkeypatch.setattr(Output, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["caption", str(folder), "--run", "tiny", "--workers", "0", "--out", str(out)])
    (tmp_path / "captions.jsonl.card.json").unlink()
    assert evlgen(folder, "--out", out, "--prompt", "two") == 2
    assert "captions.jsonl.parts is there, and no captions.jsonl.card.json" in capsys.readouterr().err


def test_two_commands_do_not_write_one_file(evlgen, folder, tmp_path, capsys):
    out = tmp_path / "captions.jsonl"
    other = Output(out)
    other.folder.mkdir()
    other.lock.take()
    try:
        assert evlgen(folder, "--out", out) == 2
    finally:
        other.lock.release()
    assert "is in use by another run" in capsys.readouterr().err and not out.exists()


def test_a_name_that_is_no_text(evlgen, folder, tmp_path):
    """Linux lets a file's name be any bytes: its record is JSON all the same."""
    os.rename(folder / "0.png", os.fsencode(folder) + b"/0\xff.png")
    assert evlgen(folder, "--out", tmp_path / "c.jsonl") == 0
    assert os.fsencode(records(tmp_path / "c.jsonl")[0]["image"]) == b"0\xff.png"


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_pictures_of_the_same_names_elsewhere_are_others(evlgen, folder, tmp_path, capsys, kind):
    """Another folder's pictures may be called the same: the captions that are there are not theirs."""
    out, other = tmp_path / "captions.jsonl", tmp_path / "other"
    other.mkdir()
    (other / "0.png").write_bytes(picture(9))
    (tmp_path / "t.csv").write_text("image\n0.png\n")
    (other / "link").symlink_to(folder)
    for name in ("1.PNG", "2.png", "b.png", "b/3.png", "b/4.png", "b/5.png"):
        (folder / name).unlink()
    given = {"folder": lambda place: [place], "table": lambda place: [tmp_path / "t.csv", "--images", place]}[kind]
    assert evlgen(*given(folder), "--out", out) == evlgen(*given(other / "link"), "--out", out) == 0  # the same ones
    written = out.read_bytes()
    assert evlgen(*given(other), "--out", out) == 2
    assert "was begun with another folder of pictures (" in capsys.readouterr().err
    assert out.read_bytes() == written


def test_names_do_not_command_the_terminal(evlgen, tmp_path, capsys):
    shard = write_shard(tmp_path / "x.tar", {"a\x1b[2J\nb.jpg": HTML, "c.jpg": picture(1, "JPEG")})
    assert evlgen(shard, "--out", tmp_path / "c.jsonl") == 1
    words = capsys.readouterr().err
    assert "\x1b[2J" not in words and f"cannot read {shard}:a\\x1b[2J\\nb: " in words
    assert records(tmp_path / "c.jsonl")[0]["image"] == "a\x1b[2J\nb"
