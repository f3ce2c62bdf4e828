import json
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lavis_evlgen.reporting.provenance import commit
from lavis_evlgen.reporting.run_card import plain, run_card, write_run_card

DATA = {"name": "coco_caption", "split": "test", "size": 5000, "fingerprint": "sha256:ab"}


def make_card(**changes):
    config = OmegaConf.create({"model": {"tome_r": [8, 8], "width": "${model.tome_r}"}, "lr": 1e-4})
    arguments = {
        "config": config,
        "prompt": "a photo of",
        "decoding": {"num_beams": 5},
        "data": DATA,
        "scoring_tokenizer": "ptb",
        "metrics": {"CIDEr": np.float32(1.25), "loss": torch.tensor(0.5), "broken": float("nan")},
        "model": {"trainable": np.int64(7)},
    }
    return run_card(**{**arguments, **changes})


def test_round_trip(tmp_path):
    card = make_card(note="café", seeds=(1, 2))
    path = write_run_card(tmp_path / "deep" / "card.json", card)
    assert json.loads(path.read_text(encoding="utf-8")) == card
    assert card["config"] == {"model": {"tome_r": [8, 8], "width": [8, 8]}, "lr": 1e-4}
    assert card["metrics"] == {"CIDEr": 1.25, "loss": 0.5, "broken": "nan"}
    assert card["data"] == DATA and card["model"] == {"trainable": 7} and card["seeds"] == [1, 2]
    assert card["versions"]["torch"] and card["versions"]["numpy"] == np.__version__
    assert card["date"].endswith("+00:00") and card["hardware"]["cpu_count"] == os.cpu_count()
    assert socket.gethostname() not in json.dumps(card)
    again = write_run_card(tmp_path / "again.json", dict(reversed(card.items())))
    assert again.read_bytes() == path.read_bytes()


def test_write_is_whole_or_nothing(tmp_path, monkeypatch):
    path = write_run_card(tmp_path / "card.json", {"a": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_run_card(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["card.json"]


def test_faults_are_named():
    with pytest.raises(ValueError, match="lacks size, fingerprint"):
        make_card(data={"name": "coco", "split": "val"})
    with pytest.raises(ValueError, match="already has the keys date"):
        make_card(date="today")


def test_plain_types():
    @dataclass
    class Point:
        x: float
        y: Path

    value = {1: Point(float("inf"), Path("a")), "t": torch.float16, "s": {3, 1}, "a": np.eye(2, dtype=bool)}
    expected = {"1": {"x": "inf", "y": "a"}, "t": "torch.float16", "s": [1, 3]}
    assert plain(value) == {**expected, "a": [[True, False], [False, True]]}
    broken = OmegaConf.create({"a": "${nowhere}", "b": 1})
    assert plain(broken) == {"a": "${nowhere}", "b": 1}


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", *identity, *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)


def test_commit(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert "version" in commit(package)
    git(tmp_path, "init")
    assert "version" in commit(package)  # lies in a checkout that does not track it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    clean = commit(package)
    assert len(clean["sha"]) == 40 and clean["dirty"] is False
    (package / "__init__.py").write_text("changed")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as inside a hook
    assert commit(package) == {"sha": clean["sha"], "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "version" in commit(package)
    assert "version" in commit(tmp_path / "missing")
