"""Runs in processes of their own, forked from this one: they start at once, for nothing has to be imported again.

What a test has patched is patched there too, so a run can be slowed down, or broken at one place.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.run_tools import Runs, free_port


class Forked:
    """`call()` in a forked process that leads a process group; what it prints goes to the file `words`.

    The process ends with what `call` returns, or with 1 after an error, whose trace is printed.
    """

    def __init__(self, call: Callable[[], int | None], words: Path, **environment: str):
        self._words, self.code = words, None
        words.parent.mkdir(parents=True, exist_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            atexit._clear()  # what belongs to the tests' own process
            code = _in_child(call, words, environment)
            threading._shutdown(), atexit._run_exitfuncs()  # as where Python ends
            os._exit(code)

    @property
    def words(self) -> str:
        return self._words.read_text(errors="replace") if self._words.exists() else ""

    def poll(self) -> int | None:
        """The exit code, or minus the number of the signal that ended it; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds: float = 180.0) -> int:
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < deadline, f"it did not end in {seconds} s:\n{self.words}"
            time.sleep(0.005)
        return self.code

    def wait_for(self, condition: Callable[[], object], seconds: float = 180.0):
        """Until `condition()`; fails when the process ends first."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.poll() is None, f"it ended with {self.code} before it got there:\n{self.words}"
            assert time.monotonic() < deadline, f"it did not get there in {seconds} s:\n{self.words}"
            time.sleep(0.002)

    def send(self, number: int):
        os.kill(self.pid, number)


def _in_child(call, words: Path, environment: dict) -> int:
    os.setsid()
    out = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    # pytest has others, which belong to its own process
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    logging.getLogger().handlers[:] = []
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    os.environ.update(environment)
    try:
        return call() or 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


@contextlib.contextmanager
def forked(call: Callable[[], int | None], words: Path, **environment: str) -> Iterator[Forked]:
    """A `Forked` that does not outlive the block."""
    process = Forked(call, words, **environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()


def run(runs: Runs, *options: str, script: str = "train.py", name: str = "words.txt"):
    """A run of one process, as `with run(...) as process`."""
    return forked(lambda: runs.command(*options, script=script), runs.folder / name)


def on_two_ranks(runs: Runs, *options: str, script: str = "train.py", code: int = 0) -> list[Forked]:
    """A run of two processes that talk over gloo, both at their end, which has to be with `code`."""
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                forked(
                    lambda: runs.command(*options, script=script),
                    runs.folder / f"rank{rank}.txt", RANK=str(rank), LOCAL_RANK=str(rank), **where,
                )
            )
            for rank in range(2)
        ]  # fmt: skip
        assert [process.wait() for process in ranks] == [code, code], ranks[0].words + ranks[1].words
    return ranks
