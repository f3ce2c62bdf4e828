"""Uploads: what is too large, or no picture, is refused by its header; the rest is what the processor makes of it."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from lavis_evlgen.demo.describing import Refused
from lavis_evlgen.demo.examples import drawn_scenes, from_folder, thumbnails
from lavis_evlgen.demo.uploads import Limits, check, preview, read
from lavis_evlgen.processors.images import EvlgenImageEvalProcessor
from lavis_evlgen.processors.videos import EvlgenVideoEvalProcessor
from tests.clip_tools import write_clip
from tests.datasets.helpers import png_of
from tests.tiny import IMAGE_SIZE

PICTURE, CLIP = EvlgenImageEvalProcessor(IMAGE_SIZE), EvlgenVideoEvalProcessor(3, image_size=IMAGE_SIZE)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (800, 600, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("width, height", [(20_000, 10_000), (12_000, 12_000), (10_000, 10_000), (8_000, 5_001)])
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, width, height, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(png_of(width, height))

    def decode(*args):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    for work in (lambda: read(str(path), PICTURE, Limits()), lambda: preview(str(path), Limits())):
        with pytest.raises(Refused, match=r"^large.png: .*at most 40 megapixels|; at most 40 \(--max-pixels\)"):
            work()
    path.write_bytes(png_of(8_000, 5_000))
    assert check(str(path), Limits())
    with pytest.raises(AssertionError, match="decoded"):  # so the refusals above came first
        with Image.open(path) as image:
            image.load()


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("note.jpg", b"dear picture", "note.jpg: looks like text, not a picture; give one of JPEG"),
        ("page.jpg", b"<!doctype html><p>404", "page.jpg: looks like HTML"),
        ("list.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "list.mp4: looks like text"),
        ("x.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "x.eps: a EPS file"),
        ("x.bin", b"\x00\x01\x02\xff" * 9, "x.bin: neither a picture nor a clip"),
        ("x.png", b"", r"x.png: the file is empty \(0 bytes\)"),
        ("half.png", png_of(9, 9)[:50], "half.png: broken or truncated"),
        ("half.mp4", b"\x00\x00\x00\x18ftypmp42" + bytes(40), "half.mp4: "),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    for processor in (PICTURE, CLIP):
        with pytest.raises(Refused, match=says):
            read(str(tmp_path / name), processor, Limits())
    with pytest.raises(Refused, match=says):
        preview(str(tmp_path / name), Limits())


def test_large_files_are_refused(picture):
    megabytes = picture.stat().st_size / 1e6
    assert check(str(picture), Limits(megabytes=megabytes))
    with pytest.raises(Refused, match=r"x.png: 1.4 MB; at most 1.4\d* MB \(--max-upload\)"):
        check(str(picture), Limits(megabytes=megabytes - 1e-6))


def test_pictures_are_what_the_processor_makes_of_them(picture):
    with Image.open(picture) as image:
        assert torch.equal(read(str(picture), PICTURE, Limits()), PICTURE(image.convert("RGB"))[None])
        expected = CLIP([image.convert("RGB")])[None, :, :1]
    assert torch.equal(read(str(picture), CLIP, Limits()), expected) and expected.shape[2] == 1
    assert preview(str(picture), Limits()).size == (480, 640)


def test_clips(tmp_path):
    path = write_clip(tmp_path / "x.avi")
    assert torch.equal(read(str(path), CLIP, Limits()), CLIP(path)[None])
    middle = np.asarray(preview(str(path), Limits()), float)
    assert middle.mean() == pytest.approx(8 * 5, abs=3)
    with pytest.raises(Refused, match="x.avi: a clip, and this model looks at pictures"):
        read(str(path), PICTURE, Limits())
    with pytest.raises(Refused, match="x.avi: 64 × 64 are 0.0 megapixels; at most 0.004"):
        read(str(path), CLIP, Limits(megapixels=0.004))


def test_lavis_processors_of_clips_read_no_pictures(picture):
    class Alpro:
        n_frms = 4

    with pytest.raises(Refused, match="x.png: a picture, and Alpro of this model reads clips only"):
        read(str(picture), Alpro(), Limits())


def test_picks_are_drawn_or_come_from_a_folder(tmp_path, picture, caplog):
    scenes = drawn_scenes(tmp_path / "a", PICTURE) if (tmp_path / "a").mkdir() is None else []
    assert len({path.read_bytes() for path in scenes}) == 6
    clips = drawn_scenes(tmp_path / "b", CLIP) if (tmp_path / "b").mkdir() is None else []
    assert [len(read(str(path), CLIP, Limits())[0, 0]) for path in clips] == [3] * 6
    assert [name for _, name in thumbnails(clips, Limits())] == [f"clip {n}" for n in range(1, 7)]
    (tmp_path / "note.jpg").write_text("no picture")
    (tmp_path / "c").mkdir()
    assert [path.name for path in from_folder(tmp_path, tmp_path / "c", PICTURE, Limits())] == ["x.png"]
    assert "left out: note.jpg: looks like text" in caplog.text
    for folder, says in ((tmp_path / "c" / "x.png", "is no folder"), (tmp_path / "d", "none of the 0 files")):
        (tmp_path / "d").mkdir(exist_ok=True)
        with pytest.raises(Refused, match=says):
            from_folder(folder, tmp_path / "c", PICTURE, Limits())
