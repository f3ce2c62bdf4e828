"""What a whole run does and leaves behind."""

import json

import pytest
import torch
from PIL import Image

from lavis_evlgen import launch
from lavis_evlgen.config import EvlgenConfig
from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.runners.optim import LinearWarmupCosineStepLR
from tests.run_tools import checkpoint, log, losses, same_tensors


def read(path):
    return json.loads(path.read_text())


def fresh_model(finished):
    """The model as it was before training."""
    torch.manual_seed(42)
    return launch.build(finished.runner.config)[2]


@pytest.mark.parametrize(
    "name",
    [
        "run.json", "log.jsonl", "loss.png", "captions.png", "checkpoint_last.pth", "checkpoint_previous.pth",
        "checkpoint_best.pth", "result/val_2.json", "result/val_4.json", "tensorboard",
    ],
)  # fmt: skip
def test_a_run_leaves(finished, name):
    assert (finished.output() / name).exists()


def test_pictures_open_and_tensorboard_has_events(finished):
    for name in ("loss.png", "captions.png"):
        assert Image.open(finished.output() / name).size[0] > 500
    assert any(file.stat().st_size > 100 for file in (finished.output() / "tensorboard").iterdir())
    assert not list(finished.output().glob(".*tmp"))


def test_log_rows_hold_what_one_watches(finished):
    rows = [row for row in log(finished.output()) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    wanted = {"lr", "across_picture_share", "grad_norm", "skipped_steps", "images_per_s", "data_wait", "peak_memory_gb"}
    assert all(wanted <= set(row) for row in rows)
    assert [row["lr"] for row in rows] == pytest.approx([1e-5, (1e-5 + 1e-2) / 2, 1e-2, (1e-2 + 1e-4) / 2])
    evaluated = [row for row in log(finished.output()) if "val_loss_right" in row]
    assert [row["step"] for row in evaluated] == [2, 4] and "blind_cider" in evaluated[0]


def test_run_card(finished):
    card = read(finished.output() / "run.json")
    assert card["data"]["name"] == "scenes" and card["data"]["split"] == "test" and card["data"]["size"] == 5
    assert card["data"]["fingerprint"] == finished.runner.datasets["scenes"]["test"].fingerprint
    assert card["decoding"]["num_beams"] == 1 and card["scoring_tokenizer"] == "simple"
    assert {"CIDEr", "BLEU-4"} <= set(card["metrics"]["metrics"]) and "CIDEr" in card["metrics"]["blind"]
    assert card["model"]["class"] == "EVLGen"
    trainable = sum(tensor.numel() for name, tensor in checkpoint(finished.output())["model"].items())
    assert card["model"]["trainable_parameters"] == trainable < card["model"]["parameters"]
    assert card["config"]["run"]["max_iters"] == 4 and card["config"]["model"]["tome_r"] == 4
    assert card["unreadable_images"] == {"test": 0, "train": 0} and card["versions"]["torch"]
    assert read(finished.output() / "result" / "val_2.card.json")["step"] == 2


def test_results_hold_every_picture_with_caption_and_references(finished):
    result = read(finished.output() / "result" / "val_4.json")
    assert result["split"] == "val" and result["step"] == 4 and result["pictures"] == len(result["rows"]) == 6
    for row in result["rows"]:
        assert isinstance(row["caption"], str) and row["references"] and "CIDEr" in row["scores"]
    assert result["loss_gap"] == pytest.approx(result["loss_shuffled"] - result["loss_right"])


def test_frozen_weights_stay_and_stay_out_of_the_checkpoint(finished):
    before, after = fresh_model(finished).state_dict(), finished.runner.model.state_dict()
    saved = checkpoint(finished.output())["model"]
    frozen = {name for name, p in finished.runner.model.named_parameters() if not p.requires_grad}
    assert len(frozen) > 40 and not frozen & set(saved)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    trained = {name for name, p in finished.runner.model.named_parameters() if p.requires_grad}
    assert trained <= set(saved)
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    moved = [name for name in trained if not torch.equal(before[name], saved[name])]
    assert len(moved) > 0.9 * len(trained)


def test_the_checkpoint_before_is_kept(finished):
    assert checkpoint(finished.output(), checkpoints.PREVIOUS)["step"] == 2
    assert checkpoint(finished.output())["step"] == 4


def test_the_best_checkpoint_is_the_best(runs):
    """CIDEr of an untrained model is 0 at every step; BLEU-1 moves."""
    keys = ["run.valid_splits=[val]", "run.test_splits=[test]", "run.metrics=[BLEU]", "run.agg_metric=BLEU-1"]
    runner = runs.train(*keys, "run.max_iters=6", "run.iters_per_inner_epoch=1", "run.min_len=8")
    results = runs.output() / "result"
    scores = {step: read(results / f"val_{step}.json")["agg_metrics"] for step in range(1, 7)}
    best = max(scores, key=scores.get)  # the first of equals
    assert len(set(scores.values())) > 1, "all alike: nothing to choose from"
    assert runner.best == {"agg_metrics": scores[best], "step": best}
    assert checkpoint(runs.output(), checkpoints.BEST)["step"] == best
    assert [path.name for path in results.glob("test_*.card.json")] == [f"test_{best}.card.json"]


def test_evaluate_gives_the_same_test_metrics(finished, tmp_path, capsys):
    expected = read(next((finished.output() / "result").glob("test_?.json")))
    runs = finished.copy(tmp_path)
    best = f"model.pretrained={finished.output() / checkpoints.BEST}"
    assert runs.command(best, "run.run_name=again", script="evaluate.py") == 0
    assert "not as it was trained" not in capsys.readouterr().err
    found = read(runs.output("again") / "result" / "test_given.json")
    for key in ("metrics", "blind", "loss_right", "loss_shuffled", "rows"):
        assert found[key] == expected[key], key
    assert not (runs.output("again") / checkpoints.LAST).exists()
    without = finished.copy(tmp_path).train("run.run_name=untrained", evaluate=True)
    untrained = read(without.output_dir / "result" / "test_given.json")
    assert untrained["loss_right"] != expected["loss_right"]


def test_settings_unlike_those_of_training_are_told(finished, tmp_path, capsys):
    best = finished.output() / checkpoints.BEST
    runs = finished.copy(tmp_path)
    assert runs.command(f"model.pretrained={best}", "model.tome_r=2", script="evaluate.py") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "not as it was trained" in line]
    assert [line.partition(f"{best}: ")[2] for line in lines] == ["not as it was trained: tome_r: 2 here, 4 there"]


