"""Temporal mixing inside every kind of frozen block: against the block's own parts put together by hand."""

import copy

import pytest
import torch
from torch import nn

from lavis_evlgen.models.vision.encoder import VisionEncoder
from lavis_evlgen.models.vision.temporal import BLOCKS, TemporalVision, kind_of
from tests.tiny import (
    pictures,
    tiny_clip,
    tiny_dinov2,
    tiny_eva,
    tiny_lavis_clip,
    tiny_lavis_vision,
    tiny_siglip,
    tiny_vision,
)  # fmt: skip

T = 3


def first(output):
    return output[0] if isinstance(output, tuple) else output


# (x after the attention residual, the MLP's share of it) of one block, as each library writes it
def eva(block):
    return lambda x: x + block.attn(block.norm1(x)), lambda x: block.mlp(block.norm2(x))


def lavis_clip(block):  # (L, B, D)
    def attend(x):
        normed = block.ln_1(x.transpose(0, 1))
        return x + block.attn(normed, normed, normed, need_weights=False)[0].transpose(0, 1)

    return attend, lambda x: block.mlp(block.ln_2(x))


def clip(block):
    return (
        lambda x: x + first(block.self_attn(block.layer_norm1(x), attention_mask=None)),
        lambda x: block.mlp(block.layer_norm2(x)),
    )


def siglip(block):
    return (
        lambda x: x + first(block.self_attn(block.layer_norm1(x), attention_mask=None)),
        lambda x: block.mlp(block.layer_norm2(x)),
    )


def dinov2(block):
    return (
        lambda x: x + block.layer_scale1(first(block.attention(block.norm1(x)))),
        lambda x: block.layer_scale2(block.mlp(block.norm2(x))),
    )


VITS = {
    "eva_vit.Block": (lambda **kw: tiny_lavis_vision(tiny_eva, **kw), eva),
    "clip_vit.ResidualAttentionBlock": (lambda **kw: tiny_lavis_vision(tiny_lavis_clip, **kw), lavis_clip),
    "modeling_clip.CLIPEncoderLayer": (lambda **kw: tiny_vision(tiny_clip, **kw), clip),
    "modeling_siglip.SiglipEncoderLayer": (lambda **kw: tiny_vision(tiny_siglip, **kw), siglip),
    "modeling_dinov2.Dinov2Layer": (lambda **kw: tiny_vision(tiny_dinov2, **kw), dinov2),
}
EACH = pytest.mark.parametrize("name", VITS)
LAST_NORM = ("modeling_siglip.SiglipEncoderLayer", "modeling_dinov2.Dinov2Layer")  # behind the last block


def blocks_of(vision: VisionEncoder) -> list[nn.Module]:
    return [module for module in vision.vit.modules() if kind_of(module)]


def encoder(name, residual="gated", positions=False, alpha=0.7, **kw) -> TemporalVision:
    """With sharp attention over frames and open gates."""
    vision = TemporalVision(VITS[name][0](**kw), residual, T if positions else None)
    torch.manual_seed(3)
    with torch.no_grad():
        for part, parameter in vision.temporal.named_parameters():
            parameter.fill_(alpha) if part.endswith("alpha") else nn.init.normal_(parameter, std=0.3)
    return vision


def test_every_kind_of_block_is_tested():
    assert set(VITS) == set(BLOCKS)


@EACH
@pytest.mark.parametrize("residual", ["gated", "convex", "paper"])
@torch.no_grad()
def test_it_is_the_block_with_the_mixing_before_its_mlp(name, residual):
    vision = encoder(name, residual, positions=True)
    seen = []
    for block in blocks_of(vision):
        block.register_forward_hook(lambda block, args, output: seen.append((args[0], first(output))))
    output = vision(pictures(2 * T), T)
    untouched = blocks_of(VITS[name][0]())  # the same weights, without hooks
    assert len(untouched) == len(seen) == len(vision.temporal) > 1
    for block, mixing, (before, after) in zip(untouched, vision.temporal, seen, strict=True):
        batch_dim = kind_of(block).batch_dim
        attend, mlp = VITS[name][1](block)
        x = attend(before.movedim(batch_dim, 0))  # (B T, L, D)
        x = mixing(x.unflatten(0, (2, T))).flatten(0, 1)
        torch.testing.assert_close(after.movedim(batch_dim, 0), x + mlp(x), rtol=1e-4, atol=1e-4)
    if name not in LAST_NORM:
        assert torch.equal(output, after.movedim(batch_dim, 0))


@EACH
@torch.no_grad()
def test_with_closed_gates_it_is_the_librarys_own_forward(name):
    plain = VITS[name][0]()
    expected = plain(pictures(4))
    assert torch.equal(encoder(name, alpha=0.0)(pictures(4), 2), expected)


@EACH
@torch.no_grad()
def test_clips_do_not_see_each_other_and_frames_do(name):
    vision = encoder(name)
    whole = vision(pictures(2 * T), T).unflatten(0, (2, T))
    for i in range(2):
        alone = vision(pictures(2 * T)[i * T : (i + 1) * T], T)
        torch.testing.assert_close(whole[i], alone, rtol=1e-4, atol=1e-4)
    single = vision(pictures(2 * T)).unflatten(0, (2, T))
    assert (whole - single).abs().max() > 0.1
    assert vision.frames == 1  # what the ViT is asked directly is a picture


