"""A run that was killed or told to stop goes on as if nothing had happened, bit for bit."""

import os
import signal

import pytest
import torch

from lavis_evlgen.config import ConfigError
from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.weights.sources import WeightsError
from tests.processes import run
from tests.run_tools import Runs, checkpoint, log, losses, same_tensors
from tests.tiny import tiny_llama, tiny_tokenizer

STEPS, KILLED_AFTER = 16, 8
ENDLESS = 100_000


def resume(folder, name="checkpoint_last.pth"):
    return f"run.resume_ckpt_path={folder / name}"


@pytest.fixture(scope="module")
def with_dropout(parts, tmp_path_factory) -> Runs:
    """Everything that draws or counts: dropout, random partition, workers, accumulation, epoch ends, validation."""
    runs = Runs(
        parts, tmp_path_factory.mktemp("resume"), max_iters=STEPS, iters_per_inner_epoch=4, accum_grad_iters=2,
        num_workers=1, valid_splits=["val"], num_beams=3, blind_shuffles=1,
    )  # fmt: skip
    runs.config["model"] |= {"dropout": 0.2, "partition": "random"}
    runs.config["datasets"]["scenes"]["sizes"] = {"train": 13, "val": 4, "test": 0}  # an epoch ends in mid-batch
    return runs


def interrupted(runs: Runs, due, number: int) -> tuple[int, str]:
    """(exit code, words) of a run whose whole process group, workers too, got a signal when `due()` came true."""
    with run(runs) as process:
        process.wait_for(due)
        os.killpg(process.pid, number)
        return process.wait(), process.words


@pytest.fixture(scope="module")
def uninterrupted(with_dropout):
    with_dropout.train()
    return with_dropout.output()


def test_after_kill_9_the_rest_is_bit_equal(with_dropout, uninterrupted, tmp_path):
    runs = with_dropout.copy(tmp_path)
    killed = runs.output()

    def past_a_checkpoint():
        return (killed / checkpoints.LAST).exists() and max(losses(killed), default=0) > KILLED_AFTER

    code, words = interrupted(runs, past_a_checkpoint, signal.SIGKILL)
    assert code == -9 and "Traceback" not in words
    assert KILLED_AFTER <= checkpoint(killed)["step"] < STEPS, "the kill came too late to show anything"
    runs.train(resume(killed))
    whole, resumed = losses(uninterrupted), losses(killed)
    assert list(resumed) == list(whole) == list(range(1, STEPS + 1))
    assert resumed == whole
    assert len(set(whole.values())) == STEPS
    validated = [[row for row in log(folder) if "val_loss_right" in row] for folder in (killed, uninterrupted)]
    assert validated[0] == validated[1] and len(validated[0]) == STEPS // 4
    last, expected = checkpoint(killed), checkpoint(uninterrupted)
    for part in ("model", "optimizer", "rng", "best", "step"):
        assert same_tensors(last[part], expected[part]), part


def test_dropout_goes_on_too(with_dropout, uninterrupted):
    """A resume that forgot the generators would differ: this is what the comparison above rests on."""
    copy = with_dropout.output("copy")
    copy.mkdir()
    content = checkpoint(uninterrupted, "checkpoint_previous.pth")
    assert content["step"] == STEPS - 4
    content["rng"][0]["torch"] = torch.Generator().manual_seed(1).get_state()
    checkpoints.write(copy / "forgot.pth", content)
    with_dropout.train("run.run_name=copy", resume(copy, "forgot.pth"), "run.valid_splits=[]")
    assert losses(copy)[STEPS - 3] != losses(uninterrupted)[STEPS - 3]


def test_sigterm_to_all_processes_saves_exits_143_and_auto_resumes(parts, tmp_path):
    endless = Runs(parts, tmp_path, max_iters=ENDLESS, iters_per_inner_epoch=ENDLESS, num_workers=1)
    folder = endless.output()
    code, words = interrupted(endless, lambda: len(losses(folder)) >= 3, signal.SIGTERM)
    assert code == 143, words
    step, before = checkpoint(folder)["step"], losses(folder)
    assert step == max(before) >= 3
    assert f"saved step {step}" in words and "Traceback" not in words

    runner = endless.train("run.resume_ckpt_path=auto", f"run.max_iters={step + 2}")
    assert runner.start_step == step and runner.output_dir == folder
    assert checkpoint(folder)["step"] == step + 2
    after = losses(folder)
    assert list(after) == list(range(1, step + 3)) and before.items() <= after.items()


def test_auto_starts_anew_where_there_is_nothing(runs):
    runner = runs.train("run.resume_ckpt_path=auto", "run.run_name=new")
    assert runner.start_step == 0 and checkpoint(runs.output("new"))["step"] == 4


def test_auto_needs_a_name(runs, capsys):
    assert runs.command("run.resume_ckpt_path=auto", "run.run_name=null") == 2
    assert "needs run.run_name" in capsys.readouterr().err


def test_a_run_that_is_done_stays_done(runs):
    runs.train()
    before = checkpoint(runs.output())
    runs.train("run.resume_ckpt_path=auto")
    assert same_tensors(checkpoint(runs.output()), before)


def test_a_truncated_checkpoint_names_the_one_before(runs):
    runs.train("run.iters_per_inner_epoch=2")
    last, previous = (runs.output() / name for name in (checkpoints.LAST, checkpoints.PREVIOUS))
    assert checkpoint(runs.output(), checkpoints.PREVIOUS)["step"] == 2
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    with pytest.raises(WeightsError) as error:
        runs.train(resume(runs.output()))
    assert "cannot be read" in str(error.value) and str(previous) in str(error.value)
    assert "\n" not in str(error.value)
    assert runs.train(resume(runs.output(), checkpoints.PREVIOUS)).start_step == 2


def test_weights_are_not_a_run(runs, tmp_path):
    checkpoints.write(tmp_path / "weights.pth", {"model": {}})
    with pytest.raises(WeightsError, match="model.pretrained"):
        runs.train(resume(tmp_path, "weights.pth"))


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / checkpoints.LAST
    checkpoints.write(path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        checkpoints.write(path, {"step": (number for number in "a generator cannot be saved")})
    assert checkpoint(tmp_path) == {"step": 1} and checkpoints.find_last(tmp_path) == path
    checkpoints.write(path, {"step": 2})
    assert checkpoint(tmp_path, checkpoints.PREVIOUS) == {"step": 1} and checkpoint(tmp_path) == {"step": 2}
    path.unlink()
    assert checkpoints.find_last(tmp_path).name == checkpoints.PREVIOUS


def test_another_language_model_of_the_same_width_is_refused(runs, parts, tmp_path):
    """It was one warning among the changed settings, and training went on with a model that the weights do not fit."""
    runs.train()
    saved = checkpoint(runs.output())
    assert set(saved["frozen_weights"]) == {"visual_encoder", "language_model"}
    llm = tiny_llama()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.normal_(std=0.1)
    llm.save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    words = "checkpoint_last.pth was trained with another language_model .*model.llm_model or model.opt_model"
    with pytest.raises(ConfigError, match=words):
        runs.train("run.resume_ckpt_path=auto", "run.max_iters=6", f"model.llm_model={tmp_path / 'llm'}")
