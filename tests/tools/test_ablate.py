"""Sweeps: the grid, what is refused before anything runs, and whole sweeps of tiny runs that fail, stop and go on."""

import json
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lavis_evlgen import launch
from lavis_evlgen.config import ConfigError
from lavis_evlgen.errors import UserError
from lavis_evlgen.reporting.sweep_plot import sweep_plot
from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.tools.sweeps import runs as sweep_runs
from lavis_evlgen.tools.sweeps import sweep
from lavis_evlgen.tools.sweeps.ablate import _curves, unlike
from tests.run_tools import checkpoint, losses
from tests.test_cli import evlgen


def test_a_grid_is_all_combinations():
    sweeps = dict(map(sweep.parse_sweep, ["model.tome_r=2,{target: 9},[3, 1]", "run.init_lr=1e-3,1e-2"]))
    assert sweeps == {"model.tome_r": ["2", "{target: 9}", "[3, 1]"], "run.init_lr": ["1e-3", "1e-2"]}
    trials = sweep.grid(sweeps, [42, 1], ["run.amp=false"])
    assert len(trials) == 12 and len({trial.name for trial in trials}) == 12
    assert trials[0].options == ["run.amp=false", "model.tome_r=2", "run.init_lr=1e-3", "run.seed=42"]
    assert trials[0].name == "tome_r=2_init_lr=1e-3_seed=42" and all("/" not in trial.name for trial in trials)
    assert [trial.seed for trial in trials[:3]] == [42, 1, 42]


@pytest.mark.parametrize(
    "text, says", [("model.tome_r", "write KEY=VALUE"), ("a=1,,2", "write KEY=VALUE"), ("run.seed=1,2", "--seeds"),
                   ("run.run_name=a", "sets it for each run"), ("a=1,1", "there twice")],
)  # fmt: skip
def test_sweeps_that_cannot_be(text, says):
    with pytest.raises(ConfigError, match=says):
        sweep.parse_sweep(text)


def test_seeds():
    assert sweep.parse_seeds("3", 42) == [42, 43, 44] and sweep.parse_seeds("42,1,2", 0) == [42, 1, 2]
    assert sweep.parse_seeds("7,", 0) == [7]
    for text in ("", "a", "0", "1,1", "-1"):
        with pytest.raises(ConfigError, match="--seeds"):
            sweep.parse_seeds(text, 42)


def record(value, seed, cider, seconds=7200.0, **card):
    return {"values": {"r": value}, "seed": seed, "scores": {"CIDEr": cider}, "seconds": seconds, "card": card}


def test_the_table_has_means_and_spreads():
    trials = sweep.grid({"r": ["1", "2", "3"]}, [42, 43], [])
    records = {trials[0].name: record("1", 42, 0.5), trials[1].name: record("1", 43, 0.7, seconds=3600.0)}
    records[trials[2].name] = record("2", 42, 0.4)
    rows = sweep.rows_of(trials, records)
    assert sweep.columns_of(rows) == ["r", "seeds", "CIDEr", "training time"]
    assert sweep.cells_of(rows) == [
        ["1", "42, 43", "0.600 ± 0.141", "1.5 h"], ["2", "42", "0.400", "2 h"], ["3", "failed", "", ""],
    ]  # fmt: skip
    assert unlike(list(records.values())) == []
    odd = [record("1", 1, 0.1, data={"split": "test"}), record("1", 2, 0.1, data={"split": "val"})]
    assert unlike(odd) == ["data is not the same in all runs: compare with care"]


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_picture(tmp_path):
    trials = sweep.grid({"r": ["1", "2"], "lr": ["a", "b"]}, [42, 43], [])
    records = {trial.name: record(None, trial.seed, float(trial.seed)) for trial in trials[:-2]}  # the last failed
    first, curves = _curves(sweep.rows_of(trials, records), "CIDEr")
    assert first == "r" and list(curves) == ["lr=a", "lr=b"] and curves["lr=b"][1] == ("2", [], [])
    assert curves["lr=a"][0] == ("1", [42.0, 43.0], [7200.0, 7200.0])
    image = np.asarray(Image.open(sweep_plot(tmp_path / "new" / "p.png", first, curves, "CIDEr")).convert("RGB"))
    assert image.shape[1] >= 560 and image.std() > 10
    sweep_plot(tmp_path / "one.png", "r", {"": [("1", [0.5], [3.0])]}, "CIDEr")


