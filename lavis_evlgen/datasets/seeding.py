"""Numbers drawn as functions of integers, alike on every machine: seeds, scopes of seeded drawing, permutations."""

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


_ROUNDS = 6  # four are known to be enough for large halves; small ones want a little more


def permuted(index: int, size: int, key: int) -> int:
    """Where a permutation of range(size), drawn by `key`, sends `index`: in constant memory, whatever the size.

    A Feistel network over the next even number of bits, walked until it lands inside (at most four tries on average;
    M. Luby and C. Rackoff, 1988; J. Black and P. Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    if not 0 <= index < size:
        raise IndexError(f"{index} is not in range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for n in range(_ROUNDS):
            left, right = right, left ^ (mix(key, n, right) & mask)
        index = left << half | right
        if index < size:
            return index


def shuffled(items: list, seed: int) -> Iterator:
    """`items` in an order drawn by `seed`."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return (items[n] for n in order.tolist())
