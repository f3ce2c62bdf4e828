"""A run that draws at random all that a run can, so that one that went on wrongly would show."""

import pytest

from tests.run_tools import Runs, checkpoint, losses, same_tensors


@pytest.fixture(scope="session")
def whole(parts, tmp_path_factory) -> Runs:
    """Ten steps with dropout and a random partition, validated at 5 and 10, that nothing happened to."""
    runs = Runs(
        parts, tmp_path_factory.mktemp("whole"), max_iters=10, iters_per_inner_epoch=5, valid_splits=["val"],
        blind_shuffles=1, sheet_pictures=0,
    )  # fmt: skip
    runs.config["model"] |= {"dropout": 0.2, "partition": "random"}
    runs.config["datasets"]["scenes"]["sizes"] = {"train": 13, "val": 4, "test": 4}
    runs.train()
    return runs


@pytest.fixture
def same_as_whole(whole):
    """Whether another folder of that run ended as it did, bit for bit."""

    def check(runs: Runs):
        assert losses(runs.output()) == losses(whole.output())
        ended, expected = checkpoint(runs.output()), checkpoint(whole.output())
        for part in ("model", "optimizer", "rng", "best", "step", "unevaluated"):
            assert same_tensors(ended[part], expected[part]), part

    return check
