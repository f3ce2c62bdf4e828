"""What LAVIS 1.0.2 imports from transformers, and transformers 5 has no longer: written anew, with the same results.

LAVIS calls these only in `prune_heads` of its BERTs and in `parallelize` of its T5, which nothing here uses; but
without the names `import lavis` fails.
"""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor


def find_pruneable_heads_and_indices(
    heads: Sequence[int], n_heads: int, head_size: int, already_pruned_heads: set[int]
) -> tuple[set[int], Tensor]:
    """(heads still to be pruned, indices (n,) of the weights' rows that stay).

    heads count as in the whole layer; the rows are those of the n_heads that are left after `already_pruned_heads`.
    """
    heads = set(heads) - already_pruned_heads
    stays = torch.ones(n_heads, head_size, dtype=torch.bool)
    for head in heads:
        stays[head - sum(pruned < head for pruned in already_pruned_heads)] = False
    return heads, stays.flatten().nonzero().flatten()


def get_device_map(n_layers: int, devices: Sequence) -> dict:
    """Device -> its share of the layers, in order."""
    share = ceil(n_layers / len(devices))
    return {device: list(range(n * share, min((n + 1) * share, n_layers))) for n, device in enumerate(devices)}


def assert_device_map(device_map: dict, num_blocks: int) -> None:
    """Raise ValueError unless every layer is on exactly one device."""
    layers = sorted(layer for on_device in device_map.values() for layer in on_device)
    if layers != list(range(num_blocks)):
        raise ValueError(f"device_map has the layers {layers}; each of 0 to {num_blocks - 1} has to be there once")
