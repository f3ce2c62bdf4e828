import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image

from lavis_evlgen.media.video import UnreadableVideo, uniform
from lavis_evlgen.processors import EvlgenImageEvalProcessor, EvlgenVideoEvalProcessor, EvlgenVideoTrainProcessor
from tests.clip_tools import frames_of, numbers_in, write_clip

NOISE = np.random.RandomState(0).randint(0, 256, (9, 40, 60, 3), dtype=np.uint8)
PLAIN = {"mean": [0, 0, 0], "std": [1, 1, 1]}


def made(name, **keys):
    return registry.get_processor_class(name).from_config(OmegaConf.create({"name": name, **keys}))


def test_a_path_becomes_frames_spread_over_the_clip(tmp_path):
    path = write_clip(tmp_path / "a.avi", 12)
    clip = made("evlgen_video_eval", image_size=20, **PLAIN)(str(path))
    assert clip.shape == (3, 4, 20, 20) and clip.dtype == torch.float32 and clip.is_contiguous()
    assert numbers_in(clip.permute(1, 2, 3, 0) * 255) == uniform(12, 4) == [0, 3, 6, 9]
    with pytest.raises(UnreadableVideo, match="no such file"):
        made("evlgen_video_eval")(tmp_path / "none.mp4")


def test_a_frame_is_what_the_image_processor_makes_of_it():
    picture, clip = EvlgenImageEvalProcessor(16, mean="clip"), EvlgenVideoEvalProcessor(9, image_size=16, mean="clip")
    alone = torch.stack([picture(Image.fromarray(frame)) for frame in NOISE], dim=1)  # (3, T, H, W)
    # Pillow and torch round resized pixels each in its own way: one step of 255, in units of the standard deviation
    assert (clip(NOISE) - alone).abs().max() < 1.01 / 255 / 0.26


def test_all_frames_share_one_crop_and_one_mirroring():
    still = np.repeat(NOISE[:1], 6, axis=0)
    train = EvlgenVideoTrainProcessor(5, image_size=16, min_scale=0.3)
    torch.manual_seed(0)
    clips = torch.stack([train(still) for _ in range(8)])  # (8, 3, T, H, W)
    assert torch.equal(clips, clips[:, :, :1].expand_as(clips))
    assert len({clip.numpy().tobytes() for clip in clips}) == 8
    mirrored = EvlgenVideoTrainProcessor(5, image_size=16, min_scale=1.0)
    whole, found = EvlgenVideoEvalProcessor(5, image_size=16)(still), set()
    for _ in range(20):
        clip = mirrored(still)
        found.add("as it is" if torch.equal(clip, whole) else "mirrored" if torch.equal(clip, whole.flip(-1)) else "?")
    assert found == {"as it is", "mirrored"}


def test_training_draws_frames_from_both_halves_by_torchs_seed():
    train = EvlgenVideoTrainProcessor(3, image_size=8, min_scale=1.0, flip=False, **PLAIN)
    draws = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        draws.append(numbers_in(train(frames_of(20)).permute(1, 2, 3, 0) * 255))
    assert draws[0] == draws[1] and len(set(map(tuple, draws))) > 1
    assert all(draw == sorted(draw) and draw[0] < 10 <= draw[2] for draw in draws)
    uniformly = EvlgenVideoTrainProcessor(3, "uniform", image_size=8, min_scale=1.0, flip=False)
    assert torch.equal(uniformly(NOISE), EvlgenVideoEvalProcessor(3, image_size=8)(NOISE))


def test_short_clips_repeat_in_order():
    clip = EvlgenVideoTrainProcessor(5, image_size=8, flip=False, min_scale=1.0, **PLAIN)(frames_of(2))
    assert numbers_in(clip.permute(1, 2, 3, 0) * 255) == [0, 0, 0, 1, 1]


def test_unknown_and_impossible_keys():
    for name, keys, words in (
        ("evlgen_video_train", {"n_frms": 4}, "unknown key n_frms; did you mean num_frames|known are"),
        ("evlgen_video_train", {"sampling": "middle"}, "sampling: 'middle' is not one of uniform, headtail"),
        ("evlgen_video_eval", {"sampling": "headtail"}, "unknown key sampling"),
        ("evlgen_video_eval", {"num_frames": 0}, "num_frames=0"),
        ("evlgen_video_eval", {"mean": "laion"}, "mean=laion must be clip"),
    ):
        with pytest.raises(ValueError, match=words):
            made(name, **keys)
