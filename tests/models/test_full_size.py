"""The paper's full-size models on the meta device: shapes and counts without a weight or a download."""

import functools

import pytest
import torch
from omegaconf import OmegaConf

from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.vision import encoder

BERT_BASE = 109_482_240  # bert-base-uncased as published: the paper's "110M"
WORDS, POOLER = 30522 * 768, 768 * 768 + 768  # what a TomeFormer leaves out of it
LAYER = 4 * (768 * 768 + 768) + (768 * 3072 + 3072) + (3072 * 768 + 768) + 2 * 2 * 768
EVA = {"width": 1408, "hidden": int(1408 * 4.3637), "blocks": 39}

# type: (width of its language model, that model's parameters as published)
LLMS = {
    "opt2.7b": (2560, 2_651_596_800),
    "opt6.7b": (4096, 6_658_473_984),
    "vicuna7b": (4096, 6_738_415_616),
    "vicuna13b": (5120, 13_015_864_320),
}
TRAINS = {  # as docs/weights.md has them
    "opt2.7b": {12: 88_504_320, 6: 45_977_088},
    "opt6.7b": {12: 89_685_504, 6: 47_158_272},
    "vicuna7b": {12: 89_685_504, 6: 47_158_272},
    "vicuna13b": {12: 90_472_960, 6: 47_945_728},
}
# what a TomeFormer trains between ViT and LLM, by its layers, without the projections
TOMEFORMER = {12: BERT_BASE - WORDS - POOLER, 6: BERT_BASE - WORDS - POOLER - 6 * LAYER}


@pytest.fixture(scope="module", autouse=True)
def each_vit_once():
    """A ViT of a billion empty numbers is the same for every test that builds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "build_empty", functools.cache(encoder.build_empty))
        yield


def build(kind: str, layers: int, **changes) -> EVLGen:
    """As the hub's models are, which nobody asks for: their sizes are kept (weights/kept_sizes.py)."""
    section = OmegaConf.load(EVLGen.default_config_path(kind)).model
    assert (section.connector_init, section.num_layers) == ("bert-base-uncased", 12)
    with torch.device("meta"):
        return EVLGen.from_config(OmegaConf.merge(section, {"num_layers": layers, **changes}))


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("layers, tokens", [(12, 29), (6, 257 - 6 * 19)])
@pytest.mark.parametrize("kind", LLMS)
def test_what_trains_is_what_the_paper_counts(kind, layers, tokens):
    """The paper's 110M is bert-base as published; it names 55M, half of that, for 6 of its 12 layers.

    Of bert-base a TomeFormer has all but the word embeddings (23.4M, no words come in) and the unused pooler
    (0.6M): 85.5M exactly. The projections and ln_vision add 3.1M for OPT-2.7b to 5.0M for Vicuna-13b. So 88.5M to
    90.5M numbers train with 12 layers, and 46.0M to 47.9M with 6: each of the paper's figures is a fifth larger,
    and no tolerance is needed for ours.
    """
    width, published = LLMS[kind]
    model = build(kind, layers)
    assert all(p.is_meta for p in model.parameters())

    body = TOMEFORMER[layers]
    around = 2 * 1408 + (1408 * 768 + 768) + (768 * width + width)
    trainable = count(p for p in model.parameters() if p.requires_grad)
    assert trainable == body + around == TRAINS[kind][layers]
    paper = {12: 110e6, 6: 55e6}[layers]
    assert 0.80 < trainable / paper < 0.88

    assert count(model.connector.tomeformer.parameters()) == body
    assert count(model.language_model.parameters()) == published
    assert not any(p.requires_grad for p in [*model.language_model.parameters(), *model.visual_encoder.parameters()])
    assert {p.dtype for p in model.language_model.parameters()} == {torch.float16}
    assert (model.connector.num_output_tokens, model.llm_proj.out_features) == (tokens, width)


def test_the_q_former_is_blip_2s():
    """BLIP-2 names 107M for OPT-2.7b (Li et al. 2023, table 2): BERT's 12 layers, cross-attention in six."""
    model = build("opt2.7b", 12, connector="qformer")
    cross = 2 * (768 * 768 + 768) + 2 * (1408 * 768 + 768) + 2 * 768
    body = 12 * LAYER + 2 * 768 + 6 * cross + 32 * 768
    assert count(model.connector.parameters()) == body
    trainable = count(p for p in model.parameters() if p.requires_grad)
    assert trainable == body + 2 * 1408 + 768 * 2560 + 2560 == 107_133_696
    assert model.connector.num_output_tokens == 32


def test_twelve_layers_are_bert_base_without_words_and_pooler():
    assert 12 * LAYER + WORDS + (512 + 2) * 768 + 2 * 768 + POOLER == BERT_BASE


def test_the_vision_encoders_are_the_papers():
    """EVA-CLIP-g less its last block, as LAVIS runs it (BLIP-2 calls it 1B); CLIP-L less its last two of 24."""
    width, hidden, blocks = EVA.values()
    attention = width * 3 * width + 2 * width + width * width + width  # biases of q and v only
    block = attention + (width * hidden + hidden) + (hidden * width + width) + 4 * width
    patches = 3 * 14 * 14 * width + width
    eva = build("opt2.7b", 6).visual_encoder
    assert count(eva.parameters()) == blocks * block + patches + width + 257 * width
    assert (eva.width, eva.num_tokens, eva.protected) == (1408, 257, 1)
    clip = build("opt2.7b", 6, vit_model="clip_L").visual_encoder
    width, blocks = 1024, 21
    block = 4 * (width * width + width) + (width * 4 * width + 4 * width) + (4 * width * width + width) + 4 * width
    assert count(clip.parameters()) == blocks * block + 3 * 14 * 14 * width + 258 * width + 2 * width
    assert (clip.width, clip.num_tokens) == (1024, 257)


@pytest.mark.parametrize("name", encoder.LAVIS_VITS)
def test_nothing_is_downloaded_or_read(name, monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("a weight was asked for")

    readers = ("vision.encoder.download_cached_file", "vision.encoder.read_state_dict",
               "connectors.tomeformer.read_state_dict")  # fmt: skip
    for reader in readers:
        monkeypatch.setattr(f"lavis_evlgen.models.{reader}", refused)
    assert build("vicuna7b", 1, vit_model=name).llm_proj.weight.is_meta
