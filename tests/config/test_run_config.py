"""Run configs: defaults under the file under --options, and every unknown key refused with the nearest known."""

import argparse
import copy
import math
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from lavis_evlgen.config import ConfigError, EvlgenConfig, nearest
from lavis_evlgen.config.run_config import registry
from tests.run_tools import ROOT, run_config, write_config

PROJECTS = sorted(ROOT.glob("projects/**/*.yaml"))
PARTS = {"vit_model": "facebook/dinov2-small", "connector_init": "bert-base-uncased", "llm_model": "some/llama"}

NUMBERS = {
    int: (
        "max_iters", "iters_per_inner_epoch", "warmup_steps", "batch_size_train", "batch_size_eval", "num_beams",
        "accum_grad_iters", "num_workers", "seed", "max_len", "min_len", "log_freq", "blind_shuffles",
    ),
    float: ("init_lr", "min_lr", "warmup_lr", "weight_decay", "beta2", "max_grad_norm"),
    list: ("train_splits", "valid_splits", "test_splits", "metrics"),
}  # fmt: skip


def load(path, *options):
    return EvlgenConfig(argparse.Namespace(cfg_path=str(path), options=list(options)))


@pytest.fixture
def path(tmp_path):
    return write_config(tmp_path, run_config(PARTS, tmp_path / "output"))


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.stem)
def test_every_project_loads_and_its_values_are_of_the_right_type(project):
    loaded = load(project)
    for cfg in loaded.stages or [loaded]:
        check_project(cfg.to_dict())


def check_project(cfg: dict):
    run = cfg["run"]
    for kind, keys in NUMBERS.items():
        for key in set(keys) & set(run):
            allowed = (int, float) if kind is float else kind
            assert isinstance(run[key], allowed) and not isinstance(run[key], bool), f"run.{key}: {run[key]!r}"
    if run.get("evaluate"):
        assert run["test_splits"] and cfg["model"]["pretrained"] is None
    else:
        assert run["amp"] in (False, True, "bf16", "fp16", "auto")
        assert run["min_lr"] <= run["init_lr"] and run["warmup_lr"] <= run["init_lr"]
        assert run["warmup_steps"] < run["max_iters"] and run["max_iters"] % run["iters_per_inner_epoch"] == 0
        assert registry.get_lr_scheduler_class(run["lr_sched"]) is not None
    assert isinstance(cfg["model"].get("num_layers", 1), int) and cfg["model"]["freeze_vit"] is True
    assert math.isfinite(sum(cfg["model"]["lr_scale"].values())) if cfg["model"].get("lr_scale") else True
    for dataset in cfg["datasets"].values():
        sizes = {processor["image_size"] for processor in dataset["vis_processor"].values()}
        assert sizes == {cfg["model"]["image_size"]}, "the processors and the ViT must agree"
        frames = {processor.get("num_frames") for processor in dataset["vis_processor"].values()}
        assert frames == {cfg["model"].get("num_frames")}, "the processors and the model must agree"
        assert 0 <= dataset["max_bad_fraction"] <= 1


def test_the_projects_are_there():
    found = {folder: {path.stem for path in PROJECTS if path.parent == ROOT / "projects" / folder}
             for folder in ("evlgen", "evlgen/eval", "evlgen_video", "evlgen_video/eval", "stages")}  # fmt: skip
    assert {"quickstart", "opt", "vicuna"} <= found["evlgen"]
    assert found["stages"] == {"four_stages_mini", "opt2.7b", "qwen2.5_1.5b"}
    assert found["evlgen/eval"] == {"coco", "nocaps", "flickr30k", "vqav2", "gqa", "okvqa", "easy_vqa"}
    assert found["evlgen_video"] == {"msrvtt", "msvd", "webvid", "msrvtt_scst", "moving_scenes", "clips"}
    assert found["evlgen_video/eval"] == {"msrvtt", "msvd"}


@pytest.mark.parametrize("name", ["msrvtt", "msvd"])
def test_fine_tuning_on_clips_has_the_released_settings(name):
    cfg = load(ROOT / f"projects/evlgen_video/{name}.yaml")
    run, model = cfg.run_cfg, cfg.model_cfg
    assert (run.warmup_lr, run.init_lr, run.min_lr, run.warmup_steps, run.max_iters) == (1e-8, 1e-5, 1e-6, 1000, 50_000)
    assert 4 <= run.batch_size_train <= 16 and (model.vit_precision, model.num_frames) == ("fp32", 4)
    assert (model.residual, model.temporal_positions, model.frame_pooling) == ("gated", False, "mean")
    score = load(ROOT / f"projects/evlgen_video/eval/{name}.yaml")
    for found in (cfg, score):
        assert (found.run_cfg.num_beams, found.run_cfg.max_len, found.run_cfg.min_len) == (5, 20, 5)
        data = found.datasets_cfg.video_captions
        assert data.videos == f"data/{name}/videos"
        assert data.annotations.test == f"data/{name}/annotations/cap_test.json"
    assert [split for split, file in data.annotations.items() if file] == ["test"]


