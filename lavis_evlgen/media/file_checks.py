"""What is wrong with a file, in one line: whether its first bytes are those of something else, and what the operating
system reports when it is read or written."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

EMPTY = "the file is empty (0 bytes)"


class Unreadable(ValueError):
    """The file of one sample cannot be read: counted, not fatal. `path`: the file; `reason`: why, one line."""

    media = "file"

    def __init__(self, path, reason: str = ""):
        super().__init__(str(path), reason)  # both as args, so that the error survives pickling by a worker
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"cannot read the {self.media} {self.path}: {self.reason}"


def problem_with(path) -> str | None:
    """Why the file at `path` cannot be opened; None where it exists and is not empty."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:
        return str(error)
    if os.path.isdir(path):
        return "a folder, not a file"
    return None if size else EMPTY


def wrong_content(head: bytes, expected: str) -> str | None:
    """What a file is that should be `expected` ("image", "video"), by its first bytes; None where they do not tell."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<body")):
        return "looks like HTML, perhaps an error page saved by a downloader"
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer, not the {expected}; run `git lfs pull` in that folder"
    if head and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return f"looks like text, not a {expected}"
    return None


def first_bytes(source) -> bytes:
    """The first 512 bytes of a file, given by its path or its content."""
    if isinstance(source, bytes):
        return source[:512]
    with open(source, "rb") as file:
        return file.read(512)


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
