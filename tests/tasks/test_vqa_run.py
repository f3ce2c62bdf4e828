"""Questions and answers through a tiny model, as train.py and evaluate.py run them."""

import json

import pytest
import torch
from PIL import Image

from lavis_evlgen import cli
from lavis_evlgen.datasets.loading import eval_loader
from tests.datasets.helpers import write_json
from tests.run_tools import Runs, checkpoint, log, losses

COLOURS = ("red", "blue", "green", "black")


def question_runs(parts, folder, **run) -> Runs:
    """A tiny config on drawn squares: 8 pictures, two questions each, ten human answers."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for n in range(8):
        colour = COLOURS[n % 4]
        Image.new("RGB", (28, 28), colour).save(folder / "images" / f"{n}.png")
        rows.append({"image": f"{n}.png", "question": "What color is it?", "answer": [colour] * 8 + ["grey"] * 2})
        rows.append({"image": f"{n}.png", "question": f"Is it {colour} or not?", "answer": ["yes"] * 10})
    config = {
        "max_iters": 4, "iters_per_inner_epoch": 2, "valid_splits": ["val"], "test_splits": ["test"],
        "batch_size_eval": 3, "task": "evlgen_vqa", "metric": "vqa", "num_beams": 2, "max_len": 4, "sheet_pictures": 3,
        **run,
    }  # fmt: skip
    runs = Runs(parts, folder, **config)
    for key in ("metrics", "tokenizer"):  # of captioning
        del runs.config["run"][key]
    processors = runs.config["datasets"]["scenes"]["vis_processor"]
    questions = {"images": str(folder / "images"), "questions": str(write_json(folder / "questions.json", rows)),
                 "split": {"train": 4, "val": 2, "test": 2}, "vis_processor": processors}  # fmt: skip
    runs.config["datasets"] = {"image_questions": questions}
    runs.config["model"]["max_txt_len"] = 64
    return runs


@pytest.fixture(scope="module")
def answered(parts, tmp_path_factory) -> Runs:
    runs = question_runs(parts, tmp_path_factory.mktemp("vqa") / "run")
    runs.runner = runs.train()
    return runs


def read(path):
    return json.loads(path.read_text())


def test_a_run_leaves_card_answers_and_pictures(answered):
    card = read(answered.output() / "run.json")
    assert card["prompt"] == "Question: {} Short answer:" and card["decoding"]["num_beams"] == 2
    assert card["data"]["name"] == "image_questions" and card["data"]["split"] == "test" and card["data"]["size"] == 2
    assert card["metrics"]["metric"] == "vqa" and 0 <= card["metrics"]["metrics"]["accuracy"] <= 1
    assert card["metrics"]["blind"]["questions"] == 4 and card["metrics"]["lemmatized"] is False
    step = answered.runner.best["step"]
    result = read(answered.output() / "result" / f"test_{step}.json")
    assert [row["question"] for row in result["rows"]][:2] == ["what color is it?", "is it green or not?"]
    for row in result["rows"]:
        assert isinstance(row["answer"], str) and len(row["answers"]) == 10 and row["score"] in (0.0, 1.0, 0.6)
        assert row["loss"] > 0 and row["blind_answer"] is not None
    assert Image.open(answered.output() / "captions.png").size[0] > 500
    assert Image.open(answered.output() / "loss.png").size[0] == 1200  # with the accuracy beside the losses


def test_the_curves_hold_accuracy_and_its_blind_twin(answered):
    rows = [row for row in log(answered.output()) if "val_loss_right" in row]
    assert [row["step"] for row in rows] == [2, 4] and all(0 <= row["blind_accuracy"] <= 1 for row in rows)
    assert losses(answered.output())[4] < losses(answered.output())[1]


def test_only_the_answer_is_learnt(answered):
    runner = answered.runner
    train = runner.datasets["image_questions"]["train"]
    batch = train.collater([train[0], train[1]])
    assert batch["prompt"][0] == "Question: what color is it? Short answer:"
    model = runner.model
    with torch.no_grad():
        _, tokens = model.loss_of(model.visual_prompt(batch["image"]), batch)
    text = model.language_model.text
    expected = [len(text.encode(f" {answer}")) + 1 for answer in batch["text_input"]]
    assert tokens.tolist() == expected


def test_a_visual_prompt_already_computed_gives_the_same_answers(answered):
    runner = answered.runner
    train = runner.datasets["image_questions"]["train"]
    samples = train.collater([train[n] for n in range(6)])
    samples = {"image": samples["image"], "text_input": samples["question"]}
    model = runner.model.eval()
    prompt = model.visual_prompt(samples["image"])
    expected = model.predict_answers(samples, num_beams=2)
    assert model.predict_answers(samples, num_beams=2, visual_prompt=prompt) == expected
    turned = type(prompt)(prompt.tokens.flip(0))
    assert model.predict_answers(samples, num_beams=2, visual_prompt=turned) != expected


def test_a_picture_is_encoded_once_for_its_questions(answered):
    """In any order: the rows are those of each question in a batch of its own."""
    runner = answered.runner
    task, data, model = runner.task, runner.datasets["image_questions"]["test"], runner.model.eval()
    task.before_evaluation(model, data)
    encoded = []
    hook = model.visual_encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    with torch.no_grad():
        together = task.valid_step(model, data.collater([data[n] for n in (0, 2, 1, 3)]))
        apart = [row for n in (0, 2, 1, 3) for row in task.valid_step(model, data.collater([data[n]]))]
    hook.remove()
    assert encoded == [2, 1, 1, 1, 1]
    for row, same in zip(together, apart, strict=True):
        (blind,), (same_blind,) = row.pop("blind").items(), same.pop("blind").items()
        assert (blind[0], blind[1]["blind_answer"]) == (same_blind[0], same_blind[1]["blind_answer"])
        values = (row.pop("loss"), blind[1]["loss_shuffled"])
        assert values == pytest.approx((same.pop("loss"), same_blind[1]["loss_shuffled"]), rel=1e-6)
        assert row == same


def test_evaluate_gives_the_same_answers(answered, tmp_path, capsys):
    best = answered.output() / "checkpoint_best.pth"
    expected = read(answered.output() / "result" / f"test_{checkpoint(answered.output(), best.name)['step']}.json")
    runs = answered.copy(tmp_path)
    assert runs.command(f"model.pretrained={best}", "run.run_name=again", script="evaluate.py") == 0
    found = read(runs.output("again") / "result" / "test_given.json")
    for key in ("metrics", "blind", "loss_right", "rows"):
        assert found[key] == expected[key], key


def test_two_ranks_answer_what_one_does(answered):
    """Each rank with its own rows of the real loader; what differs is which other picture a blind question sees."""
    runner = answered.runner
    task, dataset = runner.task, runner.datasets["image_questions"]["train"]
    dataset.is_train = False  # eight questions
    task.before_evaluation(None, dataset)
    model = runner.model.eval()
    results = []
    for world in (1, 2):
        rows = []
        for rank in range(world):
            rows += task.evaluation(model, eval_loader(dataset, 3, rank, world, 0, False))
        results.append(task.after_evaluation(rows, "train", 0))
    dataset.is_train = True
    one, two = ({row["question_id"]: (row["answer"], row["score"]) for row in result["rows"]} for result in results)
    assert one == two and len(one) == 8 and results[0]["metrics"] == results[1]["metrics"]


@pytest.mark.parametrize(
    "option, says",
    [
        ("model.max_txt_len=12", "but model.max_txt_len=12 has room for 11; raise it"),
        ("run.metric=gqa", "run.metric=gqa takes one answer a question, image_questions has 10"),
        ("run.task=evlgen_captioning", "unknown key run.metric"),
        ("run.metrics=[CIDEr]", "unknown key run.metrics; did you mean metric?"),
        ("run.blind_share=2", "run.blind_share=2 must be a number of at least 0 and at most 1"),
    ],
)
def test_mistakes_are_told_before_the_first_step(answered, tmp_path, capsys, option, says):
    runs = answered.copy(tmp_path)
    assert runs.command(option) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_lemmatizer_is_told_in_one_line(answered, tmp_path, capsys, monkeypatch):
    spacy = pytest.importorskip("spacy")

    def load(name):
        raise OSError("[E050] Can't find model 'en_core_web_sm'")

    monkeypatch.setattr(spacy, "load", load)
    assert answered.copy(tmp_path).command("run.lemmatize=true", script="evaluate.py") == 2
    assert "run.lemmatize=true needs spaCy and its model en_core_web_sm" in capsys.readouterr().err.splitlines()[-1]


def test_the_doctor_knows_questions(answered, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", str(answered.path())])
    says = capsys.readouterr().out
    assert end.value.code == 0, says
    assert "data image_questions train: 4 found and readable" in says and "train, val, test are there" in says
