"""Matching and merging: equal to plain loops, and the properties that a merge must keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_evlgen.nn.merging import MergeMap, match, max_merges
from tests.nn.slow import slow_groups, slow_mean, slow_slot

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
protected_counts = st.sampled_from([0, 1, 5])


def tensor(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_map(seed, batch, tokens, slots):
    """Any surjective map, also ones that no matching would give."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        row = torch.cat([torch.arange(slots), torch.randint(slots, (tokens - slots,), generator=generator)])
        rows.append(row[torch.randperm(tokens, generator=generator)])
    return MergeMap(torch.stack(rows), slots)


@QUICK
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    tokens=st.integers(6, 24),
    width=st.integers(2, 9),
    r=st.integers(0, 14),
    protected=protected_counts,
    weighted=st.booleans(),
)
def test_match_and_merge_equal_the_loops(seed, batch, tokens, width, r, protected, weighted):
    keys, x = tensor(seed, batch, tokens, width), tensor(seed + 1, batch, tokens, 3)
    sizes = torch.randint(1, 9, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    sizes = sizes.double() if weighted else None
    merge = match(keys, r, protected)
    merged = merge.merge(x, sizes)
    assert merge.num_slots == tokens - min(r, (tokens - protected) // 2)
    for i in range(batch):
        groups = slow_groups(keys[i], r, protected)
        assert merge.slot[i].tolist() == (slow_slot(groups) if r else list(range(tokens)))
        if r:
            expected = slow_mean(x[i], groups, sizes[i].tolist() if weighted else None)
            torch.testing.assert_close(merged[i], expected, rtol=1e-12, atol=1e-12)


@QUICK
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 40),
    r=st.integers(0, 30),
    protected=protected_counts,
    partition=st.sampled_from(["alternate", "random"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_every_match_is_a_merge_of_r_tokens(seed, tokens, r, protected, partition, dtype):
    merge = match(tensor(seed, 2, tokens, 4, dtype=dtype), r, protected, partition)
    assert merge.num_slots == tokens - min(r, max_merges(tokens, protected))
    sizes = merge.sizes()
    assert (sizes >= 1).all()  # no slot is empty
    assert (sizes.sum(1) == tokens).all()
    kept = min(protected, tokens)
    assert (merge.slot[:, :kept] == torch.arange(kept)).all()  # protected tokens stay in front ...
    assert (sizes[:, :kept] == 1).all()  # ... and alone


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_keeps_its_precision_in_short_dtypes(dtype, tolerance, weighted):
    merge = random_map(0, 3, 257, 29)
    x = tensor(1, 3, 257, 16, dtype=dtype) + 4
    sizes = torch.randint(1, 6, (3, 257)).float() if weighted else None
    merged = merge.merge(x, sizes)
    assert merged.dtype == dtype
    exact = merge.merge(x.double(), None if sizes is None else sizes.double())
    torch.testing.assert_close(merged.double(), exact, rtol=tolerance, atol=tolerance)


def test_autocast_does_not_shorten_the_mean():
    merge, x = random_map(0, 2, 30, 7), tensor(1, 2, 30, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = merge.merge(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, merge.merge(x))


@QUICK
@given(seed=st.integers(0, 10**6), tokens=st.integers(2, 30), slots=st.integers(1, 30))
def test_size_weighting_preserves_the_mean_of_all_patches(seed, tokens, slots):
    merge, x = random_map(seed, 2, tokens, min(slots, tokens)), tensor(seed, 2, tokens, 3)
    sizes = torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    merged, merged_sizes = merge.merge(x, sizes), merge.sizes(sizes)

    def mean(y, weights):
        return (y * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)

    torch.testing.assert_close(mean(merged, merged_sizes), mean(x, sizes), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(merged_sizes.sum(1), sizes.sum(1))


def test_the_plain_mean_does_not_preserve_it():
    """So that the test above has something to fail on: [1 patch] and [3 patches] average to the middle."""
    merge, x = MergeMap(torch.tensor([[0, 0]]), 1), torch.tensor([[[0.0], [4.0]]])
    assert merge.merge(x).item() == 2.0
    assert merge.merge(x, torch.tensor([[1.0, 3.0]])).item() == 3.0


def test_unmerge_gives_each_token_the_value_of_its_slot():
    merge, x = random_map(3, 2, 20, 6), tensor(4, 2, 20, 5)
    merged = merge.merge(x)
    spread = merge.unmerge(merged)
    for i in range(2):
        for token in range(20):
            assert torch.equal(spread[i, token], merged[i, merge.slot[i, token]])
    torch.testing.assert_close(merge.merge(spread), merged)  # merging equals changes nothing
    x = tensor(5, 2, 7, 5)
    identity = MergeMap.identity(2, 7)
    assert torch.equal(identity.unmerge(identity.merge(x)), x)


@QUICK
@given(seed=st.integers(0, 10**6), tokens=st.integers(3, 25), data=st.data())
def test_then_equals_applying_both(seed, tokens, data):
    middle = data.draw(st.integers(2, tokens))
    last = data.draw(st.integers(1, middle))
    first, second = random_map(seed, 2, tokens, middle), random_map(seed + 1, 2, middle, last)
    both, x = first.then(second), tensor(seed, 2, tokens, 3)
    ones = torch.ones(2, tokens, dtype=torch.float64)
    stepwise = second.merge(first.merge(x, ones), first.sizes(ones))
    torch.testing.assert_close(both.merge(x, ones), stepwise, rtol=1e-12, atol=1e-12)
    y = tensor(seed, 2, last, 3)
    assert torch.equal(both.unmerge(y), first.unmerge(second.unmerge(y)))
    assert both.num_slots == last


def test_then_refuses_maps_that_do_not_fit():
    with pytest.raises(ValueError, match="leaves 4 tokens.*takes 5"):
        random_map(0, 1, 6, 4).then(random_map(0, 1, 5, 2))


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_of_merge(weighted):
    merge = random_map(7, 2, 9, 4)
    x = tensor(8, 2, 9, 3).requires_grad_()
    sizes = torch.rand(2, 9, dtype=torch.float64) + 0.5 if weighted else None
    assert torch.autograd.gradcheck(lambda y: merge.merge(y, sizes), x)
    assert torch.autograd.gradcheck(merge.unmerge, tensor(9, 2, 4, 3).requires_grad_())


def test_matching_compares_directions_not_lengths():
    keys = tensor(1, 2, 21, 6)
    stretched = keys * (0.1 + 10 * torch.rand(2, 21, 1, dtype=torch.float64))
    assert torch.equal(match(keys, 6).slot, match(stretched, 6).slot)


def test_random_partition_follows_its_generator():
    keys = tensor(0, 1, 41, 4)

    def drawn(seed):
        return match(keys, 9, partition="random", generator=torch.Generator().manual_seed(seed)).slot

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    with pytest.raises(ValueError, match="halves.*alternate, random"):
        match(keys, 9, partition="halves")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_does_not_choose_other_pairs(dtype):
    keys = (1 + 0.05 * tensor(3, 8, 61, 16, dtype=torch.float32)).to(dtype)
    exact = match(keys.double(), 15).slot
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(match(keys, 15).slot, exact)
