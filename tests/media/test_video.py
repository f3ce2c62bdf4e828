import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lavis_evlgen.compat.environment import BrokenEnvironment
from lavis_evlgen.media.video import Frames, UnreadableVideo, VideoFile, headtail, opened, uniform
from tests.clip_tools import frames_of, numbers_in, write_clip

totals, counts = st.integers(1, 60), st.integers(1, 20)


@settings(deadline=None)
@given(totals, counts)
def test_uniform_frames_are_the_first_of_equal_parts(total, count):
    taken = uniform(total, count)
    assert len(taken) == count and taken[0] == 0 and taken == sorted(taken) and taken[-1] < total
    if total >= count:
        assert len(set(taken)) == count
        gaps = np.diff([*taken, total])
        assert gaps.max() - gaps.min() <= 1
    else:
        assert set(taken) == set(range(total))  # a short clip: all it has, repeated in order


@settings(deadline=None)
@given(totals, counts, st.integers(0, 10**6))
def test_headtail_takes_half_of_each_half_whatever_the_numbers(total, count, seed):
    torch.manual_seed(seed)
    taken = headtail(total, count)
    assert len(taken) == count and taken == sorted(taken) and 0 <= taken[0] and taken[-1] < total
    if total < count:
        assert taken == uniform(total, count)
        return
    assert len(set(taken)) == count
    head = sum(number < total // 2 for number in taken)
    assert abs(head - (count - head)) <= 1
    torch.manual_seed(seed)
    assert headtail(total, count) == taken  # a function of torch's seed


def test_headtail_reaches_every_frame_and_an_odd_one_comes_from_either_half():
    torch.manual_seed(0)
    draws = [headtail(9, 3) for _ in range(300)]
    assert set(sum(draws, [])) == set(range(9))
    assert {sum(number < 4 for number in draw) for draw in draws} == {1, 2}
    assert {headtail(2, 1)[0] for _ in range(50)} == {0, 1}


@pytest.mark.parametrize("name, codec", [("a.avi", "MJPG"), ("a.mp4", "mp4v"), ("a.mkv", "mp4v")])
def test_the_frames_asked_for_come_in_the_order_asked_for(tmp_path, name, codec):
    clip = VideoFile(write_clip(tmp_path / name, 12, codec=codec))
    assert len(clip) == 12 and clip.fps == pytest.approx(5, rel=0.1)
    frames = clip.frames([0, 5, 11, 5, 5])
    assert isinstance(frames, np.ndarray) and frames.shape == (5, 64, 64, 3) and frames.dtype == np.uint8
    assert numbers_in(frames) == [0, 5, 11, 5, 5]


def test_a_clip_of_one_frame_and_a_file_in_memory(tmp_path):
    path = write_clip(tmp_path / "one.avi", 1)
    for clip in (VideoFile(path), VideoFile(path.read_bytes(), "shard:one")):
        assert len(clip) == 1 and clip.frames(uniform(1, 4)).shape == (4, 64, 64, 3)


def test_colours_are_rgb(tmp_path):
    import cv2

    writer = cv2.VideoWriter(str(tmp_path / "red.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 64))
    writer.write(np.full((64, 64, 3), (0, 0, 255), np.uint8))  # OpenCV's order is BGR
    writer.release()
    red, green, blue = VideoFile(tmp_path / "red.avi").frames([0]).mean((0, 1, 2))
    assert red > 200 and green < 60 and blue < 60


def reason(path):
    with pytest.raises(UnreadableVideo) as error:
        clip = VideoFile(path)
        clip.frames(uniform(len(clip), 8))
    assert error.value.path == str(path) and "\n" not in error.value.reason
    return error.value.reason


def test_unreadable_clips_say_why(tmp_path):
    path = tmp_path / "x.mp4"
    assert reason(path) == "no such file"
    path.mkdir()
    assert reason(path) == "a folder, not a file"
    for content, words in (
        (b"", "the file is empty"), (b"a list of clips", "looks like text, not a video"),
        (b"<!DOCTYPE html>", "looks like HTML"), (b"version https://git-lfs.github.com/spec/v1", "not the video"),
        (bytes(range(256)) * 9, "broken, truncated or without frames"),
    ):  # fmt: skip
        file = tmp_path / f"{len(content)}.mp4"
        file.write_bytes(content)
        assert words in reason(file)
    with pytest.raises(UnreadableVideo, match="shard:x: the file is empty"):
        VideoFile(b"", "shard:x")
    error = pickle.loads(pickle.dumps(UnreadableVideo(path, "why")))
    assert (error.path, error.reason) == (str(path), "why")


@pytest.mark.parametrize("name, words", [("x.mp4", "cannot be opened"), ("x.mkv", "truncated ("), ("x.avi", "trunc")])
def test_truncated_clips_are_unreadable(tmp_path, name, words):
    whole = write_clip(tmp_path / f"whole{name[1:]}", 60, codec="MJPG" if name.endswith("avi") else "mp4v")
    (tmp_path / name).write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert len(VideoFile(whole)) == 60
    assert words in reason(tmp_path / name)


def test_a_video_without_frames_and_a_narrow_one(tmp_path):
    assert "without frames" in reason(write_clip(tmp_path / "none.avi", 0))
    assert "cannot read this width" in reason(write_clip(tmp_path / "narrow.avi", 3, side=48))


def test_clips_in_memory(tmp_path):
    array = frames_of(5)
    assert numbers_in(opened(array).frames([4, 0])) == [4, 0]
    pictures = [Image.fromarray(frame) for frame in array]
    assert numbers_in(opened(pictures).frames([1, 2])) == [1, 2]
    clip = Frames(array)
    assert opened(clip) is clip
    assert len(opened(str(write_clip(tmp_path / "a.avi", 3)))) == 3
    for wrong, words in (
        (array.astype(float), "uint8"), (array[0], "N, H, W, 3"), (7, "not int"), (array[:0], "N above 0"),
        ([pictures[0], pictures[1].resize((8, 8))], "one size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            opened(wrong)


def test_without_decord_the_error_says_what_to_do(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.avi", 2)
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(BrokenEnvironment, match="read with decord.*setup_environment"):
        VideoFile(path)
