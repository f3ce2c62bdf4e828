"""Checks of tar shards before training: are they there, do they open, do a few hold what training needs?"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from lavis_evlgen.datasets import ImageShards, UnreadableImage
from lavis_evlgen.datasets.shards.reader import read_shard
from lavis_evlgen.media.file_checks import Unreadable
from lavis_evlgen.tools.doctor.checks import Finding

_DECODED = 256  # samples of each shard that is looked into


def check_shards(name: str, dataset: ImageShards, limit: int | None, say) -> Finding:
    """Every name is a file; in the first, the middle and the last shard, samples are counted and some are decoded.

    limit: how many samples of each to decode (256).
    """
    limit = limit or _DECODED
    missing, details = _missing(name, dataset, say)
    last = len(dataset.shards) - 1
    sizes, good, reasons = [], 0, Counter()
    for index in sorted({0, last // 2, last}):
        sizes.append(0)
        for item in read_shard(dataset.shards[index], extensions=dataset.extensions):
            sizes[-1] += item.problem is None
            if item.problem is None and sizes[-1] > limit:
                continue
            error = _trouble(dataset, index, item)
            if error is None:
                good += 1
                continue
            reason = error.reason.partition(" (")[0]
            reasons[reason] += 1
            if reasons[reason] == 1:
                details.append(f"{error.path}: {error.reason}")
    bad, allowed = sum(reasons.values()), dataset.max_bad_fraction
    seen = f"{len(dataset.shards) - missing} of {len(dataset.shards)} shards are there; {', '.join(map(str, sizes))} "
    seen += f"samples in {len(sizes)} of them; of up to {limit} each, {good} are usable, {bad} are not"
    seen += f": {', '.join(f'{reason} ({n})' for reason, n in reasons.most_common(3))}" if reasons else ""
    ok = missing <= allowed * len(dataset.shards) and bad <= allowed * (good + bad) and good > 0
    return Finding(ok, f"data {name} train", seen, details)


def _missing(name: str, dataset: ImageShards, say) -> tuple[int, list[str]]:
    """How many shards are no files, and the first few of them."""
    count, first, said = 0, [], time.monotonic()
    for number, path in enumerate(dataset.shards, start=1):
        if not Path(path).is_file():
            count += 1
            first += [f"{path}: no such file"] if len(first) < 10 else []
        if time.monotonic() - said > 10:
            said = time.monotonic()
            say(f"  {name}: {number} of {len(dataset.shards)} shard names looked up")
    return count, first


def _trouble(dataset: ImageShards, index: int, item) -> UnreadableImage | None:
    if item.problem is not None:
        return UnreadableImage(dataset.shards[index], item.problem)
    try:
        dataset.sample(index, item)
    except Unreadable as error:
        return error
    return None
