import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from lavis_evlgen.config.keys import keys_of
from lavis_evlgen.datasets import DataError, VideoCaptionsBuilder, VideoShards, WebvidBuilder
from lavis_evlgen.datasets.base import CaptionedImage
from lavis_evlgen.datasets.builders.video_captions import VideoCaptionDataset
from lavis_evlgen.datasets.loading import train_loader
from lavis_evlgen.datasets.shards.stream import ShardStream
from lavis_evlgen.media.video import UnreadableVideo
from lavis_evlgen.runners.preflight import check_files
from lavis_evlgen.runners.skipped_samples import SkippedFiles, TooManyBadImages, check_unreadable
from tests.clip_tools import numbers_in, write_clip
from tests.datasets.helpers import coco, write_csv, write_json
from tests.datasets.shard_tools import write_shard

COUNT = 6
ROWS = [(f"{n}.avi", f"Clip {n}, seen {way} .") for n in range(COUNT) for way in ("once", "twice")]
KEYS = ("image", "text_input", "image_id", "instance_id", "bad")  # of image_captions


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for n in range(COUNT):
        write_clip(folder / f"{n}.avi", 8 + n)
    return folder


@pytest.fixture
def videos(clips, tmp_path):
    """A folder of the clips, to be changed."""
    (tmp_path / "videos").mkdir()
    for file in clips.iterdir():
        (tmp_path / "videos" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "videos"


def config_of(builder, kind="default", **keys):
    name = builder.NAME
    config = OmegaConf.load(builder.default_config_path(kind)).datasets[name]
    plain = {"image_size": 16, "mean": [0, 0, 0], "std": [1, 1, 1]}
    for stage in ("train", "eval"):
        config.vis_processor[stage] |= plain
    config.vis_processor.train |= {"min_scale": 1.0, "flip": False}
    return OmegaConf.merge(config, {key: str(v) if isinstance(v, Path) else v for key, v in keys.items()})


def build(videos, builder=VideoCaptionsBuilder, **keys):
    return builder(config_of(builder, videos=videos, **keys)).build_datasets()


def captioned(videos, rows=ROWS, **keys):
    path = write_csv(videos.parent / "captions.csv", rows, "video,caption")
    return build(videos, captions=path, **{"split": {"train": 3, "val": 2}, **keys})


def test_samples_are_those_of_image_captions_with_frames(videos):
    found = captioned(videos)
    train, val = found["train"], found["val"]
    assert (len(train), train.num_images, len(val), val.num_images) == (6, 3, 2, 2)
    assert val.references == {name: [text for video, text in ROWS if video == name] for name in ("3.avi", "4.avi")}
    sample = val[0]
    assert tuple(sample) == KEYS and sample["image"].shape == (3, 4, 16, 16)
    assert (sample["image_id"], sample["text_input"], sample["bad"]) == ("3.avi", "clip 3, seen once", [])
    assert numbers_in(sample["image"].permute(1, 2, 3, 0) * 255) == [0, 2, 5, 8]  # of 11 frames
    batch = val.collater([val[0], val[1]])
    assert batch["image"].shape == (2, 3, 4, 16, 16) and batch["image_id"] == ["3.avi", "4.avi"]


def test_frames_follow_the_seed_wherever_a_run_starts(videos):
    train = captioned(videos)["train"]

    def batches(seed, start, count):
        stream = iter(train_loader([train], None, 3, seed, 0, 1, start, 0, False))
        return [next(stream) for _ in range(count)]

    whole, resumed, other = batches(1, 0, 3), batches(1, 1, 2), batches(2, 0, 3)
    assert [batch["image_id"] for batch in whole[1:]] == [batch["image_id"] for batch in resumed]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(whole[1:], resumed, strict=True))
    assert not any(torch.equal(a["image"], b["image"]) for a, b in zip(whole, other, strict=True))


