"""The swapped twin of VQA: another question of the same picture in merging, the right one for the language model."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavis_evlgen import cli
from lavis_evlgen.tasks.condition_gap import condition_gap, other_questions
from tests.processes import on_two_ranks
from tests.run_tools import Runs, checkpoint, losses, same_tensors
from tests.runners.test_two_rank_evaluation import numbers


def row(image, question, answer="red"):
    return {"image_id": image, "question": question, "answers": (answer,)}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=20))
def test_another_question_of_the_same_picture(drawn):
    rows = [row(image, f"q{question}", f"a{answer}") for image, question, answer in drawn]
    found = other_questions(rows)
    for own, other in zip(rows, found, strict=True):
        candidates = [one for one in rows if one["image_id"] == own["image_id"] and one["question"] != own["question"]]
        if other is None:
            assert not candidates
        else:
            assert rows[other] in candidates
            differ = any(one["answers"] != own["answers"] for one in candidates)
            assert not differ or rows[other]["answers"] != own["answers"]


def test_which_one_depends_on_the_picture_alone():
    """Not on the other pictures, nor on the order of the rows."""
    rows = [row(0, f"q{n}", f"a{n}") for n in range(5)]
    alone = [rows[other]["question"] for other in other_questions(rows)]
    more = [row(7, "q9"), *rows[::-1], row(7, "q8")]
    found = other_questions(more)
    assert {more[n]["question"]: more[found[n]]["question"] for n in range(1, 6)} == {
        own["question"]: other for own, other in zip(rows, alone, strict=True)
    }
    assert len(set(alone)) == 5  # each takes another's place once


def test_the_gap_counts_what_has_both():
    rows = [
        {"score": 1.0, "swapped_score": 0.0, "loss": 1.0, "loss_swapped": 3.0, "tokens": 2},
        {"score": 1.0, "swapped_score": 1.0, "loss": 2.0, "loss_swapped": 4.0, "tokens": 3},
        {"score": 0.0, "swapped_score": None, "loss": 9.0, "tokens": 1},  # the only question of its picture
        {"score": 1.0, "swapped_score": None},  # not of blind_share
    ]
    assert condition_gap(rows) == {
        "accuracy_swapped": 0.5, "accuracy_same_questions": 1.0, "gap": 0.5, "loss_swapped": 7 / 5,
        "loss_gap": pytest.approx(4 / 5), "questions": 2, "without_another": 1,
    }  # fmt: skip
    assert condition_gap(rows[2:]) == {}


def conditioned_runs(parts, folder, **run) -> Runs:
    """A tiny config on questions about drawn scenes, whose merging looks at them from the first step on."""
    settings = {"max_iters": 4, "iters_per_inner_epoch": 2, "task": "evlgen_vqa", "max_len": 4, "sheet_pictures": 3,
                "test_splits": ["test"], "texts_per_image": 3, "batch_size_eval": 5, **run}  # fmt: skip
    runs = Runs(parts, folder, **settings)
    for key in ("metrics", "tokenizer", "blind_shuffles"):
        runs.config["run"].pop(key, None)
    stages = runs.config["datasets"]["scenes"]["vis_processor"]
    sizes = {"train": 8, "val": 2, "test": 3}
    runs.config["datasets"] = {"scene_questions": {"sizes": sizes, "image_size": 56, "vis_processor": stages}}
    runs.config["model"] |= {"condition": "question", "max_txt_len": 64, "dropout": 0.0, "lr_scale": {"gates": 20.0}}
    return runs


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory) -> Runs:
    runs = conditioned_runs(parts, tmp_path_factory.mktemp("conditioned"), valid_splits=["val"])
    runs.runner = runs.train()
    return runs


def read(path):
    return json.loads(path.read_text())


def test_card_rows_and_curves_have_the_gap(trained):
    card = read(trained.output() / "run.json")
    gap = card["metrics"]["condition"]
    assert gap["gap"] == pytest.approx(gap["accuracy_same_questions"] - gap["accuracy_swapped"])
    assert gap["questions"] == card["metrics"]["questions"] and gap["without_another"] == 0
    assert gap["loss_gap"] != 0 and set(card["metrics"]["condition_by_kind"]) >= {"colour", "number"}
    (file,) = (trained.output() / "result").glob("test_[0-9].json")
    rows = read(file)["rows"]
    asked = {row["image_id"]: set() for row in rows}
    for own in rows:
        asked[own["image_id"]].add(own["question"])
    for own in rows:
        swapped = own["swapped_question"].lower().rstrip("?")
        assert swapped != own["question"].rstrip("?")
        assert swapped in {question.rstrip("?") for question in asked[own["image_id"]]}
        assert own["loss_swapped"] > 0 and isinstance(own["swapped_answer"], str)
    log = [json.loads(line) for line in (trained.output() / "log.jsonl").read_text().splitlines()]
    assert [one["step"] for one in log if "val_loss_swapped" in one and 0 <= one["swapped_accuracy"] <= 1] == [2, 4]
    assert "merging for another question: accuracy" in trained.runner.task.summary(card["metrics"] | {"unreadable": []})


@torch.no_grad()
def test_the_twin_is_the_right_question_under_the_other_ones_tokens(trained):
    """Against the model asked row by row, the picture put through the ViT anew."""
    runner = trained.runner
    task, data, model = runner.task, runner.datasets["scene_questions"]["test"], runner.model.eval()
    task.before_evaluation(model, data)
    encoded = []
    hook = model.visual_encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    numbers = [0, len(data) - 1, 1, 2]
    rows = task.valid_step(model, data.collater([data[n] for n in numbers]))
    hook.remove()
    assert encoded == [2]
    for n, own in zip(numbers, rows, strict=True):
        other = task.swaps[n]
        image, text = data[n]["image"][None], data.texts_of([n])
        for question, loss, answer in (
            (text["question"], own["loss"], own["answer"]),
            (data.texts_of([other])["question"], own["loss_swapped"], own["swapped_answer"]),
        ):
            prompt = model.visual_prompt(image, questions=question)
            nats, _ = model.loss_of(prompt, {"text_input": text["answer"], "prompt": data.asked(text["question"])})
            assert loss == pytest.approx(nats.item(), rel=1e-4)
            assert [answer] == model.predict_answers(text, prompt=task.prompt, visual_prompt=prompt, **task.decoding)
        assert own["loss"] != own["loss_swapped"]
        ((blind, measured),) = own["blind"].items()  # the other picture's question is merging's too
        asked = data.texts_of([int(blind)])
        prompt = model.visual_prompt(image, questions=asked["question"])
        nats, _ = model.loss_of(prompt, {"text_input": asked["answer"], "prompt": data.asked(asked["question"])})
        assert measured["loss_shuffled"] == pytest.approx(nats.item(), rel=1e-4)


@pytest.mark.skip(reason="now and then the two ranks do not end; the cause is not found yet")
def test_two_ranks_give_the_gap_of_one(trained, tmp_path):
    weights = trained.output() / "checkpoint_last.pth"
    cards = []
    for name in ("one", "two"):
        runs = trained.copy(tmp_path / name, evaluate=True, blind_share=0.8, valid_splits=[])
        runs.config["model"]["pretrained"] = str(weights)
        runs.path()
        if name == "one":
            runs.train(evaluate=True)
        else:
            on_two_ranks(runs, script="evaluate.py")
        cards.append(read(runs.output() / "run.json")["metrics"])
    one, two = cards
    assert 0 < one["condition"]["questions"] < one["questions"]
    for key in ("condition", "condition_by_kind"):
        assert numbers(two[key]) == pytest.approx(numbers(one[key]), rel=1e-5, abs=1e-6)


def test_runs_resume_bit_equal_and_two_ranks_train_as_one(trained, tmp_path):
    one = trained.copy(tmp_path, valid_splits=[], test_splits=[], batch_size_train=2)
    two = one.copy(tmp_path / "two", batch_size_train=1)
    (tmp_path / "two").mkdir()
    one.train()
    on_two_ranks(two)
    whole = losses(one.output())
    assert list(losses(two.output()).values()) == pytest.approx(list(whole.values()), rel=1e-4, abs=1e-4)
    expected = checkpoint(one.output())["model"]
    assert expected["connector.conditioning.alpha"].abs() > 1e-3
    again = one.output("again")
    again.mkdir()
    half = again / "checkpoint_previous.pth"
    half.write_bytes((one.output() / "checkpoint_previous.pth").read_bytes())
    one.train("run.run_name=again", f"run.resume_ckpt_path={half}")
    assert same_tensors(checkpoint(again)["model"], expected)


def test_the_doctor_knows_drawn_questions(trained, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", str(trained.path())])
    says = capsys.readouterr().out
    assert end.value.code == 0, says
    assert "data scene_questions test: 3 found and readable" in says


def test_tokens_and_answers_for_questions(trained, tmp_path, capsys):
    picture = tmp_path / "photo.png"
    trained.runner.datasets["scene_questions"]["test"].pil_image(0).save(picture)
    run, questions = str(trained.output()), ["--question", "what color is the square?", "--question", "is it a dog?"]
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        cli.main(["tokens", str(picture), "--run", run, *questions, "--layers", "--before", *out])
    assert end.value.code == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"photo_tokens.png", "photo_layers_1.gif", "photo_layers_2.gif", "photo_layers_before.png"} <= names
    svg = (tmp_path / "out" / "photo_tokens.svg").read_text()
    assert "is it a dog?" in svg and "what color is the square?" in svg and "before training" in svg
    with pytest.raises(SystemExit) as end:
        cli.main(["caption", str(picture), "--run", run, "--question", "is it a dog?"])
    assert end.value.code == 0 and capsys.readouterr().out.splitlines()[-1].startswith(f"{picture}\t")
    with pytest.raises(SystemExit):
        cli.main(["tokens", str(picture), "--run", run, *questions, "--words", *out])
    assert "--words draws the words of a caption; leave it or --question out" in capsys.readouterr().err


def test_tokens_of_a_model_that_looks_at_no_question_are_refused(finished, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["tokens", "a.png", "--run", str(finished.output()), "--question", "is it?"])
    assert end.value.code == 2
    assert "--question: this model merges the same tokens whatever is asked" in capsys.readouterr().err
