"""An evaluation scores the model that was trained, whatever the config file of the evaluation says."""

import json
import shutil

import pytest

from lavis_evlgen.cli import main
from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.as_trained import as_trained, weights_of
from tests.run_tools import Runs

TRAINED = {"bos": "before", "tome_r": 2, "prompt": "a photo of", "merge_mean": "size"}
OTHERS = {"bos": "after", "tome_r": {"target": 9}, "prompt": "", "merge_mean": "plain"}


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    runs = Runs(parts, tmp_path_factory.mktemp("trained"), test_splits=["test"], blind_shuffles=1)
    runs.config["model"] |= TRAINED
    runs.train()
    return runs


@pytest.fixture(scope="module")
def bundle(trained):
    with pytest.raises(SystemExit) as end:
        main(["export", str(trained.output()), str(trained.folder / "bundle")])
    assert end.value.code == 0
    return trained.folder / "bundle"


def card(runs, name):
    return json.loads((runs.output(name) / "run.json").read_text())


def evaluate(trained, tmp_path, weights, *options, **model) -> dict:
    """The run card of an evaluation whose config file has other settings than the weights."""
    runs = trained.copy(tmp_path, evaluate=True)
    runs.config["model"] |= {**OTHERS, "pretrained": str(weights), **model}
    runs.train(*options, evaluate=True)
    return card(runs, "run")


@pytest.mark.parametrize("kind", ["checkpoint", "bundle", "bundle's file"])
def test_the_model_section_comes_from_the_weights(trained, bundle, tmp_path, capfd, kind):
    weights = {"checkpoint": trained.output() / "checkpoint_last.pth", "bundle": bundle}
    weights["bundle's file"] = bundle / "model.safetensors"
    found, expected = evaluate(trained, tmp_path, weights[kind]), card(trained, "run")
    assert {key: found["config"]["model"][key] for key in TRAINED} == TRAINED
    for key in ("loss_right", "loss_shuffled", "metrics", "blind"):
        assert found["metrics"][key] == pytest.approx(expected["metrics"][key], rel=1e-6), key
    assert found["model"]["not_as_trained"] == {}
    assert "model.bos=after of the config is not used: the weights were trained with before" in capfd.readouterr().err


def test_a_bundle_of_none_of_the_model_types(trained, bundle, tmp_path):
    """One that was converted or built by hand: a model type only names defaults."""
    shutil.copytree(bundle, tmp_path / "bundle")
    content = json.loads((tmp_path / "bundle" / "config.json").read_text())
    del content["model"]["model_type"]
    (tmp_path / "bundle" / "config.json").write_text(json.dumps(content))
    found = evaluate(trained, tmp_path, tmp_path / "bundle")
    assert {key: found["config"]["model"][key] for key in TRAINED} == TRAINED


def test_what_options_say_wins_is_logged_and_stands_in_the_card(trained, tmp_path, capfd):
    options = ("model.bos=after", "model.tome_r=4")
    found = evaluate(trained, tmp_path, trained.output() / "checkpoint_last.pth", *options)
    assert found["model"]["not_as_trained"] == {
        "bos": {"trained": "before", "here": "after"}, "tome_r": {"trained": 2, "here": 4}
    }
    section = found["config"]["model"]
    assert (section["bos"], section["tome_r"], section["prompt"]) == ("after", 4, "a photo of")
    assert "model.tome_r=4 by --options; the weights were trained with 2" in capfd.readouterr().err
    assert found["metrics"]["loss_right"] != pytest.approx(card(trained, "run")["metrics"]["loss_right"], rel=1e-3)


def test_room_for_text_and_number_formats_are_the_evaluations_own(trained, tmp_path):
    found = evaluate(trained, tmp_path, trained.output() / "checkpoint_last.pth", max_txt_len=60)
    assert found["config"]["model"]["max_txt_len"] == 60 and found["config"]["model"]["bos"] == "before"


def test_weights_that_carry_no_section_are_evaluated_as_the_config_says(trained, tmp_path):
    import torch

    state = torch.load(trained.output() / "checkpoint_last.pth", weights_only=True)["model"]
    torch.save({"model": state}, tmp_path / "bare.pth")
    found = evaluate(trained, tmp_path, tmp_path / "bare.pth")
    assert found["config"]["model"]["bos"] == "after" and "not_as_trained" not in found["model"]


def test_training_goes_by_its_own_config(trained, tmp_path):
    runs = trained.copy(tmp_path, test_splits=[], max_iters=1, iters_per_inner_epoch=1)
    runs.config["model"] |= {"bos": "after", "pretrained": str(trained.output() / "checkpoint_last.pth")}
    assert runs.train().config.model_cfg.bos == "after"


def test_an_unknown_architecture_is_named(trained, tmp_path):
    import torch

    content = torch.load(trained.output() / "checkpoint_last.pth", weights_only=True)
    content["config"]["model"]["arch"] = "evlgenn"
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ConfigError, match="odd.pth: model.arch: 'evlgenn' is unknown; did you mean evlgen?"):
        evaluate(trained, tmp_path, tmp_path / "odd.pth")


def test_image_weights_as_a_video_model_keep_the_configs_own_keys():
    merged = {"arch": "evlgen_video", "model_type": "quickstart", "residual": "convex", "bos": "after", "tome_r": 9}
    section = {"arch": "evlgen", "model_type": "quickstart", "bos": "before", "tome_r": 4, "pretrained": "start.pth"}
    found = as_trained(section, merged, {"arch": "evlgen_video", "residual": "convex"}, {}, keeps_arch=True).section
    expected = {"arch": "evlgen_video", "residual": "convex", "bos": "before", "tome_r": 4}
    assert {key: found[key] for key in expected} == expected and "pretrained" not in found


def test_a_frozen_part_that_moved_is_taken_where_the_config_has_it(tmp_path):
    there, here = str(tmp_path / "gone"), str(tmp_path)
    section, merged = {"arch": "evlgen", "llm_model": there}, {"arch": "evlgen", "llm_model": here}
    found = as_trained(section, merged, {"llm_model": here}, {}, False)
    assert found.section["llm_model"] == here and "is not here" in found.notes[0] and len(found.notes) == 1
    public = {**section, "llm_model": "owner/name"}
    assert as_trained(public, merged, {}, {}, False).section["llm_model"] == "owner/name"


@pytest.mark.parametrize("keeps_arch", [False, True])
def test_the_released_alias_does_not_stay_beside_the_weights_own(keeps_arch):
    section, merged = {"arch": "evlgen", "llm_model": "a/b"}, {"arch": "evlgen", "opt_model": "c/d"}
    assert as_trained(section, merged, {}, {}, keeps_arch).section == {"arch": "evlgen", "llm_model": "a/b"}


def test_a_key_that_came_later_keeps_its_meaning_of_then():
    section, merged = {"arch": "evlgen", "bos": "after"}, {"arch": "evlgen", "bos_token": "</s>", "pretrained": "a.pth"}
    found = as_trained(section, merged, {}, {}, False).section
    assert found == {"arch": "evlgen", "bos": "after", "pretrained": "a.pth"}


@pytest.mark.parametrize(
    "model, path",
    [
        ({"pretrained": "a"}, "a"), ({"pretrained": "a", "load_pretrained": False}, None), ({}, None),
        ({"pretrained": "a", "finetuned": "b", "load_finetuned": True}, "b"),
    ],
)
def test_which_weights_an_evaluation_loads(model, path):
    assert weights_of(model) == path
