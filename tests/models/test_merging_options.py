"""`skip` inside EVLGen: exactly as said at the start, then every parameter learns; other parts know of it."""

import pytest
import torch

from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.runners.optim import parameter_groups
from tests.models.test_connectors import config
from tests.tiny import pictures, tiny_connector, tiny_evlgen, tiny_vision

SAMPLES = {"image": pictures(2), "text_input": ["a red square", "a dog"]}


def connectors(**kw):
    """(today's, one with these options) on the same weights."""
    vision = tiny_vision()
    plain, other = tiny_connector(vision).eval(), tiny_connector(vision, **kw).eval()
    missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected
    return plain, other


@torch.no_grad()
def test_a_skip_starts_as_pooling_over_the_groups_of_today():
    plain, skip = connectors(skip="pooled")
    x = torch.randn(2, 17, 24)
    source = plain(x, return_source=True).source
    prompt = skip(x, return_source=True)
    assert torch.equal(prompt.source.slot, source.slot) and skip(x).source is None
    assert torch.equal(prompt.tokens, source.merge(x) @ skip.skip.proj.weight.T)
    skip.skip.alpha.fill_(0.5)
    torch.testing.assert_close(skip(x).tokens, prompt.tokens + 0.5 * plain(x).tokens)


def test_with_a_skip_every_parameter_learns_and_the_gate_by_itself():
    model = tiny_evlgen(connector={"skip": "pooled"}, lr_scale={"gates": 3.0, "input_proj": 0.5})
    model(SAMPLES)["loss"].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())  # DistributedDataParallel would wait for it
    assert model.connector.skip.alpha.grad.any() and not model.connector.input_proj.weight.grad.any()
    with torch.no_grad():
        model.connector.skip.alpha.fill_(0.1)
    model(SAMPLES)["loss"].backward()
    assert [name for name, p in trained.items() if not p.grad.any()] == [
        name for name in trained if name.endswith("attention.self.key.bias")
    ]
    groups = {group["name"]: group for group in parameter_groups(model, 0.1)}
    gate = groups["gates (no decay)"]
    assert gate["params"] == [model.connector.skip.alpha] and (gate["weight_decay"], gate["lr_scale"]) == (0, 3)
    assert model.connector.skip.proj.weight in set(groups["input_proj"]["params"])


@pytest.mark.parametrize("width", [16, 24])
def test_prompt_scale_knows_that_patches_of_a_group_are_alike(width):
    """Real patches of a group are nearly the same, so the mean is as large as they are, as the body's tokens are."""
    kw = {"connector": {"hidden_size": width, "skip": "pooled"}, "prompt_scale": 6}
    model = tiny_evlgen(**kw).eval()
    alike = model.ln_vision(torch.randn(64, 1, 24)).expand(-1, 17, -1)
    got = model.project(model.connector(alike).tokens).std().item()
    assert got == pytest.approx(6 * model.language_model.embedding_std(), rel=0.2)


@pytest.mark.parametrize("options", [{"skip": "pooled"}])
def test_a_config_key_turns_it_on(parts, options):
    model = EVLGen.from_config(config(parts, "tomeformer", **options))
    assert {key: getattr(model.connector.tomeformer.cfg, key) for key in options} == options
    with pytest.raises(ValueError, match="'always' is not one of"):
        EVLGen.from_config(config(parts, "tomeformer", **dict.fromkeys(options, "always")))
