"""Two runs in one folder: the second is refused, whenever it comes; a lock whose process is gone is taken over."""

import contextlib
import json
import os
import signal
import socket
import time

import pytest

from lavis_evlgen.config import ConfigError
from lavis_evlgen.runners.checkpointing import checkpoints, lock
from lavis_evlgen.runners.checkpointing.lock import RunLock
from lavis_evlgen.runners.step import TrainingStep
from tests.processes import forked, on_two_ranks, run
from tests.run_tools import checkpoint, losses

RACES, RACERS = 10, 5


def test_a_second_run_in_the_folder_is_refused(whole, tmp_path, monkeypatch, capsys):
    runs = whole.copy(tmp_path, valid_splits=[])
    update = TrainingStep._update
    monkeypatch.setattr(TrainingStep, "_update", lambda self: time.sleep(0.2) or update(self))
    with run(runs, "run.max_iters=1000") as first:
        first.wait_for(lambda: losses(runs.output()))
        for options in ([], ["run.resume_ckpt_path=auto"]):
            assert runs.command(*options) == 2
            line = capsys.readouterr().err.splitlines()[-1]
            assert f"is in use by another run (process {first.pid} on {socket.gethostname()}" in line
            assert "another run.run_name" in line
        weights = f"model.pretrained={whole.output() / checkpoints.LAST}"
        assert runs.command(weights, "run.test_splits=[test]", script="evaluate.py") == 2
        assert "is in use by another run" in capsys.readouterr().err.splitlines()[-1]
        assert not (runs.output() / "run.json").exists()
        assert first.poll() is None
        first.send(signal.SIGKILL)
        first.wait()
    assert (runs.output() / lock.NAME).exists()
    monkeypatch.undo()
    step = checkpoints.step_of(runs.output() / checkpoints.LAST) or 0
    assert runs.command("run.resume_ckpt_path=auto", f"run.max_iters={step + 1}") == 0
    words = capsys.readouterr().err
    assert f"is of process {first.pid} on {socket.gethostname()}" in words and "which is gone: taken over" in words
    assert not (runs.output() / lock.NAME).exists()


def test_a_run_that_fails_leaves_the_folder_free(whole, tmp_path):
    runs = whole.copy(tmp_path, valid_splits=[])
    assert runs.command("run.resume_ckpt_path=" + str(tmp_path / "output" / "run" / "none.pth")) == 2
    assert runs.output().exists() and not (runs.output() / lock.NAME).exists()
    runs.train("run.max_iters=1")
    assert not (runs.output() / lock.NAME).exists()


def test_of_two_ranks_one_tells_why_and_both_end(whole, tmp_path):
    runs = whole.copy(tmp_path)
    runs.output().mkdir(parents=True)
    holder = RunLock(runs.output())
    holder.take()
    ranks = on_two_ranks(runs, code=2)
    holder.release()
    assert "in use by another run" in ranks[0].words and "in use" not in ranks[1].words
    assert "Traceback" not in ranks[0].words + ranks[1].words
    assert not (runs.output() / "log.jsonl").exists()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_at_once_one_gets_it(tmp_path, stale):
    for race in range(RACES):
        folder = tmp_path / str(race)
        folder.mkdir()
        if stale:
            (folder / lock.NAME).write_text(json.dumps(gone(tmp_path)))
        start = time.monotonic() + 0.05

        def racer(folder=folder, start=start):
            while time.monotonic() < start:
                pass
            try:
                RunLock(folder).take()
            except ConfigError:
                return 2
            (folder / f"won by {os.getpid()}").touch()
            time.sleep(60)

        with contextlib.ExitStack() as stack:
            racers = [stack.enter_context(forked(racer, tmp_path / "words" / f"{n}.txt")) for n in range(RACERS)]
            deadline = time.monotonic() + 20
            while (refused := [one.poll() for one in racers].count(2)) + len(won(folder)) < RACERS:
                assert time.monotonic() < deadline, [one.words for one in racers]
                time.sleep(0.005)
            assert (refused, len(won(folder))) == (RACERS - 1, 1)


def won(folder) -> list:
    return list(folder.glob("won by *"))


