"""Mistakes that would show only in the first evaluation, or after a resume, are found before a step is made."""

import json

import pytest

from lavis_evlgen.datasets.facts import adapted
from lavis_evlgen.reporting.json_lines import read_json_lines
from lavis_evlgen.runners.checkpointing import checkpoints as state
from lavis_evlgen.runners.skipped_samples import TooManyBadImages, check_unreadable
from tests.run_tools import checkpoint, losses, same_tensors


@pytest.mark.parametrize(
    "option, says",
    [
        ("run.valid_splits=[dev]", "no data set has the split 'dev'; there are test, train, val"),
        ("run.test_splits=[dev]", "no data set has the split 'dev'"),
        ("run.valid_splits=val", "run.valid_splits=val is not a list; write [val]"),
        ("run.metrics=CIDEr", "run.metrics=CIDEr is not a list"),
        ("run.metrics=[BLEU]", "run.agg_metric=CIDEr will not be scored here; run.metrics gives BLEU-1"),
        ("run.agg_metric=SPICE", "run.agg_metric=SPICE will not be scored here"),
        ("datasets.scenes.sizes.val=1", "val has 1 pictures; scoring needs 2: give it more"),
        ("run.num_beams=0", "run.num_beams=0 must be a whole number of at least 1"),
        ("run.blind_shuffles=0", "run.blind_shuffles=0 must be a whole number of at least 1"),
        ("run.log_freq=0", "run.log_freq=0 must be a whole number of at least 1"),
        ("run.batch_size_train=2.5", "run.batch_size_train=2.5 must be a whole number"),
        ("run.beta2=2", "run.beta2=2 must be a number of at least 0 and at most 0.999999"),
        ("run.seed=-1", "run.seed=-1 must be a whole number of at least 0"),
        ("model.dropout=2", "model.dropout=2 must be a number of at least 0 and at most 0.99"),
        ("model.image_size=abc", "model.image_size: 'abc' is not a number"),
        ("datasets.scenes.vis_processor.eval.image_size=14", "eval.image_size=14, but model.image_size=28"),
        ("model.load_finetuned=true", "load_finetuned is true, but finetuned names no checkpoint"),
        ("run.device=cuda:0", "run.device: 'cuda:0' is not one of auto, cuda, cpu"),
        ("run.amp=bf16", "run.amp=bf16 with model.llm_precision=fp16: autocast cannot mix the two half precisions"),
        ("run.max_iters=null", "run.max_iters is not set: optimizer steps of the run"),
        ("run.init_lr=null", "run.init_lr is not set: learning rate"),
        ("run.device=mps", "run.device: 'mps' is not one of auto, cuda, cpu"),
        ("model.prompt=one two three four five six seven eight nine ten", "has room for"),
    ],
)
def test_refused_before_the_first_step(runs, option, says, capsys):
    given = ("run.valid_splits=[val]", "model.max_txt_len=12", "model.llm_precision=fp16")
    assert runs.command(*given, option) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (runs.output() / "log.jsonl").exists()


@pytest.mark.parametrize(
    "option, says",
    [
        ("run.resume_ckpt_path=x.pth", "set model.pretrained=x.pth in its place"),
        ("run.test_splits=[]", "run.test_splits is empty: there is nothing to evaluate"),
    ],
)
def test_evaluation_that_would_measure_something_else_is_refused(runs, option, says, capsys):
    assert runs.command(option, script="evaluate.py") == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_evaluation_needs_nothing_of_training(runs, tmp_path):
    """As the configs of projects/evlgen/eval."""
    runs = runs.copy(tmp_path, test_splits=["test"])
    for key in ("max_iters", "iters_per_inner_epoch", "init_lr", "min_lr", "warmup_lr", "warmup_steps",
                "weight_decay", "batch_size_train", "amp", "log_freq"):  # fmt: skip
        del runs.config["run"][key]
    assert runs.command(script="evaluate.py") == 0
    assert (runs.output() / "result" / "test_given.json").exists()


def test_evaluation_without_weights_says_so(runs, capsys):
    runs.train("run.test_splits=[test]", evaluate=True)
    assert "this evaluates an untrained connector" in capsys.readouterr().err


