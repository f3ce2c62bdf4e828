"""Which shards there are: brace lists, globs, folders, and lists of those, as one sequence of file names.

A brace list such as `/data/{00000..10488}.tar` is kept as it is written: its names are worked out when asked for, so
that ten million of them take no more memory and time than ten.
"""

from __future__ import annotations

import glob
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import prod

from lavis_evlgen.media.errors import DataError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_GLOB = re.compile(r"[*?\[]")


class NumberRange(Sequence):
    """The texts of the numbers first..last, zero-padded as `first` is."""

    def __init__(self, first: str, last: str):
        self.numbers = range(int(first), int(last) + 1)
        self.width = len(first) if first.startswith("0") else 0

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> str:
        return str(self.numbers[index]).zfill(self.width)


class BraceNames(Sequence):
    """The names that a pattern with braces stands for, in the order in which a shell would write them."""

    def __init__(self, pattern: str):
        pieces = _BRACES.split(pattern)  # text, inside of braces, text, ...
        self.texts = pieces[::2]
        if any(mark in text for text in self.texts for mark in "{}"):
            raise DataError(f"{pattern}: braces that are not closed, or inside of others; write them side by side")
        self.choices = [_choices(pattern, inside) for inside in pieces[1::2]]
        self.size = prod(map(len, self.choices))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> str:
        index, chosen = range(self.size)[index], []
        for choices in reversed(self.choices):
            index, place = divmod(index, len(choices))
            chosen.append(choices[place])
        return "".join(text + choice for text, choice in zip(self.texts, [*reversed(chosen), ""], strict=True))


def _choices(pattern: str, inside: str) -> Sequence[str]:
    if found := _RANGE.fullmatch(inside):
        numbers = NumberRange(*found.groups())
        if not len(numbers):
            raise DataError(f"{pattern}: the range {{{inside}}} runs backwards")
        return numbers
    if "," not in inside:
        raise DataError(f"{pattern}: {{{inside}}} is neither a range such as {{00000..10488}} nor a list {{a,b}}")
    return inside.split(",")


class ShardNames(Sequence):
    """File names of all shards that `given` (one text, or a list of texts) names, in that order.

    Each text is a file, a brace list, a glob (sorted) or a folder (its *.tar, sorted); relative ones start at
    `folder`. Files of brace lists need not be there yet; a glob or folder in which nothing is found raises DataError.
    """

    def __init__(self, given: str | Sequence[str], folder: str | None = None, place: str = "shards"):
        texts = [given] if isinstance(given, str) else list(given or [])
        if not texts:
            raise DataError(f"{place} is empty; name tar files, such as {place}='/data/{{00000..00099}}.tar'")
        self.parts = [_expand(text, folder, place) for text in texts]
        self.ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        part = bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]


def _expand(text: str, folder: str | None, place: str) -> Sequence[str]:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{place}: {text!r} is not the name of a shard")
    if "://" in text or text.startswith("pipe:"):
        raise DataError(f"{place}: {text}: shards are read from files here, not from the network; copy or mount them")
    path = os.path.expanduser(os.path.join(folder or "", text))
    try:
        names = BraceNames(path)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    if _GLOB.search(path):
        names = [found for name in names for found in sorted(glob.glob(name))]
    elif len(names) == 1 and os.path.isdir(path):
        path = os.path.join(path, "*.tar")
        names = sorted(glob.glob(os.path.join(glob.escape(names[0]), "*.tar")))
    if not names:
        here = "" if os.path.isabs(path) else f" (relative names start at {os.getcwd()})"
        raise DataError(f"{place}: no file matches {path}{here}")
    if names[-1].endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
        raise DataError(f"{place}: {names[-1]} is compressed; a place in it cannot be sought: unpack it to .tar")
    return names
