"""Sizes of public models for counting without a network: they are the published ones, and nothing else uses them."""

import logging

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModel

from lavis_evlgen.config import EvlgenConfig
from lavis_evlgen.models.language.loading import load_language_model
from lavis_evlgen.models.language.tokenizer import TextEncoder
from lavis_evlgen.models.vision.encoder import LAVIS_VITS, load_vision_encoder
from lavis_evlgen.weights import kept_sizes
from lavis_evlgen.weights.kept_sizes import KEPT, SIZES, KeptTokens, is_kept, sizes_of
from lavis_evlgen.weights.sources import WeightsError
from tests.run_tools import ROOT
from tests.tiny import tiny_tokenizer

# of those that tests/models/test_full_size.py does not build
PUBLISHED = {"bert-base-uncased": 109_482_240, "qwen2.5-1.5b": 1_543_714_304, "siglip-base-patch16-224": 203_155_970}


@pytest.fixture
def offline(monkeypatch):
    """No cache that has anything, and a hub that does not answer."""
    monkeypatch.setattr(kept_sizes, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    kept_sizes._tell.cache_clear()


@pytest.mark.parametrize("name", PUBLISHED)
def test_they_are_the_published_ones(name):
    config = AutoConfig.from_pretrained(str(SIZES / name))
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "linspace", lambda *args, **kw: torch.zeros(args[2], device="cpu"))
        model = AutoModel.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_every_kept_folder_has_a_name_and_every_name_a_folder():
    assert set(KEPT.values()) == {path.name for path in SIZES.iterdir()}


def test_they_are_for_counting_alone(offline, caplog, tmp_path, monkeypatch):
    source = "facebook/opt-2.7b"
    assert sizes_of(source) == source  # where weights are wanted
    with torch.device("meta"):
        with caplog.at_level(logging.WARNING):
            assert sizes_of(source) == sizes_of(source) == str(SIZES / "opt-2.7b") and is_kept(sizes_of(source))
        assert caplog.text.count(f"{source} is not here") == 1
        assert sizes_of("facebook/opt-13b") == "facebook/opt-13b"
        monkeypatch.chdir(tmp_path)
        (tmp_path / "facebook" / "opt-2.7b").mkdir(parents=True)
        assert sizes_of(source) == source  # a folder of that name
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(kept_sizes, "try_to_load_from_cache", lambda *args: "config.json")
        assert sizes_of(source) == source
    with pytest.raises(WeightsError, match="llm_model: cannot load 'lmsys/vicuna-7b-v1.3'"):
        load_language_model("lmsys/vicuna-7b-v1.3", "fp16")


def test_a_vision_model_of_the_hub(offline):
    with torch.device("meta"):
        vision = load_vision_encoder("google/siglip-base-patch16-224")
    assert (vision.width, vision.num_tokens, vision.protected) == (768, 196, 0)
    assert sum(p.numel() for p in vision.parameters()) == 92_884_224


@pytest.mark.parametrize(
    "source, bos, end, label_bos",
    [
        ("facebook/opt-2.7b", 2, 50118, True),
        ("lmsys/vicuna-7b-v1.3", 1, 2, False),
        ("Qwen/Qwen2.5-1.5B", None, 151643, False),
    ],
)
def test_special_tokens_are_known_and_texts_are_not(offline, source, bos, end, label_bos):
    with torch.device("meta"):
        model, tokenizer = load_language_model(source, "fp16")
    assert isinstance(tokenizer, KeptTokens)
    text = TextEncoder(tokenizer, model.config.model_type, model.config.vocab_size)
    assert (text.bos_id, text.end_id, text.label_bos, text.encode("")) == (bos, end, label_bos, [])
    for ask in (lambda: text.encode("a photo of"), lambda: tokenizer.chat_template):
        with pytest.raises(WeightsError, match=f"the tokenizer of {source} is not here.*set llm_model to it"):
            ask()


def test_the_tokenizer_itself_is_loaded_once_where_a_text_is_asked_for():
    loads = []
    tokens = KeptTokens("lmsys/vicuna-7b-v1.3", "llama", lambda: loads.append(1) or tiny_tokenizer())
    assert not loads and tokens.get_vocab()["</s>"] == 2
    assert tokens("a red square").input_ids == tiny_tokenizer()("a red square").input_ids
    assert tokens.decode([5]) == tiny_tokenizer().decode([5]) and len(loads) == 1


PROJECTS = sorted((ROOT / "projects").rglob("*.yaml"))


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: str(path.relative_to(ROOT / "projects")))
def test_no_project_needs_a_network_to_be_counted(path):
    """Each part is in a package of the quickstart, kept, LAVIS's class, or what another run of ours wrote."""
    cfg = EvlgenConfig(type("Args", (), {"cfg_path": str(path), "options": None})())
    section = OmegaConf.to_container((cfg.stages or [cfg])[0].model_cfg)
    for key in ("vit_model", "connector_init", "llm_model", "opt_model"):
        source = section.get(key) or "random"
        known = source in ("random", *LAVIS_VITS, *KEPT) or source.startswith(("package:", "output/"))
        assert known, f"{key}: {source}"
