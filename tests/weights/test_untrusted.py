"""Configs that came with weights: they name public parts and sizes of their own weights, and reach for nothing else."""

import json
import shutil

import pytest
import torch
from lavis.models import load_model_and_preprocess
from omegaconf import OmegaConf
from PIL import Image

from lavis_evlgen import cli
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.weights.bundle import read_config
from lavis_evlgen.weights.sources import WeightsError
from lavis_evlgen.weights.trainable import config_of_checkpoint
from lavis_evlgen.weights.untrusted import check_plain, checked_model, read_json
from tests.run_tools import checkpoint
from tests.tiny import IMAGE_SIZE

PREPROCESS = {"vis_processor": {"eval": {"name": "evlgen_image_eval", "image_size": IMAGE_SIZE, "mean": "half"}}}


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    section = {
        "arch": "evlgen", "model_type": "quickstart", **parts, "image_size": IMAGE_SIZE, "num_layers": 2,
        "vit_precision": "fp32", "llm_precision": "fp32", "tome_r": 4,
    }  # fmt: skip
    model = EVLGen.from_config(OmegaConf.create(section))
    return model.save_pretrained(tmp_path_factory.mktemp("saved") / "bundle", preprocess=PREPROCESS)


@pytest.fixture
def changed(saved, tmp_path):
    """changed(path of keys, value) -> a copy of the bundle with this in its config.json."""

    def change(keys: str, value):
        shutil.copytree(saved, tmp_path / "bundle", dirs_exist_ok=True)
        content = json.loads((saved / "config.json").read_text())
        section = content
        *above, last = keys.split(".")
        for key in above:
            section = section.setdefault(key, {})
        section[last] = value
        (tmp_path / "bundle" / "config.json").write_text(json.dumps(content))
        return tmp_path / "bundle"

    return change


@pytest.mark.parametrize(
    "keys, value, says",
    [
        ("model.llm_model", "${oc.env:SECRET}", "model.llm_model: '${oc.env:SECRET}' is an interpolation"),
        ("model.prompt", "a ${.vit_model}", "model.prompt: 'a ${.vit_model}' is an interpolation"),
        ("model.tome_r", ["${oc.env:SECRET}"], "model.tome_r[0]: "),
        ("preprocess.vis_processor.eval.image_size", "${oc.env:SECRET}", "preprocess.vis_processor.eval.image_size: "),
        ("decoding.num_beams", "???", "decoding.num_beams: '???' is an interpolation"),
        ("model.vit_model", "package:os/x.onnx", "model.vit_model: 'package:os/x.onnx' names a package"),
        ("model.llm_model", "package:lavis_evlgen/configs", "names a package"),
        ("model.vit_model", ["a"], "model.vit_model: ['a'] is not text"),
        ("model.num_layers", 10**7, "model.num_layers=1e+07 is too large: at most 1000"),
        ("model.num_layers", 900, "model.num_layers=900, but its weights are "),
        ("model.num_layers", "2", "num_layers: '2' is not a whole number"),
        ("model.num_layers", -1, "num_layers: -1 is not a whole number of 0 or more"),
        ("model.vit_layer", "last", "model.vit_layer: 'last' is not a number"),
        ("model.image_size", 28.5, "image_size: 28.5 is not a whole number"),
        ("model.image_size", 0, "image_size=0 must be a whole number of at least 14"),
        ("model.dropout", 2, "model.dropout=2 must be a number of at least 0 and at most 0.99"),
        ("model.prompt_scale", [1], "model.prompt_scale=[1] must be released, embedding or a number"),
        ("decoding.max_length", 0, "decoding.max_length: 0 is not a whole number of 1 or more"),
        ("decoding.length_penalty", 10**9, "decoding.length_penalty: 1e+09 is not a number of at most 1000"),
        ("model.image_size", 10**6, "model.image_size=1e+06 is too large"),
        ("model.num_query_token", 10**9, "model.num_query_token=1e+09 is too large"),
        ("model.connector_sizes.hidden_size", 4096, "connector_sizes.hidden_size=4096, but its weights are at most 32"),
        ("model.connector_sizes.intermediate_size", 10**9, "intermediate_size=1e+09 is too large"),
        ("model.connector_sizes.hidden_size", None, None),
        ("model.llm_train", {"lora": {"rank": 4096}}, "llm_train.lora.rank=4096, but its weights are at most 32 wide"),
        ("model.dropout", float("nan"), "model.dropout: nan is no number"),
        ("preprocess.vis_processor.eval.image_size", 10**6, "image_size=1e+06 is too large"),
        ("decoding.custom_generate", "stranger/code", "decoding.custom_generate is unknown"),
        ("decoding.num_beams", 10**6, "decoding.num_beams=1e+06 is too large"),
        ("decoding.num_beams", "all", "decoding.num_beams: 'all' is not a whole number"),
        ("model.arch", "no_such", "model.arch 'no_such' is unknown"),
        ("preprocess", [1], "preprocess is no section of keys"),
        ("frozen", {"language model": 3}, "frozen holds what is no section of keys"),
        ("lavis_evlgen.bundle", "one", "is not the config of a bundle"),
        ("model", "evlgen", "is not the config of a bundle"),
    ],
)
def test_what_a_bundle_may_not_say(changed, keys, value, says, monkeypatch):
    monkeypatch.setenv("SECRET", "nobody/by-the-environment")
    folder = changed(keys, value)
    if says is None:
        return read_config(folder)
    for load in (read_config, EVLGen.from_pretrained, lambda path: load_model_and_preprocess("evlgen", str(path))):
        with pytest.raises(WeightsError) as error:
            load(str(folder))
        assert says in str(error.value) and str(folder / "config.json") in str(error.value)


