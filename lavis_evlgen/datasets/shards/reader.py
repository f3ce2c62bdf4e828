"""Read one tar shard: its samples in file order, and what is wrong with it, each as one item of a fixed sequence.

`tarfile` parses the headers, but its own loop over them ends without an error at a broken header or where a download
stopped, so the loop is here. Only local, seekable files are read; content that is not needed is seeked over.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("json", "txt")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # up to the first dot of the last part, as webdataset
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2048 * _BLOCK
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class ShardItem(NamedTuple):
    """One item of a shard: a sample as it lies there, `files` {extension: content}, or a `problem` of the shard."""

    index: int
    key: str
    files: dict[str, bytes]
    problem: str | None = None


class _Member(NamedTuple):
    key: str
    extension: str
    start: int  # of its content in the file
    size: int


def read_shard(path, start: int = 0, extensions: tuple[str, ...] = IMAGES) -> Iterator[ShardItem]:
    """Items of the shard at `path` from item `start` on; earlier ones are skipped without reading their content.

    Members of one sample are neighbours: KEY.jpg (or another of `extensions`) and KEY.json or KEY.txt; other files are
    ignored. A problem of the shard as a whole (missing, cut short, broken in the middle, without samples) is an item
    too, so that the sequence is the same whenever it is read. Behind a broken header nothing more of the shard is read.
    Raises nothing because of the file's content.
    """
    index = 0
    try:
        with open(path, "rb") as file:
            for key, members in groupby(_members(file, extensions), key=lambda member: getattr(member, "key", None)):
                if index >= start:
                    yield _item(index, key, list(members), file)
                index += 1
        problem = None if index else "it holds no sample"
    except FileNotFoundError:
        problem = "it is not there"
    except OSError as error:
        problem = f"it cannot be read ({error.strerror or error})"
    if problem and index >= start:
        yield ShardItem(index, "", {}, problem)


def _item(index: int, key: str | None, members: list[_Member | str], file) -> ShardItem:
    if key is None:
        return ShardItem(index, "", {}, problem=members[0])
    files = {}
    for member in members:
        file.seek(member.start)
        files.setdefault(member.extension, file.read(member.size))
    return ShardItem(index, key, files)


def _members(file, extensions: tuple[str, ...]) -> Iterator[_Member | str]:
    """Media and caption files of the archive in order; last, what is wrong with the archive, if anything is."""
    size, tar = os.fstat(file.fileno()).st_size, _open(file)
    if isinstance(tar, str):
        yield tar
        return
    here = 0
    while True:
        file.seek(here)
        try:
            info = tarfile.TarInfo.fromtarfile(tar)
            if info.size < 0 or tar.offset <= here:
                raise tarfile.HeaderError("a size below zero")
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):
            yield "it is cut short (the end mark is missing)"
            return
        except tarfile.EOFHeaderError:
            if any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(_CHUNK), b"")):
                yield "it is broken in the middle (zeros where a file should begin)"
            return
        except Exception as error:  # a broken header makes tarfile raise errors of many types
            yield f"it is broken in the middle ({type(error).__name__}: {error})"
            return
        here = tar.offset
        found = _NAME.fullmatch(info.name) if info.isreg() else None
        if found and found[2].lower() in (*extensions, *CAPTIONS):
            if info.offset_data + info.size > size:
                yield f"it is cut short (in {info.name})"
                return
            yield _Member(found[1], found[2].lower(), info.offset_data, info.size)


def _open(file) -> tarfile.TarFile | str:
    """The archive, or why it is none."""
    head = file.read(_BLOCK)
    if not head:
        return "it is empty (0 bytes)"
    file.seek(0)
    try:
        return tarfile.TarFile(fileobj=file)
    except Exception as error:
        for magic, name in _COMPRESSED.items():
            if head.startswith(magic):
                return f"it is compressed ({name}): unpack it"
        return f"it is not a tar file ({error})"
