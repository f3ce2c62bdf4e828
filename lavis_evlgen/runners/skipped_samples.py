"""Samples that cannot be used: counted over all ranks, named in a file, fatal above `max_bad_fraction`.

Unreadable files are known one by one (bad_images.jsonl). A shard set of a hundred million samples may hold a million
bad ones, which are met again in every epoch: those are counted, not listed. Memory holds the totals by reason,
bad_shards.jsonl one row for each shard and reason.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lavis_evlgen import distributed
from lavis_evlgen.datasets import ImageShards
from lavis_evlgen.errors import UserError
from lavis_evlgen.reporting.json_lines import drop_rows_after, read_json_lines

# shares are of at least this many: one bad sample among the first ten is not yet a tenth of the set
LEAST_SAMPLES, LEAST_SHARDS = 1000, 100


class TooManyBadImages(UserError, RuntimeError):
    """More of the data is unreadable than the config tolerates."""


class SkippedSamples:
    """What one training run skipped, of files and of shards. `files` and `shards` have the same methods:

    `add(...)` after each batch (cheap, no communication), `share(step)` to sum up over ranks, write and log, and
    `check()`, which raises TooManyBadImages above the limit, on every rank alike once `share` was called.
    """

    def __init__(self, folder: Path, data: dict):
        """data: {name: training set}, adapted (datasets/facts.py)."""
        shard_sets = {name: d for name, d in data.items() if isinstance(d, ImageShards)}
        self.files = SkippedFiles(folder, [d for name, d in data.items() if name not in shard_sets])
        self.shards = SkippedInShards(folder, {name: d.max_bad_fraction for name, d in shard_sets.items()})

    @property
    def count(self) -> int:
        """Distinct files, and what was met in shards."""
        return self.files.count + self.shards.count

    def resume_at(self, step: int):
        self.files.resume_at(step)
        self.shards.resume_at(step)

    def share(self, step: int):
        """Exchange, write, log and check; every rank calls it."""
        for kind in (self.files, self.shards):
            kind.share(step)
            kind.check()


class SkippedFiles:
    """Distinct unreadable files, {path: reason}, of a training run or of the evaluation of one `split`."""

    def __init__(self, folder: Path, datasets: list, split: str | None = None):
        self.file, self.split = folder / "bad_images.jsonl", split
        # the loosest limit of the mix: with several sets, a file does not say which one it is from
        self.total = sum(d.num_images for d in datasets)
        self.allowed = sum(d.max_bad_fraction * d.num_images for d in datasets)
        self.media = " and ".join(sorted({f"{d.media}s" for d in datasets})) or "images"
        self.found: dict[str, str] = {}
        self._new: list[dict] = []

    @property
    def count(self) -> int:
        return len(self.found)

    def _listed(self) -> dict[str, str]:
        """What the file holds of this split (None: of training)."""
        rows = read_json_lines(self.file)
        return {row["image"]: row["reason"] for row in rows if row.get("split") == self.split}

    def resume_at(self, step: int):
        """Go on with what the run found before; at step 0, remove the list that an earlier run left here."""
        if step:
            self.found = self._listed()
        elif distributed.is_main():
            self.file.unlink(missing_ok=True)

    def add(self, entries: list[dict]):
        """Entries {"image", "reason"} that a batch brought along."""
        for entry in entries:
            if entry["image"] not in self.found:
                self.found[entry["image"]] = entry["reason"]
                self._new.append(entry)

    def share(self, step: int | None = None):
        fresh = {entry["image"]: entry for entry in distributed.gather_lists(self._new)}
        self.found |= {image: entry["reason"] for image, entry in fresh.items()}
        self._new = []
        if fresh and distributed.is_main():
            listed, where = self._listed(), {} if self.split is None else {"split": self.split}
            _append(self.file, ({**entry, **where} for image, entry in fresh.items() if image not in listed))
            first, more = next(iter(fresh.values())), f" and {len(fresh) - 1} more" if len(fresh) > 1 else ""
            new = f"{first['image']} ({first['reason']}){more}"
            logging.warning("%s; new: %s; all are named in %s", self.summary(), new, self.file)

    def summary(self) -> str:
        where = "" if self.split is None else f"{self.split}: "
        return f"{where}{self.count} of {self.total} {self.media} are unreadable"

    def check(self):
        if self.count > self.allowed:
            image, reason = next(iter(self.found.items()))
            raise TooManyBadImages(
                f"{self.summary()}, more than max_bad_fraction allows ({self.allowed:g}); the first is {image} "
                f"({reason}). {_fix(self.file)}"
            )


def check_unreadable(folder: Path, split: str, dataset, entries: list[dict]):
    """Name the unreadable files of an evaluation in bad_images.jsonl and the log; the scores leave them out.

    Every rank calls it with all ranks' entries. Raises TooManyBadImages above the data set's `max_bad_fraction`.
    """
    if entries:
        skipped = SkippedFiles(folder, [dataset], split)
        skipped.add(entries)
        skipped.share()
        skipped.check()


class SkippedInShards:
    """Totals of each shard set by reason; `totals` {data set: Counter} is what a checkpoint holds."""

    def __init__(self, folder: Path, limits: dict[str, float]):
        """limits: `max_bad_fraction` of each shard set by its name."""
        self.file, self.limits = folder / "bad_shards.jsonl", limits
        self.totals = {name: Counter() for name in limits}
        self.first: dict[str, str] = {}
        self._new: list[tuple] = []
        self._logged = 0

    @property
    def count(self) -> int:
        """Bad samples and shards met so far, in all sets."""
        return sum(map(self._any_bad, self.totals))

    def _any_bad(self, name: str) -> int:
        return self.bad(name, "samples") + self.bad(name, "shards")

    def bad(self, name: str, kind: str) -> int:
        """kind: samples, or shards (missing, cut short, broken)."""
        return sum(n for key, n in self.totals[name].items() if key.startswith(f"{kind}: "))

    def resume_at(self, step: int):
        """Drop rows after `step`: what they counted will be met again (0: all, of an earlier run in this folder)."""
        if distributed.is_main():
            drop_rows_after(self.file, step)

    def load(self, totals: dict[str, dict]):
        """Go on with the totals of a checkpoint."""
        self.totals |= {name: Counter(totals[name]) for name in self.limits if name in totals}
        self._logged = self.count

    def add(self, name: str, tally):
        """What one batch of this rank met of the set `name` (datasets.shards.stream.Tally)."""
        self._new.append((name, tally.opened, tally.met, [tuple(bad) for bad in tally.bad.values()]))

    def share(self, step: int):
        """Logs only when the count has doubled."""
        if not self.limits:
            return
        fresh: dict[tuple, list] = {}
        for name, opened, met, found in distributed.gather_lists(self._new):
            self.totals[name].update({"opened": opened, "met": met})
            for shard, whole, reason, first, count in found:
                kind = f"{'shards' if whole else 'samples'}: {reason}"
                self.totals[name][kind] += count
                self.first.setdefault(name, first)
                fresh.setdefault((name, shard, kind), [0, first])[0] += count
        self._new = []
        if fresh and distributed.is_main():
            keys = ("step", "data_set", "shard", "what", "count", "first")
            _append(self.file, (dict(zip(keys, (step, *key, *value), strict=True)) for key, value in fresh.items()))
        if self.count >= max(1, 2 * self._logged):
            self._logged = self.count
            for name in filter(self._any_bad, self.totals) if distributed.is_main() else ():
                logging.warning("%s; they are named by shard in %s", self.summary(name), self.file)

    def summary(self, name: str) -> str:
        """One line: how many of how many, the commonest reasons."""
        totals = self.totals[name]
        bad = Counter({key: n for key, n in totals.items() if ": " in key})
        most = ", ".join(f"{key} ({n})" for key, n in bad.most_common(3))
        return (
            f"{name}: {self.bad(name, 'samples')} of {totals['met']} samples and {self.bad(name, 'shards')} of "
            f"{totals['opened']} shards met so far cannot be used" + (f": {most}" if most else "")
        )

    def check(self):
        for name, limit in self.limits.items():
            totals = self.totals[name]
            samples, shards = max(totals["met"], LEAST_SAMPLES), max(totals["opened"], LEAST_SHARDS)
            if self.bad(name, "samples") > limit * samples or self.bad(name, "shards") > limit * shards:
                example = f", such as {self.first[name]}" if name in self.first else ""
                raise TooManyBadImages(
                    f"{self.summary(name)}{example}. That is more than max_bad_fraction={limit:g} allows. "
                    f"{_fix(self.file, name, 'by shard')}"
                )


def _append(file: Path, rows: Iterable[dict]):
    with open(file, "a", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def _fix(file: Path, name: str = "NAME", how: str = "") -> str:
    """What a user can do about too many of them."""
    named = f"{how} in" if how else "in"
    return f"Fix or remove them (all are named {named} {file}), or raise datasets.{name}.max_bad_fraction"
