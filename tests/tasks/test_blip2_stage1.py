"""The two stages of BLIP-2 as runs: trained, resumed, evaluated, and handed on from one to the other."""

import lavis_evlgen  # noqa: F401  (its bridges come before LAVIS)

# isort: split
import json
import shutil

import pytest
import torch
from lavis.common.registry import registry
from PIL import Image

from lavis_evlgen import cli, launch
from lavis_evlgen.datasets import DataError
from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.tasks.blip2_stage1 import Blip2Stage1Task
from tests.run_tools import Runs, checkpoint, log, losses, same_tensors
from tests.tiny_blip2 import (
    QUERIES,
    WORDS,
    TinyBlip2OPT,
    TinyBlip2Qformer,
    bert_folder,
    lavis_blip2,
    lavis_blip2_opt,
)

TERMS = {"loss", "loss_itc", "loss_itm", "loss_lm"}


@pytest.fixture(scope="module")
def stage1(parts, tmp_path_factory):
    """A finished first stage: four steps, validated twice; the last test batch is a single picture."""
    folder = tmp_path_factory.mktemp("stage1")
    runs = Runs(
        parts, folder, max_iters=4, iters_per_inner_epoch=2, valid_splits=["val"], test_splits=["test"],
        task="evlgen_blip2_stage1", batch_size_eval=4,
    )  # fmt: skip
    for key in ("num_beams", "max_len", "metrics", "tokenizer"):
        del runs.config["run"][key]
    runs.config["model"] = {
        "arch": "evlgen_blip2", "model_type": "quickstart", "vit_model": parts["vit_model"], "vit_layer": None,
        "vit_precision": "fp32", "image_size": 28, "connector_init": str(bert_folder(folder / "bert")),
        "num_query_token": QUERIES, "embed_dim": 8, "max_txt_len": 16,
    }  # fmt: skip
    runs.runner = runs.train()
    return runs


def result(runs, name):
    return json.loads((runs.output() / "result" / name).read_text())


def test_every_term_of_the_loss_is_logged(stage1):
    rows = log(stage1.output())
    assert len(rows) == 4 and all(TERMS <= set(row) for row in rows)
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row[term] for term in TERMS - {"loss"}), rel=1e-5)


