"""The captioning task with a model that writes down which picture's prompt it was given."""

import types

import pytest
import torch
from omegaconf import OmegaConf

from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets import DataError
from lavis_evlgen.models.connectors import VisualPrompt
from lavis_evlgen.runners.reporting import scored_curve, summary
from lavis_evlgen.tasks.captioning import EvlgenCaptionTask

WORDS = ("cat", "dog", "boat", "tree", "house", "ball", "red", "blue")


class Witness:
    """A picture is its number; the loss of a caption is 10 nats times the number whose prompt it was scored with."""

    device = torch.device("cpu")

    def __init__(self):
        self.decoding = []

    def visual_prompt(self, image):
        return VisualPrompt(image.view(-1, 1, 1))

    def loss_of(self, prompt, batch):
        return 10 * prompt.tokens[:, 0, 0], torch.full((len(prompt.tokens),), 5)

    def generate(self, batch, visual_prompt, **decoding):
        self.decoding.append(decoding)
        return [f"a {WORDS[int(n)]} stands here" for n in visual_prompt.tokens.flatten()]


def batches(numbers, size, bad=()):
    """Batches of pictures; `bad` numbers are unreadable."""
    for at in range(0, len(numbers), size):
        chunk = numbers[at : at + size]
        kept = [n for n in chunk if n not in bad]
        yield {
            "image": torch.tensor([float(n) for n in kept]) if kept else None,
            "text_input": ["x"] * len(kept),
            "image_id": [f"id{n}" for n in kept],
            "instance_id": [str(n) for n in kept],
            "bad": [{"image": f"{n}.jpg", "reason": "broken"} for n in chunk if n in bad],
        }


def task(**run):
    run = {"metrics": ["CIDEr", "BLEU"], "tokenizer": "simple", "blind_shuffles": 2, **run}
    found = EvlgenCaptionTask.setup_task(types.SimpleNamespace(run_cfg=OmegaConf.create(run)))
    references = {f"id{n}": [f"a {WORDS[n]} stands here", f"here is a {WORDS[n]}"] for n in range(8)}
    found.before_evaluation(None, types.SimpleNamespace(references=references))
    return found


def evaluate(numbers, size, bad=(), **run):
    return task(**run).evaluation(Witness(), list(batches(numbers, size, bad)))


@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_shuffled_is_never_the_own_picture(count, size):
    rows = evaluate(list(range(count)), size)
    assert [row["instance_id"] for row in rows] == [str(n) for n in range(count)]
    for row in rows:
        assert row["loss"] == 10 * int(row["instance_id"])
        assert row["loss_shuffled"] != row["loss"]
    without = [row["instance_id"] for row in rows if row["loss_shuffled"] is None]
    assert without == (["0"] if size == 1 else [])  # the very first has no other picture yet


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("bad", [{0}, {1}, {2, 3}, {6}, {0, 1, 2}])
def test_nor_when_pictures_are_unreadable(size, bad):
    rows = [row for row in evaluate(list(range(7)), size, bad) if "bad" not in row]
    assert {row["instance_id"] for row in rows} == {str(n) for n in range(7) if n not in bad}
    assert all(row["loss_shuffled"] != row["loss"] for row in rows)


def test_losses_are_per_token_over_the_rows_that_have_both():
    rows = evaluate([1, 2, 5], 1)
    result = task().after_evaluation(rows, "val", 1)
    # the first row has no shuffled loss: right is (20 + 50) / 10 tokens, shuffled (10 + 20) / 10
    assert (result["loss_right"], result["loss_shuffled"], result["loss_gap"]) == pytest.approx((7.0, 3.0, -4.0))


def test_unreadable_pictures_are_left_out_and_counted():
    rows = evaluate(list(range(8)), 3, bad={2, 7})
    result = task().after_evaluation(rows, "val", 1)
    assert result["pictures"] == len(result["rows"]) == 6
    assert [entry["image"] for entry in result["unreadable"]] == ["2.jpg", "7.jpg"]
    assert {row["image_id"] for row in result["rows"]} == {f"id{n}" for n in (0, 1, 3, 4, 5, 6)}


