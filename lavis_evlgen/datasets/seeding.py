"""Random numbers as functions of integers, the same on every machine: seeds, seeded scopes, permutations."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mix(*numbers: int) -> int:
    """One 63-bit seed from several integers (splitmix64), alike on every machine."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def seed_all(seed: int):
    """Python, numpy and torch (CPU) draw from `seed` from here on."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA's dropout too, and is slow


@contextmanager
def generators_kept():
    """Python, numpy and torch (CPU) go on afterwards as they would have before, whatever was drawn inside."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class EpochOrder:
    """An endless sequence over `size` items, each once an epoch, in a new order each time: a function of the seed."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._epoch, self._order = -1, None

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(epoch, item) at `position` of the sequence."""
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator)
        return epoch, int(self._order[offset])


def shuffled(items: list, seed: int) -> Iterator:
    """`items` in an order drawn by `seed`."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return (items[n] for n in order.tolist())
