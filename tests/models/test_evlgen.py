"""EVLGen on tiny parts: who learns, what generate and its relatives return, how the prompt starts."""

import pytest
import torch
from safetensors.torch import save_file

from lavis_evlgen.weights.sources import WeightsError
from lavis_evlgen.weights.trainable import frozen_names
from tests.tiny import pictures, tiny_clip, tiny_evlgen, tiny_siglip, tiny_vision

TEXTS = ["a red square", "two cats sleep on a wooden table", "dog"]
KINDS = pytest.mark.parametrize("llm", ["llama", "opt"])


def samples(batch=3, **more):
    return {"image": pictures(batch), "text_input": TEXTS[:batch], **more}


@KINDS
@pytest.mark.parametrize("soft_prompt", [False, True])
def test_exactly_the_parts_learn(llm, soft_prompt):
    model = tiny_evlgen(llm, soft_prompt=soft_prompt)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    output = model(samples())
    output["loss"].backward()
    parts = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.add(model.part_of(name))
            if "token_type" not in name and not name.endswith("key.bias"):  # their gradients are 0
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert name.startswith(("visual_encoder.", "language_model.")) and parameter.grad is None, name
    assert parts == set(model.PARTS) - {"gates", "language_model"} - (set() if soft_prompt else {"soft_prompt"})
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    for name, value in model.state_dict().items():
        frozen = name.startswith(("visual_encoder.", "language_model."))
        if frozen:
            assert torch.equal(value, before[name]), name
    assert not torch.equal(model.llm_proj.weight, before["llm_proj.weight"])


def test_training_mode_stops_at_the_frozen_parts():
    model = tiny_evlgen().train()
    assert model.connector.training
    assert not any(m.training for m in model.visual_encoder.modules())
    assert not any(m.training for m in model.language_model.llm.modules())


@KINDS
@torch.no_grad()
def test_the_loss_is_the_mean_over_supervised_tokens(llm):
    model = tiny_evlgen(llm).eval()
    whole = model(samples())
    total = count = 0
    for i in range(3):
        one = model({"image": pictures(3)[i : i + 1], "text_input": TEXTS[i : i + 1]})
        total += one["loss"].item() * one["loss_tokens"].item()
        count += one["loss_tokens"].item()
    assert whole["loss_tokens"].item() == count
    assert whole["loss"].item() == pytest.approx(total / count, rel=1e-5)


def test_a_few_steps_learn_three_captions():
    model = tiny_evlgen()
    batch = samples()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    first = model(batch)["loss"].item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 2


@torch.no_grad()
def test_the_share_of_variance_sees_a_collapse():
    model = tiny_evlgen().eval()
    assert 0.01 < model(samples())["across_picture_share"].item() <= 1
    same = samples() | {"image": pictures(1).expand(3, -1, -1, -1)}
    assert model(same)["across_picture_share"].item() < 1e-6


@pytest.mark.parametrize("kind, tokens", [(tiny_clip, 17), (tiny_siglip, 16)])
def test_other_vision_encoders(kind, tokens):
    model = tiny_evlgen(vision=tiny_vision(kind))
    prompt = model.visual_prompt(pictures(2), return_source=True)
    assert prompt.tokens.shape == (2, tokens - 8, 32) and prompt.source.slot.shape == (2, tokens)
    assert prompt.mask is None
    alone = (prompt.source.sizes()[:, 0] == 1).all()
    assert alone or kind is tiny_siglip  # nothing is protected where there is no [CLS]