@pytest.mark.parametrize(
    "changes, says",
    [
        (["--sweep", "model.tomer=2,3"], "unknown key model.tomer; did you mean tome_r?"),
        (["--sweep", "model.tome_r=2", "--sweep", "model.tome_r=3"], "a key is given twice"),
        (["--sweep", "model.tome_r=2", "--options", "model.tome_r=3"], "--sweep sets this key"),
        (["--sweep", "model.tome_r=2", "--options", "run.seed=3"], "evlgen ablate sets it"),
        (["--sweep", "model.tome_r=2", "--gpus", "a"], "--gpus a: give numbers"),
        (["--sweep", "model.tome_r=2", "--jobs", "0"], "--jobs 0: give 1 or more"),
        (["--sweep", "model.tome_r=2", "--seeds", "x"], "--seeds x"),
        (["--sweep", "run.init_lr=1,2", "--options", "run.valid_splits=[]"], "nothing would be scored"),
        (["--sweep", "run.init_lr=1,2", "--sweep", "run.max_iters=1,-2"], "run.max_iters=-2 must be"),
    ],
)
def test_mistakes_are_named_before_anything_runs(runs, changes, says, capsys):
    runs.config["run"]["valid_splits"] = [] if "run.valid_splits=[]" in changes else ["val"]
    out = runs.folder / "sweep"
    assert evlgen("ablate", runs.path(), "--out", out, *changes) == 2
    words = capsys.readouterr().err
    assert says in words and len(words.splitlines()) == 1 and not out.exists()


def scores(out) -> list:
    """What a table must have again: values, seeds and scores to the last digit; time is another every time."""
    table = json.loads((out / "ablation.json").read_text())["table"]
    return [{key: value for key, value in row.items() if key != "training seconds"} for row in table]


@pytest.fixture
def in_this_process(monkeypatch):
    """Training runs in this process, without the import of everything again: what is started, by name."""
    started = []

    def start(trial, cfg_path, out, environment):
        started.append((trial.name, environment))
        place = [f"run.output_dir={out / 'runs'}", f"run.run_name={trial.name}", "run.resume_ckpt_path=auto"]
        log, code = out / "logs" / f"{trial.name}.log", 0
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            launch.run(SimpleNamespace(cfg_path=cfg_path, options=[*trial.options, *place]))
        except UserError as error:
            log.write_text(f"train.py: {error}\n")
            code = 2
        return SimpleNamespace(poll=lambda: code, returncode=code, terminate=list, wait=list)

    monkeypatch.setattr(sweep_runs, "_start", start)
    return started


def test_a_value_that_fails_is_reported_and_the_others_go_on(runs, in_this_process, capsys):
    runs.config["run"]["valid_splits"] = ["val"]
    out = runs.folder / "sweep"
    command = ["ablate", runs.path(), "--sweep", "model.tome_r=2,{target: 1},4", "--seeds", "1,2", "--out", out]
    assert evlgen(*command, "--gpus", "0,1") == 1
    words = capsys.readouterr().out
    assert words.count(": done in ") == 4 and words.count(": FAILED after ") == 2
    assert "train.py: tome_r: 17 tokens cannot become 1 in 2 layers" in words
    assert [place["CUDA_VISIBLE_DEVICES"] for _, place in in_this_process[:4]] == ["0", "1", "0", "1"]
    lines = (out / "ablation.md").read_text().splitlines()
    assert lines[0].startswith("| model.tome_r | seeds | CIDEr | blind CIDEr | loss, right | loss, shuffled | training")
    assert lines[3] == "| {target: 1} | failed |  |  |  |  |  |"
    content = json.loads((out / "ablation.json").read_text())
    assert len(content["failed"]) == 2 and len(content["runs"]) == 4 and content["versions"]["torch"]
    losses = [run["scores"]["loss, right"] for run in content["runs"][:2]]
    found = content["table"][0]["loss, right"]
    assert found["mean"] == pytest.approx(np.mean(losses)) and found["spread"] == pytest.approx(np.std(losses, ddof=1))
    assert content["runs"][0]["card"]["data"]["split"] == "val" and (out / "ablation.png").exists()

    del in_this_process[:]
    before = scores(out)
    assert evlgen(*command) == 1  # again: only what failed is tried
    assert [name.split("_seed")[0] for name, _ in in_this_process] == [in_this_process[0][0].split("_seed")[0]] * 2
    assert "4 of 6 runs have been made before" in capsys.readouterr().out and scores(out) == before
    assert evlgen(*command, "--options", "run.init_lr=0.5") == 2
    assert "was run there with another config or other --options" in capsys.readouterr().err


