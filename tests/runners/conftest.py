"""Runs in processes of their own, started together at the first test: most of their time is importing."""

import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.run_tools import Runs, losses, wait_for

KILLED_AFTER = 8  # steps
ENDLESS = 100_000


def interrupted(runs: Runs, due, sign: int) -> tuple[int, str]:
    """(exit code, words) of a run whose whole process group, workers too, got a signal when `due()` came true."""
    runs.folder.mkdir(exist_ok=True)
    with open(runs.folder / "words.txt", "w+") as words:
        process = runs.start(stderr=words)
        try:
            wait_for(due, process)
            os.killpg(process.pid, sign)
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        words.seek(0)
        return process.returncode, words.read()


def on_two_ranks(runs: Runs) -> tuple[int, str]:
    runs.folder.mkdir(exist_ok=True)
    with open(runs.folder / "words.txt", "w+") as words:
        process = runs.start(processes=2, stderr=words)
        try:
            process.wait(150)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        words.seek(0)
        return process.returncode, words.read()


@pytest.fixture(scope="session")
def with_dropout(parts, tmp_path_factory) -> Runs:
    """Everything that draws or counts: dropout, random partition, workers, accumulation, epoch ends, validation."""
    runs = Runs(
        parts, tmp_path_factory.mktemp("resume"), max_iters=16, iters_per_inner_epoch=4, accum_grad_iters=2,
        num_workers=1, valid_splits=["val"], num_beams=3, blind_shuffles=1,
    )  # fmt: skip
    runs.config["model"] |= {"dropout": 0.2, "partition": "random"}
    runs.config["datasets"]["scenes"]["sizes"] = {"train": 13, "val": 4, "test": 0}  # an epoch ends in mid-batch
    return runs


@pytest.fixture(scope="session")
def endless(parts, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("sigterm")
    return Runs(parts, folder, max_iters=ENDLESS, iters_per_inner_epoch=ENDLESS, num_workers=1)


@pytest.fixture(scope="session")
def two_ranks(parts, tmp_path_factory) -> Runs:
    """Ten steps without dropout, batch 2 on each of 2 ranks; one validation in the middle, one at the end."""
    runs = Runs(
        parts, tmp_path_factory.mktemp("ranks"), max_iters=10, iters_per_inner_epoch=5, valid_splits=["val"],
        accum_grad_iters=2, batch_size_train=2, blind_shuffles=1,
    )  # fmt: skip
    runs.config["model"] |= {"dropout": 0.0}
    runs.config["datasets"]["scenes"] |= {"sizes": {"train": 14, "val": 5}, "captions_per_image": 5}
    return runs


@pytest.fixture(scope="session", autouse=True)
def early(request):
    """Start them before they are asked for, if they will be."""
    if any("background" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("background")


@pytest.fixture(scope="session")
def background(with_dropout, endless, two_ranks) -> dict[str, Future]:
    """Results of the runs in other processes, under way."""
    killed = with_dropout.copy(with_dropout.folder / "killed")

    def past_a_checkpoint():
        folder = killed.output()
        return (folder / "checkpoint_last.pth").exists() and max(losses(folder), default=0) > KILLED_AFTER

    def three_steps():
        return len(losses(endless.output())) >= 3

    with ThreadPoolExecutor(3) as pool:
        yield {
            "killed": pool.submit(lambda: (killed, *interrupted(killed, past_a_checkpoint, signal.SIGKILL))),
            "told to stop": pool.submit(interrupted, endless, three_steps, signal.SIGTERM),
            "two ranks": pool.submit(on_two_ranks, two_ranks),
        }
