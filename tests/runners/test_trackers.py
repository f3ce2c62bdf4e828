"""run.track: what W&B, trackio and TensorBoard are told of a run. W&B and trackio are modules of the test's own, with
the functions that theirs have; W&B's real offline mode is tried where it is installed."""

import json
import os
import random
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lavis_evlgen.config import ConfigError
from lavis_evlgen.runners.trackers import RUN_ID, Tracked, Trackers, check_trackers
from lavis_evlgen.runners.trainer import Trainer
from tests.processes import on_two_ranks
from tests.run_tools import Runs, checkpoint, log, losses, same_tensors

FAKE = """
import json, random, numpy, torch
from pathlib import Path
CALLS = Path({calls!r})
def call(what, **given):
    with open(CALLS, "a") as file:
        file.write(json.dumps([what, given]) + "\\n")
class Run:
    def define_metric(self, name, step_metric):
        call("define_metric", name=name, step_metric=step_metric)
    def log(self, values, step=None):
        call("log", values=values, step=step)
        if {broken}:
            raise OSError("the network is gone")
    def finish(self, **given):
        call("finish", **given)
def init(**given):
    call("init", **given)
    random.random(), numpy.random.rand(), torch.rand(1)  # as a library may
    return Run()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(name, broken): a module of this name; returns a function that gives its calls, as [what, given]."""

    def make(name: str, broken: bool = False):
        folder, calls = tmp_path / f"modules_{name}", tmp_path / f"{name}.jsonl"
        folder.mkdir()
        (folder / f"{name}.py").write_text(FAKE.format(calls=str(calls), broken=broken))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    yield make
    for name in ("wandb", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def logged(calls) -> list[tuple[int, dict]]:
    """(step, values) of every row, in either package's way."""
    rows = [given for what, given in calls if what == "log"]
    return [(r["values"].get("step") if r["step"] is None else r["step"], r["values"]) for r in rows]


def test_both_get_what_the_log_has_and_go_on_after_a_resume(parts, tmp_path, fake):
    calls = {name: fake(name) for name in ("wandb", "trackio")}
    plain = Runs(parts, tmp_path / "plain")
    plain.train()
    assert not (plain.output() / RUN_ID).exists() and not calls["wandb"]()
    runs = Runs(parts, tmp_path / "tracked", track=["wandb", "trackio"])
    runs.train("run.max_iters=2", "run.iters_per_inner_epoch=2")  # of which both are warm-up, as in four steps
    kept = (runs.output() / RUN_ID).read_text().strip()
    progress = runs.train("run.resume_ckpt_path=auto", "run.test_splits=[test]").progress
    assert progress.trackers.failures == {} and not (runs.output() / "tensorboard").exists()
    # what trackers draw at random is not missed by the run
    assert losses(runs.output()) == losses(plain.output())
    assert same_tensors(checkpoint(runs.output())["model"], checkpoint(plain.output())["model"])
    for told in calls.values():
        starts = [given for what, given in told() if what == "init"]
        assert len(starts) == 2 and starts[0]["project"] == starts[1]["project"] == "evlgen"
        assert [start["resume"] for start in starts] == ["allow", "allow"]
        assert starts[0]["config"]["model"]["tome_r"] == 4 and starts[1]["config"]["run"]["max_iters"] == 4
        rows = logged(told())
        assert {step: values["loss"] for step, values in rows if "loss" in values} == losses(runs.output())
        scores = json.loads((runs.output() / "run.json").read_text())["metrics"]
        step, final = rows[-1]
        assert step == 4 and final["test/loss_right"] == scores["loss_right"]
        assert final["test/metrics/CIDEr"] == scores["metrics"]["CIDEr"]
        assert [what for what, _ in told()].count("finish") == 2
    ids = [given["id"] for what, given in calls["wandb"]() if what == "init"]
    names = [given["name"] for what, given in calls["trackio"]() if what == "init"]
    assert ids == [kept, kept] and names == [f"run-{kept}", f"run-{kept}"]
    assert ["finish", {"exit_code": 0}] in calls["wandb"]()


def test_a_tracker_that_fails_is_told_once_and_ends_nothing(runs, fake, capsys):
    calls = fake("wandb", broken=True)
    runs.config["run"] |= {"track": ["tensorboard", "wandb"], "tensorboard": True, "max_iters": 3,
                           "iters_per_inner_epoch": 3}  # fmt: skip
    trainer = runs.train()
    said = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines() if "wandb failed" in line]
    assert said == [
        "wandb failed (OSError: the network is gone); training goes on, and log.jsonl has every value",
        "wandb failed 3 time(s)",
    ]
    assert trainer.progress.trackers.failures == {"wandb": 3} and len(log(runs.output())) == 3
    assert [what for what, _ in calls()][-1] == "finish" and any((runs.output() / "tensorboard").iterdir())


