"""Numbers that are not finite: told, never saved over good ones, never taken from a file, and no rank goes on alone."""

import shutil

import pytest
import torch
from PIL import Image

from lavis_evlgen import distributed
from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.runners.step import TrainingStep
from tests.processes import on_two_ranks
from tests.run_tools import checkpoint, log, losses
from tests.test_cli import evlgen

NAN = float("nan")


def broken_pictures(monkeypatch, steps, rank: int = 0):
    """The pictures of these steps, counted from 1, are NaN on one rank."""
    forward = TrainingStep.forward

    def with_nan(self, model, batch, micro_step=0):
        if distributed.rank() == rank and micro_step + 1 in steps:
            batch = {**batch, "image": batch["image"] * NAN}
        return forward(self, model, batch, micro_step)

    monkeypatch.setattr(TrainingStep, "forward", with_nan)


def broken_weights(monkeypatch, step: int, value: float = NAN, rank: int = 0, moment: bool = False):
    """After `step` one weight, or one of its moments, is not finite on one rank."""
    update, calls = TrainingStep._update, []

    def breaking(self):
        norm = update(self)
        calls.append(1)
        if len(calls) == step and distributed.rank() == rank:
            chosen = self.parameters[0]
            with torch.no_grad():
                (self.optimizer.state[chosen]["exp_avg_sq"] if moment else chosen).view(-1)[0] = value
        return norm

    monkeypatch.setattr(TrainingStep, "_update", breaking)


def finite(weights: dict) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in weights.values())


@pytest.mark.parametrize("value, moment", [(NAN, False), (float("inf"), False), (float("inf"), True)])
def test_weights_that_are_not_finite_are_not_saved_over_good_ones(
    whole, tmp_path, monkeypatch, capsys, value, moment
):
    runs = whole.copy(tmp_path, valid_splits=[])
    broken_weights(monkeypatch, 7, value, moment=moment)
    assert runs.command() == 2
    line = capsys.readouterr().err.splitlines()[-1]
    last = runs.output() / checkpoints.LAST
    assert "are not finite (NaN or infinity) at step 10 and were not saved" in line
    assert f"the last good checkpoint is {last}, of step 5" in line and "lower run.init_lr" in line
    assert checkpoint(runs.output())["step"] == 5 and finite(checkpoint(runs.output())["model"])


def test_a_run_that_diverges_just_before_its_end_fails(whole, tmp_path, monkeypatch, capsys):
    """Before, fewer than twenty steps from the end, it ended well with `loss nan`."""
    runs = whole.copy(tmp_path)
    broken_pictures(monkeypatch, range(8, 11))
    assert runs.command() == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "training ended at step 10 without a finite loss" in line and str(runs.output() / checkpoints.LAST) in line
    ended = checkpoint(runs.output())
    assert ended["step"] == 10 and ended["unevaluated"] and finite(ended["model"])
    assert (ended["skipped_steps"], ended["skipped_in_a_row"]) == (3, 3)
    # a launcher that starts it again is told the same, and one who raises max_iters goes on
    assert runs.command("run.resume_ckpt_path=auto") == 2
    assert "training ended at step 10 without a finite loss" in capsys.readouterr().err.splitlines()[-1]
    assert runs.command("run.resume_ckpt_path=auto", "run.max_iters=12") == 0


def test_nan_in_every_second_step_is_told(whole, tmp_path, monkeypatch, capsys):
    runs = whole.copy(tmp_path, valid_splits=[], log_freq=4)
    broken_pictures(monkeypatch, range(2, 9, 2))
    assert runs.command() == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if " step " in line and "images/s" in line]
    told = [line.partition("  peak")[0] for line in lines if "steps skipped" in line]
    assert ["2 of 4 steps skipped (gradient not finite)" in line for line in told] == [True, False]
    assert "step 4/10" in told[0] and "2 of 3 steps skipped" in told[1]
    assert [row["skipped_steps"] for row in log(runs.output())][-1] == 4


def test_the_count_of_skipped_steps_goes_on_after_a_resume(whole, tmp_path, monkeypatch, capsys):
    runs = whole.copy(tmp_path, valid_splits=[])
    broken_pictures(monkeypatch, [3, 5, 7])
    assert runs.command("run.max_iters=6") == 0
    capsys.readouterr()
    assert runs.command("run.resume_ckpt_path=auto") == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines if "steps skipped" in line] == ["7/10"]
    assert checkpoint(runs.output())["skipped_steps"] == 3


@pytest.mark.parametrize("kind", ["pictures", "weights"])
def test_nan_on_one_of_two_ranks_ends_both(whole, tmp_path, monkeypatch, kind):
    runs = whole.copy(tmp_path, valid_splits=[], max_iters=30, iters_per_inner_epoch=5)
    if kind == "pictures":
        broken_pictures(monkeypatch, range(8, 31), rank=1)
    else:
        broken_weights(monkeypatch, 8, rank=1)
    ranks = on_two_ranks(runs, code=2)
    says = "20 steps in a row up to step 27" if kind == "pictures" else "not finite (NaN or infinity) at step 10"
    assert says in ranks[0].words and "Traceback" not in ranks[0].words + ranks[1].words
    saved = checkpoint(runs.output())
    assert finite(saved["model"]) and saved["step"] == (25 if kind == "pictures" else 5)


def test_one_bad_batch_on_one_of_two_ranks_costs_one_step(whole, tmp_path, monkeypatch):
    runs = whole.copy(tmp_path, valid_splits=[])
    broken_pictures(monkeypatch, [4], rank=1)
    ranks = on_two_ranks(runs)
    assert "1 of 1 steps skipped" in ranks[0].words and checkpoint(runs.output())["skipped_steps"] == 1
    assert list(losses(runs.output())) == list(range(1, 11))


def test_a_file_of_weights_that_are_not_finite_is_refused(whole, tmp_path, capsys):
    """By evaluate.py, a resume that names it, caption and export."""
    runs = whole.copy(tmp_path)
    shutil.copytree(whole.output(), runs.output())
    last, picture = runs.output() / checkpoints.LAST, tmp_path / "picture.png"
    content = checkpoint(runs.output())
    content["model"]["llm_proj.weight"][0, 0] = NAN
    torch.save(content, last)
    Image.new("RGB", (30, 30)).save(picture)
    for attempt in (
        lambda: runs.command(f"model.pretrained={last}", "run.test_splits=[test]", script="evaluate.py"),
        lambda: runs.command(f"run.resume_ckpt_path={last}"),
        lambda: evlgen("caption", picture, "--run", runs.output(), "--checkpoint", last),
        lambda: evlgen("export", runs.output(), tmp_path / "bundle", "--checkpoint", last),
    ):
        assert attempt() == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "numbers that are not finite (NaN or infinity), first in llm_proj.weight" in line and str(last) in line
