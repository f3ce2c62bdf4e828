"""The captioning task with a model that writes down which picture's prompt it was given."""

import types

import pytest
import torch
from omegaconf import OmegaConf

from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets import DataError
from lavis_evlgen.datasets.facts import DatasetFacts
from lavis_evlgen.models.connectors import VisualPrompt
from lavis_evlgen.tasks.captioning import EvlgenCaptionTask

WORDS = ("cat", "dog", "boat", "tree", "house", "ball", "red", "blue")


class Pictures(DatasetFacts):
    """Eight pictures by number, with one text each; `sources` says which of them are of one film."""

    def __init__(self, sources=range(8)):
        self.annotation = [{"image_id": f"id{n}", "source": source} for n, source in enumerate(sources)]
        self.references = {f"id{n}": [f"a {WORDS[n]} stands here", f"here is a {WORDS[n]}"] for n in range(8)}

    def source_of(self, row):
        return row["source"]

    def texts_of(self, rows):
        return {"text_input": [f"text {row}" for row in rows]}


class Witness:
    """A picture is its number; text m under the prompt of picture n costs 10 n + m / 100 nats."""

    device = torch.device("cpu")

    def __init__(self):
        self.decoding = []

    def visual_prompt(self, image):
        return VisualPrompt(image.view(-1, 1, 1))

    def loss_of(self, prompt, batch):
        numbers = torch.tensor([float(text.split()[1]) for text in batch["text_input"]])
        return 10 * prompt.tokens[:, 0, 0] + numbers / 100, torch.full((len(prompt.tokens),), 5)

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
            "text_input": [f"text {n}" for n in kept],
            "image_id": [f"id{n}" for n in kept],
            "instance_id": [str(n) for n in kept],
            "bad": [{"image": f"{n}.jpg", "reason": "broken"} for n in chunk if n in bad],
        }


def task(data=None, **run):
    run = {"metrics": ["CIDEr", "BLEU"], "tokenizer": "simple", "blind_shuffles": 2, **run}
    found = EvlgenCaptionTask.setup_task(types.SimpleNamespace(run_cfg=OmegaConf.create(run)))
    found.before_evaluation(None, data or Pictures())
    return found


def evaluate(numbers, size, bad=(), data=None, ranks=1, **run):
    """The rows of all ranks; rank r has every `ranks`-th number from the r-th on."""
    rows = []
    for rank in range(ranks):
        rows += task(data, **run).evaluation(Witness(), list(batches(numbers[rank::ranks], size, bad)))
    return rows


