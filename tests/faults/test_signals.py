"""SIGTERM, SIGINT and SIGHUP at any moment: nothing is lost, no stack trace is shown, the folder is free again."""

import signal
import time

import pytest

from lavis_evlgen import distributed, launch
from lavis_evlgen.config import ConfigError
from lavis_evlgen.runners.checkpointing import checkpoints, lock, stopping
from lavis_evlgen.runners.checkpointing.stopping import StopCheck, save_every, signals
from lavis_evlgen.runners.step import TrainingStep
from lavis_evlgen.runners.trainer import Trainer
from tests.processes import forked, on_two_ranks, run
from tests.run_tools import checkpoint, losses

ALL = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def slow_down(monkeypatch, owner, name: str, seconds: float = 0.15):
    """`owner.name` waits so long before it begins."""
    original = getattr(owner, name)

    def slower(*args, **kwargs):
        time.sleep(seconds)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, slower)


def stopped(runs, number: int, moment, *options: str) -> str:
    """Send the signal when `moment()` comes true; what the run said. It must end as a shell expects, and leave."""
    with run(runs, *options) as process:
        process.wait_for(lambda: moment(process))
        process.send(number)
        assert process.wait() == 128 + number, process.words
        assert "Traceback" not in process.words and "KeyboardInterrupt" not in process.words
        assert not (runs.output() / lock.NAME).exists()
        return process.words


@pytest.mark.parametrize("number", ALL)
def test_between_steps_it_saves_and_the_rest_is_bit_equal(whole, same_as_whole, tmp_path, monkeypatch, number):
    runs = whole.copy(tmp_path)
    with monkeypatch.context() as patched:
        slow_down(patched, TrainingStep, "_update", 0.05)
        words = stopped(runs, number, lambda _: len(losses(runs.output())) >= 3)
    step = checkpoint(runs.output())["step"]
    assert 3 <= step < 10 and f"{number.name}: saved step {step}" in words
    assert step == max(losses(runs.output()))
    runs.train("run.resume_ckpt_path=auto")
    same_as_whole(runs)


@pytest.mark.parametrize("number", ALL)
def test_while_a_checkpoint_is_written_it_is_finished(whole, same_as_whole, tmp_path, monkeypatch, number):
    runs = whole.copy(tmp_path, save_every=2)
    with monkeypatch.context() as patched:
        slow_down(patched, checkpoints.os, "fsync")
        stopped(runs, number, lambda _: (runs.output() / f".{checkpoints.LAST}.tmp").exists())
    assert not (runs.output() / f".{checkpoints.LAST}.tmp").exists()
    assert checkpoint(runs.output())["step"] == 2
    runs.train("run.resume_ckpt_path=auto")
    same_as_whole(runs)


def test_in_an_evaluation_all_is_saved_and_it_ends_at_once(whole, same_as_whole, tmp_path, monkeypatch):
    runs = whole.copy(tmp_path)
    with monkeypatch.context() as patched:
        slow_down(patched, Trainer, "eval_epoch", 20)
        started = time.monotonic()
        stopped(runs, signal.SIGTERM, lambda _: (runs.output() / checkpoints.LAST).exists())
        assert time.monotonic() - started < 15
    assert checkpoint(runs.output())["step"] == 5 and checkpoint(runs.output())["unevaluated"]
    runs.train("run.resume_ckpt_path=auto")
    same_as_whole(runs)


def test_before_the_first_step_there_is_nothing_to_save(whole, tmp_path, monkeypatch):
    runs = whole.copy(tmp_path)
    marker = tmp_path / "building"

    def build(cfg):
        marker.touch()
        time.sleep(20)

    monkeypatch.setattr(launch, "build", build)
    stopped(runs, signal.SIGINT, lambda _: marker.exists())
    assert not (runs.output() / checkpoints.LAST).exists()


def test_in_the_test_phase_and_in_evaluate_it_ends_at_once(whole, tmp_path, monkeypatch):
    runs = whole.copy(tmp_path, valid_splits=[], test_splits=["test"], iters_per_inner_epoch=10)
    slow_down(monkeypatch, Trainer, "eval_epoch", 20)
    stopped(runs, signal.SIGTERM, lambda _: (runs.output() / checkpoints.LAST).exists())
    assert checkpoint(runs.output())["step"] == 10
    weights = f"model.pretrained={runs.output() / checkpoints.LAST}"
    with run(runs, weights, "run.run_name=again", script="evaluate.py") as process:
        file = runs.output("again") / lock.NAME
        process.wait_for(lambda: file.exists() and file.read_text())
        process.send(signal.SIGHUP)
        assert process.wait(15) == 129 and "Traceback" not in process.words
    assert not (runs.output("again") / lock.NAME).exists()


