"""The prefix loss equals the cross-entropy of the full logits; across_picture_share tells collapse from content."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_evlgen.nn.losses import IGNORE, across_picture_share, prefix_lm_loss


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    tokens=st.integers(2, 12),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_equals_the_cross_entropy_of_full_logits(seed, batch, tokens, share):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, tokens, 6, generator=generator, requires_grad=True)
    labels = torch.randint(11, (batch, tokens), generator=generator)
    labels[torch.rand(batch, tokens, generator=generator) >= share] = IGNORE
    head = torch.nn.Linear(6, 11, bias=False)
    sums, counts = prefix_lm_loss(hidden, labels, head)

    logits = head(hidden)
    for i in range(batch):
        expected, number = 0.0, 0
        for t in range(tokens - 1):
            if labels[i, t + 1] != IGNORE:
                expected += -F.log_softmax(logits[i, t], -1)[labels[i, t + 1]].item()
                number += 1
        assert sums[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert counts[i].item() == number
    whole = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    (gradient,) = torch.autograd.grad(sums.sum(), hidden, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(whole, hidden)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_the_head_sees_supervised_positions_only():
    labels = torch.full((2, 9), IGNORE)
    labels[0, 5], labels[1, 7:9] = 3, torch.tensor([1, 2])
    seen = []

    def head(rows):
        seen.append(rows)
        return rows @ torch.ones(4, 5)

    hidden = torch.randn(2, 9, 4)
    prefix_lm_loss(hidden, labels, head)
    (rows,) = seen
    assert torch.equal(rows, torch.stack([hidden[0, 4], hidden[1, 6], hidden[1, 7]]))


def test_half_precision_logits_are_summed_in_float32():
    hidden, head = torch.randn(2, 40, 8).bfloat16(), torch.nn.Linear(8, 30).bfloat16()
    sums, counts = prefix_lm_loss(hidden, torch.randint(30, (2, 40)), head)
    assert sums.dtype == torch.float32
    assert counts.tolist() == [39, 39]


def test_across_picture_share_of_a_collapsed_connector_is_0():
    same = torch.randn(1, 7, 5).expand(4, 7, 5)
    assert across_picture_share(same).item() < 1e-9
    assert across_picture_share(torch.zeros(4, 7, 5)).item() == 0.0


def test_one_vector_for_every_token_and_picture_is_collapsed_whatever_its_noise():
    same = torch.randn(1, 1, 5).expand(4, 7, 5) + 1e-3 * torch.randn(4, 1, 5)
    assert across_picture_share(same).item() < 1e-4


def test_across_picture_share_of_opposite_pictures_is_1():
    picture = torch.randn(1, 7, 5)
    assert across_picture_share(torch.cat([picture, -picture])).item() == pytest.approx(1.0, abs=1e-5)


def test_across_picture_share_lies_between_for_positions_plus_pictures():
    positions, pictures = torch.randn(1, 400, 64), torch.randn(400, 1, 64)
    assert across_picture_share(positions + pictures).item() == pytest.approx(0.5, abs=0.1)
    assert across_picture_share(positions + 3 * pictures).item() == pytest.approx(0.9, abs=0.05)
