import hashlib
import os
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.datasets.builders import load_dataset
from omegaconf import OmegaConf

from lavis_evlgen.config.keys import keys_of
from lavis_evlgen.datasets import DataError, ScenesBuilder, ScenesDataset
from lavis_evlgen.datasets.synthetic import scene_specs as specs
from lavis_evlgen.datasets.synthetic.scene_drawing import BACKGROUNDS, COLOURS, draw_scene
from lavis_evlgen.datasets.synthetic.scene_language import CAPTIONS_PER_SCENE, NUMBERS, captions_of

KINDS = {"single": 2.0, "pair": 3.0, "count": 1.0}
splits = st.sampled_from(["train", "val", "test"])
scenes = st.builds(specs.sample_scene, st.integers(0, 99), splits, st.integers(0, 10**6), st.just(KINDS))


def pixels(dataset, index):
    return np.asarray(dataset.pil_image(index)).astype(int)


def test_the_default_config_builds():
    found = load_dataset("scenes")
    assert {split: len(dataset) for split, dataset in found.items()} == dict(train=4000, val=100, test=100)
    sample = found["train"][7]
    assert sample["image"].shape == (3, 224, 224) and sample["bad"] == []
    assert sample["text_input"] == found["train"].references[sample["image_id"]][0]
    assert all(len(texts) == CAPTIONS_PER_SCENE for texts in found["val"].references.values())
    config = OmegaConf.load(ScenesBuilder.default_config_path()).datasets.scenes
    assert set(config) == set(keys_of(ScenesBuilder))


def test_scenes_do_not_depend_on_order_global_randomness_or_size():
    one = ScenesDataset("train", 12, image_size=48)
    late = pixels(one, 11)
    random.seed(5)
    np.random.seed(5)
    state = random.getstate()
    other = ScenesDataset("train", 30, image_size=48)
    assert (pixels(other, 11) == late).all() and (pixels(one, 11) == late).all()
    assert random.getstate() == state
    assert other.annotation[11]["caption"] == one.annotation[11]["caption"]
    assert (pixels(ScenesDataset("train", 12, image_size=48, seed=1), 11) != late).any()


def test_scenes_are_the_same_in_another_process():
    paths = [str(Path(specs.__file__).parents[n]) for n in (2, 1)]
    script = (  # empty packages, for LAVIS takes long to import and drawing does not need it
        "import hashlib, sys, types\n"
        f"for name, path in zip(('lavis_evlgen', 'lavis_evlgen.datasets'), {paths}):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = [path]\n"
        "from lavis_evlgen.datasets.synthetic import scene_specs, scene_drawing\n"
        f"scene = scene_specs.sample_scene(3, 'val', 5, {KINDS})\n"
        "drawn = scene_drawing.draw_scene(scene, 32).tobytes()\n"
        "print(hashlib.sha256(repr(scene).encode() + drawn).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    scene = specs.sample_scene(3, "val", 5, KINDS)
    here = hashlib.sha256(repr(scene).encode() + draw_scene(scene, 32).tobytes()).hexdigest()
    assert there.stdout.strip().endswith(here), there.stderr


def test_a_golden_scene():
    """Scenes must not drift with Python's version: a change here changes every result."""
    scene = specs.sample_scene(0, "train", 0, KINDS)
    assert captions_of(scene)[0] == "a small yellow triangle below a large orange diamond"
    assert scene.noise == 798625518


def test_combinations_belong_to_one_split():
    for kind in specs.KINDS:
        found = [set(specs.combinations_of(kind, split)) for split in specs.SHARES]
        assert sum(map(len, found)) == len(set.union(*found)) and all(found)


def test_a_single_is_new_only_as_a_whole():
    """Every two words of a held-out caption have met in training, the four of them never."""
    train = {(*look, size, background) for _, look, size, background in specs.combinations_of("single", "train")}
    for split in ("val", "test"):
        for _, look, size, background in specs.combinations_of("single", split):
            held_out = (*look, size, background)
            assert held_out not in train
            for one, other in combinations(range(4), 2):
                assert any((told[one], told[other]) == (held_out[one], held_out[other]) for told in train)


@pytest.mark.parametrize("captions_per_image", [1, CAPTIONS_PER_SCENE])
def test_training_shows_every_word(captions_per_image):
    train = ScenesDataset("train", 1500, captions_per_image=captions_per_image)
    known = {word for row in train.annotation for word in row["caption"].split()}
    for split in ("val", "test"):
        texts = ScenesDataset(split, 500).references.values()
        texts = " ".join(text for told in texts for text in told[:captions_per_image])
        assert set(texts.split()) <= known
    for words in (specs.SHAPES, specs.COLOURS, specs.BACKGROUNDS, ("left", "right", "above", "below")):
        assert set(words) <= known
    assert len(train) == 1500 * captions_per_image


@settings(max_examples=150, deadline=None)
@given(scenes)
def test_things_stay_inside_and_apart_and_relations_hold(scene):
    for n, one in enumerate(scene.things):
        assert one.side / 2 < min(one.x, one.y, 1 - one.x, 1 - one.y)
        for other in scene.things[:n]:
            gap = max(abs(one.x - other.x), abs(one.y - other.y)) - (one.side + other.side) / 2
            assert gap > 0.01
    if scene.kind == "pair":
        one, other = scene.things
        across, down = one.x - other.x, one.y - other.y
        holds = {"left of": across < 0, "right of": across > 0, "above": down < 0, "below": down > 0}
        assert holds[scene.relation]
        wide, tall = scene.relation in ("left of", "right of"), abs(across) > abs(down)
        assert wide == tall


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 99), splits, st.integers(0, 10**6))
def test_a_scene_has_a_combination_of_its_split(seed, split, index):
    scene = specs.sample_scene(seed, split, index, KINDS)
    assert scene.combination in specs.combinations_of(scene.kind, split)


