"""Conversations through a tiny model, as train.py and evaluate.py run them."""

import json
import logging

import pytest
import torch
from PIL import Image

from lavis_evlgen.datasets import DataError
from lavis_evlgen.tasks.conversation import EvlgenConversationTask
from tests.datasets.helpers import write_json
from tests.datasets.test_image_conversations import turns
from tests.run_tools import Runs, checkpoint, log, losses
from tests.tiny import tiny_evlgen

COLOURS = ("red", "blue", "green", "black")
LONG = "a wooden table and two cats on the grass " * 4


def conversation_runs(parts, folder, **run) -> Runs:
    """A tiny config on drawn squares: 8 pictures, one conversation each, of which two are too long."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for n in range(8):
        colour = COLOURS[n % 4]
        Image.new("RGB", (28, 28), colour).save(folder / "images" / f"{n}.png")
        words = ["<image>\nwhat color?", colour, "really?", LONG if n in (1, 5) else "yes"]
        rows.append({"id": n, "image": f"{n}.png", "conversations": turns(*words)})
    config = {
        "max_iters": 4, "iters_per_inner_epoch": 2, "valid_splits": ["val"], "test_splits": ["test"],
        "batch_size_eval": 2, "task": "evlgen_conversations", "sheet_pictures": 3, **run,
    }  # fmt: skip
    runs = Runs(parts, folder, **config)
    for key in ("metrics", "tokenizer", "num_beams", "max_len"):  # of captioning
        del runs.config["run"][key]
    processors = runs.config["datasets"]["scenes"]["vis_processor"]
    section = {"images": str(folder / "images"), "conversations": str(write_json(folder / "c.json", rows)),
               "split": {"train": 4, "val": 2, "test": 2}, "vis_processor": processors}  # fmt: skip
    runs.config["datasets"] = {"image_conversations": section}
    runs.config["model"] |= {"max_txt_len": 80, "chat_template": "plain"}
    return runs


@pytest.fixture(scope="module")
def talked(parts, tmp_path_factory) -> Runs:
    runs = conversation_runs(parts, tmp_path_factory.mktemp("talk") / "run")
    runs.runner = runs.train()
    return runs


def read(path):
    return json.loads(path.read_text())


def test_a_run_leaves_card_losses_and_pictures(talked):
    card = read(talked.output() / "run.json")
    assert card["data"]["name"] == "image_conversations" and card["data"]["size"] == 2
    assert card["metrics"]["loss_right"] == pytest.approx(card["metrics"]["metrics"]["loss"])
    assert card["metrics"]["loss_shuffled"] > 0 and card["metrics"]["conversations"] == 2
    best = checkpoint(talked.output(), "checkpoint_best.pth")["step"]
    rows = read(talked.output() / "result" / f"test_{best}.json")["rows"]
    assert [row["conversation_id"] for row in rows] == [6, 7] and all(row["loss_shuffled"] > 0 for row in rows)
    assert rows[0]["conversations"][1] == {"role": "assistant", "content": "green"}
    assert Image.open(talked.output() / "captions.png").size[0] > 200
    curve = [row for row in log(talked.output()) if "val_loss_right" in row]
    assert [row["step"] for row in curve] == [2, 4]
    assert losses(talked.output())[4] < losses(talked.output())[1]


def test_too_long_conversations_are_cut_and_counted(talked, tmp_path, caplog, capsys):
    train = talked.runner.datasets["image_conversations"]["train"]
    assert [len(row["messages"]) for row in train.annotation] == [4, 2, 4, 4]
    with caplog.at_level(logging.WARNING):
        talked.runner.task.check_model(None, talked.runner.model)
    assert "conversations are cut" not in caplog.text  # they fit now
    talked.copy(tmp_path / "again").train("run.max_iters=1", "run.test_splits=[]", "run.valid_splits=[]")
    words = "train: 1 of 4 conversations are cut after the last turn that fits into model.max_txt_len=80\n"
    assert words in capsys.readouterr().err


def test_evaluate_gives_the_same_losses_whatever_the_batch(talked, tmp_path):
    best = talked.output() / "checkpoint_best.pth"
    expected = read(talked.output() / "result" / f"test_{checkpoint(talked.output(), best.name)['step']}.json")
    runs = talked.copy(tmp_path, batch_size_eval=1)
    assert runs.command(f"model.pretrained={best}", "run.run_name=again", script="evaluate.py") == 0
    found = read(runs.output("again") / "result" / "test_given.json")
    for key in ("loss_right", "loss_shuffled"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)


@torch.no_grad()
def test_merging_that_looks_at_the_question_sees_what_the_user_said_first(talked):
    """Its own conversation's, and under another picture that of the conversation which is measured there."""
    data = talked.runner.datasets["image_conversations"]["test"]
    model = tiny_evlgen(connector={"condition": "question"}, max_txt_len=80).eval()
    words = ("what color?", "is it a dog?")
    model.language_model.chat_template = "plain"
    model.connector.conditioning.alpha.fill_(1.0)
    kept, data.annotation = data.annotation, [dict(row) for row in data.annotation]
    for row, said in zip(data.annotation, words, strict=True):
        row["messages"] = [{"role": "user", "content": f"<image>\n{said}"}, {"role": "assistant", "content": "red"}]
    task = EvlgenConversationTask()
    task.before_evaluation(model, data)
    samples = data.collater([data[0], data[1]])
    rows = task.valid_step(model, samples)
    for n, (row, said) in enumerate(zip(rows, words, strict=True)):
        other = 1 - n
        ((blind, measured),) = row["blind"].items()
        for nats, asked, number in ((row["loss"], said, n), (measured["loss_shuffled"], words[other], int(blind))):
            prompt = model.visual_prompt(samples["image"][n : n + 1], questions=[asked])
            assert nats == pytest.approx(model.loss_of(prompt, data.texts_of([number]))[0].item(), rel=1e-5)
            wrong = model.visual_prompt(samples["image"][n : n + 1])
            assert nats != pytest.approx(model.loss_of(wrong, data.texts_of([number]))[0].item(), rel=1e-5)
    data.annotation = kept