def test_a_run_that_ends_in_an_error_is_closed_as_failed(runs, fake, monkeypatch):
    calls = fake("wandb")

    def fail(self, batches):
        raise KeyError("a bug")

    monkeypatch.setattr(Trainer, "_loop", fail)
    with pytest.raises(KeyError):
        runs.train("run.track=[wandb]")
    assert calls()[-1] == ["finish", {"exit_code": 1}]


def test_only_the_main_rank_tells(runs, fake):
    calls = fake("trackio")
    on_two_ranks(runs, "run.track=[trackio]", "run.max_iters=2", "run.iters_per_inner_epoch=2")
    assert [what for what, _ in calls()] == ["init", "log", "log", "finish"]


def test_a_stage_is_a_run_of_its_own_in_a_group_of_the_whole():
    trainer = SimpleNamespace(output_dir=Path("out/mine/2_caption"), stage=None, config=SimpleNamespace(to_dict=dict))
    assert (Trainer._tracked(trainer).name, Trainer._tracked(trainer).group) == ("2_caption", None)
    trainer.stage = "caption"
    assert (Trainer._tracked(trainer).name, Trainer._tracked(trainer).group) == ("mine-2_caption", "mine")


def test_numbers_alone_are_sent_and_a_broken_id_is_replaced(tmp_path, fake):
    calls = fake("wandb")
    (tmp_path / RUN_ID).write_text("../../x\n")
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with Trackers(["wandb"], Tracked(tmp_path, "2_caption", "run", {})) as trackers:
        scores = {"CIDEr": 1.5, "by": {"n": 2, "of": "x"}, "rows": [1]}
        trackers.log({"step": 7, "loss": float("nan"), "reward": None, "test": scores})
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())
    start = calls()[0][1]
    assert start["group"] == "run" and start["id"] == (tmp_path / RUN_ID).read_text().strip() != "../../x"
    assert logged(calls()) == [(7, {"step": 7, "test/CIDEr": 1.5, "test/by/n": 2})]


def test_what_is_not_installed_is_one_error_before_training(tmp_path, monkeypatch):
    section = {"track": ["trackio"], "seed": 1}
    monkeypatch.setattr("lavis_evlgen.runners.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run\.track: trackio is not installed: .*transformers 5"):
        check_trackers(section)
    monkeypatch.undo()
    (tmp_path / "wandb").mkdir()  # W&B makes one where a script stands, which Python would import
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"run\.track: wandb is not installed"):
        check_trackers({"track": ["wandb"]})


def test_what_the_keys_mean_together():
    check_trackers({})
    check_trackers({"tensorboard": False})
    check_trackers({"track": []})
    with pytest.raises(ConfigError, match=r"run\.tensorboard=false, but run\.track names tensorboard"):
        check_trackers({"tensorboard": False, "track": ["tensorboard"]})


def installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not installed("wandb"), reason="wandb is not installed")
def test_the_real_offline_mode_of_wandb(tmp_path):
    """In a process of its own: W&B starts one beside it, and hooks into this one's end."""
    script = """
import sys
from pathlib import Path
from lavis_evlgen.runners.trackers import Tracked, Trackers
with Trackers(["wandb"], Tracked(Path(sys.argv[1]), "run", None, {"run": {"seed": 1}})) as trackers:
    trackers.log({"step": 1, "loss": 0.5})
    trackers.log({"step": 2, "test": {"CIDEr": 1.0}})
assert trackers.failures == {}, trackers.failures
"""
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = (tmp_path / RUN_ID).read_text().strip()
    assert list(Path(tmp_path / "wandb").glob(f"offline-run-*{kept}/*.wandb"))
