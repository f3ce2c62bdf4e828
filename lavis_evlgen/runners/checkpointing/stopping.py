"""SIGTERM, SIGINT and SIGHUP: a run saves before it ends, and ranks agree on the step after which they do."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A terminal sends SIGINT to every process of the command, and torch's launcher hands its own on: a second one within
# this time (seconds) is the first one again.
SAME_SIGNAL = 3.0


def exit_code(number: int) -> int:
    """What a shell reports for a process that signal `number` ended: 143 of SIGTERM, 130 of SIGINT, 129 of SIGHUP."""
    return 128 + number


class StopSignals:
    """What this process does on a signal to stop: it ends at once, or sets `received` where work is `deferred`.

    Signals belong to a process, so there is one object of this class, `signals`.
    """

    def __init__(self):
        self.received = 0  # number of the signal that waits; 0: none
        self._before: dict[int, object] | None = None  # handlers by signal, while ours are installed
        self._process, self._deferring, self._first = 0, False, 0.0
        self._at_end: list[Callable[[], None]] = []

    @contextlib.contextmanager
    def handled(self, at_end: Callable[[], None] | None = None) -> Iterator[None]:
        """Handle signals inside; at_end: called when a signal ends the process at once.

        May be nested. A signal that the process was started to ignore (nohup, a shell's background jobs) stays
        ignored, and outside the main thread, where Python has no handlers, all stay as they are.
        """
        outermost = self._before is None and threading.current_thread() is threading.main_thread()
        if outermost:
            self._process, self.received = os.getpid(), 0
            wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._on_signal) for number in wanted}
        if at_end is not None:
            self._at_end.append(at_end)
        try:
            yield
        finally:
            if at_end is not None:
                self._at_end.remove(at_end)
            if outermost:
                for number, handler in self._before.items():
                    signal.signal(number, handler)
                self._before = None

    @contextlib.contextmanager
    def deferred(self, defer: bool = True) -> Iterator[None]:
        """Inside, a signal only sets `received`; with False, inside a deferred part, it ends the process at once.

        One that is still waiting where deferring ends does so there.
        """
        before, self._deferring = self._deferring, defer
        if not defer and self.received:
            self._end(self.received)
        try:
            yield
        finally:
            self._deferring = before
        if not before and self.received:
            self._end(self.received)

    def _on_signal(self, number: int, _frame):
        if os.getpid() != self._process:  # a data worker, before it has handlers of its own
            return
        now = time.monotonic()
        again = number == signal.SIGINT and self.received and now - self._first > SAME_SIGNAL
        if not self._deferring or again:
            self._end(number)
        if not self.received:
            self.received, self._first = number, now
            more = "; another Ctrl-C ends it at once, without saving" if number == signal.SIGINT else ""
            self._print(f"{signal.Signals(number).name}: the run saves after this step and stops{more}")

    def _end(self, number: int):
        """Leave without unwinding: an exception raised anywhere at all could be swallowed, or reported as a bug."""
        for call in reversed(self._at_end):
            call()
        self._print(f"{signal.Signals(number).name}: stopped")
        os._exit(exit_code(number))

    @staticmethod
    def _print(text: str):
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # the terminal is gone
                os.write(2, f"{text}\n".encode())  # logging and print may have been interrupted in mid-line


signals = StopSignals()


class StopCheck:
    """Decides after each step whether the run stops or saves, the same on every rank.

    Asking makes CUDA ranks wait for their GPUs, so short steps pass unasked: up to LONGEST_STRIDE of them, or as many
    as fit into LONGEST_WAIT seconds. Ranks measure, and the slowest decides.
    """

    LONGEST_STRIDE, LONGEST_WAIT = 10, 2.0

    def __init__(self, step: int, save_steps: int | None, save_seconds: float | None, asks_gpu: bool):
        """step: the run starts there; asks_gpu: whether asking makes a GPU wait."""
        self.save_steps, self.save_seconds, self.asks_gpu = save_steps, save_seconds, asks_gpu
        self.stop = 0  # number of the signal to stop for
        self._asked, self._at, self._next = step, time.monotonic(), step + 1
        self._saved_at = self._at

    def check(self, step: int) -> bool:
        """Called after every step; sets `stop`, and returns whether the run should be saved now."""
        by_steps = self.save_steps is not None and step % self.save_steps == 0
        if step < self._next:
            return by_steps
        now = time.monotonic()
        overdue = self.save_seconds is not None and distributed.is_main() and now - self._saved_at >= self.save_seconds
        seconds = (now - self._at) / max(1, step - self._asked)
        stop, overdue, seconds = distributed.max_over_ranks([signals.received, overdue, seconds])
        self.stop = int(stop)
        stride = min(self.LONGEST_STRIDE, int(self.LONGEST_WAIT / max(seconds, 1e-9))) if self.asks_gpu else 1
        self._asked, self._at, self._next = step, now, step + max(1, stride)
        return by_steps or overdue > 0

    def stop_requested(self) -> bool:
        """Whether a rank has received a signal to stop by now; sets `stop`. Every rank calls it."""
        self.stop = int(distributed.max_over_ranks([signals.received])[0])
        return self.stop > 0

    def saved(self):
        """The run has just been saved: minutes count from here."""
        self._saved_at = time.monotonic()


_PERIOD = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|h)")
_SECONDS = {"s": 1, "min": 60, "h": 3600}


def save_every(value) -> tuple[int | None, float | None]:
    """(steps, None) or (None, seconds) of `run.save_every`: 500, "30min", "2h", "90s"; (None, None) of nothing."""
    if value in (None, 0, False):
        return None, None
    if isinstance(value, int) and value > 0 and not isinstance(value, bool):
        return value, None
    match = _PERIOD.fullmatch(str(value))
    if match is None or float(match[1]) == 0:
        raise ConfigError(
            f"run.save_every: {value!r} is not a number of steps (500) or a time (30min, 2h, 90s); 0 means at "
            "evaluations only"
        )
    return None, float(match[1]) * _SECONDS[match[2]]
