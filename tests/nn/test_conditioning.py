"""Merging that looks at a question: weights and prices against plain loops in float64; nothing where rho is 0."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_evlgen.nn import QuestionRelevance, TomeFormer, TomeFormerConfig, weighted_mean
from lavis_evlgen.nn.conditioning import LARGEST, STRENGTH, Relevance
from lavis_evlgen.nn.merging import match
from tests.nn.slow import slow_groups, slow_mean, slow_slot
from tests.nn.test_merging import QUICK, protected_counts, random_map, tensor


@QUICK
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    tokens=st.integers(4, 20),
    width=st.integers(1, 5),
    by_size=st.booleans(),
    cut=st.floats(0.3, 0.9),
)
def test_the_weighted_mean_and_what_it_leaves_equal_the_loops(seed, batch, tokens, width, by_size, cut):
    """Two merges in a row: the weight of a merged token is the sum (by_size) or the mean of its patches' exp(rho)."""
    rho, x = tensor(seed, batch, tokens), tensor(seed + 1, batch, tokens, width)
    first = random_map(seed + 2, batch, tokens, max(2, int(cut * tokens)))
    second = random_map(seed + 3, batch, first.num_slots, max(1, first.num_slots // 2))
    relevance = Relevance.of(rho)
    merged = weighted_mean(first, x, relevance.weights(by_size))
    relevance = relevance.after(first)
    again = weighted_mean(second, merged, relevance.weights(by_size))
    for b in range(batch):
        rows, patches = x[b], [[i] for i in range(tokens)]
        for step, found in ((first, merged[b]), (second, again[b])):
            groups = [[i for i, slot in enumerate(step.slot[b].tolist()) if slot == s] for s in range(step.num_slots)]
            sums = [sum(math.exp(rho[b, i]) for i in own) for own in patches]
            weights = sums if by_size else [total / len(own) for total, own in zip(sums, patches, strict=True)]
            rows = slow_mean(rows, groups, weights)
            torch.testing.assert_close(found, rows, rtol=1e-9, atol=1e-9)
            patches = [[i for token in group for i in patches[token]] for group in groups]
            if step is first:
                mean = [sum(math.exp(rho[b, i]) for i in own) / len(own) for own in patches]
                expected = STRENGTH * torch.tensor(mean, dtype=torch.float64).log()
                torch.testing.assert_close(relevance.price[b], expected, rtol=1e-9, atol=1e-9)


@QUICK
@given(seed=st.integers(0, 10**6), tokens=st.integers(6, 20), r=st.integers(1, 9), protected=protected_counts)
def test_pairs_pay_the_larger_price(seed, tokens, r, protected):
    """The loops of slow_groups, with a key of each token for each other: cosines less prices."""
    keys, price = tensor(seed, 1, tokens, 4), tensor(seed + 1, 1, tokens)
    unit = torch.nn.functional.normalize(keys[0], dim=-1)
    similar = unit @ unit.T - torch.maximum(price[0][:, None], price[0][None])
    # protected > 1 and protected = 0 split otherwise: the same loop over positions as slow_groups
    set_a, set_b, to_b = list(range(protected)), [], protected > 0
    for position in range(protected, tokens):
        (set_b if to_b else set_a).append(position)
        to_b = not to_b
    best = {a: max(set_b, key=lambda b: similar[a, b].item()) for a in set_a[protected:]}
    kept = sorted(best, key=lambda a: -similar[a, best[a]].item())[: min(r, (tokens - protected) // 2)]
    groups = [[a] for a in set_a if a not in kept]
    groups += [[b] + [a for a in kept if best[a] == b] for b in set_b]
    assert match(keys, r, protected, price=price).slot[0].tolist() == slow_slot(groups)
    assert match(keys, r, protected, price=torch.full_like(price, 0.3)).slot[0].tolist() == slow_slot(
        slow_groups(keys[0], r, protected)  # what all pay changes nothing
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("by_size", [False, True])
def test_equal_weights_are_the_mean_bit_for_bit(dtype, by_size):
    step, x = random_map(0, 3, 65, 29), tensor(1, 3, 65, 16, dtype=dtype)
    sizes = torch.randint(1, 6, (3, 65), generator=torch.Generator().manual_seed(2)).float()
    relevance = Relevance(sizes.clone(), sizes)  # rho = 0
    expected = step.merge(x, sizes if by_size else None)
    assert torch.equal(weighted_mean(step, x, relevance.weights(by_size)), expected)
    assert not relevance.price.any() and torch.equal(relevance.after(step).mass, relevance.after(step).sizes)


def test_rho_is_its_formula():
    torch.manual_seed(0)
    module, x, q = QuestionRelevance(6, 5, 4).double(), tensor(1, 3, 7, 6), 1e-3 * tensor(2, 3, 5)
    assert not module(x, q).any()
    with torch.no_grad():
        module.alpha.fill_(0.7)
    for b in range(3):
        size = (q[b] - q[b].mean()).pow(2).mean().add(1e-5).sqrt()
        query = module.query.weight @ ((q[b] - q[b].mean()) / size)
        found = torch.stack([query @ (module.key.weight @ x[b, i]) for i in range(7)]) / 2  # sqrt(d)
        torch.testing.assert_close(module(x, q)[b], math.tanh(0.7) * (found - found.mean()))
    assert not module(x, torch.zeros(3, 5)).any()  # no question
    with torch.no_grad():
        module.key.weight.mul_(1e4)
    assert module(x, q).abs().max() == LARGEST


def tomeformer(**kw):
    torch.manual_seed(0)
    cfg = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "max_positions": 32,
           "dropout": 0.0, "num_tokens": 21, "tome_r": 6}  # fmt: skip
    return TomeFormer(TomeFormerConfig(**cfg | kw)).double().eval()


@pytest.mark.parametrize("cfg", [{}, {"merge_mean": "size"}, {"proportional_attention": True}], ids=str)
def test_the_whole_tomeformer_keeps_apart_what_matters(cfg):
    model, x = tomeformer(**cfg), tensor(1, 2, 21, 16)
    plain, source = model(x, return_source=True)
    nothing, same = model(x, return_source=True, rho=torch.zeros(2, 21))
    assert torch.equal(nothing, plain) and torch.equal(same.slot, source.slot)
    rho = torch.full((2, 21), -LARGEST / 4, dtype=torch.float64)
    rho[0, [4, 5, 6, 7]] = LARGEST  # pairs with them cost 0.5 of a cosine more than the others
    tokens, source = model(x, return_source=True, rho=rho)
    alone, before = (found.sizes()[0, found.slot[0, [4, 5, 6, 7]]] == 1 for found in (source, same))
    assert tokens.shape == plain.shape and alone.sum() > before.sum() + 1


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), merge_mean=st.sampled_from(["plain", "size"]))
def test_the_gradient_of_rho_is_that_of_differences(seed, merge_mean):
    """Through means alone: which tokens merge is not differentiated."""
    model, x = tomeformer(merge_mean=merge_mean), tensor(seed, 1, 21, 16)
    rho = (0.01 * tensor(seed + 1, 1, 21)).requires_grad_()
    direction, weights = tensor(seed + 2, 1, 21), tensor(seed + 3, 1, 9, 16)
    tokens, source = model(x, True, rho=rho)
    (found,) = torch.autograd.grad((tokens * weights).sum(), rho)
    values = []
    for step in (1e-5, -1e-5):
        moved, there = model(x, True, rho=rho.detach() + step * direction)
        if not torch.equal(there.slot, source.slot):
            return  # a pair has changed between the two: there is no derivative here
        values.append((moved * weights).sum().item())
    assert (found * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-6)