@KINDS
def test_generate_returns_num_captions_for_each_picture(llm):
    model = tiny_evlgen(llm).eval()
    beams = model.generate(samples(), num_beams=3, max_length=6)
    assert len(beams) == 3 and all(isinstance(text, str) for text in beams)
    several = model.generate(samples(), num_beams=3, max_length=6, num_captions=2)
    assert several[::2] == beams and len(several) == 6  # the captions of a picture stand together
    assert any(several[2 * i] != several[2 * i + 1] for i in range(3))
    torch.manual_seed(0)
    sampled = model.generate(samples(), use_nucleus_sampling=True, num_captions=4, max_length=6)
    assert len(sampled) == 12 and len(set(sampled)) > 6
    torch.manual_seed(0)
    again = model.generate(samples(), use_nucleus_sampling=True, num_captions=4, max_length=6)
    assert again == sampled
    narrow = model.generate(samples(), use_nucleus_sampling=True, top_p=1e-6, max_length=6)
    assert narrow == model.generate(samples(), num_beams=1, max_length=6)
    with pytest.raises(ValueError, match="num_captions=4 needs num_beams >= 4, got 3"):
        model.generate(samples(), num_beams=3, num_captions=4)


def test_generate_counts_new_tokens():
    model = tiny_evlgen("opt").eval()
    short = model.generate(samples(), num_beams=2, max_length=3)
    longer = model.generate(samples(), num_beams=2, max_length=12, min_length=12)
    encode = model.language_model.text.tokenizer.encode
    assert all(len(a) < len(b) for a, b in zip(map(encode, short), map(encode, longer), strict=True))


def test_generate_takes_prompts_and_a_computed_visual_prompt():
    model = tiny_evlgen().eval()
    kw = {"num_beams": 2, "max_length": 6}
    plain = model.generate(samples(), **kw)
    asked = model.generate(samples(prompt="a photo of"), **kw)
    assert asked != plain
    assert model.generate(samples(prompt=["a photo of", "", "a photo of"]), **kw) == [
        asked[0],
        plain[1],
        asked[2],
    ]
    own = tiny_evlgen(prompt="a photo of ").eval()
    assert own.generate(samples(), **kw) == asked
    prompt = model.visual_prompt(pictures(3))
    assert model.generate({"prompt": "a photo of"}, visual_prompt=prompt, **kw) == asked
    with pytest.raises(ValueError, match="2 prompts for 3 pictures"):
        model.generate(samples(prompt=["one", "two"]), **kw)


def test_nucleus_sampling_is_not_cut_to_the_top_50(monkeypatch):
    model, seen = tiny_evlgen().eval(), {}
    real = model.language_model.llm.generate
    monkeypatch.setattr(model.language_model.llm, "generate", lambda **kw: seen.update(kw) or real(**kw))
    model.generate(samples(), use_nucleus_sampling=True, top_p=0.7, temperature=0.5, max_length=3)
    expected = {"do_sample": True, "top_p": 0.7, "temperature": 0.5, "top_k": 0, "num_beams": 1}
    assert expected.items() <= seen.items()


def test_questions_are_put_in_the_prompt(monkeypatch):
    model, seen = tiny_evlgen().eval(), {}
    answers = model.predict_answers(samples(text_input=["what color?", "how many cats?", "why"]), max_len=4)
    assert len(answers) == 3
    real = model.language_model.llm.generate

    def spy(**kwargs):
        seen.update(kwargs)
        return real(**kwargs)

    prompts = []
    encode = model.language_model.text.encode
    monkeypatch.setattr(model.language_model.llm, "generate", spy)
    monkeypatch.setattr(
        model.language_model.text, "encode", lambda text: prompts.append(text) or encode(text)
    )
    model.predict_answers(samples(text_input=["what color?", "how many cats?", "why"]), max_len=4)
    assert prompts[0] == "Question: what color? Short answer:"
    expected = {"num_beams": 5, "max_new_tokens": 4, "min_new_tokens": 1, "length_penalty": 0.0}
    assert expected.items() <= seen.items()
    mask = seen["attention_mask"]
    assert (mask[:, -1] == 1).all() and (mask[2, 0] == 0)  # padded on the left
    prompts.clear()
    assert len(model.predict_answers(samples(1, text_input="why"), prompt="Q: {} A:", max_len=3)) == 1
    assert prompts == ["Q: why A:"]
    with pytest.raises(ValueError, match="inference_method: 'rank'"):
        model.predict_answers(samples(), inference_method="rank")