def test_bad_clips_are_replaced_in_training_left_out_in_evaluation_and_counted(videos, tmp_path, caplog):
    (videos / "0.avi").write_text("<html><body>404</body></html>")
    whole = (videos / "1.avi").read_bytes()
    (videos / "1.avi").write_bytes(whole[: len(whole) // 3])
    (videos / "3.avi").write_bytes(b"")
    found = captioned(videos, max_bad_fraction=0.5)
    train, val = found["train"], found["val"]
    sample = train[0]
    assert sample["image_id"] == "2.avi" and sample["image"].shape == (3, 4, 16, 16)
    assert [entry["image"] for entry in sample["bad"]] == [str(videos / f"{n}.avi") for n in (0, 1)]
    assert "looks like HTML" in sample["bad"][0]["reason"] and "truncated" in sample["bad"][1]["reason"]
    batch = next(iter(DataLoader(val, 2, collate_fn=val.collater)))
    assert batch["image_id"] == ["4.avi"] and batch["image"].shape == (1, 3, 4, 16, 16)
    assert batch["bad"] == [{"image": str(videos / "3.avi"), "reason": "the file is empty (0 bytes)"}]
    with pytest.raises(UnreadableVideo, match="empty"):
        val.pil_image(0)

    bad = SkippedFiles(tmp_path, [train])
    bad.add(sample["bad"])
    with caplog.at_level(logging.WARNING), pytest.raises(TooManyBadImages, match="2 of 3 videos are unreadable"):
        bad.share(1), bad.check()
    assert "2 of 3 videos are unreadable; new: " in caplog.text
    named = [json.loads(line) for line in bad.file.read_text().splitlines()]
    assert [entry["image"] for entry in named] == [str(videos / f"{n}.avi") for n in (0, 1)]
    check_unreadable(tmp_path, "val", val, batch["bad"])  # one of two is what max_bad_fraction allows
    assert "val: 1 of 2 videos are unreadable" in caplog.text


def test_a_folder_of_nothing_readable_and_missing_files(videos):
    for n in range(3):
        (videos / f"{n}.avi").unlink()
    train = captioned(videos)["train"]
    with pytest.raises(DataError, match="3 videos in a row cannot be read.*Check the videos folder"):
        train[0]
    with pytest.raises(ValueError, match=r"3 of 3 videos are not there.*Check datasets\.video_captions\.videos"):
        check_files("video_captions", train)


def test_one_frame_is_a_clip_and_the_sheet_shows_four(videos):
    write_clip(videos / "3.avi", 1)
    val = captioned(videos)["val"]
    assert val[0]["image"].shape == (3, 4, 16, 16) and val[0]["bad"] == []
    assert len(val.clip(0)) == 1
    sheet = np.asarray(val.pil_image(1)).astype(float)  # 12 frames: 0, 3, 6, 9
    assert sheet.shape == (128, 128, 3)
    corners = [sheet[y:y + 64, x:x + 64].mean() / 8 for y in (0, 64) for x in (0, 64)]
    assert np.rint(corners).tolist() == [0, 3, 6, 9]


def test_lavis_and_coco_and_msrvtt_files(videos):
    lavis = [{"video": name, "caption": text, "image_id": int(name[0])} for name, text in ROWS]
    scored = [{"video": "5.avi", "caption": ["one", "two"], "image_id": "msvd_5", "instance_id": "0"}]
    files = {"train": str(write_json(videos.parent / "t.json", lavis)),
             "test": str(write_json(videos.parent / "e.json", scored))}
    found = build(videos, annotations=files)
    assert list(found["train"].references) == list(range(COUNT)) and len(found["train"]) == 2 * COUNT
    assert found["test"].references == {"msvd_5": ["one", "two"]}
    assert found["test"][0]["image"].shape == (3, 4, 16, 16)
    path = write_json(videos.parent / "coco.json", coco(ROWS))
    assert build(videos, captions=path, split={"val": 2})["val"].references[10] == [ROWS[0][1], ROWS[1][1]]

    official = {
        "info": {},
        "videos": [{"video_id": "video0", "split": "train", "url": "film"}, {"video_id": "7", "split": "validate"}],
        "sentences": [{"video_id": "video0", "caption": "a", "sen_id": 1}, {"video_id": "7", "caption": "b"}],
    }
    path = write_json(videos.parent / "m.json", official)
    write_clip(videos / "video0.mp4", 3, codec="mp4v")
    found = build(videos, captions=path, split="from_file")
    assert {split: dataset.references for split, dataset in found.items()} == {
        "train": {"video0": ["a"]}, "val": {"7": ["b"]}
    }
    assert found["train"][0]["image"].shape == (3, 4, 16, 16)
    assert found["train"].sources == {"video0": "film"} and found["val"].sources == {}


@pytest.mark.parametrize("kind", ["msrvtt", "msvd"])
def test_msrvtt_and_msvd_are_read_where_lavis_keeps_them_and_nothing_is_downloaded(videos, monkeypatch, kind):
    import torchvision.datasets.utils as downloads

    monkeypatch.setattr(downloads, "_urlretrieve", lambda *a, **k: pytest.fail("it downloads"))
    monkeypatch.chdir(videos.parent)
    with pytest.raises(DataError, match=f"videos=data/{kind}/videos is not a folder here"):
        VideoCaptionsBuilder(config_of(VideoCaptionsBuilder, kind)).build_datasets()
    home = Path("data") / kind
    home.mkdir(parents=True)
    videos.rename(home / "videos")
    with pytest.raises(DataError, match=f"there is no captions file data/{kind}/annotations/cap_train.json"):
        VideoCaptionsBuilder(config_of(VideoCaptionsBuilder, kind)).build_datasets()
    (home / "annotations").mkdir()
    for n, split in enumerate(("train", "val", "test")):
        write_json(home / "annotations" / f"cap_{split}.json", [{"video": f"{n}.avi", "caption": "x", "image_id": n}])
    found = VideoCaptionsBuilder(config_of(VideoCaptionsBuilder, kind)).build_datasets()
    assert [(split, list(dataset.references)) for split, dataset in found.items()] == [
        ("train", [0]), ("val", [1]), ("test", [2])
    ]  # fmt: skip


def test_webvids_tables(videos):
    write_clip(videos / "000_050" / "17.mp4", 5, codec="mp4v")
    lines = ["videoid,contentUrl,duration,page_dir,name", "17,https://x/17.mp4,PT00H,000_050,A dog.",
             '18,,,,"A cat, asleep"', ""]
    (videos.parent / "w.csv").write_text("\n".join(lines))
    rows = [{"videoid": 17, "page_dir": "000_050", "name": "A dog."}, {"videoid": 18, "name": "A cat, asleep"}]
    for path in (videos.parent / "w.csv", write_json(videos.parent / "w.json", rows)):
        train = build(videos, WebvidBuilder, annotations={"train": str(path)})["train"]
        assert train.references == {"17": ["A dog."], "18": ["A cat, asleep"]}
        assert [row["image"] for row in train.annotation] == ["000_050/17.mp4", "18.mp4"]
        assert train[0]["image"].shape == (3, 4, 16, 16)
        assert train.missing_files() == [str(videos / "18.mp4")]
    path = write_csv(videos.parent / "c.csv", ROWS, "video,caption")
    with pytest.raises(DataError, match="has no column 'videoid'.*video_captions"):
        build(videos, WebvidBuilder, annotations={"train": str(path)})


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"videos": None}, r"set datasets\.video_captions\.videos=FOLDER"),
        ({"split": None}, r"datasets\.video_captions\.split\.train=N"),
        ({"captions": None}, r"datasets\.video_captions has neither"),
        ({"columns": {"image": "file"}}, r"columns\.image is not known; columns takes video, caption"),
        ({"columns": {"video": "clip"}}, r"no column 'clip'.*set datasets\.video_captions\.columns\.video=NAME"),
        ({"vis_processor": {"train": {"n_frms": 3}}}, "unknown key n_frms"),
    ],
)  # fmt: skip
def test_config_errors_name_the_mend(videos, keys, words):
    path = write_csv(videos.parent / "captions.csv", ROWS, "video,caption")
    with pytest.raises(ValueError, match=words):
        build(**{"videos": videos, "captions": path, "split": {"train": 2}, **keys})