def test_every_conversation_is_scored_once(talked):
    runner = talked.runner
    task, dataset = runner.task, runner.datasets["image_conversations"]["test"]
    task.before_evaluation(None, dataset)
    samples = dataset.collater([dataset[0], dataset[1]])
    rows = task.valid_step(runner.model.eval(), samples)
    assert task.after_evaluation([dict(row) for row in rows], "test", 1)["conversations"] == 2
    for wrong in (rows[:1], [rows[0], rows[0]]):
        with pytest.raises(DataError, match="some were lost or met twice"):
            task.after_evaluation([dict(row) for row in wrong], "test", 1)
    bad = {"bad": {"image": "7.png", "reason": "broken"}}
    result = task.after_evaluation([dict(rows[0]), bad], "test", 1)
    assert "1 unreadable pictures left out" in task.summary(result)
    with pytest.raises(DataError, match="no conversation has a readable picture"):
        task.after_evaluation([bad, bad], "test", 1)


@pytest.mark.parametrize(
    "option, says",
    [
        ("model.chat_template=null", "tokenizer has no chat template to render conversations with: set model.chat_"),
        ("model.chat_template=vicuna", "model.chat_template: 'vicuna' is not one of plain"),
        ("model.max_txt_len=10", "4 have no turns with the picture that fit, or say a special token"),
        ("run.task=evlgen_vqa", "run.task=evlgen_vqa needs questions, image_conversations has none"),
        ("run.metrics=[CIDEr]", "unknown key run.metrics"),
    ],
)
def test_mistakes_are_told_before_the_first_step(talked, tmp_path, capsys, option, says):
    assert talked.copy(tmp_path).command(option) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_captions_are_not_conversations(talked, tmp_path, capsys):
    runs = talked.copy(tmp_path)
    runs.config["datasets"] = {"scenes": {"sizes": {"train": 4, "val": 2, "test": 2}, "image_size": 56}}
    assert runs.command() == 2
    assert "scores conversations, scenes has none" in capsys.readouterr().err.splitlines()[-1]