@settings(max_examples=150, deadline=None)
@given(scenes)
def test_captions_say_what_the_scene_holds(scene):
    told = captions_of(scene)
    assert len(set(told)) == CAPTIONS_PER_SCENE
    for text in told:
        words = text.split()
        for thing in scene.things:
            assert thing.colour in words and any(word.startswith(thing.shape) for word in words)
        if scene.kind == "count":
            assert NUMBERS[len(scene.things)] in words
        if scene.kind != "pair":
            assert scene.background in words
        assert "a orange" not in text and "  " not in text
    if scene.kind == "pair":
        first, second = scene.things
        look = f"a {first.size} {first.colour} {first.shape}"
        assert told[0] == f"{look} {scene.relation} a {second.size} {second.colour} {second.shape}"
        assert told[1].endswith(f"{specs.INVERSE[scene.relation]} {look}")


@settings(max_examples=60, deadline=None)
@given(scenes)
def test_pictures_show_what_the_scene_says(scene):
    side = 96
    image = np.asarray(draw_scene(scene, side)).astype(int)
    assert image.shape == (side, side, 3)
    names = {**COLOURS, **BACKGROUNDS}
    nearest = np.array(list(names.values()))

    def name_at(x, y):
        patch = image[int(y * side), int(x * side)]
        return list(names)[np.abs(nearest - patch).sum(-1).argmin()]

    assert name_at(0.005, 0.005) == scene.background
    for thing in scene.things:
        x, y = (thing.x - thing.side * 0.42, thing.y) if thing.shape == "ring" else (thing.x, thing.y)
        assert name_at(x, y) == thing.colour
        if thing.shape == "ring":
            assert name_at(thing.x, thing.y) == scene.background


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"kinds": {"triple": 1}}, r"kinds\.triple is unknown"),
        ({"kinds": {"single": 0}}, "weights"),
        ({"captions_per_image": 6}, "captions_per_image=6"),
        ({"image_size": 4}, "image_size=4"),
        ({"size": 0}, "split of 0 pictures"),
    ],
)
def test_config_errors(keys, words):
    with pytest.raises(DataError, match=words):
        ScenesDataset("train", **{"size": 3, **keys})


def test_fingerprint_and_left_out_splits():
    settings = ({}, {}, {"seed": 1}, {"image_size": 64})
    prints = [ScenesDataset("train", 9, **keys).fingerprint for keys in settings]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    config = OmegaConf.load(ScenesBuilder.default_config_path()).datasets.scenes
    config.sizes = {"train": 0, "val": 3}
    assert list(ScenesBuilder(config).build_datasets()) == ["val"]
    config.sizes = {"dev": 3}
    with pytest.raises(DataError, match=r"unknown key .*sizes\.dev; known"):
        ScenesBuilder(config).build()
