"""Temporal mixing against a loop in float64, and what it does to static and to shuffled clips."""

import pytest
import torch
from torch import nn

from lavis_evlgen.nn import TemporalMixing
from lavis_evlgen.nn.temporal import RESIDUALS

B, T, L, D = 2, 3, 5, 24
EACH = pytest.mark.parametrize("residual", RESIDUALS)
ORDER = [2, 0, 1]


def mixing(residual="gated", alpha=0.7, positions=False, seed=0, **kw) -> TemporalMixing:
    """Sharp attention, an open gate and, where asked, position embeddings that are not 0."""
    torch.manual_seed(seed)
    module = TemporalMixing(D, residual, T if positions else None, qk_width=32, **kw)
    for parameter in (*module.query.parameters(), *module.key.parameters(), *([module.positions] if positions else [])):
        nn.init.normal_(parameter, std=0.6)
    if module.alpha is not None:
        nn.init.constant_(module.alpha, alpha)
    return module


def clip(seed=1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(B, T, L, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def static(seed=1) -> torch.Tensor:
    return clip(seed)[:, :1].expand(B, T, L, D)


def slow(module: TemporalMixing, x: torch.Tensor) -> torch.Tensor:
    """One number after the other: EVLGen, eq. 7, with the released scale, heads and gate."""
    alpha = 1.0 if module.alpha is None else module.alpha.item()
    keep, take = {"gated": (1, alpha), "convex": (1 - alpha, alpha), "paper": (1, 1)}[module.residual]
    heads, qk, out = module.num_heads, module.query.out_features, x.clone()
    c, d = qk // heads, D // heads
    for b in range(B):
        for p in range(L):
            frames = [x[b, t, p] for t in range(T)]
            seen = frames if module.positions is None else [f + module.positions[t] for t, f in enumerate(frames)]
            q = [module.query.weight @ f + module.query.bias for f in seen]
            k = [module.key.weight @ f + module.key.bias for f in seen]
            for h in range(heads):
                for t in range(T):
                    scores = [sum(q[t][h * c + i] * k[s][h * c + i] for i in range(c)) / qk**0.5 for s in range(T)]
                    powers = [torch.exp(score) for score in scores]
                    for i in range(h * d, (h + 1) * d):
                        mixed = sum(powers[s] / sum(powers) * frames[s][i] for s in range(T))
                        out[b, t, p, i] = keep * frames[t][i] + take * mixed
    return out


@EACH
@pytest.mark.parametrize("positions", [False, True])
@torch.no_grad()
def test_it_is_the_slow_loop(residual, positions):
    module = mixing(residual, positions=positions, num_heads=4).double()
    x = clip(dtype=torch.float64)
    torch.testing.assert_close(module(x), slow(module, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual", ["gated", "convex"])
@torch.no_grad()
def test_a_closed_gate_is_the_identity_bit_for_bit(residual):
    assert torch.equal(mixing(residual, alpha=0.0, positions=True)(clip()), clip())
    fresh = TemporalMixing(D, residual, T)
    assert fresh.alpha.item() == 0 and torch.equal(fresh(clip()), clip()) and not fresh.positions.any()


@pytest.mark.parametrize("alpha", [-1.3, 0.2, 5.0])
@pytest.mark.parametrize("positions", [False, True])
@torch.no_grad()
def test_a_static_clip(alpha, positions):
    """convex leaves it alone at any gate; gated scales it by 1 + alpha, paper doubles it, whatever the positions."""
    x = static()
    for residual, factor in (("convex", 1.0), ("gated", 1 + alpha), ("paper", 2.0)):
        after = mixing(residual, alpha, positions)(x)
        assert (after - factor * x).abs().max() < 1e-6 * max(1, abs(alpha)) * x.abs().max()


@EACH
@torch.no_grad()
def test_only_positions_know_the_order_of_frames(residual):
    plain, ordered = mixing(residual), mixing(residual, positions=True)
    x = clip()
    torch.testing.assert_close(plain(x[:, ORDER]), plain(x)[:, ORDER], rtol=1e-5, atol=1e-5)
    assert (ordered(x[:, ORDER]) - ordered(x)[:, ORDER]).abs().max() > 0.1
    # and it shows in the mean over frames, linear as that is: some frames are looked at more than others
    assert (ordered(x[:, ORDER]) - ordered(x)).mean(1).abs().max() > 0.01


@torch.no_grad()
def test_positions_of_zero_are_none():
    ordered = mixing(positions=True)
    ordered.positions.zero_()
    plain = mixing()
    plain.load_state_dict({k: v for k, v in ordered.state_dict().items() if k != "positions"})
    assert torch.equal(ordered(clip()), plain(clip()))


def test_gradients_reach_what_can_learn():
    module = mixing(positions=True)
    x = clip().requires_grad_()
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        learns = name != "key.bias"  # what all keys share, softmax ignores
        assert (parameter.grad.abs().sum() > 0) == learns, name
    assert x.grad.abs().sum() > 0
    closed = mixing(alpha=0.0)
    closed(clip()).square().sum().backward()
    assert closed.alpha.grad.abs() > 0 and not closed.query.weight.grad.any()  # the gate opens first


@torch.no_grad()
def test_rows_of_the_weights_sum_to_one_and_under_autocast_tokens_keep_their_precision():
    module = mixing("convex", alpha=1.0)
    weights = module.weights(clip())
    assert weights.shape == (B, L, 8, T, T)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, L, 8, T))
    with torch.autocast("cpu", torch.bfloat16):
        after = module(static())
    assert after.dtype == torch.float32 and (after - static()).abs().max() < 1e-6


@torch.no_grad()
def test_a_single_frame_and_the_released_sizes():
    torch.testing.assert_close(mixing()(clip()[:, :1]), 1.7 * clip()[:, :1])
    shapes = {name: tuple(p.shape) for name, p in TemporalMixing(1408).named_parameters()}
    linear = {"weight": (256, 1408), "bias": (256,)}
    expected = {f"{part}.{name}": shape for part in ("query", "key") for name, shape in linear.items()}
    assert shapes == expected | {"alpha": (1,)}
    assert "alpha" not in dict(TemporalMixing(24, "paper").named_parameters())


def test_what_cannot_be():
    with pytest.raises(ValueError, match="residual: 'soft' is not one of gated, convex, paper"):
        TemporalMixing(D, "soft")
    with pytest.raises(ValueError, match="widths 20 and 256 do not divide into 8 heads"):
        TemporalMixing(20)
    with pytest.raises(ValueError, match="a clip of 3 frames, but there are temporal positions for 2: give fewer"):
        TemporalMixing(D, max_frames=2)(clip())