def gone(folder) -> dict:
    """The lock of a process on this machine that is no more."""
    with forked(lambda: 0, folder / "words" / "gone.txt") as process:
        process.wait()
    return {"host": socket.gethostname(), "pid": process.pid, "started": 1, "since": "then", "launch": None}


def test_a_process_number_that_was_given_again_is_not_the_same_process(tmp_path, caplog):
    (tmp_path / lock.NAME).write_text(json.dumps({**gone(tmp_path), "pid": os.getpid()}))
    mine = RunLock(tmp_path)
    mine.take()
    assert "taken over" in caplog.text
    mine.release()


def test_a_process_that_is_alive_is_believed_where_the_file_system_has_no_locks(tmp_path, monkeypatch, caplog):
    def none(fd, how):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    with pytest.raises(ConfigError, match=f"in use by another run .process {os.getpid()} on"):
        second.take()
    assert "has no file locks" in caplog.text
    first.release()
    second.take()
    second.release()


def test_a_lock_of_another_machine_says_how_to_remove_it(tmp_path, monkeypatch):
    file = tmp_path / lock.NAME
    theirs = {"host": "node7", "pid": 12, "started": 5, "since": "2026-01-01 10:00:00", "launch": "job 3"}
    file.write_text(json.dumps(theirs))
    with pytest.raises(ConfigError, match="process 12 on node7, since 2026-01-01 10:00:00") as error:
        RunLock(tmp_path).take()
    assert f"if it is gone from that machine, delete {file}" in str(error.value)
    # the same launcher over several nodes has ended its processes before it starts them again elsewhere
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 3")
    again = RunLock(tmp_path)
    again.take()
    assert json.loads(file.read_text())["host"] == socket.gethostname()
    again.release()


def test_a_process_killed_while_it_takes_a_stale_lock_over_leaves_one_that_can_be_taken(tmp_path, monkeypatch):
    """What it writes is shorter than what stood there: the end of that must not be left behind it."""
    (tmp_path / lock.NAME).write_text(json.dumps({**gone(tmp_path), "since": "2026-11-26 12:00:00 and more"}))

    class Killed(BaseException):
        pass

    def then_killed(original):
        def call(*arguments):
            original(*arguments)
            raise Killed

        return call

    with monkeypatch.context() as patched:
        for name in ("pwrite", "ftruncate"):
            patched.setattr(lock.os, name, then_killed(getattr(os, name)))
        killed = RunLock(tmp_path)
        with pytest.raises(Killed):
            killed.take()
    lock._held.discard(killed._fd)
    os.close(killed._fd)  # as the kernel does
    following = RunLock(tmp_path)
    following.take()
    following.release()


def test_a_lock_that_makes_no_sense_is_not_removed(tmp_path):
    (tmp_path / lock.NAME).write_text("hello")
    with pytest.raises(ConfigError, match="if there is none, delete"):
        RunLock(tmp_path).take()
    (tmp_path / lock.NAME).write_text("")  # of a process that was killed before it wrote
    mine = RunLock(tmp_path)
    mine.take()
    mine.release()
    assert not (tmp_path / lock.NAME).exists()


def test_a_data_worker_does_not_hold_the_lock_of_its_dead_parent(tmp_path):
    def parent():
        mine = RunLock(tmp_path)
        mine.take()
        if os.fork() == 0:  # as a data worker; it lives on for a while
            time.sleep(2)
            os._exit(0)
        time.sleep(30)

    with forked(parent, tmp_path / "words" / "parent.txt") as process:
        process.wait_for(lambda: (tmp_path / lock.NAME).exists())
        time.sleep(0.2)
        process.send(signal.SIGKILL)
        process.wait()
    mine = RunLock(tmp_path)
    mine.take()
    mine.release()


def test_what_a_folder_holds_is_what_one_run_wrote(whole, tmp_path):
    """Before, both runs ended well and their lines and checkpoints were mixed."""
    runs = whole.copy(tmp_path, valid_splits=[])
    with run(runs, name="a.txt") as first, run(runs, "run.seed=1", name="b.txt") as second:
        codes = sorted([first.wait(), second.wait()])
    assert codes == [0, 2], first.words + second.words
    steps = [row for row in losses(runs.output())]
    assert steps == list(range(1, 11)) and checkpoint(runs.output())["step"] == 10
