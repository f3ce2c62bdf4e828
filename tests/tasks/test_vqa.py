"""The VQA task with a model that writes down what it was asked, and under which picture's prompt."""

import types

import pytest
import torch
from omegaconf import OmegaConf

from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets import DataError
from lavis_evlgen.datasets.facts import DatasetFacts
from lavis_evlgen.evaluation import lemmas
from lavis_evlgen.models.connectors import VisualPrompt
from lavis_evlgen.tasks import vqa
from lavis_evlgen.tasks.vqa import EvlgenVqaTask

COLOURS = ("red", "blue", "green", "black", "white", "pink", "brown", "grey")


class Witness:
    """A picture is its number, and its colour the answer; an answer costs 10 nats times the number of the picture that
    it is seen with, and a hundredth of its colour's."""

    device = torch.device("cpu")

    def __init__(self):
        self.asked = []

    def visual_prompt(self, image):
        return VisualPrompt(image.view(-1, 1, 1))

    def loss_of(self, prompt, samples):
        assert samples["prompt"] == ["Q: which colour? A:"] * len(prompt.tokens)
        numbers = torch.tensor([float(COLOURS.index(answer)) for answer in samples["text_input"]])
        return 10 * prompt.tokens[:, 0, 0] + numbers / 100, torch.full((len(prompt.tokens),), 5)

    def predict_answers(self, samples, prompt, visual_prompt, **decoding):
        assert len(samples["text_input"]) == len(visual_prompt.tokens)
        self.asked.append((prompt, decoding))
        return [COLOURS[int(n)] for n in visual_prompt.tokens.flatten()]


class Questions(DatasetFacts, list):
    """Pictures by number, each question's; one answer each, its colour."""

    split, num_images = "test", 8

    def __init__(self, numbers, humans=1):
        super().__init__(numbers)
        self.answers = {f"q{row}": [COLOURS[n]] * humans for row, n in enumerate(numbers)}
        self.kinds = {f"q{row}": "colour" for row in range(len(numbers))}
        self.annotation = [{"image_id": n} for n in numbers]

    def source_of(self, row):
        return row["image_id"]

    def texts_of(self, rows):
        keys = ("text_input", "question")
        return {**{key: ["which colour?"] * len(rows) for key in keys}, "answer": [COLOURS[self[row]] for row in rows]}

    def batches(self, size, bad=(), ranks=1, rank=0):
        rows = list(range(rank, len(self), ranks))
        for at in range(0, len(rows), size):
            chunk = rows[at : at + size]
            kept = [row for row in chunk if self[row] not in bad]
            yield {
                "image": torch.tensor([float(self[row]) for row in kept]) if kept else None,
                "text_input": ["which colour?"] * len(kept),
                "question": ["which colour?"] * len(kept),
                "answer": [COLOURS[self[row]] for row in kept],
                "question_id": [f"q{row}" for row in kept],
                "image_id": [self[row] for row in kept],
                "instance_id": [str(row) for row in kept],
                "bad": [{"image": f"{self[row]}.jpg", "reason": "broken"} for row in chunk if self[row] in bad],
            }


def task(data=None, **run):
    found = EvlgenVqaTask.setup_task(types.SimpleNamespace(run_cfg=OmegaConf.create({"prompt": "Q: {} A:", **run})))
    if data is not None:
        found.before_evaluation(None, data)
    return found


def evaluate(data, size, bad=(), model=None, ranks=1, **run):
    rows = []
    for rank in range(ranks):
        rows += task(data, **run).evaluation(model or Witness(), list(data.batches(size, bad, ranks, rank)))
    return rows


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_the_other_picture_depends_on_the_data_set_alone(size, ranks):
    """Three questions about each picture, in a row, as files have them: each is asked again of another picture."""
    data = Questions([n for n in range(4) for _ in range(3)])
    rows = evaluate(data, size, ranks=ranks)
    rows = sorted(task(data).after_evaluation(rows, "test", 1)["rows"], key=lambda row: int(row["instance_id"]))
    assert [row["question_id"] for row in rows] == list(data.answers)
    for row in rows:
        own, other = row["image_id"], COLOURS.index(row["blind_answer"])
        assert row["answer"] == COLOURS[own] and other != own
        assert row["loss"] == pytest.approx(10 * own + own / 100)
        assert row["loss_shuffled"] == pytest.approx(10 * other + own / 100)
    alone = task(data).after_evaluation(evaluate(data, 4), "test", 1)["rows"]
    assert [row["blind_answer"] for row in rows] == [row["blind_answer"] for row in alone]


