"""The endless stream of samples of one (rank, worker) over a set of shards, and its position.

All streams share one endless sequence of shards (seeding.EpochOrder). Of T streams, stream t reads shards t, t + T,
t + 2T, ... of it, so that every shard is read once in an epoch, by one stream. A stream that starts at a
`StreamPosition` opens no shard that is done, and skips what is done of the current one by its headers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from lavis_evlgen.datasets.seeding import EpochOrder, mix, seed_all, shuffled
from lavis_evlgen.datasets.shards.reader import ShardItem, read_shard
from lavis_evlgen.media.errors import DataError, UnreadableImage
from lavis_evlgen.media.file_checks import Unreadable

# a stream gives up after this many in a row without one usable sample: something is wrong with the whole set
MOST_SHARDS, MOST_ITEMS = 64, 10_000


SHARD_ORDER = 2  # version of the order of shards and samples, in checkpoints; a position in another means other samples


class StreamPosition(NamedTuple):
    """How many shards a stream has done, and how many items (usable or not) of the current one."""

    shards: int = 0
    items: int = 0


START = StreamPosition()


class Bad(NamedTuple):
    """Something that could not be used: which shard, of the shard itself (`whole`) or of one sample, and why."""

    shard: str
    whole: bool
    reason: str  # the same text for the same kind of problem, so that it can be counted
    first: str  # the first such thing, in full
    count: int = 1


@dataclass
class Tally:
    """How far one batch has moved its stream, and what it met on the way."""

    stream: int
    position: StreamPosition = START  # of its stream after this batch
    opened: int = 0  # shards begun
    met: int = 0  # samples, usable or not
    bad: dict[tuple, Bad] = field(default_factory=dict)

    def add(self, shard: str, whole: bool, name: str, reason: str):
        kind = reason.partition(" (")[0]
        known = self.bad.get((shard, whole, kind)) or Bad(shard, whole, kind, f"{name}: {reason}", 0)
        self.bad[shard, whole, kind] = known._replace(count=known.count + 1)


class ShardStream:
    """Stream `stream` of `streams` over `dataset` (see ImageShards), from `position` on; up to `texts` captions of each
    picture."""

    def __init__(
        self, dataset, seed: int, stream: int, streams: int, position: StreamPosition = START, texts: int = 1
    ):
        self.dataset, self.seed, self.stream, self.streams, self.texts = dataset, seed, stream, streams, texts
        self.position = position
        self._order = EpochOrder(len(dataset.shards), seed)
        self._items = self._read(position)
        self._opened = 0

    def shard(self, number: int) -> tuple[int, int]:
        """(epoch, index of the shard) of this stream's shard `number`."""
        return self._order[self.stream + number * self.streams]

    def take(self, count: int) -> tuple[list[dict], Tally]:
        """The next `count` samples, and what was met on the way. Raises DataError when nothing can be used.

        Python, numpy and torch are seeded for each sample and left so.
        """
        samples, tally, unusable = [], Tally(self.stream), 0
        last = self.position.shards  # the last shard that gave a sample
        while len(samples) < count:
            self.position, epoch, index, item = next(self._items)
            if unusable >= MOST_ITEMS or self.position.shards - last > MOST_SHARDS:
                raise self._nothing_usable(tally, unusable)
            try:
                seed_all(mix(self.seed, epoch, index, item.index))
                samples.append(self._sample(tally, index, item))
                last, unusable = self.position.shards, 0
            except Unreadable as error:
                unusable += 1
                whole = item.problem is not None
                tally.add(self.dataset.shards[index], whole, error.path, error.reason)
        tally.position, tally.opened, self._opened = self.position, self._opened, 0
        return samples, tally

    def _sample(self, tally: Tally, index: int, item: ShardItem) -> dict:
        if item.problem is not None:
            raise UnreadableImage(self.dataset.shards[index], item.problem)
        tally.met += 1
        return self.dataset.sample(index, item, self.texts)

    def _nothing_usable(self, tally: Tally, unusable: int) -> DataError:
        worst = max(tally.bad.values(), key=lambda bad: bad.count)
        reasons = Counter()
        for bad in tally.bad.values():
            reasons[bad.reason] += bad.count
        return DataError(
            f"{self.dataset.name}: {unusable} samples or shards in a row cannot be used, mostly for one reason: "
            f"{reasons.most_common(1)[0][0]}; such as {worst.first}"
        )

    def _read(self, position: StreamPosition) -> Iterator[tuple[StreamPosition, int, int, ShardItem]]:
        """(position after it, epoch, shard, item) of every item from `position` on, without end."""
        number, done = position
        while True:
            epoch, index = self.shard(number)
            self._opened += done == 0
            for n, item in self._in_blocks(epoch, index, done):
                yield StreamPosition(number, n + 1), epoch, index, item
            number, done = number + 1, 0

    def _in_blocks(self, epoch: int, index: int, done: int) -> Iterator[tuple[int, ShardItem]]:
        """Items of one shard from position `done` on, each block of `shuffle_window` of them shuffled."""
        window = self.dataset.shuffle_window
        first = done - done % window  # of the block that `done` lies in, which is read again
        block: list[ShardItem] = []
        for item in read_shard(self.dataset.shards[index], first, self.dataset.extensions):
            block.append(item)
            if len(block) == window:
                yield from self._shuffled(block, epoch, index, first, done)
                first, block = first + window, []
        yield from self._shuffled(block, epoch, index, first, done)

    def _shuffled(self, block: list[ShardItem], epoch: int, index: int, first: int, done: int):
        order = shuffled(block, mix(self.seed, epoch, index, first, 1))
        return ((first + n, item) for n, item in enumerate(order) if first + n >= done)