def test_drawn_clips_are_neither_mirrored_nor_cropped():
    cfg = load(ROOT / "projects/evlgen_video/moving_scenes.yaml")
    train = cfg.datasets_cfg.moving_scenes.vis_processor.train
    assert (train.flip, train.min_scale) == (False, 1.0) and cfg.model_cfg.temporal_positions is True
    assert (cfg.run_cfg.max_iters, cfg.run_cfg.batch_size_train, cfg.model_cfg.num_frames) == (240, 8, 4)


def test_another_processor_brings_no_keys_of_the_default_one(path):
    """image_captions trains with crops by default; its evaluation's processor knows none."""
    data = "datasets.image_captions"
    options = [f"{data}.images=x", f"{data}.captions=y", f"{data}.vis_processor.train.name=evlgen_image_eval"]
    train = load(path, *options).datasets_cfg.image_captions.vis_processor.train
    assert train.name == "evlgen_image_eval" and "min_scale" not in train and train.image_size == 28
    with pytest.raises(ConfigError, match=r"unknown key datasets.image_captions.vis_processor.train.min_scale"):
        load(path, *options, f"{data}.vis_processor.train.min_scale=0.5")


def test_defaults_then_file_then_options(path):
    default = load(path).to_dict()
    assert default["model"]["bos"] == "before"  # of the model's type
    assert default["datasets"]["scenes"]["kinds"] == {"single": 2, "pair": 3, "count": 1}  # of the data set
    assert default["model"]["num_layers"] == 2 and default["run"]["max_iters"] == 4  # of the file
    cfg = load(path, "model.num_layers=1", "run.max_iters=7", "datasets.scenes.kinds.pair=0", "run.init_lr=1e-3")
    assert cfg.model_cfg.num_layers == 1 and cfg.run_cfg.max_iters == 7 and cfg.run_cfg.init_lr == 0.001
    assert dict(cfg.datasets_cfg.scenes.kinds) == {"single": 2, "pair": 0, "count": 1}


@pytest.mark.parametrize(
    "in_file, option, expected",
    [
        (None, None, {"target": 29}),  # the default of this type
        (19, None, 19),
        ([3, 2], None, [3, 2]),
        ({"target": 20}, None, {"target": 20}),
        ({"r": 4, "inflection": 0.5}, None, {"r": 4, "inflection": 0.5}),  # not beside the default's target
        ({"r": 4, "inflection": 0.5}, "model.tome_r.r=5", {"r": 5, "inflection": 0.5}),
        ({"r": 4, "inflection": 0.5}, "model.tome_r=[1,0]", [1, 0]),
        ([3, 2], "model.tome_r.target=9", {"target": 9}),
        (None, "model.tome_r=7", 7),
    ],
)
def test_a_merge_schedule_replaces_the_default_of_another_kind(tmp_path, in_file, option, expected):
    config = run_config(PARTS, tmp_path / "output")
    config["model"].pop("tome_r")
    config["model"] |= {} if in_file is None else {"tome_r": in_file}
    loaded = load(write_config(tmp_path, config), *filter(None, [option]))
    assert loaded.to_dict()["model"]["tome_r"] == expected


@pytest.mark.parametrize("option", ["datasets.scenes.sizes=[1,2]", "model.lr_scale=[1]", "run=3", "model=[a]"])
def test_a_list_where_a_mapping_belongs(path, option):
    with pytest.raises(ConfigError, match="run.yaml"):
        load(path, option)


def test_options_select_the_defaults_of_another_type(path):
    kind = "evlgen_opt2.7b.yaml"
    expected = yaml.safe_load((ROOT / "lavis_evlgen" / "configs" / "models" / kind).read_text())["model"]
    cfg = load(path, "model.model_type=opt2.7b").model_cfg
    untouched = [key for key in expected if key not in yaml.safe_load(path.read_text())["model"]]
    assert len(untouched) > 5 and cfg.bos == "after" != load(path).model_cfg.bos
    for key in untouched:
        assert cfg.get(key) == expected[key], key


