"""Bundles: what is saved gives the same prompts wherever it is loaded, and frozen parts that do not fit are named."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from lavis.models import load_model_and_preprocess
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from lavis_evlgen.config import ConfigError
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.weights import bundle
from lavis_evlgen.weights.model_card import model_card
from lavis_evlgen.weights.sources import WeightsError
from lavis_evlgen.weights.trainable import trainable_state
from tests.run_tools import redraw
from tests.tiny import IMAGE_SIZE, pictures, tiny_dinov2, tiny_evlgen, tiny_llama, tiny_opt, tiny_tokenizer

PREPROCESS = {"vis_processor": {"eval": {"name": "evlgen_image_eval", "image_size": IMAGE_SIZE, "mean": "half"}}}
CARD = {
    "data": {"name": "scenes", "split": "test", "size": 5, "fingerprint": "abc"}, "scoring_tokenizer": "simple",
    "metrics": {"metrics": {"CIDEr": 0.5}, "loss_right": 1.25, "unscored": {}}, "decoding": {"num_beams": 3},
    "versions": {"torch": "2.0"}, "config": {"run": {"output_dir": "/home/someone"}},
}  # fmt: skip
PUBLIC = {"vit_model": "somebody/vit", "llm_model": "somebody/llm"}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Frozen parts that are not the ones trained with: wider, or of another family at the same width."""
    root = tmp_path_factory.mktemp("others")
    wide = {"hidden_size": 48, "num_attention_heads": 2}
    for name, model in {"llm": tiny_llama(**wide), "opt": tiny_opt(), "vit": tiny_dinov2(**wide)}.items():
        redraw(model).save_pretrained(root / name)
        tiny_tokenizer(bos="</s>").save_pretrained(root / name)
    return root


def section(parts, **changes) -> dict:
    return {
        "arch": "evlgen", "model_type": "quickstart", **parts, "image_size": IMAGE_SIZE, "num_layers": 2,
        "vit_precision": "fp32", "llm_precision": "fp32", "tome_r": {"target": 9}, "lr_scale": {"connector": 0.1},
    } | changes  # fmt: skip


def build(parts, **changes) -> EVLGen:
    return EVLGen.from_config(OmegaConf.create(section(parts, **changes)))


@pytest.fixture(scope="module")
def trained(parts):
    """A model whose trainable weights are nobody's start."""
    model = build(parts)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    """A bundle that nobody writes to."""
    folder = tmp_path_factory.mktemp("bundle") / "b"
    return trained.save_pretrained(folder, PREPROCESS, {"num_beams": 1, "max_length": 5}, CARD)


def prompt(model):
    return model.visual_prompt(pictures(2)).tokens


def test_round_trip_is_bit_equal_without_what_training_started_from(parts, tmp_path):
    """The BERT that the connector started from may be gone; its sizes are in the bundle."""
    shutil.copytree(parts["connector_init"], tmp_path / "bert")
    model = build(parts, connector_init=str(tmp_path / "bert"), pretrained=None).eval()
    shutil.rmtree(tmp_path / "bert")
    assert model.save_pretrained(tmp_path / "b") == tmp_path / "b"
    loaded = EVLGen.from_pretrained(str(tmp_path / "b"))
    assert torch.equal(prompt(loaded), prompt(model)) and not loaded.training
    assert loaded.lr_scale["connector"] == 0.1 and loaded.connector.num_output_tokens == 9
    loaded.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("connector, tokens", [("qformer", 5), ("avgpool", 5), ("linear", 17)])
def test_round_trip_of_the_other_connectors(parts, tmp_path, connector, tokens):
    model = build(parts, connector=connector, num_query_token=5).eval()
    loaded = EVLGen.from_pretrained(str(model.save_pretrained(tmp_path / "b")))
    assert torch.equal(prompt(loaded), prompt(model)) and prompt(loaded).shape[1] == tokens
    with torch.device("meta"):
        empty = EVLGen.from_config(OmegaConf.create(section(parts, connector=connector, num_query_token=5)))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in empty.state_dict().items()} == shapes


def test_a_bundle_holds_what_trains_and_no_frozen_weight(trained, saved):
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    state, own = load_file(saved / "model.safetensors"), trainable_state(trained)
    assert set(state) == set(own) and all(torch.equal(state[k], own[k]) for k in own)
    content = json.loads((saved / "config.json").read_text())
    assert content["model"]["tome_r"] == {"target": 9} and content["model"]["connector_sizes"]["num_heads"] == 2
    assert "pretrained" not in content["model"] and content["model"]["connector_init"] is None
    llm = {"model_type": "llama", "width": 32, "layers": 2}
    assert content["frozen"] == {"vision encoder": {"width": 24, "leading tokens": 1}, "language model": llm}


