"""Data order as a pure function of (seed, position): no state to save, no epoch to replay.

Training reads an endless stream of samples: one permutation an epoch, joined end to end. Micro-step m of a run on
W ranks with B samples each takes the stream's samples [m*W*B, (m+1)*W*B); rank r gets the r-th B of them. So two
ranks see what one rank with twice the batch sees, and a resumed run goes on at the same sample.

Tar shards cannot be read in any order: each (rank, worker) has a stream of its own, whose position is saved
(shards/stream.py). Which data set a micro-step draws, and which worker's stream, is a function of (seed, m) there too.

With several texts a picture (packing.py), what is said of samples and rows holds of groups.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from lavis_evlgen.datasets.base import ReadableRows
from lavis_evlgen.datasets.packing import TextGroups
from lavis_evlgen.datasets.seeding import EpochOrder, generators_kept, mix, seed_all
from lavis_evlgen.datasets.shards.dataset import ImageShards
from lavis_evlgen.datasets.shards.stream import START, ShardStream, StreamPosition


class FromShards(NamedTuple):
    """A micro-step's worth of samples of a shard set, from one worker's stream."""

    data_set: int
    worker: int
    count: int


class MixtureBatches(Sampler):
    """Batches of (data set, epoch, row) for one rank, from micro-step `start` on, without end.

    With several data sets, each micro-step draws one of them by `ratios`: the same on every rank, or with `per_rank`
    each rank one of its own, so that W ranks draw in micro-step m what one rank draws in the W micro-steps from m * W
    on. A set of size None is one of shards: its batch is one FromShards, of the stream of worker m mod `workers`.
    """

    def __init__(self, sizes, ratios, batch_size: int, seed: int, rank: int, world: int, start: int = 0,
                 workers: int = 1, per_rank: bool = False):
        self.streams = [size and EpochOrder(size, mix(seed, k)) for k, size in enumerate(sizes)]
        self.workers = workers
        # draws of a micro-step, and which of them is this rank's; ranks that share a draw split its samples
        self.draws, self.draw = (world, rank) if per_rank else (1, 0)
        self.share, self.sharing = (0, 1) if per_rank else (rank, world)
        self.edges = np.cumsum(np.asarray(ratios, dtype=np.float64)) / float(sum(ratios))
        self.batch_size, self.seed, self.start = batch_size, seed, start

    def choices(self, start: int, count: int) -> np.ndarray:
        """The data set of each of `count` draws from number `start` on."""
        if len(self.streams) == 1:
            return np.zeros(count, dtype=np.int64)
        draws = np.random.Generator(np.random.Philox(key=mix(self.seed, 7), counter=start // 4))
        values = draws.random(count + start % 4)[start % 4 :]  # Philox yields four values a counter
        return np.minimum(np.searchsorted(self.edges, values, side="right"), len(self.streams) - 1)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        before = self.choices(0, self.start * self.draws)
        had = np.bincount(before, minlength=len(self.streams)).tolist()  # draws of each set so far
        m = self.start
        while True:
            drawn = self.choices(m * self.draws, self.draws).tolist()  # of this micro-step, on all ranks
            k = drawn[self.draw]
            if self.streams[k] is None:
                yield [FromShards(k, m % self.workers, self.batch_size)]
            else:
                turn = had[k] + drawn[: self.draw].count(k)
                first = (turn * self.sharing + self.share) * self.batch_size
                yield [(k, *self.streams[k][first + j]) for j in range(self.batch_size)]
            for one in drawn:
                had[one] += 1
            m += 1


class Mixture(Dataset):
    """(data set, epoch, row) -> (data set, sample); augmentation depends on the key, not on worker or rank.

    FromShards -> (data set, (samples, tally)), of the stream that this process reads on from call to call: one worker
    process is asked for one worker number only, in order.
    """

    def __init__(self, datasets: list[Dataset], seed: int, streams=None):
        """streams: makes the stream of (data set, worker), where there are shard sets."""
        self.datasets, self.seed, self._streams = datasets, seed, streams
        self._open: dict[int, ShardStream] = {}
        self._worker = None

    def __getitem__(self, key) -> tuple:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list) -> list[tuple]:
        with generators_kept():  # once a batch: numpy's take longer to keep than to seed
            return [self._item(key) for key in keys]

    def _item(self, key) -> tuple:
        if isinstance(key, FromShards):
            return key.data_set, self._stream(key).take(key.count)
        k, epoch, row = key
        grouped = isinstance(self.datasets[k], TextGroups)
        dataset = self.datasets[k].dataset if grouped else self.datasets[k]
        if isinstance(dataset, ReadableRows):
            dataset.epoch = epoch
        seed_all(mix(self.seed, k, epoch, row))
        return k, self.datasets[k][(epoch, row) if grouped else row]

    def _stream(self, key: FromShards) -> ShardStream:
        if self._worker not in (None, key.worker):  # samples would be lost and repeated
            raise RuntimeError(f"a data worker reads stream {self._worker}, but was asked for stream {key.worker}")
        self._worker = key.worker
        if key.data_set not in self._open:
            self._open[key.data_set] = self._streams(key.data_set, key.worker)
        return self._open[key.data_set]

    def collater(self, samples: list[tuple]) -> dict:
        """One micro-step is of one data set, whose own collater is called: LAVIS's sets have their own.

        A batch from shards says under "shards" (data set, Tally) what it used up.
        """
        k, first = samples[0]
        if not isinstance(self.datasets[k], ImageShards):
            return self.datasets[k].collater([sample for _, sample in samples])
        samples, tally = first
        return {**self.datasets[k].collater(samples), "shards": (k, tally)}


_EXITING = multiprocessing.RawValue("b", 0)  # 1 once the main process is on its way out
atexit.register(setattr, _EXITING, "value", 1)


def _prepare_worker(exiting, _worker: int):
    """One thread each, and no end at SIGTERM before the main process: schedulers and torch's launcher send it to the
    whole process group, and the main process still has a checkpoint to write."""
    torch.set_num_threads(1)
    # at exit with 0: torch raises an alarm in the main process at anything else
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if exiting.value else None)
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends these to the whole process group too
        signal.signal(number, signal.SIG_IGN)


def _shard_stream(datasets, seed, rank, world, workers, positions, texts, k: int, worker: int) -> ShardStream:
    position = positions.get((k, worker), START)
    return ShardStream(datasets[k], mix(seed, k), rank * workers + worker, world * workers, position, texts)


def train_loader(datasets, ratios, batch_size, seed, rank, world, start, num_workers, pin_memory,
                 positions: dict[tuple[int, int], StreamPosition] | None = None, per_rank: bool = False,
                 texts_per_image: int = 1) -> DataLoader:
    """Endless loader over `datasets` from micro-step `start` on. ratios: shares of micro-steps (None: by size).

    positions: of the streams of (shard set, worker) of this rank; a stream without one starts at its beginning.
    per_rank: each rank draws a data set of its own in every micro-step. texts_per_image: above 1, samples are of up to
    so many texts of a picture (all data sets are then ReadableRows or ImageShards), and `batch_size` counts pictures.
    """
    datasets = list(datasets)
    if texts_per_image > 1:
        datasets = [
            d if isinstance(d, ImageShards) else TextGroups(d, texts_per_image, mix(seed, k))
            for k, d in enumerate(datasets)
        ]
    sizes = [None if isinstance(d, ImageShards) else len(d) for d in datasets]
    ratios = ratios or (sizes if len(sizes) > 1 else [1])
    workers = max(1, num_workers)
    batches = MixtureBatches(sizes, ratios, batch_size, seed, rank, world, start, workers, per_rank)

    streams = partial(_shard_stream, datasets, seed, rank, world, workers, positions or {}, texts_per_image)
    mixture = Mixture(datasets, seed, streams)
    return DataLoader(
        mixture,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=mixture.collater,
        pin_memory=pin_memory,
        worker_init_fn=partial(_prepare_worker, _EXITING),
        generator=torch.Generator(),  # else every loader draws from the generator of dropout
        prefetch_factor=4 if num_workers else None,
    )


def eval_loader(dataset, batch_size, rank, world, num_workers, pin_memory, part: slice = slice(None)) -> DataLoader:
    """Every row exactly once over all ranks: rank r reads rows r, r + W, ... in order, or a `part` of them."""
    rows = Subset(dataset, range(rank, len(dataset), world)[part])
    return DataLoader(
        rows,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=getattr(dataset, "collater", None),
        pin_memory=pin_memory,
        worker_init_fn=partial(_prepare_worker, _EXITING),
        generator=torch.Generator(),  # else every loader draws from the generator of dropout
    )


