"""Trained weights know the frozen ones they belong to: by values, in any number format, not by name or width."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import ViTConfig, ViTModel

from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.vision import encoder as vision
from lavis_evlgen.weights.frozen_identity import frozen_identity, other_parts
from lavis_evlgen.weights.sources import WeightsError
from tests.run_tools import redraw
from tests.tiny import (
    IMAGE_SIZE,
    PATCH,
    tiny_clip,
    tiny_dinov2,
    tiny_eva,
    tiny_evlgen,
    tiny_lavis_vision,
    tiny_llama,
    tiny_tokenizer,
    tiny_vision,
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_same_weights_in_any_number_format(kind, dtype):
    model = tiny_evlgen(kind)
    trained = frozen_identity(model)
    model.language_model.to(dtype)
    model.visual_encoder.to(dtype)
    assert set(trained) == {"visual_encoder", "language_model"} and other_parts(trained, frozen_identity(model)) == []


@pytest.mark.parametrize("kind", [tiny_dinov2, tiny_clip, tiny_eva])
def test_the_same_vit_in_any_precision(kind):
    """Its matrices are cast and the rest is not."""
    build = tiny_lavis_vision if kind is tiny_eva else tiny_vision
    found = [
        frozen_identity(torch.nn.ModuleDict({"visual_encoder": build(kind, precision=precision)}))
        for precision in ("fp32", "fp16", "bf16")
    ]
    assert [other_parts(one, other) for one in found for other in found] == [[]] * 9


def test_a_pooler_that_the_file_lacks_does_not_tell(tmp_path):
    """It is drawn at random, anew in each process, and nothing reads it."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = ViTConfig(image_size=IMAGE_SIZE, patch_size=PATCH, **sizes)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    found = [vision.load_vision_encoder(str(tmp_path), IMAGE_SIZE, "fp32") for _ in range(2)]
    assert not torch.equal(*(encoder.vit.model.pooler.dense.weight for encoder in found))
    assert other_parts(*(frozen_identity(torch.nn.ModuleDict({"vit": encoder})) for encoder in found)) == []


def test_position_embeddings_of_another_picture_size_do_not_tell(tmp_path, monkeypatch):
    """LAVIS resizes them when it loads a ViT; a run may go on from its weights at another picture size."""
    monkeypatch.setitem(vision.LAVIS_VITS, "eva_clip_g", (tiny_eva, "", vision.LAVIS_VITS["eva_clip_g"][2]))
    vit = redraw(tiny_eva())
    torch.nn.init.normal_(vit.pos_embed)
    torch.save(vit.state_dict(), tmp_path / "eva.pth")
    found = [
        frozen_identity(vision.load_vision_encoder("eva_clip_g", size, "fp32", str(tmp_path / "eva.pth")))
        for size in (28, 56)
    ]
    assert set(found[0]) == {"vit"} and other_parts(*found) == []


@given(st.integers(0, 10**6))
def test_other_weights_of_the_same_shapes(seed):
    torch.manual_seed(seed)
    one, other = torch.nn.Sequential(torch.nn.Linear(9, 5)), torch.nn.Sequential(torch.nn.Linear(9, 5))
    found = [frozen_identity(model.requires_grad_(False)) for model in (one, other)]
    assert other_parts(*found) == ["0"] and other_parts(found[0], found[0]) == []
    half = frozen_identity(other.to(torch.bfloat16))
    assert other_parts(found[1], half) == [] and other_parts(found[0], half) == ["0"]


def test_a_small_change_in_one_number_format_is_seen():
    model = tiny_evlgen()
    trained = frozen_identity(model)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.mul_(1 + 1e-4)
    assert other_parts(trained, frozen_identity(model)) == ["language_model"]


def test_what_trains_and_the_meta_device_have_no_identity():
    model = tiny_evlgen()
    assert all(not part.startswith(("connector", "llm_proj")) for part in frozen_identity(model))
    assert frozen_identity(model.to("meta")) == {} and other_parts({"language_model": {}}, {}) == []


@pytest.fixture
def moving(parts, tmp_path):
    """A model section whose language model lies in a folder of its own, and what is saved with it."""
    def write(seed):
        llm = redraw(tiny_llama())
        with torch.no_grad():
            for parameter in llm.parameters():
                parameter.add_(seed * 0.01)
        llm.save_pretrained(tmp_path / "llm")
        tiny_tokenizer().save_pretrained(tmp_path / "llm")

    write(0)
    section = {
        "arch": "evlgen", "model_type": "quickstart", **parts, "llm_model": str(tmp_path / "llm"),
        "image_size": IMAGE_SIZE, "num_layers": 2, "tome_r": 4, "vit_precision": "fp32", "llm_precision": "fp32",
    }  # fmt: skip
    model = EVLGen.from_config(OmegaConf.create(section))
    return section, model.save_pretrained(tmp_path / "bundle", {"vis_processor": {}}), write


def test_a_folder_that_holds_another_model_now_is_refused(moving):
    section, bundle, write = moving
    EVLGen.from_pretrained(str(bundle))
    write(1)
    with pytest.raises(WeightsError, match="bundle was trained with another language_model .* files behind that name"):
        EVLGen.from_pretrained(str(bundle))


def test_another_model_by_another_name_is_logged(moving, parts, tmp_path, caplog):
    section, bundle, write = moving
    (tmp_path / "llm").rename(tmp_path / "copy")
    EVLGen.from_pretrained(str(bundle), llm_model=str(tmp_path / "copy"))
    assert "another language_model" not in caplog.text
    write(1)
    EVLGen.from_pretrained(str(bundle), llm_model=str(tmp_path / "llm") + "/")
    assert "was trained with another language_model" in caplog.text


def test_bundles_without_it_still_load(moving):
    _, bundle, write = moving
    content = json.loads((bundle / "config.json").read_text())
    assert set(content.pop("frozen_weights")) == {"visual_encoder", "language_model"}
    (bundle / "config.json").write_text(json.dumps(content))
    write(1)
    EVLGen.from_pretrained(str(bundle))