def test_it_is_one_more_type_for_lavis(trained, saved):
    model, vis, _ = load_model_and_preprocess("evlgen", str(saved), is_eval=True)
    assert torch.equal(prompt(model), prompt(trained))
    picture = vis["eval"](Image.new("RGB", (50, 40), (255, 0, 0)))
    assert picture.shape == (3, IMAGE_SIZE, IMAGE_SIZE) and picture[0].min() == 1  # mean "half": red is 1
    assert model.decoding == {"num_beams": 1, "max_length": 5}


@pytest.mark.parametrize("what", ["folder", "file"])
def test_pretrained_in_a_config_takes_a_bundle_or_its_file(parts, trained, saved, what):
    source = saved if what == "folder" else saved / "model.safetensors"
    assert torch.equal(prompt(build(parts, pretrained=str(source)).eval()), prompt(trained))


def test_settings_unlike_those_of_training_are_logged(parts, saved, caplog):
    build(parts, pretrained=str(saved), tome_r=2, lr_scale={"connector": 1.0})
    told = [r.getMessage() for r in caplog.records if "not as it was trained" in r.getMessage()]
    assert told == [f"{saved}: not as it was trained: tome_r: 2 here, {{'target': 9}} there"]


@pytest.mark.parametrize(
    "key, other, says",
    [
        ("llm_model", "llm", "trained with a language model of model_type llama, width 32, layers 2; this one has "
         "model_type llama, width 48, layers 2. Set model.llm_model to what it was trained with: "),
        ("llm_model", "opt", "this one has model_type opt, width 32, layers 2"),
        ("vit_model", "vit", "trained with a vision encoder of width 24, leading tokens 1; this one has width 48"),
    ],
)  # fmt: skip
def test_another_frozen_part_is_named(parts, saved, others, key, other, says):
    with pytest.raises(WeightsError, match=f"{saved} was") as error:
        EVLGen.from_pretrained(str(saved), **{key: str(others / other)})
    assert says in str(error.value)
    if other != "opt":  # a bare file has its shapes to tell
        names = {"llm_model": "language model", "vit_model": "vision encoder"}
        words = f"trained with a {names[key]} of width {32 if key == 'llm_model' else 24}, the config's has 48"
        with pytest.raises(WeightsError, match=words):
            build({**parts, key: str(others / other)}, pretrained=str(saved / "model.safetensors"))


def test_frozen_parts_may_lie_elsewhere(parts, trained, saved, tmp_path):
    shutil.copytree(parts["llm_model"], tmp_path / "llm")
    model = EVLGen.from_pretrained(str(saved), llm_model=str(tmp_path / "llm"))
    assert torch.equal(prompt(model), prompt(trained)) and model.config["llm_model"] == str(tmp_path / "llm")


def test_the_card_says_what_was_measured_and_no_path(saved):
    words = (saved / "README.md").read_text()
    for part in ("library_name: lavis-evlgen", "`scenes`, split `test`: 5 pictures, fingerprint `abc`",
                 "| `tome_r` | `{'target': 9}` |", "| metrics CIDEr | 0.5 |", "| loss_right | 1.25 |", "num_beams 3",
                 "torch 2.0"):  # fmt: skip
        assert part in words, part
    assert "/home/someone" not in words


def test_the_card_has_what_the_hub_reads(saved, trained, tmp_path):
    card = ModelCard.load(saved / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("other", "image-text-to-text")
    (result,) = [result for result in card.data.eval_results if result.metric_type == "CIDEr"]
    assert (result.dataset_name, result.dataset_split, result.metric_value) == ("scenes", "test", 0.5)
    assert card.data.base_model is None  # frozen parts of this bundle are folders of this machine
    content = json.loads((saved / "config.json").read_text())
    named = ModelCard(model_card({**content, "model": {**content["model"], **PUBLIC}}, 10, name="me/captioner"))
    assert named.data.base_model == [PUBLIC["llm_model"], PUBLIC["vit_model"]] and named.data.eval_results is None


class Hub:
    """Stands where HfApi does: what it was asked for, and the files it was given."""

    def __init__(self, token=None):
        Hub.calls = {"token": token}

    def create_repo(self, repo_id, **asked):
        Hub.calls["create_repo"] = (repo_id, asked)
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, Hub.folder)
        Hub.calls["upload"] = (repo_id, commit_message)
        return "https://hub/commit/1"


