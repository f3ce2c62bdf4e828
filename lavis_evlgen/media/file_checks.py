"""What is wrong with a file, in one line: whether its first bytes are those of something else."""

import os

EMPTY, MISSING = "the file is empty (0 bytes)", "no such file"


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
        return MISSING
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
