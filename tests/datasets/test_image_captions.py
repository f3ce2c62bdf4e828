import errno
import logging
import os
import pickle
import warnings

import pytest
import torch
from lavis.common.registry import registry
from PIL import Image, ImageFile

from lavis_evlgen.datasets import DataError, ImageCaptionsBuilder, UnreadableImage
from lavis_evlgen.datasets.base import MAX_TRIES
from lavis_evlgen.media.images import decode_image, open_image
from tests.datasets.helpers import ROWS, builder, coco, png_of, write_csv, write_json, write_pictures

COUNTS = {"train": 3, "val": 1, "test": 1}


def build(tmp_path, **keys):
    keys = keys or {"split": COUNTS}
    return builder(tmp_path, captions=write_csv(tmp_path / "c.txt"), **keys).build_datasets()


def test_split_by_counts_and_rows(tmp_path, pictures, caplog):
    with caplog.at_level(logging.INFO):
        found = build(tmp_path)
    assert "1 of 6 are in no split" in caplog.text
    train, val = found["train"], found["val"]
    assert (len(train), train.num_images, len(val), val.num_images) == (6, 3, 1, 1)
    assert val.references == {"3.jpg": [text for image, text in ROWS if image == "3.jpg"]}
    sample = train[1]
    assert sample["image"].shape == (3, 16, 16) and sample["image"].dtype == torch.float32
    assert sample["text_input"] == "picture 0, seen twice"
    assert (sample["image_id"], sample["instance_id"], sample["bad"]) == ("0.jpg", "1", [])
    images = [{row["image"] for row in dataset.annotation} for dataset in found.values()]
    assert sum(map(len, images)) == len(set.union(*images)) == 5


def test_batches_come_through_a_loader(tmp_path, pictures):
    train = build(tmp_path)["train"]
    loader = torch.utils.data.DataLoader(train, batch_size=4, collate_fn=train.collater, num_workers=1)
    batch = next(iter(loader))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert len(batch["text_input"]) == len(batch["image_id"]) == len(batch["instance_id"]) == 4


def test_split_from_file(tmp_path, pictures):
    images = [{"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": "Hi."}], "imgid": n}
              for n, split in enumerate(["train", "restval", "val", "test", "spare"])]
    path = write_json(tmp_path / "k.json", {"images": images})
    found = builder(tmp_path, captions=path, split="from_file").build_datasets()
    assert {split: list(dataset.references) for split, dataset in found.items()} == {
        "train": [0, 1], "val": [2], "test": [3]
    }
    with pytest.raises(DataError, match="names no split for 0.jpg"):
        build(tmp_path, split="from_file")


def test_a_file_per_split_warns_of_shared_images(tmp_path, pictures, caplog):
    files = {"train": str(write_json(tmp_path / "t.json", coco())),
             "val": str(write_json(tmp_path / "v.json", coco(ROWS[:2])))}
    found = builder(tmp_path, annotations=files).build_datasets()
    assert {split: len(dataset) for split, dataset in found.items()} == {"train": 12, "val": 1}
    assert list(found["val"].references) == [10]
    assert "1 of val are also in train" in caplog.text


def test_fingerprint_follows_the_data_not_the_folder(tmp_path, pictures):
    path = write_csv(tmp_path / "c.txt")
    other = write_csv(tmp_path / "d.txt", [(image, text.replace("0", "zero")) for image, text in ROWS])
    write_pictures(tmp_path / "moved")
    first, moved, changed = (
        builder(tmp_path, captions=captions, images=images, split=COUNTS).build()["train"].fingerprint
        for captions, images in ((path, pictures), (path, tmp_path / "moved"), (other, pictures))
    )
    assert first == moved != changed


def test_training_takes_the_next_readable_image_and_counts(tmp_path, pictures):
    (pictures / "0.jpg").write_text("<html><body>404</body></html>")
    (pictures / "1.jpg").unlink()
    train, val = (build(tmp_path)[split] for split in ("train", "val"))
    sample = train[0]
    assert sample["image_id"] == "2.jpg" and sample["text_input"] == "picture 2, seen once"
    assert [entry["image"] for entry in sample["bad"]] == [str(pictures / f"{n}.jpg") for n in (0, 1)]
    assert "looks like HTML" in sample["bad"][0]["reason"] and sample["bad"][1]["reason"] == "no such file"
    assert train[5]["bad"] == [] and train[0]["text_input"] == sample["text_input"]
    batch = train.collater([train[i] for i in range(6)])
    assert batch["image"].shape[0] == 6 and len(batch["bad"]) == 6
    assert train.missing_files() == [str(pictures / "1.jpg")] and val.missing_files() == []


