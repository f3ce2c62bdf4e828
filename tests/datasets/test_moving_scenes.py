from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.common.registry import registry
from lavis.datasets.builders import load_dataset
from omegaconf import OmegaConf

from lavis_evlgen.config.keys import keys_of
from lavis_evlgen.datasets import DataError, MovingScenesBuilder, MovingScenesDataset
from lavis_evlgen.datasets.synthetic import motion_specs as specs
from lavis_evlgen.datasets.synthetic.moving_scenes import DrawnClip
from lavis_evlgen.datasets.synthetic.scene_drawing import BACKGROUNDS, COLOURS
from lavis_evlgen.datasets.synthetic.scene_specs import SHARES
from lavis_evlgen.evaluation import order_accuracy
from lavis_evlgen.processors import EvlgenImageEvalProcessor, EvlgenVideoEvalProcessor, EvlgenVideoTrainProcessor

KINDS = dict.fromkeys(specs.KINDS, 1.0)
SIDE = 48
splits = st.sampled_from(["train", "val", "test"])
motions = st.builds(specs.sample_motion, st.integers(0, 99), splits, st.integers(0, 10**6), st.just(KINDS))


def clips(split="train", size=12, frames=4, side=SIDE, **keys):
    processor = EvlgenVideoEvalProcessor(frames, image_size=16)
    return MovingScenesDataset(split, size, image_size=side, vis_processor=processor, text_processor=str, **keys)


def drawn(motion, frames=5):
    return DrawnClip(motion, frames, SIDE).frames(range(frames))


def test_the_default_config_builds():
    found = load_dataset("moving_scenes")
    assert {split: len(dataset) for split, dataset in found.items()} == dict(train=4000, val=100, test=100)
    sample = found["train"][7]
    assert sample["image"].shape == (3, 4, 224, 224) and sample["bad"] == []
    assert [sample["text_input"]] == found["train"].references[sample["image_id"]]
    config = OmegaConf.load(MovingScenesBuilder.default_config_path()).datasets.moving_scenes
    assert set(config) == set(keys_of(MovingScenesBuilder))
    assert registry.get_builder_class("moving_scenes") is MovingScenesBuilder


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), splits, st.integers(0, 10**5), st.integers(2, 6))
def test_a_twin_is_the_same_frames_reversed_under_the_opposite_caption(seed, split, pair, frames):
    forwards, backwards = (specs.sample_motion(seed, split, 2 * pair + n, KINDS) for n in (0, 1))
    there, back = drawn(forwards, frames), drawn(backwards, frames)
    assert (there == back[::-1]).all() and (there != back).any()
    one, other = forwards.caption, backwards.caption
    assert one != other
    assert order_accuracy({1: one, 2: one}, {1: one, 2: other})["order_accuracy"] == 0.5
    opposite = {**specs.TWINS, **{twin: event for event, twin in specs.TWINS.items()}}
    if forwards.kind == "turn":
        (colour, *rest), (turned, *same) = one.split(), other.split()
        assert rest == [same[0], "turns", turned] and same[-1] == colour
    else:
        event = next(event for event in opposite if one.endswith(event))
        assert other == one.removesuffix(event) + opposite[event]


def seen(frame):
    """{colour name: (pixels, mean x, mean y)} of what stands out from the background."""
    names = {**COLOURS, **BACKGROUNDS}
    distance = np.abs(frame[:, :, None].astype(int) - np.array(list(names.values()))).sum(-1)
    nearest = distance.argmin(-1)
    found = {}
    for n, name in enumerate(COLOURS):
        ys, xs = np.nonzero((nearest == n) & (distance.min(-1) < 60))
        if len(ys) > 20:
            found[name] = len(ys), xs.mean() / SIDE, ys.mean() / SIDE
    return found


def most(found):
    """The colour of most pixels: where orange fades into black, the edge looks brown."""
    return max(found, key=lambda name: found[name][0])


@settings(max_examples=30, deadline=None)
@given(motions)
def test_the_frames_show_what_the_caption_says(motion):
    first, last = map(seen, drawn(motion)[[0, -1]])
    words = motion.caption.split()
    colour = words[0]
    if "moves" in words:
        across, down = (last[colour][n] - first[colour][n] for n in (1, 2))
        way = {"left": -across, "right": across, "up": -down, "down": down}[words[-1]]
        assert way > 0.3 and min(abs(across), abs(down)) < 0.05
    elif "turns" in words:
        assert most(first) == colour and most(last) == words[-1]
        assert np.allclose(first[colour][1:], last[words[-1]][1:], atol=0.03)
    elif words[-1] in ("appears", "leaves"):
        before, after = (first, last) if words[-1] == "appears" else (last, first)
        assert not before and most(after) == colour
    elif words[3] != colour:  # two of one colour are one patch here
        near, far = (last, first) if words[-1] == "collide" else (first, last)
        gap = {name: np.abs(np.subtract(told[colour][1:], told[words[3]][1:])).max()
               for name, told in (("near", near), ("far", far))}
        assert gap["near"] < gap["far"] - 0.1
        assert far[colour][1] + far[colour][2] < far[words[3]][1] + far[words[3]][2]  # the left or upper one first