def test_stopped_and_continued_equals_uninterrupted(runs, in_this_process, monkeypatch, capsys):
    runs.config["run"] |= {"valid_splits": ["val"], "iters_per_inner_epoch": 2}
    command = ["ablate", runs.path(), "--sweep", "model.tome_r=2,4", "--out"]
    assert evlgen(*command, runs.folder / "whole") == 0
    out, write = runs.folder / "cut", checkpoints.write

    def cut_off(path, content):
        write(path, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", cut_off)
        assert evlgen(*command, out) == 130
    assert "the same command goes on" in capsys.readouterr().err
    first = out / "runs" / "tome_r=2_seed=42"
    assert checkpoint(first)["step"] == 2 and not (out / "ablation.json").exists()
    assert not (out / "trials" / "tome_r=2_seed=42.json").exists()
    del in_this_process[:]
    assert evlgen(*command, out) == 0
    assert [name for name, _ in in_this_process] == ["tome_r=2_seed=42", "tome_r=4_seed=42"]
    assert scores(out) == scores(runs.folder / "whole") and len({str(row) for row in scores(out)}) == 2
    assert losses(first) == losses(runs.folder / "whole" / "runs" / first.name) and list(losses(first)) == [1, 2, 3, 4]


def test_where_runs_go(monkeypatch):
    monkeypatch.setattr(sweep_runs.os, "cpu_count", lambda: 8)
    assert sweep_runs.places_on(["0", "3"], 1) == {
        " on GPU 0": {"CUDA_VISIBLE_DEVICES": "0"}, " on GPU 3": {"CUDA_VISIBLE_DEVICES": "3"},
    }  # fmt: skip
    assert sweep_runs.places_on(None, 1) == {"": {}}  # torch's own choice of threads
    assert sweep_runs.places_on(None, 3) == {f" as job {n} of 3": {"OMP_NUM_THREADS": "2"} for n in (1, 2, 3)}
    assert list(sweep_runs.places_on(None, 20).values()) == [{"OMP_NUM_THREADS": "1"}] * 20


def test_runs_are_ended_with_the_command(runs, monkeypatch):
    started = []

    def start(trial, cfg_path, out, environment):
        started.append(subprocess.Popen(["sleep", "60"]))
        return started[-1]

    def say(line):
        if len(started) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep_runs, "_start", start)
    trials = sweep.grid({"model.tome_r": ["2", "3", "4"]}, [42], [])
    with pytest.raises(KeyboardInterrupt):
        places = sweep_runs.places_on(None, jobs=2)
        sweep_runs.run_all(trials, str(runs.path()), runs.folder / "out", places, say)
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2


def test_the_process_is_train_py(runs):
    """The one real process here: a config that is gone by the time it starts."""
    trial = sweep.grid({"model.tome_r": ["{target: 9}"]}, [42], [])[0]
    place = {"CUDA_VISIBLE_DEVICES": "3"}
    process = sweep_runs._start(trial, str(runs.folder / "gone.yaml"), runs.folder / "out", place)
    environ = Path(f"/proc/{process.pid}/environ")
    while not environ.read_bytes():  # for a moment a process that has just begun has none
        time.sleep(0.01)
    assert b"CUDA_VISIBLE_DEVICES=3" in environ.read_bytes().split(b"\0")
    assert process.wait(300) == 2
    problem = sweep_runs._problem(trial, 2, "", runs.folder / "out")
    assert problem.startswith("exit code 2; the last lines of ")
    assert problem.endswith(f"train.py: --cfg-path: {runs.folder}/gone.yaml does not exist (seen from {Path.cwd()})")
