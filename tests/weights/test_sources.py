"""Where weights come from: nothing is imported or run to find and read them, and what they are not is one message."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from lavis_evlgen.compat.environment import MissingExtra
from lavis_evlgen.models.connectors.tomeformer import build_tomeformer
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.language.loading import load_language_model
from lavis_evlgen.models.vision.encoder import load_vision_encoder
from lavis_evlgen.weights import sources
from lavis_evlgen.weights.bundle import bundle_config
from lavis_evlgen.weights.sources import WeightsError, package_folder, read_state_dict, resolve
from lavis_evlgen.weights.trainable import load_trainable, trainable_state
from tests.run_tools import redraw
from tests.tiny import IMAGE_SIZE, tiny_dinov2, tiny_evlgen, tiny_llama, tiny_tokenizer, tiny_vision


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that code touches when it runs; where one stands is the folder that holds a package of a stranger."""
    path = tmp_path / "ran"
    package = tmp_path / "here" / "stranger"
    (package / "inside").mkdir(parents=True)
    for folder in (package, package / "inside"):
        (folder / "__init__.py").write_text(f"import pathlib\npathlib.Path({str(path)!r}).touch()\n")
        (folder / "vit.onnx").write_text("")
    monkeypatch.chdir(package.parent)
    monkeypatch.syspath_prepend(str(package.parent))
    return path


@pytest.mark.parametrize(
    "source", ["stranger/vit.onnx", "stranger.inside/vit.onnx", "stranger.inside.x/vit.onnx", ".stranger/x", "stranger"]
)
def test_a_folder_where_one_stands_is_no_package_and_is_not_imported(marker, source):
    with pytest.raises((WeightsError, MissingExtra), match=r"stranger.*(is not installed|not the name of a top-level)"):
        resolve(f"package:{source}", "vit_model")
    assert not marker.exists() and not any(name.startswith("stranger") for name in sys.modules)


def test_a_package_that_is_installed_is_not_imported(tmp_path, monkeypatch):
    touched = tmp_path / "ran"
    for name, files in (("plain", "RECORD"), ("told", "top_level.txt")):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(f"open({str(touched)!r}, 'w')")
        (tmp_path / "site" / name / "w.onnx").write_text("")
        info = tmp_path / "site" / f"{name}_of-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-of\nVersion: 1.0\n")
        (info / files).write_text(f"{name}/__init__.py,,\n{name}/w.onnx,,\n" if files == "RECORD" else f"{name}\n")
    (tmp_path / "site" / "bare").mkdir()  # a folder of no distribution
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    for name in ("plain", "told"):
        assert resolve(f"package:{name}/w.onnx", "vit_model") == str(tmp_path / "site" / name / "w.onnx")
    assert package_folder("bare") is None and not touched.exists()


def test_an_editable_install_is_found_in_its_project(tmp_path, monkeypatch):
    (tmp_path / "my project" / "src" / "mine").mkdir(parents=True)
    (tmp_path / "my project" / "src" / "mine" / "w.gguf").write_text("")
    info = tmp_path / "site" / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("mine\n")
    url = (tmp_path / "my project").as_uri()
    (info / "direct_url.json").write_text(json.dumps({"url": url, "dir_info": {"editable": True}}))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert resolve("package:mine/w.gguf", "key") == str(tmp_path / "my project" / "src" / "mine" / "w.gguf")


@pytest.mark.parametrize("inside", ["../torch/version.py", "configs/../../torch", "/etc/passwd", "x/../plugin.py"])
def test_a_path_may_not_leave_its_package(inside):
    with pytest.raises(WeightsError, match="leaves the folder of package lavis_evlgen"):
        resolve(f"package:lavis_evlgen/{inside}", "vit_model")


IMPORTS_NOTHING = """
import sys
from lavis_evlgen.weights.sources import package_folder
for name in sys.argv[1:]:
    folder = package_folder(name)
    print(name, "not installed" if folder is None else folder.is_dir(), name in sys.modules)
"""


def test_the_packages_of_the_quickstart_are_found():
    names = list(sources.EXTRAS)
    found = subprocess.run([sys.executable, "-c", IMPORTS_NOTHING, *names], capture_output=True, text=True)
    if "not installed" in found.stdout:
        pytest.skip(f"{found.stdout}: uv sync --extra quickstart")
    assert found.stdout.splitlines() == [f"{name} True False" for name in names], found