def test_evaluation_drops_what_it_cannot_read_and_counts(tmp_path, pictures):
    (pictures / "1.jpg").write_bytes(b"")
    val = build(tmp_path, split={"val": 3})["val"]
    batch = val.collater([val[i] for i in range(3)])
    assert batch["image"].shape[0] == 2 and batch["image_id"] == ["0.jpg", "2.jpg"]
    assert batch["bad"] == [{"image": str(pictures / "1.jpg"), "reason": "the file is empty (0 bytes)"}]
    lost = val.collater([val[1]])
    assert lost["image"] is None and lost["text_input"] == [] and len(lost["bad"]) == 1
    with pytest.raises(UnreadableImage, match=r"1\.jpg: the file is empty"):
        val.pil_image(1)


def test_a_folder_of_nothing_readable_is_an_error(tmp_path, pictures):
    rows = [(f"none{n}.jpg", "x") for n in range(MAX_TRIES + 9)]
    keys = {"captions": write_csv(tmp_path / "c.txt", rows), "split": {"train": len(rows)}}
    with pytest.raises(DataError, match=f"{MAX_TRIES} images in a row cannot be read"):
        builder(tmp_path, **keys).build()["train"][3]


def test_unreadable_images_say_why(tmp_path, pictures):
    path = pictures / "x.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(UnreadableImage, match="broken or truncated"):
        open_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES == before  # LAVIS's own data sets go on as LAVIS wants them
    for content, words in ((b"not found", "looks like text"), (b"\x00\x01\x02" * 9, "not an image format"),
                           (b"version https://git-lfs.github.com/spec/v1", "git lfs pull")):
        path.write_bytes(content)
        with pytest.raises(UnreadableImage, match=words):
            open_image(path)
    with pytest.raises(UnreadableImage, match="a folder"):
        open_image(pictures)
    error = pickle.loads(pickle.dumps(UnreadableImage(path, "why")))
    assert (error.path, error.reason) == (str(path), "why")


def test_too_many_pixels_are_refused(pictures, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match="too many pixels"):
        open_image(pictures / "0.jpg")


def test_pictures_of_more_than_120_megapixels_are_refused_by_their_header(tmp_path, monkeypatch):
    """One of 144 was decoded, with a warning of Pillow's, which refuses from 179 on only."""

    def decode(*args):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    for limit in (Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for side, says in ((12_000, "12000 x 12000 are 144.0 megapixels; at most 120"), (10_955, "120.0 megapixels")):
            (tmp_path / "x.png").write_bytes(png_of(side, side))
            with pytest.raises(UnreadableImage, match=says) as error:
                open_image(tmp_path / "x.png")
            assert error.value.path == str(tmp_path / "x.png")
            with pytest.raises(UnreadableImage, match=says):
                decode_image(png_of(side, side), "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a camera's 102 megapixels are nothing to warn of
        with pytest.raises(UnreadableImage, match="AssertionError: decoded"):
            decode_image(png_of(11_664, 8_750), "x.png")


def test_no_other_program_is_started_for_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kw: pytest.fail(f"started {args}"))
    (tmp_path / "x.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    with pytest.raises(UnreadableImage, match="EPS, which another program would have to draw"):
        open_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16", "I"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / "x.tif"
    Image.new(mode, (8, 8), 25700 if mode.startswith("I") else 0).save(path)
    image = open_image(path)
    assert image.mode == "RGB"
    if mode.startswith("I"):
        assert image.getpixel((0, 0)) == (100, 100, 100)  # scaled to 8 bits, not clipped to white


@pytest.mark.parametrize("mode, value", [("F", 0.5), ("I", 1 << 20), ("I", -1)])
def test_numbers_of_no_known_range_are_unreadable(tmp_path, mode, value):
    path = tmp_path / "x.tif"
    Image.new(mode, (8, 8), value).save(path)
    with pytest.raises(UnreadableImage, match=f"Pillow mode {mode}") as error:
        open_image(path)
    assert error.value.path == str(path)


def test_photos_stand_upright(tmp_path):
    image = Image.new("RGB", (60, 30), "white")
    image.paste("red", (0, 0, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by 90 degrees clockwise
    image.save(tmp_path / "x.png", exif=exif)
    upright = open_image(tmp_path / "x.png")
    assert upright.size == (30, 60) and upright.getpixel((15, 5)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "x.png")
    opened = open_image(tmp_path / "x.png")
    assert opened.getpixel((6, 4)) == (255, 255, 255) and opened.getpixel((1, 4)) == (0, 0, 0)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"images": None}, "images=FOLDER"),
        ({"images": "nowhere"}, "images=nowhere is not a folder"),
        ({"split": None}, "say how to split it"),
        ({"split": "random"}, "split=random must be from_file or a mapping"),
        ({"split": {"dev": 3}}, r"unknown key .*split\.dev; known: test, train, val"),
        ({"split": {"train": 99}}, "but .* has 6"),
        ({"captions": None}, "neither of `captions`"),
        ({"annotations": {"val": "x"}}, "both of `captions`"),
        ({"vis_processor": {"train": {"name": "evlgen_imag"}}}, "evlgen_imag is no registered processor"),
        ({"text_processor": {"train": None}}, r"text_processor\.train is missing"),
        ({"max_bad_fraction": 1.5}, "must be a number of at least 0 and at most 1"),
    ],
)
def test_config_errors_name_the_mend(tmp_path, pictures, keys, words):
    with pytest.raises(DataError, match=words):
        builder(tmp_path, **{"captions": write_csv(tmp_path / "c.txt"), "split": COUNTS, **keys}).build()