@settings(max_examples=50, deadline=None)
@given(motions, st.integers(2, 9))
def test_things_stay_inside_and_do_not_overlap(motion, frames):
    for number in range(frames):
        things = motion.scene(number, frames).things
        for n, one in enumerate(things):
            assert one.side / 2 < min(one.x, one.y, 1 - one.x, 1 - one.y)
            for other in things[:n]:
                gap = max(abs(one.x - other.x), abs(one.y - other.y)) - (one.side + other.side) / 2
                assert gap > -1e-9


def test_whole_captions_of_a_split_are_in_no_other():
    for kind in specs.KINDS:
        found = [set(specs.motions_of(kind, split)) for split in SHARES]
        assert sum(map(len, found)) == len(set.union(*found)) and all(found)
    told = {split: {text for texts in clips(split, 600).references.values() for text in texts} for split in SHARES}
    assert all(told[one].isdisjoint(told[other]) for one, other in combinations(told, 2))
    known = {word for text in told["train"] for word in text.split()}
    assert {word for split in ("val", "test") for text in told[split] for word in text.split()} <= known


def test_a_model_that_ignores_order_gets_half_of_the_order_words():
    test = clips("test", 40)
    truth = {key: texts[0] for key, texts in test.references.items()}
    # it sees a bag of frames, and says what a clip with that bag is called
    bags: dict = {}
    for row in range(len(test)):
        bag = tuple(sorted(frame.tobytes() for frame in test.clip(row).frames(range(4))))
        bags.setdefault(bag, []).append(test.annotation[row]["image_id"])
    assert {len(ids) for ids in bags.values()} == {2}
    for choice in (0, 1):
        said = {key: truth[ids[choice]] for ids in bags.values() for key in ids}
        assert order_accuracy(said, truth)["order_accuracy"] == 0.5
    assert order_accuracy(truth, truth)["order_accuracy"] == 1.0
    assert {row["image_id"][:-1] for row in test.annotation} == {f"test-{n:06d}" for n in range(20)}


def test_training_takes_the_frames_of_a_clip_in_order_too():
    train = EvlgenVideoTrainProcessor(3, image_size=16, min_scale=1.0, flip=False)
    evaluate = EvlgenVideoEvalProcessor(3, image_size=16)
    one, other = (
        MovingScenesDataset("train", 4, image_size=SIDE, vis_processor=vis, text_processor=str)
        for vis in (train, evaluate)
    )
    assert torch.equal(one[2]["image"], other[2]["image"])
    assert torch.equal(one[3]["image"], one[2]["image"].flip(1))  # (3, T, H, W)


def test_a_golden_clip():
    """Clips must not drift with Python's version: a change here changes every result."""
    motion = specs.sample_motion(0, "train", 0, KINDS)
    assert (motion.caption, motion.noise) == ("orange cross moves left", 2867324954)


def test_clips_do_not_depend_on_the_size_of_the_set():
    assert (clips(size=12).clip(9).frames([2]) == clips(size=30).clip(9).frames([2])).all()
    assert clips().fingerprint == clips().fingerprint
    assert len({clips(**keys).fingerprint for keys in ({}, {"seed": 1}, {"side": 64}, {"frames": 5})}) == 4


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"kinds": {"spin": 1}}, r"moving_scenes\.kinds\.spin is unknown; kinds are move"),
        ({"kinds": {"move": 0}}, "weights"),
        ({"side": 4}, "image_size=4"),
        ({"size": 0}, "split of 0"),
        ({"size": 7}, r"sizes\.train=7 must be even"),
        ({"frames": 1}, "takes 2 frames or more"),
    ],
)
def test_config_errors(keys, words):
    with pytest.raises(DataError, match=words):
        clips(**keys)


def test_a_picture_processor_is_refused_and_splits_can_be_left_out():
    with pytest.raises(DataError, match="needs a video processor"):
        MovingScenesDataset("train", 4, vis_processor=EvlgenImageEvalProcessor(16), text_processor=str)
    config = OmegaConf.load(MovingScenesBuilder.default_config_path()).datasets.moving_scenes
    config.sizes = {"train": 0, "val": 4}
    assert list(MovingScenesBuilder(config).build_datasets()) == ["val"]
    config.sizes = {"dev": 4}
    with pytest.raises(DataError, match=r"unknown key .*sizes\.dev; known"):
        MovingScenesBuilder(config).build()


def test_every_clip_says_which_order_is_right():
    dataset = clips("val", 40)
    assert dataset.order_captions == {row["image_id"]: row["caption"] for row in dataset.annotation}
    asked = order_accuracy(dataset.order_captions, dataset.order_captions)
    assert asked["order_asked"] == 40 and asked["order_accuracy"] == 1


def test_a_clip_and_its_reverse_are_of_one_source():
    data = clips(size=6)
    assert [data.source_of(row) for row in data.annotation] == [0, 0, 1, 1, 2, 2]