def test_features_of_connector_and_prompt():
    model = tiny_evlgen().eval()
    features = model.extract_features(samples())
    assert features.image_embeds.shape == (3, 9, 16)
    assert features.image_embeds_proj.shape == (3, 9, 32)
    assert torch.equal(features.image_embeds_proj, model.visual_prompt(pictures(3)).tokens)
    assert not features.image_embeds.requires_grad
    with pytest.raises(ValueError, match="mode: 'text'"):
        model.extract_features(samples(), mode="text")


@KINDS
def test_the_prompt_starts_at_the_size_of_the_embeddings(llm):
    model = tiny_evlgen(llm, prompt_scale="embedding").eval()
    expected = model.language_model.embedding_std()
    got = model.visual_prompt(pictures(8)).tokens.std().item()
    assert got == pytest.approx(expected, rel=0.2)
    tripled = tiny_evlgen(llm, prompt_scale=3).eval().visual_prompt(pictures(8)).tokens.std().item()
    assert tripled == pytest.approx(3 * expected, rel=0.2)
    released = tiny_evlgen(llm, prompt_scale="released").eval().visual_prompt(pictures(8)).tokens.std().item()
    assert abs(released - expected) > 0.2 * expected
    assert model.train().connector.training


def test_unknown_parts_and_scales_are_refused():
    with pytest.raises(ValueError, match="unknown part vit; the parts are ln_vision, input_proj"):
        tiny_evlgen(lr_scale={"vit": 0.1})
    with pytest.raises(ValueError, match="prompt_scale: 'big' is not released, embedding or a number above 0"):
        tiny_evlgen(prompt_scale="big")
    model = tiny_evlgen(lr_scale={"connector": 0.1})
    assert model.lr_scale == {**dict.fromkeys(model.PARTS, 1.0), "connector": 0.1}


def test_a_soft_prompt_starts_without_a_trace_and_belongs_to_its_place(tmp_path, caplog):
    plain, soft = tiny_evlgen().eval(), tiny_evlgen(soft_prompt=True).eval()
    start = plain.visual_prompt(pictures(2)).tokens
    assert torch.equal(soft.visual_prompt(pictures(2)).tokens, start)
    with torch.no_grad():
        soft.soft_prompt.copy_(torch.randn(9, 32))
    torch.testing.assert_close(soft.visual_prompt(pictures(2)).tokens, start + soft.soft_prompt)
    features = soft.extract_features(samples(2)).image_embeds_proj
    assert torch.equal(features, soft.visual_prompt(pictures(2)).tokens)
    save_file({k: v for k, v in plain.state_dict().items() if k not in frozen_names(plain)}, tmp_path / "p.safetensors")
    save_file({k: v for k, v in soft.state_dict().items() if k not in frozen_names(soft)}, tmp_path / "s.safetensors")
    before = soft.soft_prompt.clone()
    caplog.set_level("INFO")
    soft.load_checkpoint(str(tmp_path / "p.safetensors"))  # a model without one may be gone on from with one
    assert torch.equal(soft.soft_prompt, before) and "soft_prompt" in caplog.text
    with pytest.raises(WeightsError, match="1 tensors have no place in this model, first soft_prompt"):
        plain.load_checkpoint(str(tmp_path / "s.safetensors"))
    with pytest.raises(ValueError, match="soft_prompt: 1 is not true or false"):
        tiny_evlgen(soft_prompt=1)


def test_stored_tokens_stand_for_their_pictures():
    model, image = tiny_evlgen().eval(), pictures(3)
    tokens = model.visual_encoder(image)
    assert torch.equal(model.visual_prompt(tokens).tokens, model.visual_prompt(image).tokens)
    samples = {"text_input": ["a red square", "a dog", "two cats"]}
    assert model({"image": tokens, **samples})["loss"] == model({"image": image, **samples})["loss"]
    assert model.generate({"image": tokens}, num_beams=1) == model.generate({"image": image}, num_beams=1)
    with pytest.raises(ValueError, match=r"of shape \(3, 28, 28\); pictures are \(B, 3, H, W\), and the stored tokens"):
        model.visual_prompt(image[0])
