"""`model.condition: question` inside EVLGen: today's model at the start, then another prompt for each question."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.questions import questions_of
from lavis_evlgen.runners.optim import parameter_groups
from lavis_evlgen.tools.convert.to_released import to_released
from lavis_evlgen.tools.cost.macs import evlgen_cost
from lavis_evlgen.tools.cost.step_memory import step_flops, step_memory
from lavis_evlgen.tools.cost.texts import Texts
from lavis_evlgen.tools.tokens.maps import layer_maps
from lavis_evlgen.weights.bundle import empty_model
from lavis_evlgen.weights.sources import WeightsError
from lavis_evlgen.weights.trainable import trainable_state
from tests.models.test_connectors import config
from tests.tiny import clips, pictures, tiny_connector, tiny_evlgen, tiny_evlgen_video, tiny_language_model, tiny_vision

QUESTIONS = ["what color is the square?", "is it a dog?"]
SAMPLES = {"image": pictures(2), "text_input": ["red", "a dog"], "prompt": ["Q A:", "Q B:"], "question": QUESTIONS}
MORE = {"merge_at": "input", "readout": "group", "skip": "pooled"}
COMBINATIONS = [dict(chosen) for n in range(4) for chosen in itertools.combinations(MORE.items(), n)]
each_combination = pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: "+".join(options) or "alone")
MODULE = "connector.conditioning."


def models(alpha=0.0, make=tiny_evlgen, **options):
    """(today's, one whose merging looks at questions) on the same weights, skip and readout open."""
    plain, model = make(connector=options).eval(), make(connector={"condition": "question", **options}).eval()
    opened(model, alpha)
    found = plain.load_state_dict(model.state_dict(), strict=False)
    assert not found.missing_keys and all(name.startswith(MODULE) for name in found.unexpected_keys)
    return plain, model


def opened(model, alpha=1.0):
    with torch.no_grad():
        model.connector.conditioning.alpha.fill_(alpha)
        for name, parameter in model.named_parameters():  # of skip and readout, so that the body counts
            if name.endswith(("skip.alpha", "readout.alpha")):
                parameter.fill_(0.3)
    return model


@each_combination
def test_at_the_start_it_is_todays_model_for_any_question(options):
    plain, model = models(**options)
    expected = plain.visual_prompt(SAMPLES["image"], return_source=True)
    for questions in (QUESTIONS, QUESTIONS[::-1], None):
        found = model.visual_prompt(SAMPLES["image"], return_source=True, questions=questions)
        assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.source.slot, expected.source.slot)
    for half in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            assert torch.equal(model(SAMPLES)["loss"], plain(SAMPLES)["loss"])


def test_all_else_of_a_new_model_starts_as_without_it():
    torch.manual_seed(0)
    plain = tiny_evlgen(prompt_scale=2).state_dict()
    torch.manual_seed(0)
    model = tiny_evlgen(connector={"condition": "question"}, prompt_scale=2).state_dict()
    assert all(torch.equal(model[name], value) for name, value in plain.items())
    assert {name for name in model if name not in plain} == {
        MODULE + name for name in ("alpha", "query.weight", "key.weight")
    }


