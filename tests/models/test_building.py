"""A model from its config: parts from folders, the keys that are refused, and sources that are not there."""

import pytest
import torch
from omegaconf import OmegaConf
from transformers import BertConfig, BertModel

from lavis_evlgen.models.connectors.tomeformer import build_tomeformer
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.language.loading import load_language_model
from lavis_evlgen.weights.sources import WeightsError, resolve
from lavis_evlgen.weights.trainable import trainable_state
from tests.tiny import pictures, tiny_dinov2, tiny_llama, tiny_tokenizer, tiny_vision


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with the sub-folders vit, llm and bert, as downloads would be."""
    root = tmp_path_factory.mktemp("parts")
    tiny_dinov2().save_pretrained(root / "vit")
    tiny_llama().save_pretrained(root / "llm")
    tiny_tokenizer().save_pretrained(root / "llm")
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=5, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, layer_norm_eps=1e-6,
    )  # fmt: skip
    BertModel(bert).save_pretrained(root / "bert")
    return root


def config(parts, **changes):
    return OmegaConf.create(
        {
            "vit_model": str(parts / "vit"), "image_size": 28, "vit_precision": "fp32", "vit_layer": 2,
            "connector_init": str(parts / "bert"), "num_layers": 2, "tome_r": {"target": 9},
            "llm_model": str(parts / "llm"), "llm_precision": "fp32", "lr_scale": {"connector": 0.1},
        }
        | changes
    )  # fmt: skip


def test_a_model_from_a_config(parts):
    model = EVLGen.from_config(config(parts))
    assert model.lr_scale["connector"] == 0.1
    assert model.visual_prompt(pictures(2)).tokens.shape == (2, 9, 32)
    cfg = model.connector.tomeformer.cfg
    assert (cfg.hidden_size, cfg.num_layers, cfg.num_heads, cfg.max_positions) == (16, 2, 2, 40)
    assert (cfg.schedule, cfg.layer_norm_eps) == ([4, 4], 1e-6)
    torch.testing.assert_close(
        model.language_model.llm.lm_head.weight, tiny_llama().lm_head.weight, rtol=0, atol=0
    )
    assert torch.isfinite(model({"image": pictures(2), "text_input": ["a dog", "a cat"]})["loss"])


def test_a_model_from_a_config_starts_from_its_checkpoint(parts, tmp_path):
    torch.manual_seed(1)
    trained = EVLGen.from_config(config(parts)).eval()
    torch.save({"model": trainable_state(trained)}, tmp_path / "checkpoint_1.pth")
    torch.manual_seed(2)
    for changes in (
        {"pretrained": str(tmp_path / "checkpoint_1.pth")},
        {"finetuned": str(tmp_path / "checkpoint_1.pth"), "load_finetuned": True, "pretrained": "absent"},
    ):
        model = EVLGen.from_config(config(parts, **changes)).eval()
        assert torch.equal(model.visual_prompt(pictures(2)).tokens, trained.visual_prompt(pictures(2)).tokens)
    with pytest.raises(WeightsError, match="checkpoint .*absent.pth does not exist"):
        EVLGen.from_config(config(parts, pretrained="absent.pth"))


def test_the_released_name_of_the_language_model(parts):
    cfg = config(parts, opt_model=str(parts / "llm"))
    del cfg["llm_model"]
    assert EVLGen.from_config(cfg).language_model.width == 32


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"freeze_vit": False}, "freeze_vit: False asked; must be true"),
        ({"drop_path_rate": 0.1}, "drop_path_rate: 0.1 asked"),
        ({"use_grad_checkpoint": True}, "use_grad_checkpoint: True asked"),
        ({"opt_model": "another"}, "llm_model .* and opt_model another differ"),
        ({"llm_model": None}, "llm_model is not set; give any Hugging Face"),
        ({"connector": "perceiver"}, "connector: 'perceiver' is not one of tomeformer, qformer, avgpool, linear"),
        ({"vit_precision": "fp8"}, "vit_precision: 'fp8' is not one of"),
        ({"llm_precision": "fp8"}, "llm_precision: 'fp8' is not one of"),
        ({"num_layers": 4}, "lack .*num_layers=4"),
        ({"tome_r": {"target": 1}}, "17 tokens cannot become 1"),
        ({"bos": "never"}, "bos: 'never'"),
    ],
)
def test_what_a_config_cannot_ask(parts, changes, message):
    with pytest.raises(ValueError, match=message):
        EVLGen.from_config(config(parts, **changes))


@pytest.mark.parametrize("init", [None, "random"])
def test_a_random_connector_has_the_sizes_it_is_given(init):
    vision = tiny_vision()
    connector = build_tomeformer(vision, {"connector_init": init, "num_layers": 1, "tome_r": 3})
    assert connector.width == 768 and connector.num_output_tokens == 14
    assert connector(vision(pictures(1))).tokens.shape == (1, 14, 768)


def test_a_folder_that_is_no_bert(parts, tmp_path):
    with pytest.raises(WeightsError, match="connector_init: .* has no config.json"):
        build_tomeformer(tiny_vision(), {"connector_init": str(tmp_path)})
    with pytest.raises(ValueError, match="the BERT weights lack .* or not a BERT"):
        build_tomeformer(tiny_vision(), {"connector_init": str(parts / "llm"), "num_layers": 1, "tome_r": 0})


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_language_model_comes_in_its_precision(parts, precision):
    llm, tokenizer = load_language_model(str(parts / "llm"), precision)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert {p.dtype for p in llm.parameters()} == {dtype}
    assert tokenizer.eos_token == "</s>"


def test_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    assert resolve("weights", "key") == "weights"
    assert resolve("facebook/opt-2.7b", "key") == "facebook/opt-2.7b"
    assert resolve("bert-base-uncased", "key") == "bert-base-uncased"
    for absent in ("./weights.pth", "a/b/c", "weights.onnx", "some/weights.gguf"):
        with pytest.raises(WeightsError, match=f"key: {absent} does not exist .*fix the path"):
            resolve(absent, "key")


def test_sources_inside_packages():
    assert resolve("package:lavis_evlgen/configs/models", "key").endswith("models")
    with pytest.raises(WeightsError, match="package lavis_evlgen is installed but holds no weights.pth"):
        resolve("package:lavis_evlgen/weights.pth", "key")
    with pytest.raises(ImportError, match="no_such_package"):
        resolve("package:no_such_package/weights.pth", "key")


def test_an_id_that_the_hub_does_not_give(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="llm_model: cannot load 'nobody/nothing': not a folder here"):
        load_language_model("nobody/nothing", "fp32")
    with pytest.raises(WeightsError, match="connector_init: cannot load 'nobody/nothing': not a folder here"):
        build_tomeformer(tiny_vision(), {"connector_init": "nobody/nothing"})