def test_every_key_is_known_and_lavis_finds_the_builders():
    for builder in (VideoCaptionsBuilder, WebvidBuilder, registry.get_builder_class("video_shards")):
        assert registry.get_builder_class(builder.NAME) is builder
        for kind in builder.DATASET_CONFIG_DICT:
            config = OmegaConf.load(builder.default_config_path(kind)).datasets[builder.NAME]
            assert set(config) == set(keys_of(builder))


def test_clips_in_tar_shards(clips, tmp_path):
    members = {f"{n}.avi": (clips / f"{n}.avi").read_bytes() for n in range(COUNT)}
    members |= {"6.avi": b"not a video", "7.jpg": b"no clip"}
    members = {name: content for key in members for name, content in
               ((key, members[key]), (f"{key[0]}.txt", f"clip {key[0]}".encode()))}
    write_shard(tmp_path / "0.tar", members)
    name = str(tmp_path / "0.tar")
    builder = registry.get_builder_class("video_shards")
    dataset = builder(config_of(builder, shards=name)).build_datasets()["train"]
    assert isinstance(dataset, VideoShards)
    samples, _ = ShardStream(dataset, 0, 0, 1).take(COUNT)
    assert {sample["text_input"] for sample in samples} <= {f"clip {n}" for n in range(COUNT)}
    assert dataset.collater(samples)["image"].shape == (COUNT, 3, 4, 16, 16)
    _, tally = ShardStream(dataset, 0, 0, 1).take(3 * COUNT)  # more than one epoch
    reasons = {bad.reason for bad in tally.bad.values()}
    assert reasons == {"looks like text, not a video", "a caption without a clip"}


def test_clips_of_one_film_are_of_one_source(videos):
    """Two clips of one film are too alike to stand in for each other in a blind baseline."""
    names = ("-4wsuPCjDBc_5_15.avi", "-4wsuPCjDBc_20.5_31.avi", "04Gt01vatkk_248_265.mp4", "holiday_2.mp4",
             "video_0001_0002.mp4", "video_0001_0003.mp4")
    items = [CaptionedImage(name, name, ("a clip",)) for name in names]
    clips = VideoCaptionDataset("mine", "test", items, videos=str(videos), vis_processor=str, text_processor=str)
    sources = [clips.source_of(row) for row in clips.annotation]
    assert sources == ["-4wsuPCjDBc", "-4wsuPCjDBc", "04Gt01vatkk", *names[3:]]
    items = [CaptionedImage(f"video{n}.mp4", f"video{n}", ("a clip",), "youtube.com/a") for n in (1, 2)]
    clips = VideoCaptionDataset("mine", "test", items, videos=str(videos), vis_processor=str, text_processor=str)
    assert [clips.source_of(row) for row in clips.annotation] == ["youtube.com/a"] * 2