def test_scores_right_and_blind():
    data = Questions([n for n in range(8) for _ in range(2)])
    result = task(data).after_evaluation(evaluate(data, 4), "test", 1)
    assert result["metrics"] == {"accuracy": 1.0, "accuracy colour": 1.0} and result["agg_metrics"] == 1.0
    assert result["blind"] == {"accuracy": 0.0, "accuracy_same_questions": 1.0, "questions": 16}
    assert (result["questions"], result["pictures"], result["unreadable"]) == (16, 8, [])
    tokens = 16 * 5
    assert result["loss_right"] == pytest.approx(sum(20.02 * n for n in range(8)) / tokens)
    assert result["loss_gap"] == pytest.approx(result["loss_shuffled"] - result["loss_right"])
    row = result["rows"][3]
    assert (row["question"], row["answer"], row["answers"], row["score"]) == ("which colour?", "blue", ["blue"], 1.0)
    assert "accuracy 1.000 (blind 0.000 on 16)" in task(data).summary(result)
    assert task(data).shown(row) == ("which colour? blue", ["blue"], 1.0)


def test_kinds_are_scored_apart_each_with_its_blind_twin():
    """Questions about pictures 0 to 3 are closed; an answer of picture 2 is worth 0.9 of VQA's point, not 1."""
    data = Questions([n for n in range(8) for _ in range(2)], humans=10)
    data.kinds = {key: "closed" if row < 8 else "open" for row, key in enumerate(data.answers)}
    for key in ("q4", "q5"):
        data.answers[key] = [COLOURS[2]] * 3 + ["other"] * 7
    rows = evaluate(data, 4)
    for metric, closed in (("vqa", (6 + 2 * 0.9) / 8), ("exact", 1.0), ("auto", (6 + 2 * 0.9) / 8)):
        found = task(data, metric=metric)
        result = found.after_evaluation([dict(row) for row in rows], "test", 1)
        assert result["metric"] == ("vqa" if metric == "auto" else metric)
        assert f"questions, {result['metric']}]" in found.summary(result)
        assert result["metrics"]["accuracy closed"] == pytest.approx(closed)
        assert result["metrics"]["accuracy open"] == 1.0
        assert result["metrics"]["accuracy"] == pytest.approx((closed + 1) / 2)
        exact = {name: value for name, value in result["metrics"].items() if name.startswith("exact")}
        assert exact == ({} if metric == "exact" else {"exact": 1.0, "exact closed": 1.0, "exact open": 1.0})
        for kind in ("closed", "open"):
            blind = result["blind_by_kind"][kind]
            assert blind["questions"] == 8 and blind["accuracy"] == 0.0
            assert blind["accuracy_same_questions"] == result["metrics"][f"accuracy {kind}"]
            assert ("exact" in blind) == (metric != "exact")
        assert f"closed {closed:.3f} (blind 0.000)  open 1.000 (blind 0.000)" in found.summary(result)


def test_auto_takes_exact_match_where_any_question_has_too_few_humans():
    data = Questions([0, 1, 2], humans=10)
    data.answers["q1"] = ["blue"]
    result = task(data, metric="auto").after_evaluation(evaluate(data, 3), "test", 1)
    assert result["metric"] == "exact"
    task(metric="auto").check_dataset("mine", data)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_answer_every_question_once(ranks):
    data = Questions([n for n in range(8) for _ in range(3)][:-1])
    rows = evaluate(data, 4, ranks=ranks)
    result = task(data).after_evaluation(rows, "test", 1)
    assert result["questions"] == 23 and result["metrics"]["accuracy"] == 1.0
    with pytest.raises(DataError, match="24 answers to 23 questions.* lost or asked twice"):
        task(data).after_evaluation([*rows, rows[0]], "test", 1)
    with pytest.raises(DataError, match="22 answers to 22 questions, 0 with unreadable pictures, of 23"):
        task(data).after_evaluation(rows[:-1], "test", 1)