@each_combination
@torch.no_grad()
def test_questions_give_different_tokens_once_alpha_has_moved(options):
    plain, model = models(1.0, **options)
    image = SAMPLES["image"][:1].expand(2, -1, -1, -1)
    tokens = model.visual_prompt(image, questions=QUESTIONS).tokens
    assert (tokens[0] - tokens[1]).abs().max() > 1e-2
    today = plain.visual_prompt(image).tokens  # without a question, or with an empty one
    assert torch.equal(model.visual_prompt(image).tokens, today)
    empty = model.visual_prompt(image, questions=["", QUESTIONS[1]]).tokens
    torch.testing.assert_close(empty[0], today[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(model.visual_prompt(image, questions=QUESTIONS[0]).tokens[1], tokens[0])


@torch.no_grad()
def test_a_question_alone_is_as_beside_longer_ones():
    _, model = models(1.0, skip="pooled")
    lm, questions = model.language_model, ["dog?", "two cats sleep on a wooden table, or is it a dog on the grass?", ""]
    together = lm.mean_embeddings(questions)
    for question, found in zip(questions, together, strict=True):
        assert torch.equal(lm.mean_embeddings([question])[0], found)
        ids = lm.text.encode(question)
        expected = lm.embed[0].weight[ids].mean(0) if ids else torch.zeros(32)
        torch.testing.assert_close(found, expected)
    image = pictures(3)
    batch = model.visual_prompt(image, questions=questions, return_source=True)
    for i in range(3):
        alone = model.visual_prompt(image[i : i + 1], questions=questions[i : i + 1], return_source=True)
        torch.testing.assert_close(alone.tokens[0], batch.tokens[i], rtol=1e-4, atol=1e-5)
        assert torch.equal(alone.source.slot[0], batch.source.slot[i])


@pytest.mark.parametrize("kind", ["llama", "opt"])
@torch.no_grad()
def test_the_mean_has_neither_bos_nor_padding(kind):
    lm = tiny_language_model(kind)
    before = lm.mean_embeddings(QUESTIONS)
    lm.embed[0].weight[[lm.text.bos_id, lm.text.pad_id]] += 100
    assert torch.equal(lm.mean_embeddings(QUESTIONS), before) and before.dtype == torch.float32


@each_combination
def test_gradients_reach_alpha_first_and_then_both_matrices(options):
    model = tiny_evlgen(connector={"condition": "question", **options}, lr_scale={"gates": 3.0})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {name for name in trained if name.startswith(MODULE)}
    model(SAMPLES)["loss"].backward()
    assert all(p.grad is not None for p in trained.values())
    assert {name for name in own if trained[name].grad.any()} == {MODULE + "alpha"}
    opened(model, 0.2)(SAMPLES)["loss"].backward()
    assert {name for name in own if trained[name].grad.any()} == own
    model.zero_grad()
    model({key: SAMPLES[key] for key in ("image", "text_input")})["loss"].backward()  # captions: DDP waits for nothing
    assert all(trained[name].grad is not None and not trained[name].grad.any() for name in own)
    assert model.part_of(MODULE + "alpha") == "gates" and model.part_of(MODULE + "key.weight") == "connector"
    gates = next(g for g in parameter_groups(model, 0.1) if any(trained[MODULE + "alpha"] is p for p in g["params"]))
    assert (gates["weight_decay"], gates["lr_scale"]) == (0, 3)


@torch.no_grad()
def test_several_questions_of_a_picture_are_each_in_a_row_of_their_own():
    """Packed, the ViT runs once a picture, and the losses are those of the questions one by one."""
    _, model = models(1.0)
    questions, answers = [*QUESTIONS, "two cats?"], ["red", "a dog", "two"]
    prompts = [f"Question: {question} Short answer:" for question in questions]
    texts = {"text_input": answers, "prompt": prompts, "question": questions}
    encoded = []
    hook = model.visual_encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    samples = {"image": pictures(2), "texts_per_image": [2, 1], **texts}
    prompt = model.prompts_for(samples)
    nats, tokens = model.loss_of(prompt, samples)
    hook.remove()
    assert encoded == [2] and prompt.tokens.shape[0] == 3
    for n, picture in enumerate((0, 0, 1)):
        one = {"image": pictures(2)[picture : picture + 1], **{key: [own[n]] for key, own in texts.items()}}
        alone, count = model.loss_of(model.prompts_for(one), one)
        torch.testing.assert_close(nats[n], alone[0], rtol=1e-5, atol=1e-4)
        assert tokens[n] == count[0]
    stored = {**samples, "image": model.visual_tokens(samples["image"])}  # of run.cache_features
    assert torch.equal(model.prompts_for(stored).tokens, prompt.tokens)
    total = model(samples)
    assert total["loss"].item() == pytest.approx((nats.sum() / tokens.sum()).item(), rel=1e-6)


def test_an_elastic_model_merges_for_the_question_at_each_number_of_tokens():
    elastic = {"elastic": [5, 9], "draw": "sandwich", "beta": 1.0}
    model = opened(tiny_evlgen(connector={"condition": "question", "tome_r": elastic, "merge_at": "input"}))
    samples = {**SAMPLES, "budgets": (9, 5)}
    losses = [model({**samples, "question": questions}) for questions in (QUESTIONS, QUESTIONS[::-1])]
    assert all(losses[0][key] != losses[1][key] for key in ("loss_largest", "loss_other", "loss_kl"))
    for budget in (5, 9):
        one = {"condition": "question", "tome_r": {"target": budget}, "merge_at": "input"}
        fixed = opened(tiny_evlgen(connector=one))
        fixed.load_state_dict(model.state_dict())
        found = model.visual_prompt(SAMPLES["image"], budget=budget, questions=QUESTIONS).tokens
        assert torch.equal(found, fixed.visual_prompt(SAMPLES["image"], questions=QUESTIONS).tokens)


@torch.no_grad()
def test_answers_and_conversations_pass_their_question_on(monkeypatch):
    _, model = models(1.0)
    found = []
    connector = model.connector.forward
    monkeypatch.setattr(model.connector, "forward", lambda *given: found.append(given[1]) or connector(*given))
    expected = model.language_model.mean_embeddings(QUESTIONS)
    model.predict_answers({"image": pictures(2), "text_input": QUESTIONS}, num_beams=1, max_len=2)
    model.generate({"image": pictures(2), "question": QUESTIONS, "prompt": "a"}, num_beams=1, max_length=2)
    model.generate({"image": pictures(2)}, num_beams=1, max_length=2)
    model.extract_features({"image": pictures(2), "question": QUESTIONS})
    assert [None if one is None else torch.equal(one, expected) for one in found] == [True, True, None, True]
    first = {"role": "system", "content": "Be brief."}, {"role": "user", "content": f"<image>\n{QUESTIONS[0]}"}
    told = [*first, {"role": "assistant", "content": "red"}, {"role": "user", "content": "And?"}]
    assert questions_of({"conversations": [told, told[:1]], "question": "another"}) == [QUESTIONS[0], ""]
    assert questions_of({"image": None}) is None
    with pytest.raises(ValueError, match="3 questions about 2 pictures; give one for each picture, or texts_per_image"):
        model.visual_prompt(pictures(2), questions=[*QUESTIONS, "more?"])


@pytest.mark.parametrize("pooling, tokens", [("mean", 9), ("concat", 27), ("connector_mean", 9)])
@torch.no_grad()
def test_each_frame_of_a_clip_is_merged_for_its_clips_question(pooling, tokens):
    model = opened(tiny_evlgen_video(connector={"condition": "question"}, frame_pooling=pooling).eval())
    image = clips(1).expand(2, -1, -1, -1, -1)
    found = model.visual_prompt(image, questions=QUESTIONS).tokens
    assert found.shape == (2, tokens, 32) and (found[0] - found[1]).abs().max() > 1e-2
    seen = model.visual_tokens(image[:1])
    again = model.visual_prompt(seen, questions=QUESTIONS[::-1], pictures=[0, 0]).tokens
    torch.testing.assert_close(again.flip(0), found, rtol=1e-4, atol=1e-5)


@each_combination
@torch.no_grad()
def test_maps_of_tokens_are_those_of_the_question(options):
    _, model = models(4.0, **options)
    image, conditions = pictures(1), model.language_model.mean_embeddings(QUESTIONS)
    cells = []
    for question, condition in zip(QUESTIONS, conditions, strict=True):
        maps = layer_maps(model.visual_encoder, model.ln_vision, model.connector, image, condition[None])
        source = model.visual_prompt(image, return_source=True, questions=question).source
        assert (maps[-1].cells.ravel() == source.slot[0, 1:].numpy()).all()
        cells.append(maps[-1].cells)
    assert (cells[0] != cells[1]).any()


def test_keys_checkpoints_bundles_and_counting(parts, tmp_path):
    """Built from keys, read back by another process's way; a model without it may be gone on from with it."""
    section = config(parts, "tomeformer", condition="question")
    model = opened(EVLGen.from_config(section)).eval()
    expected = model.visual_prompt(SAMPLES["image"], questions=QUESTIONS).tokens
    model.save_pretrained(tmp_path / "bundle")
    loaded = EVLGen.from_pretrained(str(tmp_path / "bundle")).eval()
    assert torch.equal(loaded.visual_prompt(SAMPLES["image"], questions=QUESTIONS).tokens, expected)
    with pytest.raises(WeightsError, match="model.condition=question, which the released code does not have"):
        to_released(str(tmp_path / "bundle"), EVLGen)
    plain = EVLGen.from_config(config(parts, "tomeformer")).eval()
    torch.save({"model": trainable_state(plain)}, tmp_path / "plain.pth")
    read = EVLGen.from_config(config(parts, "tomeformer", condition="question", pretrained=str(tmp_path / "plain.pth")))
    today = plain.visual_prompt(SAMPLES["image"]).tokens
    assert torch.equal(read.eval().visual_prompt(SAMPLES["image"], questions=QUESTIONS).tokens, today)
    torch.save({"model": trainable_state(model)}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="connector.conditioning"):
        EVLGen.from_config(config(parts, "tomeformer", pretrained=str(tmp_path / "model.pth")))
    costs = [evlgen_cost(empty_model(EVLGen, config(parts, "tomeformer", condition=kind)).eval(), 28, 8)
             for kind in ("none", "question")]  # fmt: skip
    without, with_it = (next(part for part in cost.parts if part.name == "connector") for cost in costs)
    assert with_it.parameters - without.parameters == 32 * 16 + 24 * 16
    more = 32 * 16 + 24 * 16 + 17 * 24  # W_q q, W_k' of that, and a product a token
    assert with_it.macs - without.macs == more


@pytest.mark.parametrize("own_prompts", [False, True])
def test_each_question_of_a_picture_is_counted_with_its_own_merging(parts, own_prompts):
    """The ViT once, all behind it once for each of three questions; memory and FLOPs of a step as they are counted."""
    section, texts = config(parts, "tomeformer", condition="question"), Texts(3, True, own_prompts)

    def model():
        return empty_model(EVLGen, section)

    one, three = ({part.name: part.macs for part in evlgen_cost(model().eval(), 28, 8, of).parts}
                  for of in (Texts(1, True), texts))  # fmt: skip
    times = {name: three[name] / one[name] for name in ("vision encoder", "connector", "llm_proj", "language model")}
    prompts = 1 + 2 * own_prompts
    expected = {"vision encoder": 1, "connector": prompts, "llm_proj": prompts, "language model": 3}
    assert times == pytest.approx(expected, rel=0.01)
    flops = [step_flops(model(), (2, 3, 28, 28), 8, of) for of in (Texts(3, True, False), texts)]
    assert (flops[1] > flops[0]) == own_prompts
    assert step_memory(model(), (2, 3, 28, 28), 8, None, texts=texts).working > 0
    cfg = SimpleNamespace(run_cfg=OmegaConf.create({"task": "evlgen_vqa", "texts_per_image": 3}), model_cfg=section)
    assert Texts.of(cfg) == Texts(3, True, True)


def test_bad_values_are_one_error(parts):
    with pytest.raises(ValueError, match="condition: 'always' is not one of none, question"):
        tiny_connector(tiny_vision(), condition="always")
    with pytest.raises(ValueError, match="condition.*always"):
        EVLGen.from_config(config(parts, "tomeformer", condition="always"))
    each = {"average": 9, "least": 7, "most": 12}
    with pytest.raises(ValueError, match="needs condition: none, not question; leave condition out"):
        tiny_connector(tiny_vision(), condition="question", tome_r=each)
    for connector in ("avgpool", "linear", "qformer"):
        with pytest.raises(ValueError, match=f"condition: question needs connector tomeformer.*; {connector} does not"):
            EVLGen.from_config(config(parts, connector, condition="question"))