def test_a_second_sigint_ends_it_at_once_without_saving(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "SAME_SIGNAL", 0.3)
    runs = whole.copy(tmp_path)
    slow_down(monkeypatch, TrainingStep, "_update", 20)
    with run(runs) as process:
        process.wait_for(lambda: "what trains" in process.words)
        process.send(signal.SIGINT)
        process.wait_for(lambda: "another Ctrl-C ends it at once" in process.words)
        process.send(signal.SIGINT)  # the launcher's, of the same key press
        time.sleep(0.5)
        assert process.poll() is None
        process.send(signal.SIGINT)
        assert process.wait(10) == 130 and "Traceback" not in process.words
    assert not (runs.output() / checkpoints.LAST).exists() and not (runs.output() / lock.NAME).exists()


def test_a_signal_that_is_ignored_stays_ignored(whole, tmp_path):
    """nohup starts a process with SIGHUP ignored."""
    runs = whole.copy(tmp_path, valid_splits=[])

    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return runs.command()

    with forked(nohup, tmp_path / "words.txt") as process:
        process.wait_for(lambda: losses(runs.output()))
        process.send(signal.SIGHUP)
        assert process.wait() == 0, process.words


def test_handlers_come_back_after_a_run():
    before = [signal.getsignal(number) for number in ALL]
    with signals.handled(), signals.handled():
        assert signal.getsignal(signal.SIGTERM) == signals._on_signal
    assert [signal.getsignal(number) for number in ALL] == before


def test_a_signal_to_one_rank_stops_both_at_the_same_step(whole, tmp_path, monkeypatch):
    runs = whole.copy(tmp_path, valid_splits=[])
    update = TrainingStep._update

    def told_at_the_third_step(self):
        if distributed.rank() == 1:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 3:
                signal.raise_signal(signal.SIGTERM)
        return update(self)

    monkeypatch.setattr(TrainingStep, "_update", told_at_the_third_step)
    ranks = on_two_ranks(runs, code=143)
    assert checkpoint(runs.output())["step"] == 3 and "Traceback" not in ranks[0].words + ranks[1].words


class Clock:
    """time.monotonic of a run whose steps take `step_seconds`."""

    def __init__(self, monkeypatch, step_seconds: float):
        self.now, self.step_seconds = 0.0, step_seconds
        monkeypatch.setattr(stopping.time, "monotonic", lambda: self.now)

    def steps(self, check: StopCheck, count: int) -> list[int]:
        """The steps, of `count`, after which ranks asked each other."""
        asked, ask = [], distributed.max_over_ranks
        for step in range(1, count + 1):
            self.now += self.step_seconds
            stopping.distributed.max_over_ranks = lambda values, step=step: asked.append(step) or ask(values)
            check.check(step)
        stopping.distributed.max_over_ranks = ask
        return asked


@pytest.mark.parametrize(
    "step_seconds, asked",
    [(4.0, [*range(1, 13)]), (0.7, [1, 3, 5, 7, 9, 11]), (0.01, [1, 11])],
)
def test_ranks_on_gpus_ask_each_other_every_two_seconds_or_ten_steps(monkeypatch, step_seconds, asked):
    """Torch's launcher kills 30 s after SIGTERM: with steps of 4 s, every tenth step was too late."""
    clock = Clock(monkeypatch, step_seconds)
    check = StopCheck(0, None, None, asks_gpu=True)
    assert clock.steps(check, 12) == asked


def test_steps_that_become_slow_are_noticed(monkeypatch):
    clock = Clock(monkeypatch, 0.01)
    check = StopCheck(0, None, None, asks_gpu=True)
    clock.steps(check, 11)
    clock.step_seconds = 6.0
    asked = []
    for step in range(12, 30):
        clock.now += clock.step_seconds
        before = check._asked
        check.check(step)
        asked += [step] if check._asked != before else []
    assert asked == [*range(21, 30)]


@pytest.mark.parametrize(
    "value, expected",
    [(None, (None, None)), (0, (None, None)), (500, (500, None)), ("30min", (None, 1800)), ("2h", (None, 7200)),
     ("90s", (None, 90)), ("1.5h", (None, 5400)), ("10 min", (None, 600))],
)  # fmt: skip
def test_save_every_is_steps_or_a_time(value, expected):
    assert save_every(value) == expected


@pytest.mark.parametrize("value", [-1, 2.5, True, "soon", "0min", "-3h", "30 minutes", [1]])
def test_save_every_refuses(value):
    with pytest.raises(ConfigError, match="run.save_every: .* is not a number of steps"):
        save_every(value)


def test_save_every_so_many_steps(whole, tmp_path):
    runs = whole.copy(tmp_path, valid_splits=[], iters_per_inner_epoch=10, max_iters=7, save_every=3)
    runs.train()
    steps = [checkpoint(runs.output(), name)["step"] for name in (checkpoints.LAST, checkpoints.PREVIOUS)]
    assert steps == [7, 6]


def test_save_every_so_many_minutes(monkeypatch):
    clock = Clock(monkeypatch, 25.0)
    check, saved = StopCheck(0, None, 60.0, asks_gpu=True), []
    for step in range(1, 10):
        clock.now += clock.step_seconds
        if check.check(step):
            saved.append(step)
            check.saved()
    assert saved == [3, 6, 9]
