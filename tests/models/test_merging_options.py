"""`merge_at`, `readout` and `skip` inside EVLGen: exactly as said at the start, then every parameter learns."""

import itertools
import shutil

import pytest
import torch
from torch.nn import functional as F

from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.runners.optim import parameter_groups
from lavis_evlgen.tools.tokens.maps import layer_maps
from lavis_evlgen.weights.sources import WeightsError
from lavis_evlgen.weights.trainable import trainable_state
from tests.models.test_connectors import config
from tests.nn.test_fold import slow_fold
from tests.processes import on_two_ranks
from tests.run_tools import Runs, checkpoint, losses, same_tensors
from tests.tiny import clips, pictures, tiny_connector, tiny_evlgen, tiny_evlgen_video, tiny_vision

SAMPLES = {"image": pictures(2), "text_input": ["a red square", "a dog"]}
OPTIONS = {"merge_at": "input", "readout": "group", "skip": "pooled"}
COMBINATIONS = [dict(chosen) for n in (1, 2, 3) for chosen in itertools.combinations(OPTIONS.items(), n)]
each_combination = pytest.mark.parametrize("options", COMBINATIONS, ids="+".join)


def connectors(**kw):
    """(today's, one with these options) on the same weights, and two pictures' tokens."""
    vision = tiny_vision()
    plain, other = tiny_connector(vision).eval(), tiny_connector(vision, **kw).eval()
    missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith(("readout.", "skip.")) for name in missing)
    return plain, other, torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(5))


def open_gates(model, alpha=0.1):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("connector.") and name.endswith(".alpha"):
                parameter.fill_(alpha)
    return model


@torch.no_grad()
def test_said_to_be_off_it_is_todays_model():
    plain, off, x = connectors(merge_at="layers", readout="none", skip="none")
    torch.manual_seed(0)
    first = tiny_evlgen().state_dict()
    torch.manual_seed(0)
    second = tiny_evlgen(connector={"merge_at": "layers", "readout": "none", "skip": "none"}).state_dict()
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(plain(x).tokens, off(x, features=torch.randn_like(x)).tokens)


@torch.no_grad()
def test_a_readout_starts_as_todays_model():
    plain, readout, x = connectors(readout="group")
    assert torch.equal(readout(x).tokens, plain(x).tokens) and readout(x).source is None
    readout.readout.alpha.fill_(0.5)
    source = plain(x, return_source=True).source
    assert torch.equal(readout(x).tokens, readout.readout(plain(x).tokens, x, source))
    assert not torch.equal(readout(x).tokens, plain(x).tokens)


@torch.no_grad()
def test_a_skip_starts_as_pooling_over_the_groups_of_today():
    plain, skip, x = connectors(skip="pooled")
    source = plain(x, return_source=True).source
    prompt = skip(x, return_source=True)
    assert torch.equal(prompt.source.slot, source.slot) and skip(x).source is None
    assert torch.equal(prompt.tokens, F.linear(source.merge(x), skip.skip.proj.weight))
    skip.skip.alpha.fill_(0.5)
    torch.testing.assert_close(skip(x).tokens, prompt.tokens + 0.5 * plain(x).tokens)


@torch.no_grad()
def test_merging_first_follows_the_frozen_features_and_nothing_that_trains():
    plain, first, x = connectors(merge_at="input", skip="pooled")
    features = torch.randn_like(x)
    prompt = first(x, return_source=True, features=features)
    assert prompt.tokens.shape == plain(x).tokens.shape and first.tomeformer.cfg.folds == [8]
    for i in range(2):
        groups = slow_fold(features[i].double(), [8], 1)
        assert [sorted(group) for group in groups] == [
            (prompt.source.slot[i] == s).nonzero().flatten().tolist() for s in range(9)
        ]
        means = torch.stack([x[i, group].mean(0) for group in groups])
        torch.testing.assert_close(prompt.tokens[i], means @ first.skip.proj.weight.T)
    first.input_proj.weight.normal_()  # nor do the tokens behind ln_vision count
    again = first(3 + x.flip(-1), return_source=True, features=features).source
    assert torch.equal(again.slot, prompt.source.slot)
    with pytest.raises(ValueError, match="merge_at: input compares the ViT's own features"):
        first(x)


@each_combination
def test_every_parameter_learns_once_the_gates_are_open(options):
    """Before that none is without a gradient, for which DistributedDataParallel would wait."""
    model = tiny_evlgen(connector=options, lr_scale={"gates": 3.0, "input_proj": 0.5})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model(SAMPLES)["loss"].backward()
    assert all(p.grad is not None for p in trained.values())
    gates = [name for name in trained if name.startswith("connector.") and name.endswith(".alpha")]
    assert len(gates) == len({"readout", "skip"} & set(options)) and all(trained[name].grad.any() for name in gates)
    open_gates(model)(SAMPLES)["loss"].backward()
    unmoved = {name for name, p in trained.items() if not p.grad.any()}
    assert unmoved == {name for name in trained if name.endswith("attention.self.key.bias")}
    assert {name for name in trained if model.part_of(name) == "gates"} == set(gates)
    for group in parameter_groups(model, 0.1):
        if set(gates) & {name for name, p in trained.items() if any(p is one for one in group["params"])}:
            assert (group["weight_decay"], group["lr_scale"], len(group["params"])) == (0, 3, len(gates))
    assert "skip" not in options or model.part_of("connector.skip.proj.weight") == "input_proj"


