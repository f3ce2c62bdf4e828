"""Data order as a pure function of (seed, position): no state to save, no epoch to replay.

Training reads an endless stream of samples: one permutation an epoch, joined end to end. Micro-step m of a run on
W ranks with B samples each takes the stream's samples [m*W*B, (m+1)*W*B); rank r gets the r-th B of them. So two
ranks see what one rank with twice the batch sees, and a resumed run goes on at the same sample.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several integers (splitmix64), alike on every machine."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class EpochStream:
    """Sample `position` of the endless stream over one data set of `size` rows -> (epoch, row)."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._epoch, self._order = -1, None

    def __getitem__(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator)
        return epoch, int(self._order[offset])


class MixtureBatches(Sampler):
    """Batches of (data set, epoch, row) for one rank, from micro-step `start` on, without end.

    With several data sets, each micro-step draws one of them by `ratios`, the same on every rank.
    """

    def __init__(self, sizes, ratios, batch_size: int, seed: int, rank: int, world: int, start: int = 0):
        self.streams = [EpochStream(size, _mix(seed, k)) for k, size in enumerate(sizes)]
        self.edges = np.cumsum(np.asarray(ratios, dtype=np.float64)) / float(sum(ratios))
        self.batch_size, self.seed, self.rank, self.world, self.start = batch_size, seed, rank, world, start

    def choices(self, start: int, count: int) -> np.ndarray:
        """The data set of each of `count` micro-steps from `start` on."""
        if len(self.streams) == 1:
            return np.zeros(count, dtype=np.int64)
        draws = np.random.Generator(np.random.Philox(key=_mix(self.seed, 7), counter=start // 4))
        values = draws.random(count + start % 4)[start % 4 :]  # Philox yields four values a counter
        return np.minimum(np.searchsorted(self.edges, values, side="right"), len(self.streams) - 1)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        done = np.bincount(self.choices(0, self.start), minlength=len(self.streams)) if self.start else None
        steps = [0] * len(self.streams) if done is None else done.tolist()  # micro-steps each set has had
        m = self.start
        while True:
            k = int(self.choices(m, 1)[0])
            first = (steps[k] * self.world + self.rank) * self.batch_size
            yield [(k, *self.streams[k][first + j]) for j in range(self.batch_size)]
            steps[k] += 1
            m += 1


@contextmanager
def seeded(seed: int):
    """Python, numpy and torch (CPU) draw from `seed` inside, and go on as before afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Mixture(Dataset):
    """(data set, epoch, row) -> (data set, sample); augmentation depends on the key, not on worker or rank."""

    def __init__(self, datasets: list[Dataset], seed: int):
        self.datasets, self.seed = datasets, seed

    def __getitem__(self, key: tuple[int, int, int]) -> tuple:
        k, epoch, row = key
        with seeded(_mix(self.seed, k, epoch, row)):
            return k, self.datasets[k][row]

    def collater(self, samples: list[tuple]) -> dict:
        """One micro-step is of one data set, whose own collater is called: LAVIS's sets have their own."""
        return self.datasets[samples[0][0]].collater([sample for _, sample in samples])


_EXITING = multiprocessing.RawValue("b", 0)  # 1 once the main process is on its way out
atexit.register(setattr, _EXITING, "value", 1)


def _prepare_worker(exiting, _worker: int):
    """Workers leave the cores to the model, and outlive SIGTERM while the main process works: schedulers and torch's
    launcher send it to the whole process group, and the main process still has a checkpoint to write."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143) if exiting.value else None)


def train_loader(datasets, ratios, batch_size, seed, rank, world, start, num_workers, pin_memory) -> DataLoader:
    """Endless loader over `datasets` from micro-step `start` on. ratios: shares of micro-steps (None: by size)."""
    sizes = [len(d) for d in datasets]
    batches = MixtureBatches(sizes, ratios or sizes, batch_size, seed, rank, world, start)
    mixture = Mixture(list(datasets), seed)
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


