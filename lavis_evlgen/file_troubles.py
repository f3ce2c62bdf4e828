"""What is wrong with a picture or video file, in one line, as far as a look from outside tells."""

import os

EMPTY = "the file is empty (0 bytes)"


class Unreadable(ValueError):
    """One sample's file that cannot be read: counted, not fatal. `path` says which, `reason` why (str, one line)."""

    THING = "file"

    def __init__(self, path, reason: str = ""):
        super().__init__(str(path), reason)  # both as args, so that the error survives pickling by a worker
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"cannot read the {self.THING} {self.path}: {self.reason}"


def trouble_with(path) -> str | None:
    """Why the file at `path` cannot even be opened; None when it is there and holds something."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:
        return str(error)
    if os.path.isdir(path):
        return "a folder, not a file"
    return None if size else EMPTY


def looks_like(head: bytes, thing: str) -> str | None:
    """What a file that is no `thing` (picture, video) is in its place, by its first few hundred bytes; else None."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<body")):
        return "looks like HTML, perhaps an error page saved by a downloader"
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer, not the {thing}; run `git lfs pull` in that folder"
    if head and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return f"looks like text, not a {thing}"
    return None


def head_of(source) -> bytes:
    """The first 512 bytes of a file (a path) or of its content (bytes)."""
    if isinstance(source, bytes):
        return source[:512]
    with open(source, "rb") as file:
        return file.read(512)