@each_combination
@torch.no_grad()
def test_a_picture_alone_is_as_in_a_batch_and_has_a_source_map(options):
    model = open_gates(tiny_evlgen(connector=options)).eval()
    image = pictures(3)
    batch = model.visual_prompt(image, return_source=True)
    assert batch.tokens.shape == (3, 9, 32) and (batch.source.sizes().sum(1) == 17).all()
    for i in range(3):
        alone = model.visual_prompt(image[i : i + 1], return_source=True)
        torch.testing.assert_close(alone.tokens[0], batch.tokens[i], rtol=1e-4, atol=1e-5)
        assert torch.equal(alone.source.slot[0], batch.source.slot[i])
    maps = layer_maps(model.visual_encoder, model.ln_vision, model.connector, image[:1])
    assert [found.num_tokens for found in maps] == ([17, 9] if "merge_at" in options else [17, 13, 9])
    assert (maps[-1].cells.ravel() == batch.source.slot[0, 1:].numpy()).all()


@pytest.mark.parametrize("pooling, tokens", [("mean", 9), ("concat", 27), ("connector_mean", 9)])
def test_clips_take_all_of_them(pooling, tokens):
    model = open_gates(tiny_evlgen_video(connector=OPTIONS, frame_pooling=pooling))
    assert model.visual_prompt(clips(2)).tokens.shape == (2, tokens, 32)
    model({"image": clips(2), "text_input": SAMPLES["text_input"]})["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("width", [16, 24])
def test_prompt_scale_knows_that_patches_of_a_group_are_alike(width):
    """Real patches of a group are nearly the same, so the mean is as large as they are, as the body's tokens are."""
    kw = {"connector": {"hidden_size": width, "skip": "pooled"}, "prompt_scale": 6}
    model = tiny_evlgen(**kw).eval()
    alike = model.ln_vision(torch.randn(64, 1, 24)).expand(-1, 17, -1)
    got = model.project(model.connector(alike).tokens).std().item()
    assert got == pytest.approx(6 * model.language_model.embedding_std(), rel=0.2)


def test_config_keys_checkpoints_and_bundles(parts, tmp_path):
    """Built from keys, read back by another process's way; a model without a readout may be gone on from with one."""
    model = open_gates(EVLGen.from_config(config(parts, "tomeformer", **OPTIONS))).eval()
    assert {key: getattr(model.connector.tomeformer.cfg, key) for key in OPTIONS} == OPTIONS
    expected = model.visual_prompt(SAMPLES["image"]).tokens
    model.save_pretrained(tmp_path / "bundle")
    loaded = EVLGen.from_pretrained(str(tmp_path / "bundle")).eval()
    assert torch.equal(loaded.visual_prompt(SAMPLES["image"]).tokens, expected)
    plain = EVLGen.from_config(config(parts, "tomeformer")).eval()
    torch.save({"model": trainable_state(plain)}, tmp_path / "plain.pth")
    start = {"pretrained": str(tmp_path / "plain.pth")}
    read = EVLGen.from_config(config(parts, "tomeformer", readout="group", **start)).eval()
    assert torch.equal(read.visual_prompt(SAMPLES["image"]).tokens, plain.visual_prompt(SAMPLES["image"]).tokens)
    with pytest.raises(WeightsError, match="connector.skip"):  # it would start as another model
        EVLGen.from_config(config(parts, "tomeformer", skip="pooled", **start))


@pytest.mark.parametrize("key", OPTIONS)
def test_unknown_values_are_refused(parts, key):
    with pytest.raises(ValueError, match=f"{key}: 'always' is not one of"):
        tiny_connector(tiny_vision(), **{key: "always"})
    with pytest.raises(ValueError, match=f"{key}.*always"):
        EVLGen.from_config(config(parts, "tomeformer", **{key: "always"}))


def test_runs_resume_bit_equal_and_two_ranks_are_one(parts, tmp_path):
    """Four steps with everything on; the gates have moved."""
    one = Runs(parts, tmp_path, max_iters=4, iters_per_inner_epoch=2, batch_size_train=4, valid_splits=[])
    one.config["model"] |= {"dropout": 0.0, **OPTIONS}
    two = one.copy(tmp_path / "two", batch_size_train=2)
    (tmp_path / "two").mkdir()
    one.train()
    on_two_ranks(two)
    whole = losses(one.output())
    assert list(losses(two.output()).values()) == pytest.approx(list(whole.values()), rel=1e-5, abs=1e-5)
    expected = checkpoint(one.output())["model"]
    assert all(expected[f"connector.{name}.alpha"].any() for name in ("readout", "skip"))
    again = one.output("again")
    again.mkdir()
    half = shutil.copy(one.output() / "checkpoint_previous.pth", again)
    assert checkpoint(again, "checkpoint_previous.pth")["step"] == 2
    one.train("run.run_name=again", f"run.resume_ckpt_path={half}")
    assert same_tensors(checkpoint(again)["model"], expected)
    assert losses(again) == {step: loss for step, loss in whole.items() if step > 2}