def test_a_folder_that_holds_a_run_takes_no_other(runs, capsys):
    runs.train("run.valid_splits=[val]", "run.iters_per_inner_epoch=2")
    before = checkpoint(runs.output(), checkpoints.BEST)
    assert runs.command("run.max_iters=3", "run.seed=1") == 2
    says = capsys.readouterr().err.splitlines()[-1]
    assert "holds the checkpoint_last.pth of another run" in says and "run.resume_ckpt_path=auto" in says
    assert same_tensors(checkpoint(runs.output(), checkpoints.BEST), before)


def test_the_test_phase_says_which_weights_it_used_when_the_best_are_gone(runs):
    runs.train("run.valid_splits=[val]", "run.iters_per_inner_epoch=2")
    (runs.output() / checkpoints.BEST).unlink()
    runs.train("run.resume_ckpt_path=auto", "run.test_splits=[test]")
    assert [file.name for file in (runs.output() / "result").glob("test_?.json")] == ["test_4.json"]


def test_training_that_diverges_ends_with_one_line(runs, capsys, monkeypatch):
    monkeypatch.setattr(LinearWarmupCosineStepLR, "rate", lambda self, step: 1e30)  # a config may not ask for it
    code = runs.command("run.max_iters=60", "run.warmup_steps=0", "run.max_grad_norm=0")
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and last.startswith("train.py: the gradient was not finite in 20 steps in a row")


@pytest.mark.parametrize(
    "option, says",
    [
        ("run.valid_splits=[dev]", "no data set has the split 'dev'; there are test, train, val"),
        ("run.train_dataset_ratios.coco=1", "train_dataset_ratios names ['coco'], the training sets are ['scenes']"),
        ("run.lr_sched=linear_warmup_step_lr", "'linear_warmup_step_lr' is not one of linear_warmup_cosine_step_lr"),
    ],
)
def test_run_keys_that_cannot_be_met(runs, option, says, capsys):
    assert runs.command(option) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_bf16_trains_on_the_cpu(runs):
    runner = runs.train("run.amp=bf16", "run.valid_splits=[val]")
    assert len(losses(runs.output())) == 4 and "amp bf16" in runner.reporter.facts({}, 2)["device"]


def test_the_config_read_again_is_the_config_of_the_card(finished):
    args = finished.runner.config.args
    assert EvlgenConfig(args).to_dict() == read(finished.output() / "run.json")["config"]
