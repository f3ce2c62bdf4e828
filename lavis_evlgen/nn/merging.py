"""Token merging: match similar tokens, merge them, remember where each one went.

A merge of T tokens into T' is one integer map `slot (B, T) -> [0, T')`. Merged means, group sizes,
un-merging and the source map of a whole TomeFormer all follow from it (maps compose by indexing).
Mathematics: EVLGen, section 3.2 and appendix C; bipartite soft matching, Bolya et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MergeMap:
    """Where each of T tokens goes: `slot` (B, T) long, values in [0, num_slots)."""

    slot: Tensor
    num_slots: int

    @staticmethod
    def identity(batch: int, tokens: int, device=None) -> MergeMap:
        """The map that merges nothing: (B, T) -> T slots."""
        return MergeMap(torch.arange(tokens, device=device).expand(batch, tokens), tokens)

    def sizes(self, sizes: Tensor | None = None) -> Tensor:
        """Patches per slot, (B, T'); `sizes` (B, T) is how many each token stood for before (default 1)."""
        batch, tokens = self.slot.shape
        if sizes is None:
            sizes = torch.ones(batch, tokens, device=self.slot.device)
        return sizes.new_zeros(batch, self.num_slots).scatter_add_(1, self.slot, sizes)

    def merge(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Mean of the tokens in each slot: (B, T, D) -> (B, T', D), differentiable in `x`.

        `sizes=None` is the plain mean over the tokens at this layer (released EVLGen);
        `sizes` (B, T) weights each token by the number of patches it stands for.
        """
        if sizes is not None:
            x = x * sizes.unsqueeze(-1).to(x.dtype)
        sums = self.sums_by_index(x) if x.device.type == "cpu" else self.sums_by_product(x)
        return sums / self.sizes(sizes).unsqueeze(-1).to(x.dtype)  # (B, T', D)

    def sums_by_product(self, x: Tensor) -> Tensor:
        """Sum of the tokens in each slot, (B, T, D) -> (B, T', D), as a product with the 0/1 map.

        For GPUs: deterministic there, where a scatter is not, and it rounds once (0/1 is exact in bf16).
        """
        one_hot = F.one_hot(self.slot, self.num_slots).transpose(1, 2)  # (B, T', T)
        with torch.autocast(x.device.type, enabled=False):  # the sum keeps the precision of its tokens
            return one_hot.to(x.dtype) @ x

    def sums_by_index(self, x: Tensor) -> Tensor:
        """The same by adding row after row: for CPUs, where it is several times as fast (docs/performance.md).

        Half precision is added up in float32 and rounded once, as in the product.
        """
        batch, _, width = x.shape
        first = torch.arange(batch, device=x.device).unsqueeze(1) * self.num_slots  # (B, 1)
        rows, wide = (self.slot + first).flatten(), x.to(torch.promote_types(x.dtype, torch.float32))
        sums = wide.new_zeros(batch * self.num_slots, width).index_add(0, rows, wide.reshape(-1, width))
        return sums.view(batch, self.num_slots, width).to(x.dtype)

    def unmerge(self, y: Tensor) -> Tensor:
        """Each token gets its slot's value back: (B, T', D) -> (B, T, D)."""
        return y.gather(1, self.slot.unsqueeze(-1).expand(-1, -1, y.shape[-1]))

    def then(self, following: MergeMap) -> MergeMap:
        """This merge followed by another one, as one map."""
        if following.slot.shape[1] != self.num_slots:
            raise ValueError(
                f"cannot compose merges: the first leaves {self.num_slots} tokens, "
                f"the second takes {following.slot.shape[1]}"
            )
        return MergeMap(following.slot.gather(1, self.slot), following.num_slots)


def max_merges(tokens: int, protected: int = 1) -> int:
    """The most tokens that one layer can merge: half of the unprotected ones."""
    return max(tokens - protected, 0) // 2


@torch.no_grad()
def match(
    keys: Tensor,
    r: int,
    protected: int = 1,
    partition: str = "alternate",
    generator: torch.Generator | None = None,
    price: Tensor | None = None,
) -> MergeMap:
    """Choose the `r` most similar pairs and map T tokens to T - r.

    keys: (B, T, C), compared by cosine in float32 whatever the autocast: half precision ties cosines that differ, and
    training would merge other pairs than evaluation. The tokens are split in two sets, A and B: even and odd positions
    (`alternate`), or at random, anew in every call (`random`, from `generator`). Every A token points at its
    most similar B token; the r strongest pointers are kept. The first `protected` tokens are in A and never
    merge. Order afterwards: unmerged A in their old order, then B. r is capped at `max_merges`. price (B, T): the
    larger one of a pair's two is taken off its cosine (nn/conditioning.py).
    """
    batch, tokens, _ = keys.shape
    r = min(int(r), max_merges(tokens, protected))
    if r <= 0:
        return MergeMap.identity(batch, tokens, keys.device)
    set_a, set_b = _partition(tokens, protected, partition, keys.device, generator)
    with torch.autocast(keys.device.type, enabled=False):
        unit = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
        similarity = unit[:, set_a] @ unit[:, set_b].transpose(1, 2)  # (B, A, B)
    if price is not None:
        similarity = similarity - torch.maximum(price[:, set_a, None], price[:, None, set_b])
    similarity[:, :protected] = float("-inf")
    strength, partner = similarity.max(dim=-1)  # (B, A)
    merged = strength.topk(r, dim=-1).indices  # (B, r) positions within A

    is_merged = torch.zeros_like(partner, dtype=torch.bool).scatter_(1, merged, True)
    kept = len(set_a) - r
    slot_a = (~is_merged).cumsum(1) - 1  # rank among the unmerged A tokens
    slot_a = torch.where(is_merged, kept + partner, slot_a)
    slot = torch.empty(batch, tokens, dtype=torch.long, device=keys.device)
    slot[:, set_a] = slot_a
    slot[:, set_b] = kept + torch.arange(len(set_b), device=keys.device)
    return MergeMap(slot, tokens - r)


def _partition(tokens, protected, partition, device, generator) -> tuple[Tensor, Tensor]:
    """Index sets A (with the protected tokens first) and B."""
    positions = torch.arange(tokens, device=device)
    if partition == "alternate":
        if protected > 1:  # the protected ones all in A, the rest alternating from B on
            rest = positions[protected:]
            return torch.cat([positions[:protected], rest[1::2]]), rest[::2]
        return positions[::2], positions[1::2]
    if partition == "random":
        shuffled = torch.randperm(tokens - protected, generator=generator).to(device) + protected
        half = (tokens - protected + 1) // 2
        set_b = shuffled[:half].sort().values
        return torch.cat([positions[:protected], shuffled[half:].sort().values]), set_b
    raise ValueError(f"unknown partition {partition!r}; known: alternate, random")


@torch.no_grad()
def fold(
    features: Tensor,
    schedule: Sequence[int],
    protected: int = 1,
    partition: str = "alternate",
    generator: torch.Generator | None = None,
    prices: Callable[[MergeMap], Tensor] | None = None,
) -> list[MergeMap]:
    """One merge after another with no layer between: where the T tokens are at first, and after each r of `schedule`.

    features: (B, T, C). What is compared is the mean of all features in a group (weighted by size, that is) in float32
    whatever the autocast, as in `match`. prices: of the groups that the tokens are in, `match`'s price.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    maps = [MergeMap.identity(*features.shape[:2], features.device)]
    for r in schedule:
        means = maps[-1].merge(features)  # (B, T', C)
        price = None if prices is None else prices(maps[-1])
        maps.append(maps[-1].then(match(means, r, protected, partition, generator, price)))
    return maps


def fold_schedule(tokens: int, target: int, protected: int = 1) -> list[int]:
    """The fewest merges that leave `target` of `tokens`: each but the last merges all that it can, 257 -> 129 -> 65 ...

    Raises ValueError for a target that no number of them leaves.
    """
    schedule = []
    while tokens > target:
        r = min(tokens - target, max_merges(tokens, protected))
        if r == 0:
            raise ValueError(f"merge_at: {tokens} tokens, {protected} of them protected, cannot become {target}")
        schedule.append(r)
        tokens -= r
    return schedule


def tokens_after(tokens: int, schedule: Sequence[int], protected: int = 1) -> int:
    """How many tokens are left of `tokens` after merging by `schedule`, one r per layer."""
    for r in schedule:
        tokens -= min(r, max_merges(tokens, protected))
    return tokens


def merge_schedule(spec, num_layers: int, tokens: int, protected: int = 1) -> list[int]:
    """The number of merges of each layer, from one of

    - `19`: the same r everywhere;
    - `[30, 20, 10]`: one r per layer;
    - `{r: 19, inflection: -1}`: a line from r(1 - inflection) to r(1 + inflection): -1 merges early, 1 late;
    - `{target: 29}`: as even as can be, ending with exactly that many tokens.
    """
    if isinstance(spec, Mapping):
        if set(spec) == {"r", "inflection"}:
            return _line(int(spec["r"]), float(spec["inflection"]), num_layers)
        if set(spec) == {"target"}:
            return _to_target(int(spec["target"]), num_layers, tokens, protected)
        known = "{r, inflection}, {target}, {elastic, draw, beta} or {average, least, most}"
        raise ValueError(f"tome_r: keys {sorted(spec)}; use {known}")
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        if len(spec) != num_layers:
            raise ValueError(f"tome_r lists {len(spec)} layers, the TomeFormer has {num_layers}")
        schedule = [int(r) for r in spec]
    else:
        try:
            schedule = [int(spec)] * num_layers
        except (TypeError, ValueError):
            raise ValueError(
                f"tome_r: {spec!r} is not an int, a list, {{r, inflection}} or {{target}}"
            ) from None
    if min(schedule, default=0) < 0:
        raise ValueError(f"tome_r: negative merges in {schedule}")
    return schedule


def _line(r: int, inflection: float, num_layers: int) -> list[int]:
    if not -1 <= inflection <= 1:
        raise ValueError(f"tome_r: inflection {inflection} is outside [-1, 1]")
    if r < 0:
        raise ValueError(f"tome_r: negative merges in {{r: {r}}}")
    if num_layers == 1:
        return [r]
    exact = [r * (1 - inflection + 2 * inflection * i / (num_layers - 1)) for i in range(num_layers)]
    # rounding the running sum keeps the total at r x layers
    edges = [round(sum(exact[:i])) for i in range(num_layers + 1)]
    return [b - a for a, b in zip(edges, edges[1:], strict=False)]


def _to_target(target: int, num_layers: int, tokens: int, protected: int) -> list[int]:
    # most[i]: the most tokens after layer i from which the target is still in reach (a merge at most halves)
    most = [target] * num_layers
    for layer in range(num_layers - 2, -1, -1):
        most[layer] = 2 * most[layer + 1] - protected
    schedule, left = [], tokens
    for layer in range(num_layers):
        # an even share of the way to every later bound, the target among them
        wanted = max(-((most[j] - left) // (j - layer + 1)) for j in range(layer, num_layers))
        r = min(max(wanted, 0), max_merges(left, protected))
        schedule.append(r)
        left -= r
    if left != target:
        least = tokens_after(tokens, [tokens] * num_layers, protected)
        raise ValueError(
            f"tome_r: {tokens} tokens cannot become {target} in {num_layers} layers (a layer merges at most half "
            f"of the unprotected tokens); reachable: {least} to {tokens}"
        )
    return schedule
