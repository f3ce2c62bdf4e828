"""Errors that the user can fix: commands show them as one line, without a stack trace, and end with exit code 2.

Standard library only: commands that import neither torch nor LAVIS use this.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Base of the errors whose message is all that a user needs."""


def one_line(error: Exception) -> str:
    """The message alone: what comes from a data worker carries the worker's whole stack trace."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        return text.strip().splitlines()[-1].partition(": ")[2]
    return text


def explanation(error: Exception) -> str | None:
    """The one line for what a user can fix; None for a bug, whose trace is wanted."""
    if isinstance(error, UserError):
        return one_line(error)
    refused = system_error(error)
    return None if refused is None else advice(refused)


# what the system refuses and a user can change, and how; other errors of the system are bugs and keep their trace
ADVICE = {
    errno.ENOSPC: "free space on that disk, or write to another one",
    errno.EDQUOT: "free space, or write to another disk",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or write to another disk",
    errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path",
    errno.EROFS: "give a path that can be written to",
    errno.ELOOP: "its links lead in a circle; correct them, or give another path",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "a part of the path is a file and no folder; give another path",
    errno.EISDIR: "give the name of a file",
    errno.EEXIST: "a file stands where a folder is to be; give another path",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or use fewer workers",
    errno.ENFILE: "close other programs, or use fewer workers",
    errno.EIO: "the disk or network share fails; look at it, or use another",
    errno.ESTALE: "the network share was mounted anew; start again",
}


def system_error(error: BaseException | None) -> OSError | None:
    """The refusal of the system (ADVICE) that `error` is, or that torch or safetensors tell of in their own words."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return error if error.errno in ADVICE else None
    told = re.findall(r"\[Errno (\d+)\][^'\n]*(?:'(.*)')?|\(os error (\d+)\)", text)  # of a worker; of a Rust library
    if told and isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError" and told:
        number = int(told[-1][0] or told[-1][2])
        return OSError(number, os.strerror(number), told[-1][1] or None) if number in ADVICE else None
    # torch.save into a full disk stumbles over its own count of bytes
    while isinstance(error, RuntimeError) and error.__context__ is not None:
        error = error.__context__
        if isinstance(error, OSError):
            return error if error.errno in ADVICE else None
    return None


def advice(error: OSError) -> str:
    """One line for a refusal of the system (ADVICE): the path, what is wrong, what to do."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror}: {ADVICE[error.errno]}"


@contextmanager
def writing(path) -> Iterator[None]:
    """Within it, what the system refuses names `path`: a disk that is full in mid-file does not say which file."""
    try:
        yield
    except Exception as error:
        refused = system_error(error)
        if refused is None or refused.filename is not None:
            raise
        raise OSError(refused.errno, refused.strerror, str(path)) from error
