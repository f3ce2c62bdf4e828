"""run.deterministic: what it switches on, and that a run goes on bit for bit under it."""

import os

import pytest
import torch

from lavis_evlgen.runners.determinism import be_deterministic
from tests.run_tools import losses

FUSED = ("flash", "mem_efficient", "cudnn")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    enabled = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in (*FUSED, "math")}
    yield
    torch.use_deterministic_algorithms(False)
    for name, value in enabled.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(value)


def fused() -> list[bool]:
    return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in FUSED]


def test_on_cuda_attention_is_not_fused_and_cublas_has_its_workspace():
    be_deterministic(torch.device("cuda", 0))
    assert torch.are_deterministic_algorithms_enabled() and fused() == [False] * 3
    assert torch.backends.cuda.math_sdp_enabled() and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_on_the_cpu_attention_stays_fused_and_a_given_workspace_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = fused()
    be_deterministic(torch.device("cpu"))
    assert fused() == before and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_run_under_it(runs, tmp_path):
    runs.config["model"]["dropout"] = 0.1
    same_rate = ["run.deterministic=true", "run.min_lr=1e-2", "run.warmup_lr=1e-2"]
    runs.train(*same_rate)
    assert torch.are_deterministic_algorithms_enabled()
    cut = runs.copy(tmp_path / "cut")
    cut.train(*same_rate, "run.max_iters=2")
    cut.train(*same_rate, "run.resume_ckpt_path=auto")
    assert losses(cut.output()) == losses(runs.output()) and len(losses(cut.output())) == 4


def test_it_is_off_unless_asked_for_and_is_a_switch(runs, capsys):
    runs.train("run.max_iters=1")
    assert not torch.are_deterministic_algorithms_enabled()
    assert runs.command("run.deterministic=1e-3") == 2
    assert "run.deterministic: 0.001 is not true or false" in capsys.readouterr().err.splitlines()[-1]
