"""`stages:` of a config: how a stage is laid over the file, how --options reach it, what is refused in which words."""

import argparse
import copy

import pytest

from lavis_evlgen.config import ConfigError, EvlgenConfig
from lavis_evlgen.config.stages import OF_THE_RUN
from lavis_evlgen.runners.settings import RunSettings
from tests.run_tools import ROOT, run_config, write_config

PARTS = {"vit_model": "facebook/dinov2-small", "connector_init": "bert-base-uncased", "llm_model": "some/llama"}


def staged(folder, *options, stages, stage=None, evaluate=False, **run):
    config = run_config(PARTS, folder / "output", **run)
    config["datasets"]["easy_vqa"] = {"vis_processor": copy.deepcopy(config["datasets"]["scenes"]["vis_processor"])}
    config["stages"] = stages
    args = argparse.Namespace(cfg_path=str(write_config(folder, config)), options=list(options))
    return EvlgenConfig(args, evaluate, stage=stage)


TWO = [
    {"name": "align", "trains": ["connector.*"], "datasets": ["scenes"], "run": {"max_iters": 7}},
    {"datasets": ["easy_vqa"], "run": {"task": "evlgen_vqa"}},
]


def test_a_stage_overlays_run_and_datasets_and_nothing_else(tmp_path):
    align, other = staged(tmp_path, stages=TWO).stages
    assert align.run_cfg.max_iters == 7 and other.run_cfg.max_iters == 4
    assert align.run_cfg.task == "evlgen_captioning" and other.run_cfg.task == "evlgen_vqa"
    assert "metrics" in align.run_cfg and "metrics" not in other.run_cfg  # which that task does not read
    assert list(align.datasets_cfg) == ["scenes"] and list(other.datasets_cfg) == ["easy_vqa"]
    assert align.model_cfg == other.model_cfg
    assert [cfg.stage.folder for cfg in (align, other)] == ["1_align", "2_stage2"]
    assert align.stage.trains == ("connector.*",) and other.stage.trains is None
    assert align.to_dict()["stage"] == {"name": "align", "number": 1, "of": 2, "trains": ["connector.*"]}


def test_a_stage_may_say_how_many_texts_a_picture(tmp_path):
    align, other = staged(tmp_path, stages=[{**TWO[0], "run": {"texts_per_image": 5}}, TWO[1]]).stages
    assert (align.run_cfg.texts_per_image, "texts_per_image" in other.run_cfg) == (5, False)
    drawn = {"datasets": ["scenes"], "run": {"task": "scst"}}
    with pytest.raises(ConfigError, match="stage stage2: run.texts_per_image=5: run.task=scst draws its captions"):
        staged(tmp_path, stages=[TWO[0], drawn], texts_per_image=5)
    drawn["run"]["texts_per_image"] = 1
    both = staged(tmp_path, stages=[TWO[0], drawn], texts_per_image=5).stages
    assert [cfg.run_cfg.texts_per_image for cfg in both] == [5, 1]


def test_without_stages_there_is_none(tmp_path):
    cfg = staged(tmp_path, stages=None)
    assert cfg.stages == [] and cfg.stage is None and "stage" not in cfg.to_dict()


def test_a_section_of_data_sets_replaces_the_files(tmp_path):
    """The builder's defaults are under it, not the file's section."""
    stages = [{"datasets": {"scenes": {"sizes": {"train": 3}}}, "run": {"train_dataset_ratios": {"scenes": 1}}}]
    (cfg,) = staged(tmp_path, stages=stages, train_dataset_ratios={"scenes": 1, "easy_vqa": 2}).stages
    assert list(cfg.datasets_cfg) == ["scenes"]
    assert cfg.datasets_cfg.scenes.sizes == {"train": 3, "val": 100, "test": 100}
    assert cfg.datasets_cfg.scenes.image_size != 56
    assert cfg.run_cfg.train_dataset_ratios == {"scenes": 1}


def test_options_reach_stages_by_name(tmp_path, caplog):
    options = ("stages.align.run.max_iters=9", "stages.align.run.init_lr=0.5", "run.log_freq=3", "run.max_iters=5",
               "stages.stage2.trains=[llm_proj.*]", "datasets.scenes.sizes.train=2")  # fmt: skip
    align, other = staged(tmp_path, *options, stages=TWO).stages
    assert (align.run_cfg.max_iters, align.run_cfg.init_lr, align.run_cfg.log_freq) == (9, 0.5, 3)
    assert (other.run_cfg.max_iters, other.run_cfg.log_freq) == (5, 3)
    assert other.stage.trains == ("llm_proj.*",) and align.datasets_cfg.scenes.sizes.train == 2
    assert "run.max_iters=5 by --options does not reach stage align" in caplog.text
    assert "stage stage2" not in caplog.text


def test_options_on_data_sets_that_reach_no_stage(tmp_path, caplog):
    own = [TWO[0], {"name": "own", "datasets": {"scenes": {"sizes": {"train": 3}}}}]
    align, other = staged(tmp_path, "datasets.scenes.sizes.train=2", stages=own).stages
    assert (align.datasets_cfg.scenes.sizes.train, other.datasets_cfg.scenes.sizes.train) == (2, 3)
    words = "datasets.scenes by --options does not reach stage own, which has its own: set stages.own.datasets.scenes"
    assert words in caplog.text and "no stage takes datasets.easy_vqa from the file" in caplog.text
    for option, words in {
        "datasets.scene.sizes.train=2": "--options datasets.scene: no stage takes it from the file; did you mean sce",
        "datasets.easy_vqa.image_size=2": "--options datasets.easy_vqa: no stage takes it from the file; known: scenes",
    }.items():
        with pytest.raises(ConfigError, match=words):
            staged(tmp_path, option, stages=own)
    with pytest.raises(ConfigError, match="from the file: set stages.own.datasets.scenes"):
        staged(tmp_path, "datasets.scenes.sizes.train=2", stages=own[1:])


