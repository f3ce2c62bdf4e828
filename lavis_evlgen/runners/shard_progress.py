"""How far a run has come in its shard sets: the position of every stream, for checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets import ImageShards
from lavis_evlgen.datasets.shards.stream import SHARD_ORDER, StreamPosition
from lavis_evlgen.runners.skipped_samples import SkippedInShards


class ShardProgress:
    """Follows the batches of one rank, where there are shard sets.

    Only batches that training has taken count: what workers have read ahead is read again after a resume.
    """

    def __init__(self, data: dict, num_workers: int, skipped: SkippedInShards):
        """data: {name: training set}, in the order in which the loader has them."""
        self.sets = {k: (name, d) for k, (name, d) in enumerate(data.items()) if isinstance(d, ImageShards)}
        self.workers, self.skipped = max(1, num_workers), skipped
        self.positions: dict[tuple[int, int], StreamPosition] = {}  # of (set, worker) of this rank

    def follow(self, batches: Iterable[dict]) -> Iterator[dict]:
        """The same batches, without what they say about shards."""
        for batch in batches:
            if "shards" in batch:
                k, tally = batch.pop("shards")
                self.positions[k, tally.stream % self.workers] = tally.position
                self.skipped.add(self.sets[k][0], tally)
            yield batch

    def state(self, step: int) -> dict | None:
        """For a checkpoint, of all ranks; every rank calls it."""
        if not self.sets:
            return None
        self.skipped.share(step)
        first = distributed.rank() * self.workers
        rows = distributed.gather_lists([(k, first + w, *position) for (k, w), position in self.positions.items()])
        sets = {name: {"shards": len(d.shards), "places": {}} for name, d in self.sets.values()}
        for k, stream, shards, items in rows:
            sets[self.sets[k][0]]["places"][stream] = [shards, items]
        for name, totals in self.skipped.totals.items():
            sets[name]["totals"] = dict(totals)
        return {"ranks": distributed.world_size(), "workers": self.workers, "order": SHARD_ORDER, "sets": sets}

    def load(self, saved: dict | None, path):
        """Go on from the `state` in the checkpoint `path`. Raises ConfigError where a position would be lost."""
        sets = (saved or {}).get("sets", {})
        known = {k: (name, d) for k, (name, d) in self.sets.items() if name in sets}
        if known:
            self._check(saved, known, path)
        for k, (name, _) in self.sets.items():
            if k not in known:
                logging.warning("%s holds no position in %s: it is read from its beginning", path, name)
                continue
            for w in range(self.workers):
                position = sets[name]["places"].get(distributed.rank() * self.workers + w)
                if position:
                    self.positions[k, w] = StreamPosition(*position)
        self.skipped.load({name: sets[name]["totals"] for name, _ in known.values()})

    def _check(self, saved: dict, known: dict, path):
        new_run = f"or start a new run from these weights with model.pretrained={path}"
        then, now = (saved["ranks"], saved["workers"]), (distributed.world_size(), self.workers)
        if then != now:
            raise ConfigError(
                f"{path} was trained by {then[0]} ranks with {then[1]} data workers each, this run has {now[0]} with "
                f"{now[1]}: every worker has its own position in the shards of "
                f"{', '.join(name for name, _ in known.values())}, and it would be lost. Keep the number of ranks and "
                f"run.num_workers={then[1]}, {new_run}"
            )
        if saved.get("order") != SHARD_ORDER:
            raise ConfigError(
                f"{path} was trained when shards were read in another order, and its position in the shards of "
                f"{', '.join(name for name, _ in known.values())} means nothing in this one: finish that run with the "
                f"version it was started with, {new_run}"
            )
        for name, d in known.values():
            if saved["sets"][name]["shards"] != len(d.shards):
                raise ConfigError(
                    f"{path} was trained on {saved['sets'][name]['shards']} shards of {name}, now there are "
                    f"{len(d.shards)}, and its position in them would be lost: fix datasets.{name}.shards, {new_run}"
                )
