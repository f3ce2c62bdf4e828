"""The list of shards that a config names: files, brace lists such as `{00000..10488}.tar`, globs, folders."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence

from braceexpand import UnbalancedBracesError, braceexpand

from lavis_evlgen.media.errors import DataError

_GLOB = re.compile(r"[*?\[]")


def shard_names(patterns: str | Sequence[str], folder: str | None = None, config_path: str = "shards") -> list[str]:
    """File names of all shards that `patterns` (one text, or a list of texts) name, in that order.

    Each text is a file, a brace list, a glob (sorted) or a folder (its *.tar, sorted); relative ones start at
    `folder`. Files of brace lists need not exist yet; a glob or folder in which nothing is found raises DataError.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns or [])
    if not patterns:
        raise DataError(f"{config_path} is empty; name tar files, such as {config_path}='/data/{{00000..00099}}.tar'")
    return [name for pattern in patterns for name in _expand(pattern, folder, config_path)]


def _expand(pattern: str, folder: str | None, config_path: str) -> list[str]:
    if not isinstance(pattern, str) or not pattern.strip():
        raise DataError(f"{config_path}: {pattern!r} is not the name of a shard")
    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(
            f"{config_path}: {pattern}: shards are read from files here, not from the network; copy or mount them"
        )
    path = os.path.expanduser(os.path.join(folder or "", pattern))
    try:
        names = list(braceexpand(path, escape=False))
    except UnbalancedBracesError:
        raise DataError(f"{config_path}: {path}: braces that are not closed") from None
    if _GLOB.search(path):
        names = [found for name in names for found in sorted(glob.glob(name))]
    elif len(names) == 1 and os.path.isdir(names[0]):
        path = os.path.join(names[0], "*.tar")
        names = sorted(glob.glob(os.path.join(glob.escape(names[0]), "*.tar")))
    if not names:
        start = "" if os.path.isabs(path) else f" (relative names start at {os.getcwd()})"
        raise DataError(f"{config_path}: no file matches {path}{start}")
    if names[-1].endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
        raise DataError(f"{config_path}: {names[-1]} is compressed; its samples cannot be sought: unpack it to .tar")
    return names