def test_it_is_evaluated_by_its_losses(stage1):
    found = [result(stage1, f"val_{step}.json") for step in (2, 4)]
    for row in found:
        assert set(row["metrics"]) == TERMS and row["agg_metrics"] == -row["metrics"]["loss"]
        assert row["pictures"] == 6 and row["left_out"] == 0 and row["unreadable"] == []
    test = next((stage1.output() / "result").glob("test_?.json"))
    assert json.loads(test.read_text())["left_out"] == 1  # 5 pictures in batches of 4
    best = min((2, 4), key=lambda step: found[step // 2 - 1]["metrics"]["loss"])
    assert checkpoint(stage1.output(), "checkpoint_best.pth")["step"] == best


def test_a_resumed_run_is_the_same_run(stage1, tmp_path):
    """Cut after step 2, as a run that was killed then leaves its folder."""
    runs = stage1.copy(tmp_path, test_splits=[])
    runs.output().mkdir(parents=True)
    shutil.copy(stage1.output() / checkpoints.PREVIOUS, runs.output() / checkpoints.LAST)
    shutil.copy(stage1.output() / "log.jsonl", runs.output())
    assert checkpoint(runs.output())["step"] == 2
    runs.train("run.resume_ckpt_path=auto")
    assert losses(runs.output()) == losses(stage1.output())
    assert same_tensors(checkpoint(runs.output())["model"], checkpoint(stage1.output())["model"])
    assert same_tensors(checkpoint(runs.output())["optimizer"], checkpoint(stage1.output())["optimizer"])


def test_the_second_stage_starts_where_the_first_ended(stage1, parts, tmp_path):
    source = stage1.output() / "checkpoint_best.pth"
    runs = Runs(parts, tmp_path, max_iters=2, test_splits=["test"], sheet_pictures=0)
    runs.config["model"] |= {"connector": "qformer", "connector_init": str(source), "num_query_token": QUERIES}
    model = launch.build(runs.train().config)[2]
    first = torch.load(source, weights_only=True)["model"]
    assert torch.equal(model.ln_vision.weight, first["ln_vision.weight"])
    assert all(torch.equal(value, first[name]) for name, value in model.connector.state_dict().items())
    assert model.connector.Qformer.config.num_attention_heads == 2
    assert {"CIDEr"} <= set(result(runs, "test_2.json")["metrics"])


def test_evaluation_alone(stage1, tmp_path):
    runs = stage1.copy(tmp_path)
    best = f"model.pretrained={stage1.output() / 'checkpoint_best.pth'}"
    runs.train(best, "run.test_splits=[val]", evaluate=True)
    step = checkpoint(stage1.output(), "checkpoint_best.pth")["step"]
    assert result(runs, "val_given.json")["metrics"] == result(stage1, f"val_{step}.json")["metrics"]


def test_captions_of_the_first_stage(stage1, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(picture)
    with pytest.raises(SystemExit) as end:
        cli.main(["caption", str(picture), "--run", str(stage1.output()), "--num-beams", "2"])
    assert end.value.code == 0
    path, caption = capsys.readouterr().out.strip().split("\t")
    assert path == str(picture) and set(caption.split()) <= set(WORDS)


@pytest.mark.parametrize(
    "options, says",
    [
        (["run.task=evlgen_captioning"], "captions with EVLGen models; model.arch=evlgen_blip2 is none"),
        (["run.task=image_text_pretrain"], "trains and scores nothing, but val, test should be scored"),
        (["run.batch_size_train=1"], "needs 2 of them: raise run.batch_size_train"),
        (["run.test_splits=[]", "datasets.scenes.sizes.val=1"], "scoring needs 2 on one rank"),
    ],
)
def test_runs_that_cannot_be(stage1, tmp_path, capsys, options, says):
    assert stage1.copy(tmp_path).command(*options) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_the_task_is_for_the_first_stage(runs, capsys):
    for key in ("num_beams", "max_len", "metrics", "tokenizer"):
        del runs.config["run"][key]
    assert runs.command("run.task=evlgen_blip2_stage1") == 2
    assert "is for model.arch=evlgen_blip2, not evlgen" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("arch, model_type", [("blip2", "pretrain"), ("blip2_opt", "pretrain_opt2.7b")])
def test_lavis_own_classes_train_and_resume(arch, model_type, parts, tmp_path, monkeypatch):
    """`arch: blip2` and `blip2_opt` themselves, tiny: what trains moves and is saved, and a resume goes on."""
    tiny, build = {"blip2": (TinyBlip2Qformer, lavis_blip2), "blip2_opt": (TinyBlip2OPT, lavis_blip2_opt)}[arch]
    # LAVIS's classes always load a checkpoint: load_pretrained=False does not reach them
    torch.save({"model": build(tmp_path, monkeypatch).state_dict()}, tmp_path / "blip2.pth")
    monkeypatch.setitem(registry.mapping["model_name_mapping"], arch, tiny)
    runs = Runs(parts, tmp_path, max_iters=2, iters_per_inner_epoch=2, task="image_text_pretrain")
    runs.config["model"] = {
        "arch": arch, "model_type": model_type, "pretrained": str(tmp_path / "blip2.pth"), "image_size": 28,
        "num_query_token": QUERIES, "opt_model": str(tmp_path / "opt"),
    }  # fmt: skip
    runs.train()
    saved = checkpoint(runs.output())["model"]
    assert "query_tokens" in saved and not any(name.startswith(("visual_encoder.", "opt_model.")) for name in saved)
    runs.train("run.resume_ckpt_path=auto", "run.max_iters=3")
    assert set(losses(runs.output())) == {1, 2, 3}
    again = checkpoint(runs.output())["model"]
    assert set(again) == set(saved) and not torch.equal(again["query_tokens"], saved["query_tokens"])


def test_nothing_to_score_is_an_error():
    with pytest.raises(DataError, match="val: no batch of 2 readable pictures .1 unreadable.*run.batch_size_eval"):
        Blip2Stage1Task().after_evaluation([{"bad": {"image": "a"}}, {"left_out": 1}], "val", 3)


def test_means_are_over_pictures():
    rows = [{"pictures": 4, "loss": 1.0, "loss_itc": 0.5}, {"pictures": 2, "loss": 4.0, "loss_itc": 2.0}]
    scored = Blip2Stage1Task().after_evaluation(rows, "val", 3)
    assert scored["metrics"] == {"loss": 2.0, "loss_itc": 1.0} and scored["agg_metrics"] == -2.0