def test_push_to_hub_uploads_a_bundle_with_public_names(parts, trained, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.folder = tmp_path / "uploaded"
    with pytest.raises(WeightsError, match=r'model.vit_model is /.*; give its public name: .*vit_model="owner/name"'):
        trained.push_to_hub("me/captioner")
    assert not Hub.folder.exists()
    done = trained.push_to_hub("me/captioner", private=True, token="t", card=CARD, preprocess=PREPROCESS, **PUBLIC)
    assert done == "https://hub/commit/1"
    asked = ("me/captioner", {"private": True, "exist_ok": True, "repo_type": "model"})
    assert Hub.calls["token"] == "t" and Hub.calls["create_repo"] == asked
    assert Hub.calls["upload"][0] == "me/captioner" and Hub.calls["upload"][1].startswith("lavis_evlgen ")
    assert sorted(p.name for p in Hub.folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (Hub.folder / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    words = (Hub.folder / "config.json").read_text() + (Hub.folder / "README.md").read_text()
    assert PUBLIC["llm_model"] in words and not any(path in words for path in parts.values())
    assert 'load_model_and_preprocess("evlgen", "me/captioner"' in words

    # and down again, by the same name
    def downloaded(repo_id, allow_patterns, revision):
        assert (repo_id, revision) == ("me/captioner", "v1")
        assert sorted(allow_patterns) == ["config.json", "model.safetensors"]
        return str(Hub.folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", downloaded)
    frozen = {key: parts[key] for key in PUBLIC}
    model = EVLGen.from_pretrained("me/captioner", revision="v1", **frozen)
    assert torch.equal(prompt(model), prompt(trained))


def test_what_from_pretrained_cannot_load(parts, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused = [
        ("opt2.8b", WeightsError, "'opt2.8b' is no model type .opt2.7b, .*no folder here"),
        ("./nowhere", WeightsError, "no folder here"),
        ("nobody/nothing", WeightsError, "model_type: cannot load 'nobody/nothing'"),
        (parts["llm_model"], WeightsError, "is not the config of a bundle"),
        (str(tmp_path), WeightsError, "is no bundle: it lacks model.safetensors or config.json; of a run folder give"),
    ]
    for source, kind, says in refused:
        with pytest.raises(kind, match=says):
            EVLGen.from_pretrained(source)
    with pytest.raises(WeightsError, match="is no bundle: .*make a bundle: `evlgen export"):
        build(parts, pretrained=str(tmp_path))
    with pytest.raises(ConfigError, match="from_pretrained: unknown key llm_modle; did you mean llm_model?"):
        EVLGen.from_pretrained(str(saved), llm_modle="x")
    with pytest.raises(ConfigError, match="from_pretrained: pretrained: .* brings its own weights"):
        EVLGen.from_pretrained(str(saved), pretrained="other.pth")
    content = json.loads((saved / "config.json").read_text())
    shutil.copytree(saved, tmp_path / "b")
    for change, says in (
        ({"lavis_evlgen": {"bundle": 2, "version": "9.9"}}, "written by lavis_evlgen 9.9, newer than"),
        ({"model": content["model"] | {"tomer": 1}}, "unknown key tomer; did you mean tome_r?"),
        ({"model": content["model"] | {"arch": "blip2_opt"}}, "holds a blip2_opt, which EVLGen is not"),
    ):
        (tmp_path / "b" / "config.json").write_text(json.dumps(content | change))
        with pytest.raises((WeightsError, ConfigError), match=says):
            EVLGen.from_pretrained(str(tmp_path / "b"))


def test_what_cannot_be_saved(trained, saved, tmp_path):
    with pytest.raises(ValueError, match="put together by hand and knows no config"):
        tiny_evlgen().save_pretrained(tmp_path / "b")
    with pytest.raises(ConfigError, match="save_pretrained: unknown key tomer"):
        trained.save_pretrained(tmp_path / "b", tomer=3)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(WeightsError, match="is no empty folder: it holds thesis.tex"):
        trained.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_saving_names_the_paths_of_this_machine(parts, trained, tmp_path, caplog):
    trained.save_pretrained(tmp_path / "b", llm_model="somebody/llm")
    told = [r.getMessage() for r in caplog.records if "a path of this machine" in r.getMessage()]
    path = parts["vit_model"]
    assert told == [f"config.json: model.vit_model is {path}, a path of this machine; elsewhere give another"]


def test_a_model_type_gives_its_own_preprocessing(parts, tmp_path):
    build(parts).save_pretrained(tmp_path / "b")
    stages = bundle.read_config(tmp_path / "b")["preprocess"]["vis_processor"]
    colours = {"mean": "imagenet", "std": "imagenet"}
    assert stages["eval"] == {"name": "evlgen_image_eval", "image_size": IMAGE_SIZE, **colours}


def test_an_empty_model_has_the_shapes_and_reads_no_weights(parts, trained, tmp_path):
    """Without the weight files it can be built all the same, and its counts are those of the real one."""
    for key, folder in parts.items():
        shutil.copytree(folder, tmp_path / key, ignore=shutil.ignore_patterns("*.safetensors"))
    bare = {key: str(tmp_path / key) for key in parts}
    model = bundle.empty_model(EVLGen, section(bare, pretrained="/gone", prompt_scale="embedding"))
    assert all(p.is_meta for p in model.parameters())
    shapes = {k: (p.shape, p.dtype, p.requires_grad) for k, p in trained.named_parameters()}
    assert {k: (p.shape, p.dtype, p.requires_grad) for k, p in model.named_parameters()} == shapes