@pytest.mark.parametrize("source", ["x" * 300, "~nobody_of_this_name/weights.pth"])
def test_what_is_no_path_is_named(source):
    with pytest.raises(WeightsError, match=f"key: {source[:100]}.* is no path"):
        resolve(source, "key")


# --- code that a model folder brings


CODE = """import pathlib
from transformers import {base}
pathlib.Path({marker!r}).touch()
class Mine({base}):
    model_type = "stranger"
    pass
"""


def with_code(folder, marker, **config):
    """A model folder whose config names classes of a file beside it, which touches `marker` when it is imported."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(CODE.format(base="PretrainedConfig", marker=str(marker)))
    auto_map = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine", "AutoModel": "mine.Mine"}
    about = {"model_type": "stranger", "auto_map": auto_map, **config}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def never_asked(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail(f"asked: {words}"))


def with_tokenizer_code(folder, marker):
    tiny_llama().save_pretrained(folder)
    with_code(folder, marker, **json.loads((folder / "config.json").read_text()) | {"model_type": "stranger"})
    auto_map = {"AutoTokenizer": [None, "mine.Mine"]}
    about = {"tokenizer_class": "Stranger", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def with_generation_code(folder, marker):
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "custom_generate").mkdir()
    touch = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\ndef generate(model, **kw): pass\n"
    (folder / "custom_generate" / "generate.py").write_text(touch)
    return folder


def with_kernels(folder, marker):
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    about = json.loads((folder / "config.json").read_text()) | {"_attn_implementation": "stranger/kernels"}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def language_model(folder):
    load_language_model(str(folder), "fp32")


def language_model_without_weights(folder):
    with torch.device("meta"):
        load_language_model(str(folder), "fp32")


def vision(folder):
    load_vision_encoder(str(folder), IMAGE_SIZE, "fp32")


@pytest.mark.parametrize(
    "make, load, key",
    [
        (with_code, language_model, "llm_model"),
        (with_code, language_model_without_weights, "llm_model"),
        (with_tokenizer_code, language_model, "llm_model"),
        (with_generation_code, language_model, "llm_model"),
        (with_kernels, language_model, "llm_model"),
        (with_code, vision, "vit_model"),
    ],
)
def test_code_of_a_model_folder_is_not_run_and_nobody_is_asked(tmp_path, never_asked, make, load, key):
    marker = tmp_path / "ran"
    with pytest.raises(WeightsError, match=f"{key}: .* brings code of its own.*set model.trust_remote_code=true"):
        load(make(tmp_path / "model", marker))
    assert not marker.exists()


def test_code_is_run_where_a_person_says_so(tmp_path):
    """As far as the file is imported: it is no language model, and that is told."""
    marker = tmp_path / "ran"
    with pytest.raises(WeightsError, match="llm_model: "):
        load_language_model(str(with_code(tmp_path / "model", marker)), "fp32", trust_remote_code=True)
    assert marker.exists()


VIT = """
from transformers import Dinov2Config, Dinov2Model
class Config(Dinov2Config):
    model_type = "stranger_vit"
class Model(Dinov2Model):
    config_class = Config
