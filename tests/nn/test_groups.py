"""The skip over groups of patches, against plain loops in float64."""

import pytest
import torch

from lavis_evlgen.nn import PooledSkip
from tests.nn.slow import slow_mean
from tests.nn.test_merging import random_map, tensor


@pytest.mark.parametrize("widths", [(6, 6), (9, 4), (4, 9)])
@torch.no_grad()
def test_a_skip_is_the_means_of_groups_through_w_and_some_of_the_body(widths):
    torch.manual_seed(0)
    skip, source = PooledSkip(*widths).double(), random_map(0, 2, 21, 7)
    x, body = tensor(1, 2, 21, widths[0]), tensor(2, 2, 7, widths[1])
    groups = [[[i for i in range(21) if row[i] == s] for s in range(7)] for row in source.slot.tolist()]
    means = torch.stack([slow_mean(one, of) for one, of in zip(x, groups, strict=True)]) @ skip.proj.weight.T
    torch.testing.assert_close(skip(body, source.merge(x)), means, rtol=0, atol=1e-12)
    skip.alpha.fill_(-0.3)
    torch.testing.assert_close(skip(body, source.merge(x)), means - 0.3 * body, rtol=0, atol=1e-12)


@pytest.mark.parametrize("widths, size", [((64, 64), 1.0), ((96, 64), 1.0), ((64, 96), 1.5**0.5)])
@torch.no_grad()
def test_w_starts_well_conditioned_and_keeps_the_size(widths, size):
    torch.manual_seed(0)
    skip = PooledSkip(*widths)
    torch.testing.assert_close(torch.linalg.svdvals(skip.proj.weight), torch.full((64,), size))
    assert torch.equal(skip.proj.weight, torch.eye(64)) == (widths[0] == widths[1])
    x = torch.randn(4, 50, widths[0])
    assert skip(torch.zeros(4, 50, widths[1]), x).square().mean().sqrt().item() == pytest.approx(1, rel=0.03)
