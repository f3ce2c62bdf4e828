"""One run at a time in a folder: `run.lock` names the process that writes there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from lavis_evlgen.config import ConfigError

NAME = "run.lock"
_held: set[int] = set()  # file descriptors of locks
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems without it


class RunLock:
    """Taken before a run writes to `folder`, released when it ends; the main rank does both.

    The kernel's lock on the file (flock) decides on one machine: it ends with its process, however that ends. What the
    file says decides where flock does not reach, between machines that share the folder.
    """

    def __init__(self, folder: Path, key: str = "run.run_name", name: str = NAME):
        """key: of the config, which names another folder."""
        self.file, self.key = Path(folder) / name, key
        self._fd: int | None = None

    def take(self):
        """Raises ConfigError when another process uses the folder; the lock of one that has ended is taken over."""
        while self._fd is None:
            fd = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._check(fd)
            except BaseException:
                os.close(fd)
                raise
            if self._is_at_path(fd):
                self._fd = fd
                _held.add(fd)
            else:  # its owner removed the file in between
                os.close(fd)
        content = json.dumps(_this_process()).encode()
        os.ftruncate(self._fd, 0)  # first: a kill in between leaves an empty file, which nobody has to delete
        os.pwrite(self._fd, content, 0)
        os.fsync(self._fd)

    def release(self):
        """Remove the lock, if this process has it."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        with contextlib.suppress(FileNotFoundError):  # someone cleared the folder
            if self._is_at_path(fd):
                self.file.unlink()
        _held.discard(fd)
        os.close(fd)

    def _is_at_path(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.file))
        except FileNotFoundError:
            return False

    def _check(self, fd: int):
        """Lock the open file; raises ConfigError unless nobody alive has it."""
        held = not _flock(fd, self.file)
        text = os.pread(fd, 10_000, 0).decode(errors="replace")
        owner = _parsed(text)
        if owner is None:
            if held or text:
                raise ConfigError(self._refusal("another process", f"; if there is none, delete {self.file}"))
            return
        who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        here = owner["host"] == socket.gethostname()
        if held or (here and _alive(owner)):
            raise ConfigError(self._refusal(who))
        launch = _this_process()["launch"]
        if not here and not (launch and launch == owner.get("launch")):
            raise ConfigError(self._refusal(who, f"; if it is gone from that machine, delete {self.file}"))
        logging.warning("%s is of %s, which is gone: taken over", self.file, who)

    def _refusal(self, who: str, remedy: str = "") -> str:
        return (
            f"{self.file.parent} is in use by another run ({who}): wait for its end, or give this one another "
            f"{self.key}{remedy}"
        )


def _close_inherited():
    while _held:
        os.close(_held.pop())


# flock goes with the open file, which a forked data worker would keep open after this process was killed
os.register_at_fork(after_in_child=_close_inherited)


def _flock(fd: int, file: Path) -> bool:
    """Whether this process now has the lock on the open file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        logging.warning(
            "%s: this file system has no file locks (%s); two runs that start in the same instant are not noticed",
            file, error.strerror,
        )  # fmt: skip
    return True


def _this_process() -> dict:
    """What the lock of this process says. launch: of torch's launcher over several nodes, the same on all of them."""
    pid, launch = os.getpid(), os.environ.get("TORCHELASTIC_RUN_ID")
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started": _start_time(pid),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "launch": None if launch == "none" else launch,
    }


def _parsed(text: str) -> dict | None:
    """The content of a lock file; None where it is not complete."""
    try:
        owner = json.loads(text)
    except ValueError:
        return None
    complete = isinstance(owner, dict) and {"host", "pid", "started", "since"} <= set(owner)
    return owner if complete else None


def _alive(owner: dict) -> bool:
    """Whether the process that wrote a lock on this machine is still there: one of its number, started when it was."""
    started = _start_time(owner["pid"])
    return started is not None and started == owner["started"]


def _start_time(pid: int) -> int | None:
    """When process `pid` of this machine started, in clock ticks since boot; None when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])  # proc(5): field 22; the name, field 2, may hold anything