def test_nesting_without_end_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "b")
    for depth, says in ((100_000, "nested too deeply to be a config"), (100, "is nested too deeply or too long")):
        (tmp_path / "b" / "config.json").write_text('{"a": ' * depth + "1" + "}" * depth)
        with pytest.raises(WeightsError, match=says):
            read_json(tmp_path / "b" / "config.json", "bundle")
    shared = [1]
    for _ in range(25):
        shared = [shared] * 10  # 10²⁵ values in a few lines of a pickle
    endless = []
    endless.append(endless)
    for value in (shared, endless):
        with pytest.raises(WeightsError, match="nested too deeply or too long"):
            check_plain(value, "here")


def test_trust_is_never_taken_from_a_file(changed, finished, tmp_path, caplog):
    assert "trust_remote_code" not in read_config(changed("model.trust_remote_code", True))["model"]
    content = checkpoint(finished.output())
    content["config"]["model"]["trust_remote_code"] = True
    torch.save(content, tmp_path / "checkpoint_last.pth")
    assert "trust_remote_code" not in config_of_checkpoint(str(tmp_path / "checkpoint_last.pth"))
    assert caplog.text.count("model.trust_remote_code is not taken from a file") == 2


@pytest.mark.parametrize(
    "section, key, value, says",
    [
        ("model", "llm_model", "${oc.env:SECRET}", "is an interpolation"),
        ("datasets", "scenes", {"vis_processor": {"eval": {"name": "${oc.env:SECRET}"}}}, "is an interpolation"),
        ("run", "num_beams", 10**7, "is too large"),
        ("model", "vit_model", "package:os/x", "names a package"),
        ("model", "num_layers", 10**7, "is too large"),
        ("model", "arch", "nothing", "'nothing' is not known"),
        ("datasets", "scenes", {"vis_processor": {"eval": {"name": "x"}}}, "vis_processor.eval.name: 'x' is not known"),
        ("datasets", "scenes", 3, "has no vis_processor.eval"),
    ],
)
def test_what_a_checkpoint_may_not_say(finished, tmp_path, capsys, monkeypatch, section, key, value, says):
    monkeypatch.setenv("SECRET", "nobody/by-the-environment")
    content = checkpoint(finished.output())
    content["config"][section][key] = value
    torch.save(content, tmp_path / "checkpoint_last.pth")
    with pytest.raises(SystemExit) as end:
        cli.main(["caption", "x.png", "--run", str(tmp_path)])
    words = capsys.readouterr().err
    line = words.splitlines()[-1]
    assert end.value.code == 2 and "Traceback" not in words
    assert says in line and "checkpoint_last.pth" in line


def test_references_that_older_checkpoints_hold_are_left_out(finished, tmp_path, monkeypatch, capsys, caplog):
    """Of a run's own settings and data folders, which neither a model nor pictures are read with."""
    monkeypatch.setenv("SECRET", "by-the-environment")
    content = checkpoint(finished.output())
    content["config"]["run"] |= {"log_freq": "${run.seed}", "output_dir": "${oc.env:SECRET}/runs"}
    content["config"]["datasets"]["scenes"]["seed"] = "${run.seed}"
    torch.save(content, tmp_path / "checkpoint_last.pth")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    for command in (["caption", str(tmp_path / "a.png"), "--run"], ["export"]):
        with pytest.raises(SystemExit) as end:
            cli.main([*command, str(tmp_path), *([str(tmp_path / "bundle")] if command == ["export"] else [])])
        assert not end.value.code, capsys.readouterr().err
    assert "run: log_freq, output_dir left out" in caplog.text and "datasets.scenes: seed left out" in caplog.text
    assert "environment" not in caplog.text + "".join(capsys.readouterr())


def test_a_persons_interpolation_is_resolved_before_it_is_written(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM", "somebody/llm")
    with pytest.raises(SystemExit) as end:
        cli.main(["export", str(finished.output()), str(tmp_path / "b"), "--options", "model.llm_model=${oc.env:LLM}"])
    assert not end.value.code and read_config(tmp_path / "b")["model"]["llm_model"] == "somebody/llm"
    with pytest.raises(WeightsError, match="model.prompt: .* is an interpolation"):
        EVLGen.from_pretrained(str(tmp_path / "b"), llm_model=finished.config["model"]["llm_model"]).save_pretrained(
            tmp_path / "c", prompt="${oc.env:LLM}"
        )


def test_sizes_are_held_against_weights_only_where_they_are_built():
    shapes = {"ln_vision.weight": (24,), "llm_proj.weight": (32, 24)}
    section = {"arch": "evlgen", "connector": "linear", "num_layers": 12}
    assert checked_model(section, "here", shapes) == section
    with pytest.raises(WeightsError, match="num_layers=12, but its weights are 2 tensors"):
        checked_model(section | {"connector": "qformer"}, "here", shapes)
