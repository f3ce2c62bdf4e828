"""Defaults for what is not ours: LAVIS's tasks, data sets and models, adapted where they come in."""

import lavis_evlgen  # noqa: F401  (its bridges come before LAVIS)

# isort: split

import pickle
from types import SimpleNamespace

import pytest
from lavis.tasks.base_task import BaseTask
from lavis.tasks.image_text_pretrain import ImageTextPretrainTask
from torch import nn

from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets.facts import DatasetFacts, adapted, adapted_sets
from lavis_evlgen.models.facts import ModelFacts, facts_of
from lavis_evlgen.tasks import base
from lavis_evlgen.tasks.base import Task, adapted_task, with_progress
from lavis_evlgen.tasks.captioning import EvlgenCaptionTask
from tests.tiny import tiny_evlgen


class Theirs(BaseTask):
    """A task that knows LAVIS's interface, and one hook of ours."""

    score_name = "theirs"

    def valid_step(self, model, samples):
        return [(model, samples)]

    def after_evaluation(self, val_result, **kwargs):
        return {"agg_metrics": len(val_result)}


def test_a_task_of_laviss_keeps_its_own_hooks_and_gets_the_others():
    task = adapted_task(Theirs())
    assert task.valid_step("model", "samples") == [("model", "samples")]
    assert task.after_evaluation([1, 2], split_name="val", epoch=1) == {"agg_metrics": 2}
    assert (task.score_name, task.answer_word, task.min_pictures) == ("theirs", "caption", 1)
    assert task.objective(0) is None and task.summary({}) is None and task.curve({}) == {}
    task.check_scored(["val"]), task.check_dataset("mine", [])
    assert adapted_task(task) is task


def test_a_task_that_cannot_score_says_so():
    with pytest.raises(ConfigError, match="image_text_pretrain trains and scores nothing, but val, test should be"):
        adapted_task(ImageTextPretrainTask()).check_scored(["val", "test"])


def test_what_a_task_must_say_is_asked_for_by_name():
    for ask in (lambda t: t.valid_step(None, {}), lambda t: t.after_evaluation([], "val", 1), lambda t: t.shown({})):
        with pytest.raises(NotImplementedError, match="^Task must"):
            ask(Task())


def test_a_data_set_of_another_kind_gets_the_defaults():
    class Ten(list):
        num_images, collater = 10, staticmethod(len)

    sets = adapted_sets({"theirs": {"train": Ten("abc"), "val": [1, 2]}})["theirs"]
    train, val = sets["train"], sets["val"]
    assert (train.num_images, val.num_images, len(train), train[2], train.collater("ab")) == (10, 2, 3, "c", 2)
    assert (val.media, val.max_bad_fraction, val.references, val.missing_files()) == ("image", 0.0, None, [])
    assert adapted(train) is train and list(pickle.loads(pickle.dumps(val))) == [1, 2]
    with pytest.raises(AttributeError):
        _ = val.collater
    with pytest.raises(ConfigError, match="mine has no references"):
        EvlgenCaptionTask({}, tokenizer="simple").check_dataset("mine", val)


def test_a_model_of_another_kind_gets_the_defaults():
    other = nn.Linear(2, 2)
    other.prompt = "a photo of"
    facts = facts_of(other)
    assert (facts.prompt, facts.part_of("weight"), facts.lr_scale, facts.token_counts()) == (
        "a photo of", "model", {}, None,
    )  # fmt: skip
    own = tiny_evlgen()
    assert isinstance(own, ModelFacts) and facts_of(own) is own and own.part_of("llm_proj.weight") == "llm_proj"


def test_defaults_are_not_shared_between_adapters():
    one, other = adapted([1]), adapted([1])
    one.references = {"a": ["b"]}
    assert other.references is None and DatasetFacts.references is None


@pytest.mark.parametrize("main, lines", [(True, 10), (False, 0)])
def test_long_evaluations_log_ten_times_on_the_main_rank(monkeypatch, caplog, main, lines):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(base.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(base.distributed, "is_main", lambda: main)
    with caplog.at_level("INFO"):
        for n, _ in enumerate(with_progress(list(range(200)))):
            clock.now = 40.0 + n
    assert len(caplog.records) == lines
    assert not lines or caplog.records[4].getMessage() == "evaluation: 100 of 200 batches, 139 s left"


def test_short_evaluations_log_nothing(caplog):
    with caplog.at_level("INFO"):
        assert list(with_progress([1, 2, 3])) == [1, 2, 3]
    assert not caplog.records
