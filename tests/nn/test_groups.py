"""What reads groups of patches, the skip and the readout, against plain loops in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavis_evlgen.nn import GroupReadout, MergeMap, PooledSkip
from tests.nn.slow import slow_mean
from tests.nn.test_merging import QUICK, random_map, tensor


def members(source):
    """Of one picture's map: the patches of each token."""
    return [[i for i, s in enumerate(source.slot[0].tolist()) if s == token] for token in range(source.num_slots)]


def slow_readout(readout, tokens, x, groups):
    """tokens (L', D_c), x (L, D_v) -> (the result (L', D_c), the weights of each token's patches in each head)."""
    state, wide, rows, weights = readout.state_dict(), tokens.shape[1] // readout.num_heads, [], []
    for token, group in zip(tokens, groups, strict=True):
        query, heads, given_to = state["query.weight"] @ token, [], []
        for head in range(readout.num_heads):
            part = slice(head * wide, (head + 1) * wide)
            logits = [(query[part] @ (state["key.weight"] @ x[i])[part]).item() / math.sqrt(wide) for i in group]
            shares = [math.exp(one) / sum(map(math.exp, logits)) for one in logits]
            heads.append(sum(s * (state["value.weight"] @ x[i])[part] for s, i in zip(shares, group, strict=True)))
            given_to.append(shares)
        rows.append(token + state["alpha"] * (state["output.weight"] @ torch.cat(heads)))
        weights.append(given_to)
    return torch.stack(rows), weights


def opened(readout, alpha=0.7, seed=0):
    """Double, with weights of any size and the gate open."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in readout.double().parameters():
            parameter.normal_()
        readout.alpha.fill_(alpha)
    return readout


@QUICK
@given(
    seed=st.integers(0, 10**6), tokens=st.integers(1, 16), slots=st.integers(1, 16), heads=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([4, 8]), inputs=st.sampled_from([3, 8]),
)  # fmt: skip
@torch.no_grad()
def test_a_readout_equals_the_loops(seed, tokens, slots, heads, width, inputs):
    readout, slots = opened(GroupReadout(inputs, width, heads)), min(slots, tokens)
    source = random_map(seed, 2, tokens, slots)
    x, merged = tensor(seed, 2, tokens, inputs), tensor(seed + 1, 2, slots, width)
    found = readout(merged, x, source)
    for i in range(2):
        groups = members(MergeMap(source.slot[i : i + 1], slots))
        expected, weights = slow_readout(readout, merged[i], x[i], groups)
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-9)
        assert all(sum(shares) == pytest.approx(1, abs=1e-12) for heads in weights for shares in heads)


@torch.no_grad()
def test_weights_sum_to_1_and_a_lone_patch_is_read_whole():
    readout, source = opened(GroupReadout(6, 8, 2)), random_map(0, 2, 21, 7)
    x, merged = tensor(1, 2, 21, 6), tensor(2, 2, 7, 8)

    def read(x, source, tokens):
        return (readout(tokens, x, source) - tokens) / readout.alpha

    # patches that are all the same: whatever the weights, their sum reads that patch
    same = x[:, :1].expand(-1, 21, -1)
    whole = readout.output(readout.value(same[:, :7]))
    torch.testing.assert_close(read(same, source, merged), whole, rtol=0, atol=1e-12)
    # groups of one patch: the patch itself, whatever the query
    alone = MergeMap.identity(2, 7)
    whole = readout.output(readout.value(x[:, :7]))
    torch.testing.assert_close(read(x[:, :7], alone, merged), whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_token_reads_no_other_patches():
    readout, source = opened(GroupReadout(6, 8, 2)), random_map(0, 1, 21, 7)
    x, merged = tensor(1, 1, 21, 6), tensor(2, 1, 7, 8)
    before = readout(merged, x, source)
    x[0, 4] += 1
    changed = (readout(merged, x, source) != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [source.slot[0, 4].item()]


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@torch.no_grad()
def test_a_readout_starts_without_a_trace(amp):
    torch.manual_seed(0)
    readout, source = GroupReadout(6, 8, 2), random_map(0, 2, 21, 7)
    x, merged = (tensor(n, 2, *shape, dtype=torch.float32) for n, shape in ((1, (21, 6)), (2, (7, 8))))
    with torch.autocast("cpu", torch.bfloat16, enabled=amp is not None):
        assert torch.equal(readout(merged, x, source), merged)


def test_gradients_of_a_readout():
    readout, source = opened(GroupReadout(3, 4, 2)), random_map(0, 2, 9, 4)
    inputs = tensor(1, 2, 4, 4).requires_grad_(), tensor(2, 2, 9, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda tokens, x: readout(tokens, x, source), inputs, fast_mode=True)
    readout(*inputs, source).square().sum().backward()
    assert all(p.grad.any() for p in readout.parameters())


@pytest.mark.parametrize("widths", [(6, 6), (9, 4), (4, 9)])
@torch.no_grad()
def test_a_skip_is_the_means_of_groups_through_w_and_some_of_the_body(widths):
    torch.manual_seed(0)
    skip, source = PooledSkip(*widths).double(), random_map(0, 1, 21, 7)
    x, body = tensor(1, 1, 21, widths[0]), tensor(2, 1, 7, widths[1])
    means = slow_mean(x[0], members(source)) @ skip.proj.weight.T
    torch.testing.assert_close(skip(body, source.merge(x))[0], means, rtol=0, atol=1e-12)
    skip.alpha.fill_(-0.3)
    torch.testing.assert_close(skip(body, source.merge(x))[0], means - 0.3 * body[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("widths, size", [((64, 64), 1.0), ((96, 64), 1.0), ((64, 96), 1.5**0.5)])
@torch.no_grad()
def test_w_starts_well_conditioned_and_keeps_the_size(widths, size):
    torch.manual_seed(0)
    skip = PooledSkip(*widths)
    torch.testing.assert_close(torch.linalg.svdvals(skip.proj.weight), torch.full((64,), size))
    assert torch.equal(skip.proj.weight, torch.eye(64)) == (widths[0] == widths[1])
    x = torch.randn(4, 50, widths[0])
    assert skip(torch.zeros(4, 50, widths[1]), x).square().mean().sqrt().item() == pytest.approx(1, rel=0.03)
