"""Describing: r of one request changes nothing for others, answers are the task's, tokens lie on the right frames."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lavis_evlgen.demo.describing import (
    Refused,
    Settings,
    describe,
    facts,
    largest_r,
    maps_of,
    tokens_picture,
    with_r,
)
from lavis_evlgen.models.connectors import build_connector
from lavis_evlgen.models.connectors.pooling import LinearConnector
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.processors.images import EvlgenImageEvalProcessor
from tests.tiny import (
    IMAGE_SIZE,
    clips,
    pictures,
    tiny_evlgen,
    tiny_evlgen_video,
    tiny_language_model,
    tiny_vision,
)

SHORT = {"num_beams": 1, "max_length": 8}


def test_a_model_that_merges_first_says_so_and_takes_another_r():
    model = tiny_evlgen(connector={"merge_at": "input", "readout": "group", "skip": "pooled"}).eval()
    found = describe(model, pictures(1), Settings(r=5, **SHORT))
    assert (found.prompt, found.schedule, found.folds) == (7, (0, 0), (8, 2))
    assert "**17** visual tokens → **7** in the prompt (merges before the first layer: 8, 2)" in facts(found)


@pytest.mark.parametrize("r, tokens", [(0, 17), (3, 11), (8, 5)])
def test_r_is_what_a_model_built_with_it_does(r, tokens):
    """One layer merges at most 8 of 16 patches, then 4 of 8."""
    shared, built = tiny_evlgen().eval(), tiny_evlgen(connector={"tome_r": r}).eval()
    found = describe(shared, pictures(1), Settings(r=r, num_beams=3, max_length=8))
    assert found.text == " ".join(built.generate({"image": pictures(1)}, num_beams=3, max_length=8)[0].split())
    assert (found.visual, found.prompt, found.schedule) == (17, tokens, (r, r))
    expected = built.visual_prompt(pictures(1), return_source=True).source
    assert torch.equal(found.source.slot, expected.slot) and found.source.num_slots == tokens
    assert with_r(shared, r).connector.num_output_tokens == tokens


def test_a_model_whose_pictures_have_numbers_of_their_own_takes_one_for_all():
    model = tiny_evlgen(connector={"tome_r": {"average": 9, "least": 6, "most": 13}}).eval()
    built = tiny_evlgen(connector={"tome_r": {"target": 11}}).eval()
    found = describe(model, pictures(1), Settings(tokens=11, **SHORT))
    assert (found.prompt, found.schedule) == (11, tuple(built.connector.tomeformer.cfg.schedule))
    assert found.text == describe(built, pictures(1), Settings(**SHORT)).text


def test_the_model_stays_as_it_was():
    model = tiny_evlgen().eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, modules = describe(model, pictures(1), Settings(**SHORT)), dict(model.named_modules())
    assert describe(model, pictures(1), Settings(r=0, **SHORT)).prompt == 17
    assert before.schedule == (4, 4) and before.prompt == 9
    after = describe(model, pictures(1), Settings(**SHORT))
    assert (after.text, after.schedule, after.prompt) == (before.text, before.schedule, before.prompt)
    assert dict(model.named_modules()) == modules and not any(module.training for module in modules.values())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    view = dict(with_r(model, 2).named_parameters())
    assert all(view[name] is parameter for name, parameter in model.named_parameters()), "a view copies no weight"


def test_requests_with_different_r_at_the_same_time_do_not_meet():
    model = tiny_evlgen().eval()
    asked = [(Settings(r=r, **SHORT), pictures(1, seed)) for seed in range(3) for r in (0, 2, 5, 8, None)]

    def say(request):
        found = describe(model, request[1], request[0])
        return found.text, found.prompt, found.source.slot.tolist()

    alone = [say(request) for request in asked]
    assert len({tuple(map(str, answer)) for answer in alone}) > 10, "alike answers would hide a mix-up"
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(say, asked)) == alone


def test_prompts_lengths_and_decoding_reach_the_language_model():
    model = tiny_evlgen(prompt="a photo of").eval()
    image = pictures(1)
    plain = describe(model, image, Settings(**SHORT))
    assert plain.asked == "a photo of" and plain.said == len(model.language_model.text.encode(plain.text))
    assert plain.text == " ".join(model.generate({"image": image}, num_beams=1, max_length=8)[0].split())
    other = describe(model, image, Settings(prompt="two cats", **SHORT))
    expected = model.generate({"image": image, "prompt": "two cats"}, num_beams=1, max_length=8)[0]
    assert other.text == " ".join(expected.split()) != plain.text
    short = describe(model, image, Settings(num_beams=1, max_length=1)).text
    assert short == " ".join(model.generate({"image": image}, num_beams=1, max_length=1)[0].split()) != plain.text
    penalty = describe(model, image, Settings(more={"repetition_penalty": 3.0, "max_length": 99}, **SHORT))
    expected = model.generate({"image": image}, num_beams=1, max_length=8, repetition_penalty=3.0)[0]
    assert penalty.text == " ".join(expected.split()), "the run's other decoding keys count, the visitor's replace them"


def test_a_question_is_asked_as_the_task_asks_it():
    model = tiny_evlgen(max_txt_len=64).eval()
    question = "what color is {the} square?"
    found = describe(model, pictures(1), Settings(question=f" {question} ", num_beams=2, max_length=6))
    expected = model.predict_answers({"image": pictures(1), "text_input": [question]}, num_beams=2, max_len=6)[0]
    assert found.text == " ".join(expected.split())
    assert found.asked == f"Question: {question} Short answer:"
    asked = {"image": pictures(1), "text_input": [question]}
    settings = {"question": question, "num_beams": 1, "max_length": 20}
    plain = describe(model, pictures(1), Settings(**settings))
    decoding = {"repetition_penalty": 3.0, "length_penalty": -5.0}  # the second is of captions
    penalty = describe(model, pictures(1), Settings(**settings, more=decoding))
    expected = model.predict_answers(asked, num_beams=1, max_len=20, repetition_penalty=3.0)[0]
    assert penalty.text == " ".join(expected.split()) != plain.text


@pytest.mark.parametrize(
    "chosen, says",
    [
        ({"num_beams": 0}, "beams: 0 is outside 1 to 10"),
        ({"num_beams": 1.5}, "beams: 1.5 is no whole number"),
        ({"max_length": float("inf")}, "longest: inf is no whole number"),
        ({"max_length": None}, "longest: None is no whole number"),
        ({"max_length": 101}, "longest: 101 is outside"),
        ({"min_length": 9, "max_length": 8}, r"shortest \(9 tokens\) is above longest \(8\)"),
        ({"prompt": "x" * 501}, "the prompt has 501 letters; at most 500"),
        ({"question": " "}, "ask a question first"),
    ],
)
def test_settings_that_cannot_be(chosen, says):
    with pytest.raises(Refused, match=says):
        Settings(**chosen)
    assert Settings(num_beams=2.0).num_beams == 2


def test_r_that_cannot_be():
    model = tiny_evlgen().eval()
    assert largest_r(model) == 8
    for r in (-1, 9, 2.5):
        with pytest.raises(Refused, match="r: "):
            with_r(model, r)
    vision = tiny_vision()
    linear = EVLGen(vision, LinearConnector(vision.width, vision.num_tokens), tiny_language_model()).eval()
    assert largest_r(linear) is None
    with pytest.raises(Refused, match="LinearConnector does not merge tokens"):
        describe(linear, pictures(1), Settings(r=1))
    found = describe(linear, pictures(1), Settings(**SHORT))
    assert found.schedule is None and found.prompt == 17 and "merges" not in facts(found)


def test_facts_tell_tokens_and_time():
    found = describe(tiny_evlgen().eval(), pictures(1), Settings(**SHORT))
    words = facts(found)
    assert "**17** visual tokens → **9** in the prompt (merges of each layer: 4, 4)" in words
    assert found.seeing > 0 and found.saying > 0 and f"**{found.saying:.2f} s** to say" in words


@pytest.mark.parametrize("pooling, tokens, alike", [("mean", 9, True), ("concat", 27, False)])
def test_tokens_of_a_clip_lie_on_its_frames(pooling, tokens, alike):
    model = tiny_evlgen_video(frame_pooling=pooling, temporal=False).eval()
    clip = clips(1)
    found = describe(model, clip, Settings(**SHORT))
    maps = maps_of(found, clip, model.visual_encoder.protected)
    assert (found.visual, found.prompt, len(maps)) == (51, tokens, 3)
    if alike:
        assert all((one.cells == maps[0].cells).all() for one in maps)
    else:  # each frame by itself, its tokens after those of the frames before
        image_model = tiny_evlgen().eval()
        for n, one in enumerate(maps):
            alone = describe(image_model, clip[:, :, n], Settings(**SHORT)).source.slot[0, 1:]
            assert (one.cells.ravel() == alone.numpy() + 9 * n).all()
    assert describe(model, clip[:, :, :1], Settings(r=2, **SHORT)).prompt == 13


def test_without_a_map_the_picture_is_shown_and_the_reason_told():
    processor = EvlgenImageEvalProcessor(IMAGE_SIZE, mean="half")
    vision = tiny_vision()
    sizes = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
    qformer = build_connector(vision, {"connector": "qformer", "connector_sizes": sizes, "num_layers": 2})
    model = EVLGen(vision, qformer, tiny_language_model()).eval()
    found = describe(model, pictures(1), Settings(**SHORT))
    drawing, note = tokens_picture(found, pictures(1), processor, vision.protected, "mean")
    assert "QFormerConnector has no source map" in note and np.asarray(drawing).std() > 10
    mean = tiny_evlgen_video(frame_pooling="connector_mean").eval()
    found = describe(mean, clips(1), Settings(**SHORT))
    assert "a token has other patches in each frame" in tokens_picture(found, clips(1), processor, 1, "mean")[1]
    drawing, note = tokens_picture(found, clips(1), object(), 1, "mean")
    assert "object normalises in a way" in note


def test_tokens_are_drawn_over_the_picture():
    processor, model = EvlgenImageEvalProcessor(IMAGE_SIZE, mean="half"), tiny_evlgen().eval()
    image = pictures(1).clamp(-1, 1)
    drawn = {}
    for r in (0, 4):
        found = describe(model, image, Settings(r=r, **SHORT))
        for style in ("mean", "outline"):
            picture, note = tokens_picture(found, image, processor, 1, style)
            assert note == "" and picture.width == picture.height
            drawn[r, style] = np.asarray(picture, float)
    for key, other in (((0, "mean"), (4, "mean")), ((4, "mean"), (4, "outline"))):
        assert np.abs(drawn[key] - drawn[other]).mean() > 1
    clip = tiny_evlgen_video().eval()
    found = describe(clip, clips(1), Settings(**SHORT))
    wide, _ = tokens_picture(found, clips(1), processor, 1, "outline")
    assert 2.8 < wide.width / wide.height < 3.2