def test_unreadable_pictures_are_counted_once_and_their_questions_too():
    data = Questions([n for n in range(6) for _ in range(2)])
    result = task(data).after_evaluation(evaluate(data, 3, bad={1, 5}), "test", 1)
    assert result["questions"] == 8 and result["unasked"] == 4
    assert [entry["image"] for entry in result["unreadable"]] == ["1.jpg", "5.jpg"]
    assert "4 questions about 2 unreadable pictures left out" in task(data).summary(result)
    with pytest.raises(DataError, match="no question has a readable picture"):
        task(data).after_evaluation(evaluate(data, 3, bad=set(range(6))), "test", 1)


def test_a_share_of_the_questions_is_asked_again():
    data = Questions([n % 8 for n in range(400)])
    counts = {}
    for share in (0.0, 0.25, 1.0):
        counts[share] = []
        for size in (8, 50):
            rows = task(data).after_evaluation(evaluate(data, size, blind_share=share), "test", 1)["rows"]
            again = {row["question_id"] for row in rows if "loss" in row}
            assert again == {row["question_id"] for row in rows if "loss_shuffled" in row and row["blind_answer"]}
            counts[share].append(again)
    assert counts[0.0] == [set(), set()] and len(counts[1.0][0]) == 400
    assert counts[0.25][0] == counts[0.25][1] and 80 < len(counts[0.25][0]) < 120
    result = task(data, blind_share=0.0).after_evaluation(evaluate(data, 8, blind_share=0.0), "test", 1)
    assert result["blind"] == {} and "loss_right" not in result
    assert task(data).summary(result).startswith("accuracy 1.000  colour 1.000")


def test_decoding_and_prompt_come_from_the_config():
    model = Witness()
    keys = {"num_beams": 2, "max_len": 7, "min_len": 2, "length_penalty": -1, "repetition_penalty": 1.5}
    evaluate(Questions([0, 1]), 2, model=model, blind_share=0.0, **keys)
    assert model.asked == [("Q: {} A:", {**keys, "length_penalty": -1.0})]
    default = EvlgenVqaTask.setup_task(types.SimpleNamespace(run_cfg=OmegaConf.create({})))
    assert default.prompt == "Question: {} Short answer:"
    expected = {"num_beams": 5, "max_len": 10, "min_len": 1, "length_penalty": 0.0, "repetition_penalty": 1.0}
    assert default.decoding == expected


def test_answers_are_lemmatised_for_the_score_only(monkeypatch):
    monkeypatch.setattr(vqa, "load_lemmatizer", lambda: lambda text: text.removesuffix("s"))
    data = Questions([0, 1])
    data.answers = {"q0": ["red"], "q1": ["blue"]}
    rows = [
        {"question_id": f"q{i}", "instance_id": str(i), "image_id": i, "answer": word}
        for i, word in enumerate(("reds", "blue"))
    ]
    found = task(data, lemmatize=True)
    result = found.after_evaluation(rows, "test", 1)
    assert result["metrics"]["accuracy"] == 1.0 and result["lemmatized"] is True
    assert result["rows"][0]["answer"] == "reds"
    assert task(data).after_evaluation(rows, "test", 1)["metrics"]["accuracy"] == 0.5


def test_a_missing_lemmatizer_stops_before_anything_runs(monkeypatch):
    def missing():
        raise lemmas.NoLemmatizer("run.lemmatize=true needs spaCy")

    monkeypatch.setattr(vqa, "load_lemmatizer", missing)
    with pytest.raises(lemmas.NoLemmatizer):
        task(lemmatize=True)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"metric": "vqav2"}, "unknown answer metric 'vqav2', did you mean 'vqa'"),
        ({"prompt": "Question:"}, "run.prompt: 'Question:' must hold {} once"),
        ({"prompt": "{} or {}?"}, "must hold {} once"),
        ({"prompt": "{question}"}, "must hold {} once"),
        ({"lemmatize": "yes"}, "run.lemmatize: 'yes' is not true or false"),
    ],
)
def test_config_errors_come_first(keys, words):
    with pytest.raises(ValueError, match=words):
        task(**keys)


def test_data_that_cannot_be_scored_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="vqa needs 4 human answers.*questions with 1; set run.metric=exact"):
        task(metric="vqa").check_dataset("mine", Questions([0, 1]))
    with pytest.raises(ConfigError, match="run.metric=gqa takes one answer a question, mine has 10"):
        task(metric="gqa").check_dataset("mine", Questions([0, 1], humans=10))
    with pytest.raises(ConfigError, match="needs questions, scenes has none"):
        task().check_dataset("scenes", DatasetFacts())
    task(metric="vqa").check_dataset("mine", Questions([0, 1], humans=10))