def test_a_key_that_only_the_task_of_no_stage_reads_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="stage align: unknown key run.num_samples"):
        staged(tmp_path, stages=TWO, num_samples=2)  # of scst
    cfgs = staged(tmp_path, stages=[*TWO, {"name": "reward", "run": {"task": "scst"}}], num_samples=2).stages
    assert [cfg.run_cfg.get("num_samples") for cfg in cfgs] == [None, None, 2]


def test_stages_by_options_replace_the_files(tmp_path):
    (cfg,) = staged(tmp_path, "stages=[{name: only, run: {max_iters: 3}}]", stages=TWO).stages
    assert cfg.stage.name == "only" and cfg.run_cfg.max_iters == 3


def test_references_of_a_stage_are_to_its_own_sections(tmp_path):
    (cfg,) = staged(tmp_path, stages=[{"run": {"max_iters": 6, "iters_per_inner_epoch": "${run.max_iters}"}}]).stages
    assert cfg.run_cfg.iters_per_inner_epoch == 6


def test_an_evaluation_is_of_one_stage(tmp_path):
    cfg = staged(tmp_path, stages=TWO, evaluate=True)
    assert cfg.stages == [] and cfg.stage.name == "stage2" and cfg.run_cfg.task == "evlgen_vqa" and cfg.run_cfg.evaluate
    cfg = staged(tmp_path, stages=TWO, evaluate=True, stage="align")
    assert list(cfg.datasets_cfg) == ["scenes"] and cfg.run_cfg.max_iters == 7
    with pytest.raises(ConfigError, match="--stage algin: no stage has this name; did you mean align?"):
        staged(tmp_path, stages=TWO, evaluate=True, stage="algin")
    with pytest.raises(ConfigError, match="--stage align: no stage has this name; the file has no stages"):
        staged(tmp_path, stages=None, evaluate=True, stage="align")


REFUSED = {
    "stages={} must be a list of mappings": {},
    "stages=\\[\\] must be a list of mappings": [],
    "stages=three must be a list": "three",
    "stages\\[0\\].name='a b' must be a letter": [{"name": "a b"}],
    "stages\\[0\\].name='../up' must be a letter": [{"name": "../up"}],
    "stages\\[1\\].name=a: another stage has this name": [{"name": "a"}, {"name": "a"}],
    "unknown key stages.a.train; did you mean trains": [{"name": "a", "train": ["*"]}],
    "stages.a.model: the model is the same in all stages": [{"name": "a", "model": {"tome_r": 3}}],
    "stages.a.trains=connector": [{"name": "a", "trains": "connector.*"}],
    "stages.a.trains=\\[\\]: nothing would train": [{"name": "a", "trains": []}],
    "stages.a.datasets: scene is none of the file's data sets; did you mean scenes": [
        {"name": "a", "datasets": ["scene"]}
    ],
    "stage a: unknown key run.max_iter; did you mean max_iters": [{"name": "a", "run": {"max_iter": 1}}],
    "stage a: run.max_iters='ten' is not a number|stage a: run.max_iters: 'ten' is not a number": [
        {"name": "a", "run": {"max_iters": "ten"}}
    ],
    "stage a: unknown key run.lemmatize": [{"name": "a", "run": {"lemmatize": True}}],  # of evlgen_vqa
    "stage a: run.task: .*'vqa'.* is unknown": [{"name": "a", "run": {"task": ["vqa"]}}],
    "stage a: datasets: 'pictures' is unknown": [{"name": "a", "datasets": {"pictures": {}}}],
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_no_list_of_stages_is_refused_by_name(tmp_path, words):
    with pytest.raises(ConfigError, match=words) as error:
        staged(tmp_path, stages=REFUSED[words])
    assert "run.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "option, words",
    [("stages.0.run.max_iters=1", "stages.0: no stage has this name; known: align, stage2"),
     ("stages.algin.run.max_iters=1", "stages.algin: no stage has this name; did you mean align?"),
     ("stages=3", "stages=3: give stages.NAME.run.KEY=VALUE; the stages are align, stage2"),
     ("stages.align.run=3", "stages.align.run=3 must be a mapping"),
     ("stage.align.run.max_iters=1", "unknown key stage")],
)  # fmt: skip
def test_options_that_reach_no_stage_are_refused(tmp_path, option, words):
    with pytest.raises(ConfigError) as error:
        staged(tmp_path, option, stages=TWO)
    assert words in str(error.value)


def test_the_example_in_the_docs_is_a_config(tmp_path):
    text = (ROOT / "docs" / "stages.md").read_text()
    path = tmp_path / "staged.yaml"
    path.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    cfgs = EvlgenConfig(argparse.Namespace(cfg_path=str(path), options=["stages.align.run.max_iters=10"])).stages
    assert [cfg.stage.folder for cfg in cfgs] == ["1_align", "2_language", "3_questions"]
    assert [cfg.run_cfg.max_iters for cfg in cfgs] == [10, 400, 400]


def test_options_need_stages_to_change(tmp_path):
    with pytest.raises(ConfigError, match="stages: the file has none"):
        staged(tmp_path, "stages.align.run.max_iters=1", stages=None)


@pytest.mark.parametrize("key", OF_THE_RUN)
def test_keys_of_the_whole_run_are_refused_in_a_stage(tmp_path, key):
    assert key in RunSettings.meanings()
    with pytest.raises(ConfigError, match=f"stages.a.run.{key}: the same in all stages; set run.{key}"):
        staged(tmp_path, stages=[{"name": "a", "run": {key: 1}}])