"""


def test_a_vit_of_its_own_code_loads_where_a_person_says_so(tmp_path):
    folder = tmp_path / "vit"
    model = redraw(tiny_dinov2())
    model.save_pretrained(folder)
    # under the names that the class has: transformers 5 writes those of old, which it knows of its own classes alone
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "mine.py").write_text(VIT)
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "stranger_vit", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(WeightsError, match="brings code of its own"):
        load_vision_encoder(str(folder), IMAGE_SIZE, "fp32")
    vit = load_vision_encoder(str(folder), IMAGE_SIZE, "fp32", trust_remote_code=True)
    image = torch.ones(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(vit(image), tiny_vision(lambda: redraw(tiny_dinov2()))(image))


def test_only_true_and_false_trust(parts):
    section = {"arch": "evlgen", **parts, "image_size": IMAGE_SIZE, "num_layers": 2, "vit_precision": "fp32"}
    with pytest.raises(ValueError, match="trust_remote_code: 'yes' is not true or false"):
        EVLGen.from_config(OmegaConf.create(section | {"trust_remote_code": "yes"}))
    model = EVLGen.from_config(OmegaConf.create(section | {"trust_remote_code": True, "llm_precision": "fp32"}))
    assert "trust_remote_code" not in bundle_config(model, changes={"trust_remote_code": True})["model"]


# --- files of weights


class Runs:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_refused_pickle_says_what_it_calls_and_advises_nothing_dangerous(tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    torch.save({"model": {"a": Runs(tmp_path / "ran")}}, file)
    with pytest.raises(WeightsError) as error:
        read_state_dict(str(file), "key")
    words = str(error.value)
    assert str(file) in words and "a pickle that would run code when it is read (it calls posix.mkdir)" in words
    assert "have it saved as .safetensors" in words and "weights_only" not in words and "\n" not in words
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content, says",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "looks like HTML"),
        (b"", "it is empty (0 bytes)"),
        (b"\x80\x04\x95" + bytes(50), "it is broken, or a pickle of other things than tensors, which is not run"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_file_of_weights_is_told(tmp_path, content, says, suffix):
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(WeightsError, match="is not a file of plain tensors") as error:
        read_state_dict(str(tmp_path / f"w{suffix}"), "key")
    words = str(error.value)
    assert says in words or (suffix == ".safetensors" and "it is broken" in words)
    assert "weights_only" not in words


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(100_000, 100_000)}, tmp_path / "w.pth")  # 40 GB once it is copied
    with pytest.raises(WeightsError, match=r"a of shape \(100000, 100000\) is larger than the file"):
        read_state_dict(str(tmp_path / "w.pth"), "key")


@pytest.mark.parametrize("content", [[1, 2], {1: torch.zeros(2)}, torch.zeros(3)])
def test_what_holds_no_tensors_by_name_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="w.pth is not a file of plain tensors: it is broken .*not tensors by name"):
        read_state_dict(str(tmp_path / "w.pth"), "key")


@pytest.mark.parametrize("wrong", [torch.int8, torch.int64, torch.bool, "text", "sparse"])
def test_weights_that_are_no_floating_point_numbers_are_refused(wrong):
    model = tiny_evlgen()
    state = dict(trainable_state(model))
    before = state["llm_proj.weight"].clone()
    other = {"text": "zeros", "sparse": torch.zeros_like(before).to_sparse()}.get(wrong)
    state["llm_proj.weight"] = before.to(wrong) if other is None else other
    with pytest.raises(WeightsError, match="checkpoint x.pth: llm_proj.weight (holds numbers of type|is no tensor)"):
        load_trainable(model, state, "x.pth")
    assert torch.equal(model.llm_proj.weight, before)


def test_frozen_parts_and_starts_of_whole_numbers_are_refused(parts, tmp_path):
    from safetensors.torch import load_file

    for key, load in (
        ("llm_model", lambda folder: load_language_model(folder, "fp32")),
        ("vit_model", lambda folder: load_vision_encoder(folder, IMAGE_SIZE, "fp32")),
        ("connector_init", lambda folder: build_tomeformer(
            tiny_vision(), {"connector_init": folder, "num_layers": 2, "tome_r": 4})),
    ):  # fmt: skip
        folder = tmp_path / key
        folder.mkdir()
        for file in os.listdir(parts[key]):
            content = open(os.path.join(parts[key], file), "rb").read()
            (folder / file).write_bytes(content)
        state = {name: value.to(torch.int32) for name, value in load_file(folder / "model.safetensors").items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WeightsError, match=f"{key}: "):
            load(str(folder))


def test_a_broken_model_folder_is_one_message(parts, tmp_path):
    """Whatever transformers raises at it."""
    for name, content, says in (
        ("config.json", "[" * 100_000, "llm_model: .*nested too deeply"),
        ("model.safetensors", "x" * 100, "llm_model: .*(is broken|is no model)"),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}', "llm_model: "),
    ):
        folder = tmp_path / name.replace(".", "_") / str(len(content))
        folder.mkdir(parents=True)
        for file in os.listdir(parts["llm_model"]):
            (folder / file).write_bytes(open(os.path.join(parts["llm_model"], file), "rb").read())
        (folder / name).write_text(content)
        with pytest.raises(WeightsError, match=says):
            load_language_model(str(folder), "fp32")


def test_every_call_of_transformers_says_what_it_trusts():
    """One without it asks on the terminal."""
    for path in Path(sources.__file__).parent.parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            words = ast.unparse(node) if isinstance(node, ast.Call) else ""
            name = words.partition("(")[0]
            called = words.removeprefix("load_from_hub(").partition(",")[0]
            if name == "load_from_hub" and re.search(r"(Auto|Bert)\w+\.from_|model_class\.from_", called):
                assert "trust" in words or "**kwargs" in words, f"{path}: {words}"
