"""Two processes with batch 2 are one with batch 4, two micro-steps one of both: weighting, order, evaluation."""

import json

import pytest

from tests.processes import on_two_ranks
from tests.run_tools import Runs, checkpoint, log, losses


@pytest.fixture(scope="module")
def two(parts, tmp_path_factory) -> Runs:
    """Ten steps without dropout, batch 2 on each of 2 ranks; one validation in the middle, one at the end."""
    runs = Runs(
        parts, tmp_path_factory.mktemp("ranks"), max_iters=10, iters_per_inner_epoch=5, valid_splits=["val"],
        accum_grad_iters=2, batch_size_train=2, blind_shuffles=1,
    )  # fmt: skip
    runs.config["model"] |= {"dropout": 0.0}
    runs.config["datasets"]["scenes"] |= {"sizes": {"train": 14, "val": 5}, "captions_per_image": 5}
    on_two_ranks(runs)
    return runs


@pytest.fixture(scope="module")
def one_rank(two, tmp_path_factory) -> Runs:
    runs = two.copy(tmp_path_factory.mktemp("one"), batch_size_train=4)
    runs.runner = runs.train()
    return runs


@pytest.fixture(scope="module")
def one_batch(two, tmp_path_factory) -> Runs:
    """The same pictures in steps without accumulation."""
    runs = two.copy(tmp_path_factory.mktemp("batch"), batch_size_train=8, accum_grad_iters=1, valid_splits=[])
    runs.train()
    return runs


def test_captions_differ_in_length(one_rank):
    """Else a wrong weighting of ranks would not show."""
    dataset = one_rank.runner.datasets["scenes"]["train"]
    text = one_rank.runner.model.language_model.text
    assert len({len(text.encode(row["caption"])) for row in dataset.annotation}) > 5


def test_losses_of_two_ranks_are_those_of_one_with_twice_the_batch(one_rank, two):
    expected, found = losses(one_rank.output()), losses(two.output())
    assert list(found) == list(expected) == list(range(1, 11))
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-5, rel=1e-5)


def test_two_micro_steps_on_two_ranks_are_one_batch_of_all(one_batch, two):
    """Every token of a step weighs alike, whichever rank and micro-step it is in."""
    expected, found = (losses(runs.output()) for runs in (one_batch, two))
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-5, rel=1e-5)
    first = [log(runs.output())[0] for runs in (one_batch, two)]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-6)
    assert first[1]["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=2e-6)


def test_the_mean_over_micro_steps_is_the_same_on_two_ranks(one_rank, two, tmp_path):
    """`run.loss_mean: micro_steps`, as earlier versions had it: other numbers, and the same on two ranks."""
    short = {"max_iters": 2, "iters_per_inner_epoch": 2, "valid_splits": [], "loss_mean": "micro_steps"}
    of_two, of_one = two.copy(tmp_path / "two", **short), one_rank.copy(tmp_path / "one", **short)
    on_two_ranks(of_two)
    of_one.train()
    expected = losses(of_one.output())
    assert losses(of_two.output()) == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert expected[1] != pytest.approx(losses(one_rank.output())[1], rel=1e-4)


def test_weights_after_training_agree(one_rank, two):
    expected, found = (checkpoint(runs.output())["model"] for runs in (one_rank, two))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-4, name


def test_two_ranks_evaluate_every_picture_once(one_rank, two):
    def rows(runs):
        return json.loads((runs.output() / "result" / "val_10.json").read_text())["rows"]

    ids = [[row["image_id"] for row in rows(runs)] for runs in (one_rank, two)]
    assert sorted(ids[1]) == sorted(ids[0]) and len(set(ids[1])) == 5
    right = [
        [row["val_loss_right"] for row in log(runs.output()) if "val_loss_right" in row]
        for runs in (one_rank, two)
    ]
    assert right[1] == pytest.approx(right[0], abs=1e-4)


def test_one_rank_takes_over_from_two(one_rank, two):
    """The data order goes on; the checkpoint at step 5 holds the generators of both ranks."""
    saved = two.output() / "checkpoint_previous.pth"
    content = checkpoint(two.output(), saved.name)
    assert content["step"] == 5 and content["world_size"] == len(content["rng"]) == 2
    copy = one_rank.output("taken over")
    copy.mkdir()
    (copy / "start.pth").write_bytes(saved.read_bytes())
    one_rank.train(f"run.resume_ckpt_path={copy / 'start.pth'}", "run.valid_splits=[]")
    expected = losses(one_rank.output())
    assert losses(copy) == pytest.approx({step: expected[step] for step in range(6, 11)}, abs=1e-5, rel=1e-5)
