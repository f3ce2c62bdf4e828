"""Files that are no config, and values that make no sense: one line that says which, and what it must be."""

import argparse
import math
from typing import get_args

import pytest
import yaml

from lavis_evlgen.config import ConfigError, EvlgenConfig
from lavis_evlgen.config.keys import keys_of
from lavis_evlgen.config.run_config import registry
from tests.config.test_run_config import PARTS, load
from tests.run_tools import run_config, write_config


@pytest.fixture
def config(tmp_path):
    return run_config(PARTS, tmp_path / "output")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
NO_CONFIGS = {
    "empty": (b"", "section 'run' is missing"),
    "comments": (b"# nothing\n", "section 'run' is missing"),
    "null": (b"null\n", "section 'run' is missing"),
    "text": (b"just words", "section 'run' is missing"),
    "number": (b"42", "holds a single value; a run config has the sections run, model, datasets"),
    "list": (b"- a\n- b\n", "holds a list; a run config has the sections run, model, datasets"),
    "png": (b"\x89PNG\r\n\x1a\n\x00\x00", "not a text in UTF-8 (byte 0x89 at position 0)"),
    "latin-1": ("run: {prompt: Bär}".encode("latin-1"), "not a text in UTF-8 (byte 0xe4 at position 15)"),
    "utf-16": ("run: 1".encode("utf-16"), "not a text in UTF-8"),
    "nul": (b"run: a\0b", "not YAML: "),
    "gzip": (b"\x1f\x8b\x08\x00\x00", "not a text in UTF-8"),
    "tag": (b"run: !!python/object/apply:os.system [id]", "could not determine a constructor for the tag"),
    "set": (b"run: {task: !!set {a, b}}", "run.task"),
    "date": (b"run: {task: !!timestamp 2024-01-01}", "run.task"),
    "digits": (b"run: {seed: 1" + b"0" * 5000 + b"}", "not YAML: "),
    "float tag": (b"run: {seed: !!float abc}", "could not convert string to float: 'abc'"),
    "anchors": (b"a: &x 1\nb: &x 2", "not YAML: "),
    "twice": (b"run: {seed: 1, seed: 2}", "found duplicate key seed"),
    "documents": (b"--- a\n--- b", "expected a single document"),
    "no end": (b"run: {max_iters: 3\n", "not YAML: "),
    "holds itself": (b"run: &a [*a]", "not YAML: "),
    "unknown alias": (b"run: *a", "found undefined alias"),
    "list as key": (b"? [a, b]\n: c", "found unhashable key"),
    "null as key": (b"null: 2", "not YAML: "),
    "broken reference": (b"run: {seed: '${'}", "run.seed"),
    "deep": (b"a: " + b"[" * 200 + b"]" * 200, "values inside of values, more than 20 levels deep"),
    "bomb": (BOMB.encode(), "more than 20,000 values, with what aliases (*name) stand for"),
    "large": (b"#" * 2**20 + b"\n", "is larger than 1,048,576 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("content, says", NO_CONFIGS.values(), ids=NO_CONFIGS)
def test_files_that_are_no_config(tmp_path, content, says):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=f"--cfg-path: {tmp_path} is not a file"):
        load(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text("run: 1")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(ConfigError, match=f"--cfg-path: {path} cannot be read: Permission denied"):
        load(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, config):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(config).encode())
    assert load(path).run_cfg.max_iters == 4


NONSENSE = [
    ("datasets.scenes", 1, "datasets.scenes=1 is not a mapping; write {} for its defaults"),
    ("datasets.scenes", None, "datasets.scenes=null is not a mapping; write {} for its defaults"),
    ("datasets.scenes", [1], "datasets.scenes=[1] is not a mapping"),
    ("datasets.scenes", "all", "datasets.scenes=all is not a mapping"),
    ("datasets.scenes.vis_processor", 3, "datasets.scenes.vis_processor=3 is not a mapping; write {train: {name"),
    ("datasets.scenes.vis_processor.train", "x", "datasets.scenes.vis_processor.train=x is not a mapping"),
    ("datasets.scenes.vis_processor.train.name", ["x"], "datasets.scenes.vis_processor.train.name: "),
    ("datasets.scenes.type", [1], "datasets.scenes.type: [1] is unknown; known: default"),
    ("model.arch", {"a": 1}, "model.arch: "),
    ("run.max_iters", math.inf, "run.max_iters=inf must be a whole number of at least 1 and at most 1000000000"),
    ("run.seed", math.nan, "run.seed=nan must be a whole number"),
    ("run.seed", 2**33, "run.seed=8589934592 must be a whole number of at least 0 and at most 4000000000"),
    ("run.beta2", 1, "run.beta2=1 must be a number of at least 0 and at most 0.999999"),
    ("run.weight_decay", math.nan, "run.weight_decay=nan must be a number of at least 0 and at most 10"),
    ("run.init_lr", 1e30, "run.init_lr=1e+30 must be a number of at least 0 and at most 100"),
    ("run.init_lr", "0.001", "run.init_lr: '0.001' is not a number; write it without quotes: 0.001"),
    ("run.min_lr", 0.5, "run.min_lr=0.5 must be at most run.init_lr=0.01"),
    ("run.min_len", 9, "run.min_len=9 must be at most run.max_len=8"),
    ("run.log_freq", 0, "run.log_freq=0 must be a whole number of at least 1"),
    ("run.train_splits", ["foo"], "run.train_splits[0]: 'foo' is not one of train"),
    ("run.valid_splits", [1], "run.valid_splits[0]=1 must be text"),
    ("run.evaluate", "false", "run.evaluate: 'false' is not true or false"),
    ("run.max_len", True, "run.max_len=true must be a whole number of at least 1 and at most 65536"),
    ("model.load_pretrained", None, "model.load_pretrained=null must be true or false; leave it out for the default"),
    ("run.tensorboard", 1, "run.tensorboard: 1 is not true or false"),
    ("run.amp", 1, "run.amp: 1 is not one of false, bf16, fp16, true, auto, fp32"),
    ("run.compile", ["vit"], "run.compile[0]: 'vit' is not one of vision, connector, llm"),
    ("run.lr_sched", "linear_warmup_step_lr", "run.lr_sched: 'linear_warmup_step_lr' is not one of linear_warmup_cos"),
    ("run.train_dataset_ratios", {"scenes": -1}, "run.train_dataset_ratios.scenes=-1 must be a number of at least 0"),
    ("run.train_dataset_ratios", {"scenes": math.nan}, "run.train_dataset_ratios.scenes=nan must be a number"),
    ("run.train_dataset_ratios", {"scenes": 0}, "run.train_dataset_ratios={'scenes': 0} must have a share above 0"),
    ("run.train_dataset_ratios", [1], "run.train_dataset_ratios=[1] must be a mapping {name: ...}"),
    ("run.world_size", -1, "run.world_size=-1 must be a whole number of at least 1"),
    ("run.output_dir", None, "run.output_dir is not set: folder of runs"),
    ("run.output_dir", 2024, "run.output_dir=2024 must be text"),
    ("run.run_name", {"a": 1}, "run.run_name={'a': 1} must be text or a whole number of at least 0 and at most"),
    ("run.run_name", "a/b", "run.run_name=a/b must be the name of one folder; run.output_dir says where it lies"),
    ("run.run_name", "..", "run.run_name=.. must be the name of one folder"),
    ("run.run_name", "..\\x", "run.run_name=..\\x must be the name of one folder"),
    ("run.run_name", "n" * 300, "run.run_name has 300 characters; it must have at most 200"),
    ("run.resume_ckpt_path", ["a"], "run.resume_ckpt_path=['a'] must be text"),
    ("run.resume_ckpt_path", "a\0b", "run.resume_ckpt_path='a\\x00b' holds a null character"),
    ("model.pretrained", {"a": 1}, "model.pretrained={'a': 1} must be text"),
    ("model.pretrained", 3, "model.pretrained=3 must be text"),
    ("model.llm_model", ["a", "b"], "model.llm_model=['a', 'b'] must be text"),
    ("model.vit_model", None, "model.vit_model=null must be text; leave it out for the default"),
    ("model.freeze_vit", "yes", "model.freeze_vit: 'yes' is not true or false"),
    ("model.bos", "middle", "model.bos: 'middle' is not one of before, after"),
    ("model.prompt_scale", 0, "model.prompt_scale=0 must be a number of at least 1e-06 and at most 1e+06"),
    ("model.prompt_scale", "big", "model.prompt_scale=big must be released, embedding or a number of at least"),
    ("model.lr_scale", {"connector": -1}, "model.lr_scale.connector=-1 must be a number of at least 0"),
    ("model.lr_scale", {"connector": None}, "model.lr_scale.connector=null must be a number of at least 0"),
    ("model.lr_scale", {"conector": 1}, "unknown key model.lr_scale.conector; did you mean connector?"),
    ("model.tome_r", 1_000_000, "model.tome_r=1000000 must be a whole number of at least 0 and at most 10000"),
    ("model.tome_r", [1, -1], "model.tome_r[1]=-1 must be a whole number of at least 0"),
    ("model.tome_r", {"target": "29"}, "model.tome_r.target: '29' is not a number; write it without quotes: 29"),
    ("model.tome_r", "all", "model.tome_r=all must be a whole number of at least 0 and at most 10000 or a list of"),
    ("model.connector_sizes", {"num_heads": 1.5}, "model.connector_sizes.num_heads=1.5 must be a whole number"),
    ("datasets.scenes.kinds", {"pair": -1}, "datasets.scenes.kinds.pair=-1 must be a number of at least 0"),
    ("datasets.scenes.sizes", {"train": 1e400}, "datasets.scenes.sizes.train=inf must be a whole number"),
    ("datasets.scenes.seed", None, "datasets.scenes.seed=null must be a whole number of at least 0 and at most"),
    ("datasets.scenes.max_bad_fraction", math.nan, "datasets.scenes.max_bad_fraction=nan must be a number of at lea"),
    ("run.seed", "${run.seed}", "run.seed=${run.seed} refers to what cannot be read: Recursive interpolation"),
    ("run.seed", "${nope.here}", "run.seed=${nope.here} refers to what cannot be read: Interpolation key 'nope.here'"),
    ("run.seed", "${run}", "run.seed=${run} refers to what cannot be read: "),
    ("run.seed", "${model}", "run.seed=${model} refers to a section that holds references itself; write the section"),
    ("run.seed", "???", "run.seed is ???, which means that a value must be given"),
]  # fmt: skip


@pytest.mark.parametrize("key, value, says", NONSENSE, ids=[f"{key}-{n}" for n, (key, _, _) in enumerate(NONSENSE)])
def test_values_that_make_no_sense_are_refused_by_name(tmp_path, config, key, value, says):
    *sections, last = key.split(".")
    place = config
    for section in sections:
        place = place[section]
    place[last] = value
    if value == "${model}":
        config["model"]["prompt"] = "${run.seed}"
    path = write_config(tmp_path, config)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: {says[:20]}") and says in str(error.value)


@pytest.mark.parametrize(
    "options, says",
    [
        (["run.seed=1" + "0" * 5000], "--options run.seed=1000"),
        (["run.seed=&a [*a]"], "--options run.seed=&a [*a]"),
        (["run.seed=" + "[" * 100 + "]" * 100], "more than 20 levels deep"),
        (["run.seed=!!python/object:os.system {}"], "could not determine a constructor"),
        (["run.seed=!!binary aGk="], "run.seed=b'hi' must be a whole number"),
        (["=3"], "unknown key ; known: datasets, model, run"),
        (["run..seed=3"], "unknown key run."),
        (["run=null"], "section 'run' is missing"),
        (["run.seed=1", "run.seed.x=2"], "run.seed"),
        (["run.metrics=[CIDEr]", "run.metrics.x=2"], "run.metrics"),
        (["run.weight_decay=.nan"], "run.weight_decay=nan must be a number"),
        (["run.train_splits=[foo]"], "'foo' is not one of train"),
        (["model.lr_scale={connector: -1}"], "model.lr_scale.connector=-1"),
        (["datasets.scenes=1"], "datasets.scenes=1 is not a mapping"),
        (["datasets=1"], "section 'datasets' is missing"),
    ],
)
def test_options_that_make_no_sense(tmp_path, config, options, says):
    with pytest.raises(ConfigError) as error:
        load(write_config(tmp_path, config), *options)
    assert says in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_what_is_meant_is_taken(tmp_path, config):
    """Numbers in every notation, whole floats as the ints they are, a year as a name, null as not given."""
    config["run"] |= {"max_iters": 2.5e2, "run_name": 2024, "seed": "${run.max_iters}", "amp": None, "num_beams": None}
    config["model"] |= {"num_layers": 2.0, "tome_r": [3.0, 1]}
    config["datasets"]["scenes"]["sizes"]["train"] = 1e1
    path = write_config(tmp_path, config)
    path.write_text(path.read_text().replace("init_lr: 0.01", "init_lr: 1e-2"))
    found = load(path, "run.min_lr=1e-5", "run.train_splits=[train]").to_dict()
    run = found["run"]
    assert (run["init_lr"], run["min_lr"], run["run_name"]) == (0.01, 1e-5, "2024")
    assert repr([run["max_iters"], run["seed"], found["model"]["tome_r"]]) == "[250, 250, [3, 1]]"
    assert repr([found["model"]["num_layers"], found["datasets"]["scenes"]["sizes"]["train"]]) == "[2, 10]"
    assert not {"amp", "num_beams"} & set(run)


def test_a_reference_to_a_section_is_a_copy_of_it(tmp_path, config):
    stages = config["datasets"]["scenes"]["vis_processor"]
    config["datasets"]["scenes"]["vis_processor"] = {**stages, "eval": "${datasets.scenes.vis_processor.train}"}
    found = load(write_config(tmp_path, config)).datasets_cfg.scenes.vis_processor
    assert found["eval"] == found.train and found["eval"].name == "evlgen_image_train"


@pytest.mark.parametrize(
    "option, says",
    [
        ("run.warmup_steps=9", "run.warmup_steps=9 is more than run.max_iters=4: the run ends before run.init_lr"),
        ("run.warmup_lr=0.5", "run.warmup_lr=0.5 is above run.init_lr=0.01: the rate falls during the warm-up"),
    ],
)
def test_what_is_strange_but_can_be_meant_is_told(tmp_path, config, caplog, option, says):
    path = write_config(tmp_path, config)
    load(path)
    assert not caplog.messages
    load(path, option)
    assert says in caplog.text
    caplog.clear()
    load(path, option, "run.evaluate=true", "run.test_splits=[test]")
    assert not caplog.messages


def test_lengths_are_compared_with_the_default_of_the_task(tmp_path, config):
    config["run"].pop("max_len")
    path = write_config(tmp_path, config)
    with pytest.raises(ConfigError, match="run.min_len=31 must be at most run.max_len=30"):
        load(path, "run.min_len=31")
    load(path, "run.min_len=30")


def test_the_only_schedule_is_the_one_that_evlgen_keys_names():
    schedule = keys_of(registry.get_runner_class("runner_evlgen"))["lr_sched"]
    assert get_args(schedule.kind) == (schedule.default,) == ("linear_warmup_cosine_step_lr",)
    assert schedule.meaning.startswith("linear_warmup_cosine_step_lr: ") and "another" not in schedule.meaning


def test_lavis_processors_are_checked_too(tmp_path, config):
    scenes = config["datasets"]["scenes"]
    scenes["vis_processor"]["train"] = {"name": "blip2_image_train", "image_size": 28, "min_scale": math.nan}
    with pytest.raises(ConfigError, match=r"vis_processor\.train\.min_scale=nan must be a number of at least 1e-06"):
        EvlgenConfig(argparse.Namespace(cfg_path=str(write_config(tmp_path, config)), options=[]))
