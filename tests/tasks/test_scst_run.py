"""SCST as train.py runs it, from the checkpoint of a captioning run."""

import json

import pytest

from lavis_evlgen.evaluation.cider_d import CaptionReward
from tests.processes import on_two_ranks
from tests.run_tools import checkpoint, log, losses, same_tensors

STILL = ["model.dropout=0", "model.partition=alternate", "run.valid_splits=[]", "run.max_iters=2"]


def letters(self, key, caption, ended=True):
    """In the place of CaptionReward.__call__: CIDEr-D is 0 for the noise that tiny models utter."""
    return caption.count("o") + 0.1 * len(caption) + ended, len(caption.split())


@pytest.fixture(scope="module")
def scst(finished, tmp_path_factory):
    """Runs that go on from the finished captioning run."""
    runs = finished.copy(
        tmp_path_factory.mktemp("scst"), task="scst", num_samples=2, max_iters=4, iters_per_inner_epoch=2, max_len=6,
        valid_splits=["val"], test_splits=[], tensorboard=False, metrics=["CIDEr"], batch_size_train=2,
        accum_grad_iters=2,
    )  # fmt: skip
    runs.config["model"] |= {"pretrained": str(finished.output() / "checkpoint_best.pth"), "dropout": 0.2}
    runs.config["model"]["partition"] = "random"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CaptionReward, "__call__", letters)
        runs.runner = runs.train()
        yield runs


def test_every_window_says_what_was_rewarded(scst):
    rows = [row for row in log(scst.output()) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["reward"] >= 0 and row["reward_greedy"] >= 0 and row["entropy"] > 0 and row["length"] > 0
        assert row["across_picture_share"] > 0 and row["skipped_steps"] == 0 and row["flops_per_image"] > 0
    assert len({row["loss"] for row in rows}) == 4 and len({row["reward"] for row in rows}) > 1


def test_the_run_card_says_how(scst):
    card = json.loads((scst.output() / "run.json").read_text())
    assert card["config"]["run"]["task"] == "scst" and card["metrics"]["metrics"]["CIDEr"] >= 0
    reward = card["metrics"]["reward"]
    assert reward["metric"] == "CIDEr-D" and reward["document_frequencies"] == "training captions of 12 pictures"
    assert reward["tokenizer_of_references"] == reward["tokenizer_of_captions"] == "simple"
    assert reward["same_words_on_references"] == 1 and reward["end_mark"] is True


def test_a_resume_is_bit_equal(scst):
    """What is drawn, dropped out and merged at random goes on where it was."""
    copy = scst.output("copy")
    copy.mkdir()
    middle = scst.output() / "checkpoint_previous.pth"
    assert checkpoint(scst.output(), middle.name)["step"] == 2
    (copy / middle.name).write_bytes(middle.read_bytes())
    scst.train("run.run_name=copy", f"run.resume_ckpt_path={copy / middle.name}")
    whole, resumed = losses(scst.output()), losses(copy)
    assert resumed == {step: whole[step] for step in (3, 4)}
    last, expected = checkpoint(copy), checkpoint(scst.output())
    assert same_tensors(last["model"], expected["model"]) and same_tensors(last["optimizer"], expected["optimizer"])


def test_micro_steps_are_one_step_of_their_pictures(scst):
    """The same captions are drawn, and a mean over captions is the mean of means over halves of them."""
    scst.train("run.run_name=two", *STILL)
    scst.train("run.run_name=one", "run.accum_grad_iters=1", "run.batch_size_train=4", *STILL)
    one, two = (log(scst.output(name)) for name in ("one", "two"))
    for key in ("loss", "reward", "reward_greedy", "length", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-3, abs=1e-5), key


def test_two_ranks_are_one_with_their_pictures(scst):
    """The same captions are drawn and rewarded, each rank's by a thread of its own, and the gradient is the same."""
    on_two_ranks(scst, "run.run_name=ranks", "run.accum_grad_iters=1", *STILL)
    scst.train("run.run_name=alone", "run.accum_grad_iters=1", "run.batch_size_train=4", *STILL)
    alone, ranks = (log(scst.output(name)) for name in ("alone", "ranks"))
    assert [row["step"] for row in ranks] == [1, 2] and alone[0]["reward"] > 0 and alone[0]["grad_norm"] > 0
    for key in ("loss", "reward", "reward_greedy", "entropy", "length", "grad_norm"):
        assert [row[key] for row in ranks] == pytest.approx([row[key] for row in alone], rel=1e-4, abs=1e-5), key


def test_an_evaluation_needs_no_reward(scst):
    runner = scst.train("run.run_name=scored", "run.test_splits=[test]", evaluate=True)
    assert runner.task.reward is None
    assert "reward" not in json.loads((scst.output("scored") / "run.json").read_text())["metrics"]


@pytest.mark.parametrize(
    "option, says",
    [
        ("model.pretrained=null", "goes on from a captioner, and model.pretrained is empty"),
        ("model.load_pretrained=false", "goes on from a captioner, and model.pretrained is empty"),
        ("run.num_sample=3", "unknown key run.num_sample; did you mean num_samples?"),
        ("run.temperature=0", "run.temperature=0 must be a number of at least 0.01"),
        ("run.top_p=2", "run.top_p=2 must be a number of at least 0.01 and at most 1"),
        ("run.baseline=gredy", "did you mean greedy?"),
    ],
)
def test_refused_before_the_first_step(scst, option, says, capsys):
    assert scst.command("run.run_name=refused", option) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (scst.output("refused") / "log.jsonl").exists()
