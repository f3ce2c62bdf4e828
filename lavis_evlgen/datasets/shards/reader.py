"""Read one tar shard: its samples in file order, and what is wrong with it, each as one item of a fixed sequence.

Python's `tarfile` parses the headers, but the loop over them is ours: tarfile's own ends without a word at a broken
header or where a download stopped. Only local, seekable files are read; what is skipped is skipped by its header.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("json", "txt")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # up to the first dot of the last part, as webdataset
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
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


class _Problem(NamedTuple):
    words: str


def read_shard(path, start: int = 0, media: tuple[str, ...] = IMAGES) -> Iterator[ShardItem]:
    """Items of the shard at `path` from item `start` on; earlier ones are skipped without reading their content.

    Members of one sample lie side by side: KEY.jpg (others of `media`) and KEY.json or KEY.txt; the rest is no matter.
    Whatever is wrong with the shard as a whole (missing, cut short, broken in the middle, without samples) is an item
    too, so that the sequence is the same whenever it is read. Raises nothing that comes from the file.
    """
    index = 0
    try:
        with open(path, "rb") as file:
            for group in _groups(_members(file, media)):
                if index >= start:
                    yield _item(index, group, file)
                index += 1
        problem = None if index else "it holds no sample"
    except FileNotFoundError:
        problem = "it is not there"
    except OSError as error:
        problem = f"it cannot be read ({error.strerror or error})"
    if problem and index >= start:
        yield ShardItem(index, "", {}, problem)


def _item(index: int, group: list[_Member] | _Problem, file) -> ShardItem:
    if isinstance(group, _Problem):
        return ShardItem(index, "", {}, group.words)
    files = {}
    for member in group:
        file.seek(member.start)
        files.setdefault(member.extension, file.read(member.size))
    return ShardItem(index, group[0].key, files)


def _groups(members: Iterator[_Member | _Problem]) -> Iterator[list[_Member] | _Problem]:
    """Neighbours with the same key together; problems as they come."""
    group: list[_Member] = []
    for member in members:
        if group and (isinstance(member, _Problem) or member.key != group[0].key):
            yield group
            group = []
        if isinstance(member, _Problem):
            yield member
        else:
            group.append(member)
    if group:
        yield group


def _members(file, media: tuple[str, ...]) -> Iterator[_Member | _Problem]:
    """Media and caption files of the archive in order, and its problems where they are."""
    size, tar = os.fstat(file.fileno()).st_size, _open(file)
    if isinstance(tar, _Problem):
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
            yield _Problem("it is cut short (the end mark is missing)")
            return
        except tarfile.EOFHeaderError:
            here = _next_header(file, here + _BLOCK) if size - here > _RECORD else None
            if here is None:
                return
            yield _Problem("it is broken in the middle (zeros where a file should begin)")
            continue
        except Exception as error:  # tarfile raises what the broken header makes it stumble over
            yield _Problem(f"it is broken in the middle ({type(error).__name__}: {error})")
            here = _next_header(file, here + _BLOCK)
            if here is None:
                return
            continue
        here = tar.offset
        found = _NAME.fullmatch(info.name) if info.isreg() else None
        if found and found[2].lower() in (*media, *CAPTIONS):
            if info.offset_data + info.size > size:
                yield _Problem(f"it is cut short (in {info.name})")
                return
            yield _Member(found[1], found[2].lower(), info.offset_data, info.size)


def _open(file) -> tarfile.TarFile | _Problem:
    head = file.read(_BLOCK)
    if not head:
        return _Problem("it is empty (0 bytes)")
    file.seek(0)
    try:
        return tarfile.TarFile(fileobj=file)
    except Exception as error:
        for magic, name in _COMPRESSED.items():
            if head.startswith(magic):
                return _Problem(f"it is compressed ({name}): unpack it")
        return _Problem(f"it is not a tar file ({error})")


def _next_header(file, start: int) -> int | None:
    """Where the next whole header lies from `start` on, a multiple of 512; None when there is none."""
    while True:
        file.seek(start)
        chunk = file.read(_CHUNK)
        at = chunk.find(b"ustar")
        while at >= 0:
            block, offset = divmod(at, _BLOCK)
            if offset == 257 and _is_header(chunk[block * _BLOCK : (block + 1) * _BLOCK]):
                return start + block * _BLOCK
            at = chunk.find(b"ustar", at + 1)
        if len(chunk) < _CHUNK:
            return None
        start += _CHUNK


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