def test_more_bad_rows_than_tolerated_stop(tmp_path, pictures, caplog):
    path = write_csv(tmp_path / "c.txt", [*ROWS, ("7.jpg", " ")])
    with pytest.raises(DataError, match="1 of 13 rows .* no caption for 7.jpg.*max_bad_fraction"):
        builder(tmp_path, captions=path, split=COUNTS).build()
    builder(tmp_path, captions=path, split=COUNTS, max_bad_fraction=0.1).build()
    assert "1 of 13 rows" in caplog.text


def test_conflicting_ids_are_errors(tmp_path, pictures):
    for rows, words in (
        ([("a", 1), ("a", 2)], "gives a two image ids: 1 and 2"),
        ([("a", 1), ("b", 1)], "gives the id 1 to two images: a and b"),
    ):
        rows = [{"image": image, "image_id": image_id, "caption": "x"} for image, image_id in rows]
        with pytest.raises(DataError, match=words):
            builder(tmp_path, captions=write_json(tmp_path / "c.json", rows), split={"train": 1}).build()


def test_lavis_finds_the_builder_and_its_own_processors_fit(tmp_path, pictures):
    assert registry.get_builder_class("image_captions") is ImageCaptionsBuilder
    made = builder(tmp_path, captions=write_csv(tmp_path / "c.txt"), split=COUNTS)
    made.config.vis_processor.train = {"name": "blip_image_train", "image_size": 32}
    made.config.text_processor.train = {"name": "blip_caption"}
    sample = made.build_datasets()["train"][0]
    assert sample["image"].shape == (3, 32, 32) and sample["text_input"] == "picture 0, seen once"


def test_a_folder_that_may_not_be_read_is_named(tmp_path, pictures, monkeypatch):
    train = build(tmp_path)["train"]

    def refused(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=f"the images folder {pictures} cannot be read .Permission denied"):
        train.missing_files()
    with pytest.raises(DataError, match=r"images=.*x cannot be read \(File name too long\)"):
        builder(tmp_path, captions=write_csv(tmp_path / "c.txt"), images="x" * 300, split=COUNTS).build_datasets()


@pytest.mark.parametrize("name", ["a\0/b.jpg", "a\0.jpg", "0.jpg/b.jpg", "x" * 300 + "/b.jpg", "x" * 300 + ".jpg"])
def test_a_name_that_no_file_can_have_is_one_missing_file(tmp_path, pictures, name):
    path = write_json(tmp_path / "c.json", [{"image": image, "caption": "a dog"} for image in ("1.jpg", name)])
    data = builder(tmp_path, annotations={"train": str(path)}).build_datasets()["train"]
    assert data.missing_files() == [data.path_of(name)]
    with pytest.raises(UnreadableImage):
        data.pil_image(1)
