"""Fixtures of whole runs. lavis is imported by those that need it, so that the light tests stay light."""

import logging
import os

import pytest

# before torch is imported: tiny tensors are fastest on one thread, and sums are then alike everywhere
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny parts, by the config key that names them."""
    from tests.run_tools import save_parts

    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def runs(parts, tmp_path):
    """A tiny config in a folder of its own, to be changed and run."""
    from tests.run_tools import Runs

    return Runs(parts, tmp_path)


@pytest.fixture(scope="session")
def finished(parts, tmp_path_factory):
    """A finished run with validation twice and a test, read by many tests: nobody writes to its folder."""
    from tests.run_tools import Runs

    runs = Runs(
        parts, tmp_path_factory.mktemp("finished"), max_iters=4, iters_per_inner_epoch=2, valid_splits=["val"],
        test_splits=["test"], tensorboard=True, metrics=["CIDEr", "BLEU"], sheet_pictures=4,
    )  # fmt: skip
    runs.runner = runs.train()
    return runs


@pytest.fixture(autouse=True)
def logging_as_before():
    """A run sets up logging for its process; pytest's own handlers come back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
