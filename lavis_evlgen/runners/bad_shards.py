"""What shards hold that cannot be used: counted by shard and reason, fatal above `max_bad_fraction`.

A set of a hundred million samples may hold a million bad ones, which come again in every epoch. So they are counted
as they are met, not listed: memory holds the totals by reason, bad_shards.jsonl one row for each shard and reason.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

from lavis_evlgen import distributed
from lavis_evlgen.reporting.json_lines import drop_rows_after
from lavis_evlgen.runners.bad_images import TooManyBadImages

# shares are of at least this many: one bad sample among the first ten is not yet a tenth of the set
LEAST_SAMPLES, LEAST_SHARDS = 1000, 100


class BadShards:
    """Totals of a run over all ranks, after `share()`; `totals` {data set: Counter} is what a checkpoint holds."""

    def __init__(self, folder: Path, limits: dict[str, float]):
        """limits: `max_bad_fraction` of each shard set by its name."""
        self.file, self.limits = folder / "bad_shards.jsonl", limits
        self.totals = {name: Counter() for name in limits}
        self.first: dict[str, str] = {}
        self._new: list[tuple] = []
        self._said = 0

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
        drop_rows_after(self.file, step)

    def load(self, totals: dict[str, dict]):
        """Go on with the totals of a checkpoint."""
        self.totals |= {name: Counter(totals[name]) for name in self.limits if name in totals}
        self._said = self.count

    def add(self, name: str, tally):
        """What one batch of this rank met; cheap, no communication."""
        self._new.append((name, tally.opened, tally.met, [tuple(bad) for bad in tally.bad.values()]))

    def share(self, step: int):
        """Sum up over ranks, write the new ones down and say so when they have doubled; every rank calls it."""
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
            with open(self.file, "a", encoding="utf-8") as file:
                for (name, shard, kind), (count, first) in fresh.items():
                    row = {"step": step, "data_set": name, "shard": shard, "what": kind, "count": count, "first": first}
                    file.write(json.dumps(row) + "\n")
        if self.count >= max(1, 2 * self._said):
            self._said = self.count
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
        """Raises TooManyBadImages above a set's limit; alike on every rank after `share()`."""
        for name, limit in self.limits.items():
            totals = self.totals[name]
            samples, shards = max(totals["met"], LEAST_SAMPLES), max(totals["opened"], LEAST_SHARDS)
            if self.bad(name, "samples") > limit * samples or self.bad(name, "shards") > limit * shards:
                example = f", such as {self.first[name]}" if name in self.first else ""
                raise TooManyBadImages(
                    f"{self.summary(name)}{example}. That is more than max_bad_fraction={limit:g} allows; mend them "
                    f"(they are named by shard in {self.file}), or raise datasets.{name}.max_bad_fraction"
                )