BEYOND = [
    ("run.max_iter=3", "unknown key run.max_iter; did you mean max_iters?"),
    ("run.num_beam=3", "unknown key run.num_beam; did you mean num_beams?"),  # the task's
    ("model.tome=3", "unknown key model.tome; did you mean tome_r?"),
    ("model.lr_scale.conector=1", "unknown key model.lr_scale.conector; did you mean connector?"),
    ("model.zzz=3", "unknown key model.zzz; known: "),
    ("datasets.scenes.size=3", "unknown key datasets.scenes.size; did you mean sizes?"),
    ("datasets.scene.sizes.train=3", "datasets: 'scene' is unknown; did you mean scenes?"),
    ("datasets.scenes.vis_processor.trian.name=x", "datasets.scenes.vis_processor.trian; did you mean train?"),
    ("datasets.scenes.vis_processor.train.flips=1", "vis_processor.train.flips; did you mean flip?"),
    ("datasets.scenes.text_processor.eval.name=evlgen_captions", "did you mean evlgen_caption?"),
    ("datasets.scenes.type=big", "datasets.scenes.type: 'big' is unknown; known: default"),
    ("model.arch=evlgn", "model.arch: 'evlgn' is unknown; did you mean evlgen?"),
    ("model.model_type=opt2.7", "model.model_type: 'opt2.7' is unknown; did you mean opt2.7b?"),
    ("run.task=evlgen_caption", "run.task: 'evlgen_caption' is unknown; did you mean evlgen_captioning?"),
    ("run.runner=runner_evlgn", "run.runner: 'runner_evlgn' is unknown; did you mean runner_evlgen?"),
    ("runs.max_iters=3", "unknown key runs; did you mean run?"),
    ("max_iters=3", "unknown key max_iters"),
]


@pytest.mark.parametrize("option, says", BEYOND, ids=[option for option, _ in BEYOND])
def test_unknown_keys_in_options(path, option, says):
    with pytest.raises(ConfigError) as error:
        load(path, option)
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("option, says", BEYOND, ids=[option for option, _ in BEYOND])
def test_unknown_keys_in_the_file(tmp_path, option, says):
    config = run_config(PARTS, tmp_path / "output")
    *sections, key = option.partition("=")[0].replace("opt2.7", "opt2_7").split(".")
    place = config
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = yaml.safe_load(option.partition("=")[2])
    with pytest.raises(ConfigError) as error:
        load(write_config(tmp_path, config))
    assert says in str(error.value) and "run.yaml" in str(error.value)


@pytest.mark.parametrize("section", ["run", "model", "datasets"])
@pytest.mark.parametrize("how", ["missing", "empty", "misspelt"])
def test_a_missing_section_is_named(tmp_path, section, how):
    config = copy.deepcopy(run_config(PARTS, tmp_path / "output"))
    body = config.pop(section)
    config |= {"empty": {section: None}, "misspelt": {section + "s": body}, "missing": {}}[how]
    with pytest.raises(ConfigError, match=f"section '{section}' is missing; a run config has run, model, datasets"):
        load(write_config(tmp_path, config))


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just words\n", "run: {max_iters: 3\n"])
def test_a_file_that_is_no_config(tmp_path, content):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ConfigError, match="run.yaml"):
        load(tmp_path / "run.yaml")


def test_a_missing_file_is_named_with_the_folder_it_was_sought_from(tmp_path):
    with pytest.raises(ConfigError) as error:
        load("projects/none.yaml")
    assert "projects/none.yaml does not exist" in str(error.value) and str(Path.cwd()) in str(error.value)


@pytest.mark.parametrize("option", ["run.max_iters", "run.max_iters 3", "run={"])
def test_options_that_are_no_assignment(path, option):
    with pytest.raises(ConfigError, match="--options"):
        load(path, option)


def test_the_number_of_frames_is_said_once(tmp_path, monkeypatch):
    video = registry.get_model_class("evlgen_video")
    monkeypatch.setattr(registry.get_model_class("evlgen"), "Settings", video.Settings)
    config = run_config(PARTS, tmp_path / "output")
    config["datasets"] = {"moving_scenes": {}, "scenes": config["datasets"]["scenes"]}
    config["model"] |= {"num_frames": 7}
    path = write_config(tmp_path, config)
    stages = load(path).config.datasets.moving_scenes.vis_processor
    assert [stages[stage].num_frames for stage in ("train", "eval")] == [7, 7]
    with pytest.raises(ConfigError, match=r"eval\.num_frames=3, but model\.num_frames=7; leave it out"):
        load(path, "datasets.moving_scenes.vis_processor.eval.num_frames=3")


@pytest.mark.parametrize("name", ["msrvtt_caption", "msvd_caption", "vatex_caption"])
def test_lavis_builders_of_clips_are_refused_with_what_reads_their_files(tmp_path, name):
    config = run_config(PARTS, tmp_path / "output")
    config["datasets"] = {name: {}}
    with pytest.raises(ConfigError, match=rf"datasets\.{name}: .*downloads.*take datasets\.video_captions"):
        load(write_config(tmp_path, config))


def test_nearest_or_the_list():
    assert nearest("max_iter", ["max_iters", "seed"]) == "; did you mean max_iters?"
    assert nearest("q", ["seed", "amp"]) == "; known: amp, seed"


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_shows_examples(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    words = capsys.readouterr().out
    assert end.value.code == 0
    assert f"python {script} --cfg-path projects/evlgen/quickstart.yaml" in words and "evlgen keys" in words
