"""Questions about drawn scenes: answers that the picture decides, several a picture, no leak between splits."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from lavis.datasets.builders import load_dataset
from omegaconf import OmegaConf

from lavis_evlgen.config.keys import keys_of
from lavis_evlgen.datasets import DataError, SceneQuestionsBuilder, SceneQuestionsDataset, ScenesDataset
from lavis_evlgen.datasets.packing import TextGroups
from lavis_evlgen.datasets.synthetic import scene_specs as specs
from lavis_evlgen.datasets.synthetic.scene_answers import ANSWERS, ASKED, COUNTS, questions_of
from tests.datasets.test_scenes import scenes


def test_the_default_config_builds():
    found = load_dataset("scene_questions")
    assert {split: data.num_images for split, data in found.items()} == dict(train=4000, val=50, test=100)
    train, test = found["train"], found["test"]
    assert 6 < len(train) / train.num_images < 9
    assert {answer for own in train.answers.values() for answer in own} == set(ANSWERS)
    assert set(test.kinds.values()) == set(ASKED)
    sample = test[3]
    assert sample["image"].shape == (3, 224, 224) and sample["question"].endswith("?")
    assert sample["answer"] == test.answers[sample["question_id"]][0]
    assert set(train.texts_of([0, 5])) >= {"prompt", "text_input", "question"}
    config = OmegaConf.load(SceneQuestionsBuilder.default_config_path()).datasets.scene_questions
    assert set(config) == set(keys_of(SceneQuestionsBuilder))


@settings(max_examples=150, deadline=None)
@given(scenes)
def test_the_picture_decides_each_answer(scene):
    """What is called by a word is the only thing with that word; the answer is its own."""
    asked = questions_of(scene)
    assert len({question for question, *_ in asked}) == len(asked) >= 3
    for question, answer, kind in asked:
        assert answer in ANSWERS and kind in ASKED
        words = question.lower().rstrip("?").split()
        named = [thing for thing in scene.things
                 if {thing.shape, f"{thing.shape}s", f"{thing.shape}es"} & set(words)]  # fmt: skip
        if kind == "number":
            assert answer == COUNTS[len(scene.things)]
        elif kind == "background":
            assert answer == scene.background
        elif kind == "place":
            (other,) = named
            (thing,) = (thing for thing in scene.things if thing is not other)
            across, down = thing.x - other.x, thing.y - other.y
            holds = {"left": across < 0, "right": across > 0, "above": down < 0, "below": down > 0}
            assert holds[words[2]] and answer == thing.shape
        elif kind == "shape":
            assert {thing.shape for thing in scene.things if thing.colour in words} == {answer}
        else:
            assert {getattr(thing, kind) for thing in named} == {answer}
            assert len(named) == (1 if scene.kind == "pair" else len(scene.things))


def test_most_questions_of_a_pair_have_one_with_another_answer():
    data = SceneQuestionsDataset("train", 200, kinds={"pair": 1})
    answers: dict = {}
    for row in data.annotation:
        answers.setdefault(row["image_id"], set()).update(row["answers"])
    assert min(map(len, answers.values())) >= 2 and sum(map(len, answers.values())) / 200 > 5


def test_splits_share_no_combination_and_pictures_are_those_of_scenes():
    shown = {
        split: {data.scene(row).combination for row in range(len(data))}
        for split in specs.SHARES
        if (data := SceneQuestionsDataset(split, 300))
    }
    assert not shown["train"] & shown["test"] and not shown["train"] & shown["val"] and not shown["val"] & shown["test"]
    kinds = {"single": 1, "pair": 1}
    ours = SceneQuestionsDataset("test", 5, seed=3, image_size=48, kinds=kinds)
    captions = ScenesDataset("test", 5, seed=3, image_size=48, kinds=kinds)
    for row, own in enumerate(ours.annotation):
        assert np.array_equal(ours.pil_image(row), captions.pil_image(own["image"]))


def test_they_do_not_depend_on_size_or_global_randomness():
    one = SceneQuestionsDataset("train", 6, image_size=48)
    random.seed(5)
    np.random.seed(5)
    other = SceneQuestionsDataset("train", 20, image_size=48)
    drop = [{key: row[key] for key in ("question", "answers", "question_id")} for row in one.annotation]
    assert drop == [{key: row[key] for key in drop[0]} for row in other.annotation[: len(one)]]
    prints = [SceneQuestionsDataset("train", 6, **keys).fingerprint
              for keys in ({}, {}, {"seed": 1}, {"image_size": 64}, {"asked": ["size"]})]  # fmt: skip
    assert prints[0] == prints[1] and len(set(prints)) == 4


def test_questions_of_a_picture_are_packed_together():
    data = SceneQuestionsDataset("train", 8, image_size=32, vis_processor=np.asarray, text_processor=str)
    groups = TextGroups(data, 4, seed=1)
    rows = sorted(row for group in range(len(groups)) for row in groups.rows(0, group))
    assert rows == list(range(len(data)))
    sample = groups[0, 0]
    assert len(sample["texts"]) == 4 and len({text["image_id"] for text in sample["texts"]}) == 1


def test_only_some_kinds_of_question():
    data = SceneQuestionsDataset("train", 50, kinds={"single": 1, "pair": 1}, asked=["size", "place"])
    assert set(data.kinds.values()) == {"size", "place"}
    config = OmegaConf.load(SceneQuestionsBuilder.default_config_path()).datasets.scene_questions
    config.sizes, config.asked = {"train": 0, "val": 3}, ["number"]
    found = SceneQuestionsBuilder(config).build_datasets()
    assert list(found) == ["val"] and len(found["val"]) == 3


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"kinds": {"triple": 1}}, r"datasets\.scene_questions\.kinds\.triple is unknown"),
        ({"asked": ["weight"]}, r"datasets\.scene_questions\.asked=\['weight'\] must name some of colour, shape"),
        ({"asked": []}, r"asked=\[\] must name some of"),
        ({"asked": ["size"], "kinds": {"count": 1}}, "the train split is empty"),
        ({"size": 0}, "split of 0 pictures"),
    ],
)
def test_config_errors(keys, words):
    with pytest.raises(DataError, match=words):
        SceneQuestionsDataset("train", **{"size": 3, **keys})
