"""Merging that leaves each picture its own number of tokens: how many pairs merge in a layer is decided by how similar
they are, not by a schedule. Rows are as wide as the picture that may keep most; the end of a shorter one is padding.

docs/merging.md has the formula. After Wang et al. 2025, "DyMU", whose thresholds are found and used in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lavis_evlgen.nn.merging import MergeMap, _partition, max_merges, merge_schedule, tokens_after

KEYS = ("average", "least", "most")  # of tome_r
# thresholds outside of what a cosine can be: all pairs that may merge do; none does; nothing was learnt yet (none does)
ALL, NONE, UNSET = -2.0, 2.0, 3.0
MOMENTUM = 0.1  # of the moving average, as BatchNorm's: keys move on as the connector learns
# share of a layer's possible merges that the mean picture makes at most: where it were all of them, thresholds had
# nothing to decide, and pictures that are above the average could not come back to it
USED = 0.9


def alive(left: Tensor, tokens: int) -> Tensor:
    """left (B,): tokens of each row -> (B, tokens) bool, true for those; what follows is padding."""
    return torch.arange(tokens, device=left.device) < left.unsqueeze(1)


class Limits(NamedTuple):
    """Tokens in front of the first layer, and after each: in the mean of a batch, and the fewest and most of a picture.
    """

    average: tuple[int, ...]
    least: tuple[int, ...]
    most: tuple[int, ...]

    def merges(self, layer: int) -> int:
        """The most pairs that may merge in a layer."""
        return self.most[layer] - self.least[layer + 1]

    @property
    def differ(self) -> bool:
        """Whether pictures may differ in how many tokens they end with."""
        return self.least[-1] < self.most[-1]


def limits_of(spec, num_layers: int, tokens: int, protected: int = 1) -> Limits | None:
    """The limits that `tome_r: {average, least, most}` sets; None for any other tome_r.

    After each layer a picture has at least the tokens that `{target: least}` leaves there, and at most those of
    `{target: most}`; the average is planned in the same way, but that no layer but the first merges more than USED of
    what it could, where so many layers reach it like that. Raises ValueError for numbers that are in no order or that
    the layers cannot reach.
    """
    if not isinstance(spec, Mapping) or not set(spec) & set(KEYS):
        return None
    if set(spec) != set(KEYS):
        raise ValueError(f"tome_r: keys {sorted(spec)}; give all of {{average, least, most}}, and no others")
    average, least, most = (int(spec[key]) for key in KEYS)
    if not least <= average <= most:
        raise ValueError(f"tome_r: least {least}, average {average}, most {most}; give least <= average <= most")
    left = []
    for key in KEYS:
        try:
            schedule = merge_schedule({"target": int(spec[key])}, num_layers, tokens, protected)
        except ValueError as error:
            raise ValueError(f"tome_r: {key}: {str(error).removeprefix('tome_r: ')}") from None
        left.append(tuple(tokens_after(tokens, schedule[:n], protected) for n in range(num_layers + 1)))
    even, fewest, longest = left
    planned = _average(average, num_layers, tokens, protected) or even
    within = (min(max(n, least), most) for n, least, most in zip(planned, fewest, longest, strict=True))
    return Limits(tuple(within), fewest, longest)


def _average(target: int, num_layers: int, tokens: int, protected: int) -> tuple[int, ...] | None:
    """Tokens of the mean picture in front of the layers and after each, as even as can be; None where USED is in the
    way."""
    bound = [float(target)] * num_layers  # after each layer, the most from which the target is still in reach
    for layer in range(num_layers - 2, -1, -1):
        bound[layer] = (bound[layer + 1] - USED / 2 * protected) / (1 - USED / 2)
    left = [tokens]
    for layer in range(num_layers):
        wanted = max((left[-1] - bound[j]) / (j - layer + 1) for j in range(layer, num_layers))
        left.append(max(round(left[-1] - max(wanted, 0)), left[-1] - max_merges(left[-1], protected)))
    return tuple(left) if left[-1] == target else None


@dataclass(frozen=True)
class RaggedMap(MergeMap):
    """A merge in which the first `given` (B,) of the T tokens are real and the rest padding, as the first `left` (B,)
    of the slots are. Padding stands for no patch: it has size 0, and its mean is 0."""

    given: Tensor
    left: Tensor

    @staticmethod
    def identity(batch: int, tokens: int, device=None) -> RaggedMap:
        whole = MergeMap.identity(batch, tokens, device)
        count = torch.full((batch,), tokens, device=device)
        return RaggedMap(whole.slot, tokens, count, count)

    def alive(self) -> Tensor:
        """(B, T') bool: which slots are real."""
        return alive(self.left, self.num_slots)

    def sizes(self, sizes: Tensor | None = None) -> Tensor:
        own = alive(self.given, self.slot.shape[1]).float() if sizes is None else sizes
        return super().sizes(own)

    def merge(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        own = alive(self.given, self.slot.shape[1]).float() if sizes is None else sizes  # (B, T)
        x = x * own.unsqueeze(-1).to(x.dtype)
        sums = self.sums_by_index(x) if x.device.type == "cpu" else self.sums_by_product(x)
        weight = self.sizes(own)  # (B, T')
        return sums / weight.masked_fill(weight == 0, 1).unsqueeze(-1).to(x.dtype)

    def then(self, following: RaggedMap) -> RaggedMap:
        return RaggedMap(super().then(following).slot, following.num_slots, self.given, following.left)


class Pairs:
    """What may merge in one layer: keys (B, T, C), of which the first `left` (B,) are real -> each token of the set A
    with its most similar token of B, as `match` has them.

    strength (B, A): cosines, -inf for padding and for protected tokens; fewest, most (B,): pairs of a row that have to
    merge, and that may, to stay within the limits.
    """

    @torch.no_grad()
    def __init__(self, keys: Tensor, left: Tensor, protected: int, least: int, widest: int):
        """least, widest: tokens that a row has after this layer, at least and at most."""
        self.left, self.widest, self.tokens = left, widest, keys.shape[1]
        real = alive(left, self.tokens)
        self.set_a, self.set_b = _partition(self.tokens, protected, "alternate", keys.device, None)
        with torch.autocast(keys.device.type, enabled=False):
            unit = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
            similarity = unit[:, self.set_a] @ unit[:, self.set_b].transpose(1, 2)  # (B, A, B)
        similarity[:, :protected] = float("-inf")
        both = real[:, self.set_a].unsqueeze(2) & real[:, self.set_b].unsqueeze(1)
        self.strength, self.partner = similarity.masked_fill_(~both, float("-inf")).max(dim=-1)  # (B, A)
        self.rank = self.strength.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0: the row's strongest
        self.fewest = (left - widest).clamp_min(0)
        self.most = torch.minimum(left - least, (left - protected) // 2)

    def free(self) -> Tensor:
        """(B, A + 2): strengths of the pairs that may merge and need not, -inf elsewhere; then fewest and left."""
        is_free = (self.rank >= self.fewest.unsqueeze(1)) & (self.rank < self.most.unsqueeze(1))
        counts = torch.stack([self.fewest, self.left], 1).to(self.strength.dtype)
        return torch.cat([self.strength.masked_fill(~is_free, float("-inf")), counts], 1)

    def merged(self, threshold: Tensor) -> RaggedMap:
        """Each row merges its pairs at least as strong as `threshold` (), within its limits; nothing of the other rows
        has a part in it. Order afterwards: unmerged A in their old order, then B, then padding."""
        batch, device = len(self.left), self.left.device
        r = (self.strength >= threshold).sum(1).clamp(self.fewest, self.most)  # (B,)
        is_merged = self.rank < r.unsqueeze(1)
        real = alive(self.left, self.tokens)
        in_a = real[:, self.set_a] & ~is_merged
        kept = in_a.sum(1, keepdim=True)  # (B, 1)
        slot_a = torch.where(is_merged, kept + self.partner, in_a.long().cumsum(1) - 1)
        slot = torch.empty(batch, self.tokens, dtype=torch.long, device=device)
        slot[:, self.set_a] = slot_a
        slot[:, self.set_b] = kept + torch.arange(len(self.set_b), device=device)
        # as `match`: where nothing merges, nothing moves
        slot = torch.where(r.unsqueeze(1) > 0, slot, torch.arange(self.tokens, device=device))
        slot = slot.masked_fill(~real, self.widest - 1)  # wherever: padding has no weight
        return RaggedMap(slot, self.widest, self.left, self.left - r)


@torch.no_grad()
def cut(pairs: Sequence[Pairs], average: int) -> Tensor:
    """The threshold () with which the rows of all `pairs`, on all ranks, have `average` tokens each in the mean.

    The strength of the weakest of the pairs that then merge; ALL or NONE where the limits decide alone; NaN where a
    key is. Every rank calls it, with as many rows.
    """
    rows = _of_all_ranks(torch.cat([one.free() for one in pairs]))  # (N, A + 2)
    strongest = rows[:, :-2].flatten().sort(descending=True).values
    wanted = (rows[:, -1].sum() - len(rows) * average - rows[:, -2].sum()).round().long()
    possible = strongest.isfinite().sum()
    at = (wanted - 1).clamp(0, len(strongest) - 1)
    found = strongest.gather(0, at.unsqueeze(0)).squeeze(0)
    found = found.masked_fill(wanted >= possible, ALL).masked_fill(wanted <= 0, NONE)
    return found.masked_fill(rows.isnan().any(), float("nan"))


def _of_all_ranks(rows: Tensor) -> Tensor:
    """rows (B, C) of each rank, as many on all -> (W B, C)."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class RaggedPass:
    """One pass of a batch through the layers. `left` (B,): tokens that each row still has; `layer`: which is next.

    In training the strongest pairs of the batch merge, on all ranks together, as many as leave the limits' average; the
    thresholds (layers,), changed in place, follow where the cut was. In evaluation they say what merges.
    """

    def __init__(self, limits: Limits, thresholds: Tensor, protected: int, batch: int, training: bool):
        self.limits, self.thresholds, self.protected, self.training = limits, thresholds, protected, training
        self.left = torch.full((batch,), limits.most[0], device=thresholds.device)
        self.layer = 0

    def key_bias(self) -> Tensor | None:
        """(B, T): what attention adds to logits, 0, and -inf for padding; None where no row can have any."""
        tokens = self.limits.most[self.layer]
        if self.limits.least[self.layer] == tokens:
            return None
        padding = ~alive(self.left, tokens)
        return torch.zeros(padding.shape, device=padding.device).masked_fill_(padding, float("-inf"))

    def pairs(self, keys: Tensor) -> Pairs:
        limits, after = self.limits, self.layer + 1
        return Pairs(keys, self.left, self.protected, limits.least[after], limits.most[after])

    @torch.no_grad()
    def match(self, keys: Tensor) -> RaggedMap:
        """keys (B, T, C) of the layer -> where its tokens go; `left` is then what is left of them."""
        pairs = self.pairs(keys)
        if self.training:
            threshold = cut([pairs], self.limits.average[self.layer + 1])
            self._follow(threshold)
        else:
            threshold = self.thresholds[self.layer]
        step = pairs.merged(threshold)
        self.left = step.left
        return step

    def _follow(self, threshold: Tensor):
        before = self.thresholds[self.layer]
        now = torch.where(before == UNSET, threshold, before.lerp(threshold.to(before.dtype), MOMENTUM))
        # of keys that are not finite nothing is learnt
        self.thresholds[self.layer] = torch.where(now.isfinite(), now, before)