def test_an_evaluation_that_fails_loses_no_step_and_is_made_up_for(runs, monkeypatch):
    from lavis_evlgen.tasks.captioning import EvlgenCaptionTask

    def fails(*args, **kwargs):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(EvlgenCaptionTask, "evaluation", fails)
        with pytest.raises(OSError, match="disk is full"):
            runs.train("run.valid_splits=[val]", "run.iters_per_inner_epoch=2")
    saved = checkpoint(runs.output())
    assert saved["step"] == 2 and saved["unevaluated"]
    runs.train("run.resume_ckpt_path=auto", "run.valid_splits=[val]", "run.iters_per_inner_epoch=2")
    validated = sorted(file.name for file in (runs.output() / "result").glob("val_?.json"))
    assert validated == ["val_2.json", "val_4.json"] and list(losses(runs.output())) == [1, 2, 3, 4]
    assert checkpoint(runs.output(), state.PREVIOUS)["step"] == 2 and not checkpoint(runs.output())["unevaluated"]


def test_a_resume_follows_the_config_and_names_what_changed(runs, capsys):
    runs.train("run.max_iters=2")
    runner = runs.train(
        "run.resume_ckpt_path=auto", "run.max_iters=3", "run.weight_decay=0.5", "run.beta2=0.5",
        "model.lr_scale.connector=0.5",
    )  # fmt: skip
    groups = {group["name"]: group for group in runner.optimizer.param_groups}
    assert groups["connector"]["weight_decay"] == 0.5 and groups["connector"]["lr_scale"] == 0.5
    assert {group["betas"][1] for group in groups.values()} == {0.5}
    assert all(float(state["step"]) == 3 for state in runner.optimizer.state.values())
    words = capsys.readouterr().err
    for change in ("model.lr_scale.connector: ", "run.beta2: None -> 0.5", "run.max_iters: 2 -> 3"):
        assert change in words


@pytest.mark.parametrize(
    "option, says",
    [
        ("run.batch_size_train=3", "was trained with 2 images a step, this run has 3"),
        ("run.accum_grad_iters=2", "was trained with 2 images a step, this run has 4"),
        ("run.max_iters=1", "run.max_iters=1, but "),
    ],
)
def test_a_resume_that_would_lose_its_place_is_refused(runs, option, says, capsys):
    runs.train("run.max_iters=2")
    before = checkpoint(runs.output())
    assert runs.command("run.resume_ckpt_path=auto", option) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert same_tensors(checkpoint(runs.output())["model"], before["model"])


class Pictures(list):
    num_images, max_bad_fraction = 10, 0.2


def test_unreadable_pictures_of_an_evaluation_are_named_and_limited(tmp_path):
    entries = [{"image": f"{n}.png", "reason": "empty"} for n in range(3)]
    check_unreadable(tmp_path, "val", adapted(Pictures()), entries[:2])
    check_unreadable(tmp_path, "val", adapted(Pictures()), entries[:2])
    with pytest.raises(TooManyBadImages, match="test: 3 of 10 images are unreadable.*first is 0.png .empty."):
        check_unreadable(tmp_path, "test", adapted(Pictures()), entries)
    rows = read_json_lines(tmp_path / "bad_images.jsonl")
    assert [(row["image"], row["split"]) for row in rows] == [
        ("0.png", "val"), ("1.png", "val"), ("0.png", "test"), ("1.png", "test"), ("2.png", "test"),
    ]  # fmt: skip


def test_a_line_cut_short_by_a_crash_does_not_stop_a_resume(runs):
    runs.train("run.max_iters=2")
    with open(runs.output() / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    runs.train("run.resume_ckpt_path=auto", "run.max_iters=3")
    assert list(losses(runs.output())) == [1, 2, 3]


def test_one_picture_a_step_raises_no_false_alarm(runs, capsys):
    runs.train("run.batch_size_train=1", "run.accum_grad_iters=2")
    assert "collapsed" not in capsys.readouterr().err
    rows = [json.loads(line) for line in (runs.output() / "log.jsonl").read_text().splitlines()]
    assert rows and all(row["across_picture_share"] is None for row in rows if "loss" in row)
