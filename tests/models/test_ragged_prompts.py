"""`tome_r: {average, least, most}` inside EVLGen: a picture in a batch is what it is alone, wherever prompts go."""

import pytest
import torch

from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.keys import plain
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.lengths import of_histogram, summary_of, tokens_of
from lavis_evlgen.nn import across_picture_share
from lavis_evlgen.tasks.blind_baseline import prompts_of
from lavis_evlgen.tools.tokens.maps import layer_maps, untrained, words_of
from lavis_evlgen.weights.trainable import trainable_state
from tests.models.test_connectors import config
from tests.models.test_merging_options import open_gates
from tests.tiny import clips, pictures, tiny_evlgen, tiny_evlgen_video

SPEC = {"average": 9, "least": 6, "most": 13}
TEXTS = ["a red square", "two cats sleep on a wooden table", "a dog", "a photo of a dog on the grass"]
EVERY = {"readout": "group", "skip": "pooled", "merge_mean": "size", "proportional_attention": True}


def ragged(llm="llama", connector=None, kind=tiny_evlgen, images=None, **kw):
    """A calibrated model in eval mode, all gates open."""
    model = open_gates(kind(llm=llm, connector={"tome_r": SPEC, **(connector or {})}, **kw)).eval()
    model.calibrate([pictures(48, seed=3)] if images is None else images)
    return model


def lengths(prompt):
    return prompt.mask.sum(1).tolist()


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request):
    return ragged(request.param)