@EACH
def test_gradients_reach_every_temporal_module_and_no_weight_of_the_vit(name):
    vision = encoder(name, positions=True).train()
    assert not any(module.training for module in vision.modules())
    vision(pictures(T), T).square().sum().backward()
    for part, parameter in vision.named_parameters():
        if part.startswith("temporal."):
            learns = not part.endswith("key.bias")  # what all keys share, softmax ignores
            assert (parameter.grad.abs().sum() > 0) == learns, part
        else:
            assert not parameter.requires_grad and parameter.grad is None, part


@EACH
def test_from_closed_gates_every_gate_learns(name):
    vision = TemporalVision(VITS[name][0]())
    vision(pictures(T), T).square().sum().backward()
    assert all(mixing.alpha.grad.abs() > 0 for mixing in vision.temporal)


@pytest.mark.parametrize("name", [name for name in VITS if name.startswith("modeling_")])
@torch.no_grad()
def test_a_hidden_layer_is_read_after_the_mixing(name):
    vision = encoder(name, layer=2)
    assert len(vision.temporal) == 2
    seen = []
    blocks_of(vision)[-1].register_forward_hook(lambda block, args, output: seen.append(first(output)))
    assert torch.equal(vision(pictures(T), T), seen[0])
    closed = encoder(name, layer=2, alpha=0.0)
    assert (vision(pictures(T), T) - closed(pictures(T), T)).abs().max() > 0.1


def test_positions_learn_an_order_that_a_mean_over_frames_would_hide():
    """Which of two clips runs forwards, told by a linear map of the mean over frames; all starts at zero."""

    def loss(positions: int | None) -> float:
        torch.manual_seed(0)
        vision, head = TemporalVision(tiny_vision(), max_frames=positions), nn.Linear(24, 1)
        clips = torch.cat([pictures(T), pictures(T).flip(0)])
        optimizer = torch.optim.Adam([*vision.temporal.parameters(), *head.parameters()], 2e-2)
        for _ in range(60):
            said = head(vision(clips, T).unflatten(0, (2, T)).mean((1, 2)))  # (2, 1)
            loss = nn.functional.binary_cross_entropy_with_logits(said, torch.tensor([[0.0], [1.0]]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    coin = torch.tensor(2.0).log().item()
    assert loss(None) == pytest.approx(coin, abs=1e-3) and loss(T) < 0.2 * coin


@EACH
@torch.no_grad()
def test_a_copy_mixes_by_its_own_weights(name):
    vision = encoder(name)
    before = vision(pictures(T), T)
    other = copy.deepcopy(vision)
    for mixing in other.temporal:
        mixing.alpha.zero_()
    assert torch.equal(vision(pictures(T), T), before)
    torch.testing.assert_close(other(pictures(T), T), VITS[name][0]()(pictures(T)))


@EACH
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_vit_in_half_precision_trains_float32_modules(name, precision):
    exact, vision = encoder(name)(pictures(T), T), encoder(name, precision=precision)
    short = vision(pictures(T), T)
    assert short.dtype == torch.float32 and 0 < (short - exact).norm() / exact.norm() < 0.2
    (short * torch.randn_like(short)).sum().backward()
    assert {p.dtype for p in vision.temporal.parameters()} == {torch.float32}
    assert all(mixing.query.weight.grad.abs().sum() > 0 for mixing in vision.temporal)


@EACH
@pytest.mark.parametrize("autocast", [True, False])
def test_a_float32_vit_multiplies_in_autocasts_type(name, autocast):
    """As released: the weights of a video model's ViT stay float32, and its products are run.amp's."""
    exact, vision = encoder(name)(pictures(T), T).detach(), encoder(name)
    expected = torch.bfloat16 if autocast else torch.float32
    linears = {part: module for part, module in vision.named_modules() if isinstance(module, nn.Linear)}
    seen = {}
    for part, module in linears.items():
        module.register_forward_hook(lambda module, args, output, part=part: seen.update({part: output.dtype}))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens = vision(pictures(T), T)
    assert seen and set(seen.values()) == {expected}
    assert any(part.startswith("temporal.") for part in seen) and any(part.startswith("vit.") for part in seen)
    assert {p.dtype for p in vision.parameters()} == {torch.float32} and tokens.dtype == torch.float32
    distance = (tokens - exact).norm() / exact.norm()
    assert 1e-4 < distance < 0.2 if autocast else distance == 0
    tokens.square().sum().backward()
    assert all(mixing.query.weight.grad.abs().sum() > 0 for mixing in vision.temporal)


def test_names_of_the_vits_weights_are_untouched():
    plain, vision = tiny_vision(), TemporalVision(tiny_vision())
    names = {name for name in vision.state_dict() if not name.startswith("temporal.")}
    assert names == set(plain.state_dict())
    kinds = [type(m) for m in plain.vit.modules()]
    assert [type(m) for m in vision.vit.modules()] == kinds


def test_a_vit_that_is_not_known_and_a_layer_without_blocks():
    strange = VisionEncoder(nn.Sequential(nn.Linear(24, 24)), 24, 5, 1, "fp32")
    with pytest.raises(ValueError, match="does not know the blocks of a Sequential; it knows eva_vit.Block, clip_vit"):
        TemporalVision(strange)
    with pytest.raises(ValueError, match="vit_layer: 0 reads the embeddings, in front of every block"):
        TemporalVision(tiny_vision(layer=0))
