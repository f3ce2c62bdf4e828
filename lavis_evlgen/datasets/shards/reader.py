"""Read one tar shard: its samples in file order, and what is wrong with it, each as one item of a fixed sequence.

`tarfile` parses the headers, but its own loop over them ends without an error at a broken header or where a download
stopped, so the loop is here. Only local, seekable files are read; content that is not needed is seeked over.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator
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


class Member(NamedTuple):
    """One file of a shard: its `name` there, which is KEY.EXTENSION (the extension in small letters here)."""

    name: str
    key: str
    extension: str
    start: int  # of its content in the file
    size: int


class ShardEntry(NamedTuple):
    """The members of one sample, those of its picture and its texts."""

    key: str
    members: list[Member]


def read_shard(path, start: int = 0, extensions: tuple[str, ...] = IMAGES) -> Iterator[ShardItem]:
    """Items of the shard at `path` from item `start` on; earlier ones are skipped without reading their content.

    Members of one sample are neighbours: KEY.jpg (or another of `extensions`) and KEY.json or KEY.txt; other files are
    ignored. A problem of the shard as a whole (missing, cut short, broken in the middle, without samples) is an item
    too, so that the sequence is the same whenever it is read. Behind a broken header nothing more of the shard is read.
    Raises nothing because of the file's content.
    """
    return _walk(path, start, extensions, _item)


class ShardIndex:
    """Where the items of a shard lie, by its headers alone: the items of `read_shard`, in any order and process.

    `entries`: of each item its key and members; of a problem of the shard, what `read_shard` says of it.
    """

    def __init__(self, path, extensions: tuple[str, ...] = IMAGES):
        self.path = path
        self.entries: list[ShardEntry | ShardItem] = list(_walk(path, 0, extensions, _entry))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> ShardItem:
        entry = self.entries[number]
        if isinstance(entry, ShardItem):
            return entry
        try:
            with open(self.path, "rb") as file:
                return _item(number, entry.key, entry.members, file)
        except OSError as error:
            return ShardItem(number, entry.key, {}, _cannot(error))


def all_members(file) -> Iterator[Member]:
    """Every file of an opened shard that has the name KEY.EXTENSION, in order, up to where the shard is broken."""
    return (member for member in _members(file, None) if isinstance(member, Member))


def _walk(path, start: int, extensions: tuple[str, ...], item_of: Callable) -> Iterator:
    """Of each item from `start` on, what `item_of` makes of (index, key or None, members or [problem], file)."""
    index = 0
    try:
        with open(path, "rb") as file:
            for key, members in groupby(_members(file, extensions), key=lambda member: getattr(member, "key", None)):
                if index >= start:
                    yield item_of(index, key, list(members), file)
                index += 1
        problem = None if index else "it holds no sample"
    except FileNotFoundError:
        problem = "it is not there"
    except OSError as error:
        problem = _cannot(error)
    if problem and index >= start:
        yield ShardItem(index, "", {}, problem)


def _cannot(error: OSError) -> str:
    return f"it cannot be read ({error.strerror or error})"


def _entry(index: int, key: str | None, members: list[Member | str], file) -> ShardEntry | ShardItem:
    return _item(index, None, members, file) if key is None else ShardEntry(key, members)


def _item(index: int, key: str | None, members: list[Member | str], file) -> ShardItem:
    if key is None:
        return ShardItem(index, "", {}, problem=members[0])
    files = {}
    for member in members:
        file.seek(member.start)
        files.setdefault(member.extension, file.read(member.size))
    return ShardItem(index, key, files)


def _members(file, extensions: tuple[str, ...] | None) -> Iterator[Member | str]:
    """Media and caption files of the archive in order (extensions None: all files); last, what is wrong with the
    archive, if anything is."""
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
        if found and (extensions is None or found[2].lower() in (*extensions, *CAPTIONS)):
            if info.offset_data + info.size > size:
                yield f"it is cut short (in {info.name})"
                return
            yield Member(info.name, found[1], found[2].lower(), info.offset_data, info.size)


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