@pytest.mark.parametrize("options", [{}, *({key: value} for key, value in EVERY.items()), EVERY])
@torch.no_grad()
def test_tokens_of_a_picture_alone(options):
    model, image = ragged(connector=options), pictures(6)
    batch = model.visual_prompt(image, return_source=True)
    assert batch.tokens.shape == (6, 13, 32) and len(set(lengths(batch))) > 1
    assert batch.tokens.isfinite().all() and (batch.source.sizes().sum(1) == 17).all()
    for i, count in enumerate(lengths(batch)):
        assert batch.mask[i, :count].all() and 6 <= count <= 13
        alone = model.visual_prompt(image[i : i + 1])
        assert lengths(alone) == [count]
        torch.testing.assert_close(alone.tokens[0, :count], batch.tokens[i, :count], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_losses_of_a_picture_alone(model):
    """Also in training mode, and with texts that share a prompt."""
    image, prompt = pictures(4), None
    for training in (False, True):
        model.language_model.train(training)
        prompt = model.visual_prompt(image)
        sums, _ = model.loss_of(prompt, {"text_input": TEXTS})
        packed, _ = model.loss_of(prompt, {"text_input": TEXTS + TEXTS[::-1], "texts_per_image": [2] * 4})
        for i, count in enumerate(lengths(prompt)):
            one = model.visual_prompt(image[i : i + 1])
            one.tokens, one.mask = one.tokens[:, :count], None  # as if nobody else had more
            own, _ = model.loss_of(one, {"text_input": TEXTS[i : i + 1]})
            torch.testing.assert_close(own[0], sums[i], rtol=1e-5, atol=1e-5)
            own, _ = model.loss_of(one, {"text_input": (TEXTS + TEXTS[::-1])[2 * i : 2 * i + 2],
                                         "texts_per_image": [2]})  # fmt: skip
            torch.testing.assert_close(own, packed[2 * i : 2 * i + 2], rtol=1e-5, atol=1e-5)
    assert len(set(lengths(prompt))) > 1


@pytest.mark.parametrize(
    "bos, attention", [("after", "causal"), ("before", "causal"), ("after", "visual"), ("before", "prefix")]
)
@torch.no_grad()
def test_captions_of_a_picture_alone(bos, attention):
    for llm in ("llama", "opt"):
        model = ragged(llm, bos=bos)
        lm = model.language_model
        lm.prompt_attention = type(lm.prompt_attention)(lm.llm, attention)
        image = pictures(4)
        asked = {"image": image, "prompt": ["a", "", "a photo of", "two"]}
        assert len(set(lengths(model.visual_prompt(image)))) > 1
        for beams in (1, 3):
            said = model.generate(asked, num_beams=beams, max_length=6)
            for i, prompt in enumerate(asked["prompt"]):
                one = model.visual_prompt(image[i : i + 1])
                one.tokens, one.mask = one.tokens[:, : lengths(one)[0]], None
                own = {"image": image[i : i + 1], "prompt": [prompt]}
                assert model.generate(own, num_beams=beams, max_length=6) == [said[i]]
                assert model.generate(own, num_beams=beams, max_length=6, visual_prompt=one) == [said[i]]


@torch.no_grad()
def test_drawn_captions_and_their_log_probabilities(model):
    image = pictures(4)
    prompt, samples = model.visual_prompt(image), {"image": image}
    drawing = {"num_samples": 2, "greedy": True, "max_new_tokens": 5}
    rows = model.sample(prompt, samples, seeds=[1, 2, 3, 4], **drawing)
    log_probs, _ = model.log_probs_of(prompt, samples, rows)
    for i in range(4):
        one = prompts_of(prompt, [i])
        one.tokens, one.mask = one.tokens[:, : lengths(prompt)[i]], None
        own = model.sample(one, {"image": image[i : i + 1]}, seeds=[i + 1], **drawing)
        assert own == rows[3 * i : 3 * i + 3]
        found, _ = model.log_probs_of(one, {"image": image[i : i + 1]}, own)
        torch.testing.assert_close(found, log_probs[3 * i : 3 * i + 3], rtol=1e-5, atol=1e-5)


def test_words_and_pictures_of_tokens(model):
    image = pictures(1)
    prompt = model.visual_prompt(image)
    (count,) = lengths(prompt)
    ids, with_padding = model.language_model.token_log_probs(prompt.tokens, "a red dog", "a", prompt.mask)
    _, without = model.language_model.token_log_probs(prompt.tokens[:, :count], "a red dog", "a")
    torch.testing.assert_close(with_padding, without, rtol=1e-5, atol=1e-5)
    words = words_of(model, image, "a red dog")
    assert all(not word.reliance[count:].any() and word.reliance[:count].all() for word in words) and words
    maps = layer_maps(model.visual_encoder, model.ln_vision, model.connector, image)
    assert maps[0].num_tokens == 17 and maps[-1].num_tokens == count < 17


def test_training_learns_everything_and_says_how_long_prompts_are():
    model = open_gates(tiny_evlgen(connector={"tome_r": SPEC, **EVERY}, soft_prompt=True))
    samples = {"image": pictures(4), "text_input": TEXTS}
    out = model(samples)
    out["loss"].backward()
    unmoved = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert unmoved == {f"connector.tomeformer.encoder.layer.{n}.attention.self.key.bias" for n in (0, 1)}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert out["prompt_lengths"].shape == (14,) and out["prompt_lengths"].sum() == 4
    assert of_histogram(out["prompt_lengths"])["prompt_tokens"] == 9
    packed = model({**samples, "image": pictures(2), "texts_per_image": [3, 1]})
    assert packed["loss"].isfinite() and packed["prompt_lengths"].sum() == 2
    assert "prompt_lengths" not in tiny_evlgen()(samples)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(samples)
    assert half["loss"].item() == pytest.approx(out["loss"].item(), rel=0.1)


@torch.no_grad()
def test_the_across_picture_share_leaves_padding_out():
    prompt, mask = torch.randn(5, 7, 4), torch.arange(7) < torch.tensor([7, 3, 4, 3, 6])[:, None]
    assert across_picture_share(prompt, torch.ones(5, 7, dtype=torch.bool)) == pytest.approx(
        across_picture_share(prompt).item(), rel=1e-5
    )
    across = power = 0.0
    for position in range(7):
        own = prompt[mask[:, position], position]
        if len(own) > 1:
            across, power = across + own.var(0, unbiased=False).sum() * len(own), power + own.square().sum()
    assert across_picture_share(prompt, mask) == pytest.approx((across / power).item(), rel=1e-5)
    assert across_picture_share(1e9 * (~mask[..., None]) + prompt * 0 + 2.0 * mask[..., None], mask) < 1e-6


@pytest.mark.parametrize("pooling, most", [("mean", 13), ("concat", 39)])
def test_clips(pooling, most):
    model = ragged(kind=tiny_evlgen_video, images=[clips(16, seed=3)], frame_pooling=pooling)
    image = clips(3)
    prompt = model.visual_prompt(image, return_source=True)
    assert prompt.tokens.shape == (3, most, 32) and len(set(lengths(prompt))) > 1
    said = model.generate({"image": image}, num_beams=2, max_length=5)
    for i in range(3):
        alone = model.visual_prompt(image[i : i + 1])
        assert torch.equal(alone.mask[0], prompt.mask[i])
        torch.testing.assert_close(alone.tokens[alone.mask], prompt.tokens[i][prompt.mask[i]], rtol=1e-4, atol=1e-5)
        assert model.generate({"image": image[i : i + 1]}, num_beams=2, max_length=5) == [said[i]]
    out = model.train()({"image": image, "text_input": TEXTS[:3]})
    out["loss"].backward()
    assert out["prompt_lengths"].sum() == (9 if pooling == "concat" else 3)
    assert f"{most} in the prompt at most, 9 on average of a frame" in model.token_counts()


@pytest.mark.parametrize("pooling", ["connector_mean", "temporal_qformer", "temporal_queries"])
def test_clips_whose_frames_must_agree_are_refused(pooling):
    with pytest.raises(ValueError, match=f"{pooling} needs as many tokens .* frame_pooling mean or concat"):
        tiny_evlgen_video(connector={"tome_r": SPEC}, frame_pooling=pooling)


def test_thresholds_are_in_checkpoints_and_bundles(parts, tmp_path):
    model = EVLGen.from_config(config(parts, "tomeformer", tome_r=SPEC))
    with pytest.raises(ValueError, match="model.tome_r: the weights have no thresholds .* train with it"):
        model.check_calibrated()
    with pytest.raises(ConfigError, match="--before: .* no thresholds yet"):
        untrained(model.visual_encoder, plain(config(parts, "tomeformer", tome_r=SPEC)), 0)
    model.eval().calibrate([pictures(32, seed=3)])
    model.check_calibrated()
    state = trainable_state(model)
    assert torch.equal(state["connector.tomeformer.thresholds"], model.connector.tomeformer.thresholds)
    expected = model.visual_prompt(pictures(4))
    model.save_pretrained(tmp_path / "bundle")
    loaded = EVLGen.from_pretrained(str(tmp_path / "bundle"))
    loaded.check_calibrated()
    found = loaded.visual_prompt(pictures(4))
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.mask, expected.mask)
    fixed = EVLGen.from_config(config(parts, "tomeformer"))
    torch.save({"model": trainable_state(fixed)}, tmp_path / "fixed.pth")
    begun = EVLGen.from_config(config(parts, "tomeformer", tome_r=SPEC, pretrained=str(tmp_path / "fixed.pth")))
    assert torch.equal(begun.llm_proj.weight, fixed.llm_proj.weight)
    with pytest.raises(ValueError, match="thresholds"):
        begun.check_calibrated()


@pytest.mark.parametrize("wrong", [SPEC | {"least": 10}, {"average": 9, "least": 6}, SPEC | {"most": 18}])
def test_wrong_values_are_refused(parts, wrong):
    with pytest.raises(ValueError, match="tome_r: "):
        EVLGen.from_config(config(parts, "tomeformer", tome_r=wrong))


def test_summaries_over_pictures():
    counts = [6] * 10 + [9] * 85 + [13] * 5
    found = summary_of([{"prompt_tokens": count} for count in counts] + [{}])
    assert found == {"prompt_tokens": sum(counts) / 100, "prompt_tokens_p5": 6, "prompt_tokens_p95": 9}
    assert summary_of([{}]) == {} and tokens_of(tiny_evlgen().visual_prompt(pictures(2))) == [{}, {}]
