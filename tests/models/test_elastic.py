"""`tome_r: {elastic}` in a whole model: budgets against models of one number of tokens, and the sandwich's loss."""

import pytest
import torch
from torch.nn import functional as F

from lavis_evlgen.models.connectors import build_connector
from lavis_evlgen.models.elastic import divergence, kept_outputs
from tests.tiny import clips, pictures, tiny_connector, tiny_evlgen, tiny_evlgen_video, tiny_vision

LISTED = [5, 9, 13]
TEXTS = ["a red square", "two cats sleep on a wooden table", "a dog", "a blue circle and a dog"]
SAMPLES = {"image": pictures(2), "text_input": TEXTS[:2]}
PACKED = {"image": pictures(2), "text_input": TEXTS, "texts_per_image": [3, 1]}
ALL = {"merge_at": "input", "skip": "pooled", "readout": "group"}


def elastic(draw="one", beta=1.0, connector=(), **kw):
    tome_r = {"elastic": LISTED, "draw": draw, "beta": beta}
    return open_gates(tiny_evlgen(connector={"tome_r": tome_r, **dict(connector)}, **kw))


def fixed(budget, connector=(), **kw):
    return open_gates(tiny_evlgen(connector={"tome_r": {"target": budget}, **dict(connector)}, **kw))


def open_gates(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".alpha") and name.startswith("connector."):
                parameter.fill_(0.5)
    return model


def gradients(model, out) -> dict:
    model.zero_grad()
    out["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("samples", [SAMPLES, PACKED], ids=["one text", "packed"])
@pytest.mark.parametrize("connector", [{}, ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("budget", LISTED)
def test_each_budget_trains_as_a_model_of_its_own(budget, connector, samples):
    model, own = elastic(connector=connector), fixed(budget, connector)
    out, expected = model(samples | {"budgets": (budget,)}), own(samples)
    assert torch.equal(out["loss"], expected["loss"])
    found, wanted = gradients(model, out), gradients(own, expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_without_a_draw_it_is_the_largest():
    model = elastic().eval()
    assert torch.equal(model(SAMPLES)["loss"], fixed(13).eval()(SAMPLES)["loss"])
    assert model.token_counts() == "17 visual -> 13 in the prompt; trained with 5, 9 or 13"
    assert elastic("sandwich").token_counts().endswith("; trained with 13 and one other of 5, 9 or 13")
    assert model.token_draws() == [(5,), (9,), (13,)] and fixed(9).token_draws() == []


@pytest.mark.parametrize("pooling", ["mean", "concat", "connector_mean", "temporal_qformer", "temporal_queries"])
def test_clips_take_budgets_per_frame(pooling):
    def made(tome_r):
        return tiny_evlgen_video(frame_pooling=pooling, connector={"tome_r": tome_r}).eval()

    samples = {"image": clips(2), "text_input": TEXTS[:2]}
    torch.manual_seed(0)
    model, own = made({"elastic": LISTED, "draw": "sandwich"}), made({"target": 5})
    own.load_state_dict(model.state_dict())
    assert torch.equal(model(samples | {"budgets": (5,)})["loss"], own(samples)["loss"])
    assert model(samples | {"budgets": (13, 5)})["loss"].isfinite()


def by_hand(model, samples, budgets, beta):
    """CE_largest + CE_other + beta KL, a position after the other in float64, from models of one budget each."""
    nats, logits, tokens = [], [], 0
    for budget in budgets:
        own = fixed(budget)
        own.load_state_dict(model.state_dict())
        with torch.no_grad(), kept_outputs(own.language_model.llm.get_output_embeddings()) as kept:
            sums, counts = own.loss_of(own.visual_prompt(samples["image"]), samples)
        nats.append(sums.double().sum())
        logits.append(kept[0].double())
        tokens = counts.sum().double()
    kl = 0.0
    for said, other in zip(*logits, strict=True):
        p, q = said.softmax(-1), other.softmax(-1)
        kl = kl + sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
    return nats[0] / tokens, nats[1] / tokens, kl / tokens, (nats[0] + nats[1] + beta * kl) / tokens


@pytest.mark.parametrize("samples, beta", [(SAMPLES, 1.0), (PACKED, 0.3)], ids=["one text", "packed"])
def test_the_sandwich_is_two_losses_and_a_divergence(samples, beta):
    model = elastic("sandwich", beta)
    out = model(samples | {"budgets": (13, 5)})
    largest, other, kl, loss = by_hand(model, samples, (13, 5), beta)
    found = [out[name].item() for name in ("loss_largest", "loss_other", "loss_kl", "loss")]
    assert found == pytest.approx([largest.item(), other.item(), kl.item(), loss.item()], rel=1e-5)
    assert kl > 0.01 and out["loss_tokens"] == model(samples)["loss_tokens"]


def test_the_largest_learns_nothing_from_the_divergence():
    torch.manual_seed(0)
    said, other = (torch.randn(6, 11, dtype=torch.double, requires_grad=True) for _ in range(2))
    kl = divergence(said, other)
    wanted = sum(F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="sum") for p, q in zip(said, other, strict=True))
    torch.testing.assert_close(kl.double(), wanted, rtol=1e-5, atol=1e-5)
    kl.backward()
    assert said.grad is None and torch.allclose(other.grad, other.softmax(-1) - said.softmax(-1), atol=1e-6)


def test_the_frozen_vit_runs_once():
    model, calls = elastic("sandwich"), []
    model.visual_encoder.register_forward_hook(lambda *_: calls.append(1))
    model(SAMPLES | {"budgets": (13, 5)})
    assert len(calls) == 1
    stored = {**SAMPLES, "image": model.visual_tokens(SAMPLES["image"]), "budgets": (13, 5)}
    assert torch.equal(model(stored)["loss"], model(SAMPLES | {"budgets": (13, 5)})["loss"])


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="soft_prompt: it has a vector for each token.*leave soft_prompt out"):
        elastic(soft_prompt=True)
    with pytest.raises(ValueError, match="tome_r.draw: sandwich has a loss of its own.*take draw: one"):
        elastic("sandwich")(SAMPLES | {"budgets": (13, 5)}, objective=lambda *_: {})
    with pytest.raises(ValueError, match="a budget of 7 tokens is none of tome_r.elastic"):
        elastic()(SAMPLES | {"budgets": (7,)})
    with pytest.raises(ValueError, match="tokens: connector avgpool leaves a number of tokens of its own"):
        build_connector(tiny_vision(), {"connector": "avgpool", "tokens": 5})
    with pytest.raises(ValueError, match="tokens: 17 tokens cannot become 2 in 2 layers"):
        tiny_connector(tiny_vision(), tokens=2)
