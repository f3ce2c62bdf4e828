"""LAVIS's own BLIP-2 classes generate what they should under current transformers.

The independent path of the second stage is Hugging Face's BLIP-2 with the same weights (ViT, Q-Former, OPT); that of
the first stage is transformers' own repeating for beams, given prompts that nobody repeated before.
"""

import lavis_evlgen  # noqa: F401  (its bridges come before LAVIS)

# isort: split
import pytest
import torch
from lavis.models.blip2_models.modeling_opt import OPTForCausalLM
from lavis.models.blip2_models.Qformer import BertLMHeadModel
from transformers import GenerationMixin

from lavis_evlgen.compat import lavis_bridge
from tests.tiny import pictures
from tests.tiny_blip2 import QUERIES, hugging_face_blip2, lavis_blip2, lavis_blip2_opt

IMAGE_TOKEN, NEW = 3, 8
SEARCHES = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 5},
    "several of the beams": {"num_beams": 4, "num_captions": 3},
    "length penalty": {"num_beams": 3, "length_penalty": -1.0, "repetition_penalty": 1.5},
    "samples": {"use_nucleus_sampling": True, "num_captions": 2, "top_p": 0.9, "temperature": 1.3},
}


@pytest.fixture
def stage2(tmp_path, monkeypatch):
    return lavis_blip2_opt(tmp_path, monkeypatch)


def ids_of_lavis(model, monkeypatch, **search) -> torch.Tensor:
    """Token ids behind the captions of Blip2OPT.generate, which returns text only."""
    seen, decode = [], model.opt_tokenizer.batch_decode
    with monkeypatch.context() as patch:
        patch.setattr(model.opt_tokenizer, "batch_decode", lambda ids, **kw: seen.append(ids) or decode(ids, **kw))
        captions = model.generate({"image": pictures(3)}, max_length=NEW, **search)
    assert captions == [text.strip() for text in decode(seen[0], skip_special_tokens=True)]
    return seen[0]


def ids_of_hugging_face(model, prompt: torch.Tensor, end: int, **search) -> torch.Tensor:
    """New tokens of Blip2ForConditionalGeneration for the same pictures and prompt."""
    sample = search.pop("use_nucleus_sampling", False)
    asked = {"num_return_sequences": search.pop("num_captions", 1), "do_sample": sample, **search}
    ids = torch.cat([torch.full((3, QUERIES), IMAGE_TOKEN), prompt.expand(3, -1)], dim=1)
    out = model.generate(
        pixel_values=pictures(3), input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
        eos_token_id=end, **asked,
    )  # fmt: skip
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_stage_2_says_what_hugging_face_says(stage2, monkeypatch, search):
    theirs = hugging_face_blip2(stage2, IMAGE_TOKEN)
    prompt = stage2.opt_tokenizer(stage2.prompt, return_tensors="pt").input_ids
    torch.manual_seed(7)
    ours = ids_of_lavis(stage2, monkeypatch, **search)
    torch.manual_seed(7)
    expected = ids_of_hugging_face(theirs, prompt, stage2.eos_token_id, **search)
    assert ours.shape[0] == 3 * search.get("num_captions", 1)
    assert torch.equal(ours, expected)
    assert len({tuple(row) for row in ours.tolist()}) > 1  # pictures differ


def test_beams_find_what_greedy_does_not(stage2, monkeypatch):
    greedy, beams = (ids_of_lavis(stage2, monkeypatch, num_beams=n) for n in (1, 5))
    assert not torch.equal(greedy, beams)


def stage1_ids(model, **search) -> torch.Tensor:
    """What Blip2Qformer.generate asks for, with a row for each picture and all repeating left to transformers."""
    visual = model.ln_vision(model.visual_encoder(pictures(3)))
    return model.Qformer.generate(
        input_ids=torch.full((3, 1), model.tokenizer.bos_token_id),
        query_embeds=model.query_tokens.expand(3, -1, -1),
        encoder_hidden_states=visual,
        encoder_attention_mask=torch.ones(visual.shape[:2], dtype=torch.long),
        max_length=NEW,
        min_length=4,
        eos_token_id=model.tokenizer.sep_token_id,
        pad_token_id=model.tokenizer.pad_token_id,
        **search,
    )


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_stage_1_repeats_once(tmp_path, monkeypatch, beams):
    model = lavis_blip2(tmp_path, monkeypatch)
    captions = model.generate({"image": pictures(3)}, num_beams=beams, max_length=NEW, min_length=4)
    expected = model.tokenizer.batch_decode(stage1_ids(model, num_beams=beams), skip_special_tokens=True)
    assert captions == expected and len(set(captions)) > 1


@torch.no_grad()
def test_stage_1_beams_are_no_worse_than_greedy(tmp_path, monkeypatch):
    """Scored by a plain forward pass over the whole caption, without generate's own bookkeeping."""
    model = lavis_blip2(tmp_path, monkeypatch)
    visual = model.ln_vision(model.visual_encoder(pictures(3)))

    def score(ids):
        mask = torch.ones(3, QUERIES + ids.shape[1], dtype=torch.long)
        logits = model.Qformer(
            ids, query_embeds=model.query_tokens.expand(3, -1, -1), encoder_hidden_states=visual, attention_mask=mask,
        ).logits  # fmt: skip
        chosen = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(-1)
        end = (ids[:, 1:] == model.tokenizer.sep_token_id).cumsum(1)
        counted = (end == 0) | ((end == 1) & (ids[:, 1:] == model.tokenizer.sep_token_id))
        return (chosen * counted).sum(1)

    greedy, wide = (stage1_ids(model, num_beams=n, length_penalty=0.0) for n in (1, 12))
    assert (score(wide) >= score(greedy) - 1e-4).all() and not torch.equal(wide, greedy)


@pytest.mark.parametrize("model_class, make", [(OPTForCausalLM, lavis_blip2_opt), (BertLMHeadModel, lavis_blip2)])
def test_beams_fail_without_the_bridge(model_class, make, tmp_path, monkeypatch):
    assert f"repeat_for_beams_once:{model_class.__name__}" in dict(lavis_bridge.applied())
    model = make(tmp_path, monkeypatch)
    original = vars(GenerationMixin)["_expand_inputs_for_generation"]  # a static method up to transformers 4
    monkeypatch.setattr(model_class, "_expand_inputs_for_generation", original)
    with pytest.raises((RuntimeError, ValueError), match="size|batch|shape"):
        model.generate({"image": pictures(2)}, num_beams=3)