def shuffled_by(rows, data=None) -> dict[int, int | None]:
    """{text: picture that it was scored with in the blind baseline}."""
    rows = task(data).after_evaluation(rows, "val", 1)["rows"]
    for row in rows:
        assert row["loss"] == pytest.approx(10.01 * int(row["instance_id"]))
    losses = {int(row["instance_id"]): row["loss_shuffled"] for row in rows}
    return {text: None if loss is None else round((loss - text / 100) / 10) for text, loss in losses.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_other_picture_depends_on_the_data_set_alone(size, ranks):
    """With a neighbour in the batch as the other picture it depended on both."""
    found = shuffled_by(evaluate(list(range(8)), size, ranks=ranks))
    assert found == shuffled_by(evaluate(list(range(8)), 4))
    assert sorted(found.values()) == list(range(8)) and all(text != picture for text, picture in found.items())


@pytest.mark.parametrize("sources", ["aabbccdd", "abababcd", "aaaabbbb", "abcdabcd"])
def test_the_other_picture_is_of_another_source(sources):
    """A clip's reverse shows the same frames, and clips of one film the same things."""
    data = Pictures(sources)
    found = shuffled_by(evaluate(list(range(8)), 3, data=data), data)
    assert sorted(found.values()) == list(range(8))
    assert all(sources[text] != sources[picture] for text, picture in found.items())


def test_a_source_of_more_than_half_the_rows_leaves_some_without():
    data = Pictures("aaaaaabb")
    found = shuffled_by(evaluate(list(range(8)), 3, data=data), data)
    paired = {text: picture for text, picture in found.items() if picture is not None}
    assert len(paired) == 4 and all((text < 6) != (picture < 6) for text, picture in paired.items())


@pytest.mark.parametrize("bad", [{0}, {1}, {2, 3}, {6}, {0, 1, 2}])
def test_texts_paired_with_unreadable_pictures_have_no_other(bad):
    whole = shuffled_by(evaluate(list(range(8)), 3))
    left = shuffled_by(evaluate(list(range(8)), 3, bad))
    assert left == {text: None if picture in bad else picture for text, picture in whole.items() if text not in bad}


def test_losses_are_per_token_over_the_rows_that_have_both():
    result = task().after_evaluation(evaluate(list(range(8)), 3, {1}), "val", 1)
    paired = [row for row in result["rows"] if row["loss_shuffled"] is not None]
    assert len(result["rows"]) == 7 and len(paired) == 6
    right = sum(row["loss"] for row in paired) / (5 * len(paired))
    shuffled = sum(row["loss_shuffled"] for row in paired) / (5 * len(paired))
    assert (result["loss_right"], result["loss_shuffled"]) == pytest.approx((right, shuffled))
    assert result["loss_gap"] == pytest.approx(shuffled - right)


def test_pictures_of_one_source_cannot_be_scored():
    data = Pictures("aaaaaaaa")
    with pytest.raises(DataError, match=r"val: 8 readable pictures \(0 unreadable\), no two .* different sources"):
        task(data).after_evaluation(evaluate(list(range(8)), 3, data=data), "val", 1)


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
    rows = evaluate(list(range(8)), 2)
    with pytest.raises(ConfigError, match="run.agg_metric=METEOR will not be scored"):
        task(agg_metric="METEOR").after_evaluation(rows, "val", 1)
    assert task(agg_metric="BLEU-1").after_evaluation(rows, "val", 1)["agg_metrics"] == pytest.approx(1.0)


def test_an_unknown_metric_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="CIDErr.*did you mean 'CIDEr'"):
        task(metrics=["CIDErr"])


def test_a_data_set_without_captions_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="easy_vqa has no references to score .* there is run.task=evlgen_vqa"):
        task().check_dataset("easy_vqa", DatasetFacts())


def test_a_data_set_of_one_source_is_refused_before_anything_runs():
    data = Pictures("a" * 8)
    data.split, data.media = "val", "video"
    with pytest.raises(ConfigError, match="mine: all 8 videos of val are of one source .'a'., so none can stand in"):
        task().check_dataset("mine", data)
    data.annotation[0]["source"] = "b"
    task().check_dataset("mine", data)


@pytest.mark.parametrize("rows", [[], [0]])
def test_too_few_pictures_say_so(rows):
    with pytest.raises(DataError, match=f"val: {len(rows)} readable pictures"):
        task().after_evaluation(evaluate(rows, 2), "val", 1)


def test_one_picture_on_each_of_two_ranks_is_enough():
    data = Pictures("ab")
    assert shuffled_by(evaluate([0, 1], 1, data=data, ranks=2), data) == {0: 1, 1: 0}


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
    data = Pictures(range(4))
    data.references = {key: [caption] for key, caption in captions.items()}
    data.order_captions = captions
    captioner.before_evaluation(None, data)
    rows = captioner.evaluation(Narrator(), list(batches(range(4), 3, bad)))
    result = captioner.after_evaluation(rows, "val", 1)
    found = {key.removeprefix("order_accuracy"): result[key] for key in result if key.startswith("order_accuracy")}
    assert found == expected and result["order_asked"] == 4 - len(bad)
    assert captioner.curve(result)["order_accuracy"] == expected[""]
    words = f"order of events {expected['']:.3f} (appears/leaves 1.00, left/right {expected[' left/right']:.2f}; "
    assert words in captioner.summary(result)
    # the next data set does not say it
    del data.order_captions
    captioner.before_evaluation(None, data)
    result = captioner.after_evaluation(rows, "val", 1)
    assert not [key for key in (*result, *captioner.curve(result)) if "order" in key]
    assert "order" not in captioner.summary(result)