def test_right_captions_score_high_and_blind_low():
    result = task().after_evaluation(evaluate(list(range(8)), 4), "val", 1)
    assert result["metrics"]["BLEU-4"] == pytest.approx(1.0, abs=1e-3)
    assert result["blind"]["BLEU-4"] < 0.8 and result["blind"]["CIDEr"] < 0.5 * result["metrics"]["CIDEr"]
    assert result["agg_metrics"] == result["metrics"]["CIDEr"]
    row = result["rows"][3]
    assert row["references"][0] == row["caption"] and row["scores"]["CIDEr"] > 1


def test_decoding_comes_from_the_config():
    model = Witness()
    keys = {"num_beams": 2, "max_len": 7, "min_len": 3, "length_penalty": 0.5, "repetition_penalty": 1.2}
    task(**keys).evaluation(model, list(batches([0, 1], 2)))
    assert model.decoding == [
        {"num_beams": 2, "max_length": 7, "min_length": 3, "length_penalty": 0.5, "repetition_penalty": 1.2}
    ]


def test_the_aggregate_must_be_among_the_metrics():
    rows = evaluate([0, 1], 2)
    with pytest.raises(ConfigError, match="run.agg_metric=METEOR will not be scored"):
        task(agg_metric="METEOR").after_evaluation(rows, "val", 1)
    assert task(agg_metric="BLEU-1").after_evaluation(rows, "val", 1)["agg_metrics"] == pytest.approx(1.0)


def test_an_unknown_metric_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="CIDErr.*did you mean 'CIDEr'"):
        task(metrics=["CIDErr"])


def test_a_data_set_without_captions_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="easy_vqa has no references to score .* there is run.task=evlgen_vqa"):
        task().check_dataset("easy_vqa", types.SimpleNamespace(answers={}))


@pytest.mark.parametrize("rows", [[], [0]])
def test_too_few_pictures_say_so(rows):
    with pytest.raises(DataError, match=f"val: {len(rows)} readable pictures"):
        task().after_evaluation(evaluate(rows, 2), "val", 1)


def test_two_ranks_of_one_picture_each_say_so():
    rows = evaluate([0], 1) + evaluate([1], 1)
    with pytest.raises(DataError, match="scoring needs 2"):
        task().after_evaluation(rows, "val", 1)


class Narrator(Witness):
    """Says the same of both directions of a move, and the right thing of what appears or leaves."""

    SAID = ("red circle moves left", "red circle moves left", "blue star appears", "blue star leaves")

    def generate(self, batch, visual_prompt, **decoding):
        return [self.SAID[int(n)] for n in visual_prompt.tokens.flatten()]


EVENTS = ("red circle moves left", "red circle moves right", "blue star appears", "blue star leaves")


@pytest.mark.parametrize(
    "bad, expected",
    [
        ((), {"": 0.75, " left/right": 0.5, " appears/leaves": 1.0}),
        ({1, 3}, {"": 1.0, " left/right": 1.0, " appears/leaves": 1.0}),
    ],
)
def test_the_order_of_events_is_scored_where_the_data_set_says_it(bad, expected):
    captioner = task()
    captions = {f"id{n}": caption for n, caption in enumerate(EVENTS)}
    references = {key: [caption] for key, caption in captions.items()}
    captioner.before_evaluation(None, types.SimpleNamespace(references=references, order_captions=captions))
    rows = captioner.evaluation(Narrator(), list(batches(range(4), 3, bad)))
    result = captioner.after_evaluation(rows, "val", 1)
    found = {key.removeprefix("order_accuracy"): result[key] for key in result if key.startswith("order_accuracy")}
    assert found == expected and result["order_asked"] == 4 - len(bad)
    assert scored_curve(result)["order_accuracy"] == expected[""]
    words = f"order of events {expected['']:.3f} (appears/leaves 1.00, left/right {expected[' left/right']:.2f}; "
    assert words in summary(result)
    # the next data set does not say it
    captioner.before_evaluation(None, types.SimpleNamespace(references=references))
    result = captioner.after_evaluation(rows, "val", 1)
    assert not [key for key in (*result, *scored_curve(result)) if "order" in key] and "order" not in summary(result)
