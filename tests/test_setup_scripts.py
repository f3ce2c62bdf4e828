"""What setup_environment.sh and test.sh have uv install; a stand-in for uv writes down what it is asked for."""

import os
import subprocess

import pytest

from tests.run_tools import ROOT

LOCKED = "pip install --python {environment} --no-deps --requirement requirements.lock --override requirements.lock"
UV = """#!/usr/bin/env bash
case "$*" in
*--dry-run*) printf '%s\\n' "$PLAN" ;;
*) echo "$*" >>"$CALLS" ;;
esac
case "$*" in
*--requirement*) cat "${@: -1}" >"$CALLS.requirements" ;;
esac
made=
[ "$1" != venv ] || made=python
[[ "$*" != *--editable* || "$*" == *--dry-run* ]] || made=evlgen
if [ -n "$made" ]; then
    mkdir -p "$UV_PROJECT_ENVIRONMENT/bin"
    echo '#!/bin/sh' >"$UV_PROJECT_ENVIRONMENT/bin/$made"
    chmod +x "$UV_PROJECT_ENVIRONMENT/bin/$made"
fi
"""


@pytest.fixture
def asked(tmp_path):
    """asked(arguments, plan): the calls of uv that change something, in a folder that keeps its environment."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").write_text(UV)
    (tmp_path / "bin" / "uv").chmod(0o755)
    environment, calls = tmp_path / "env", tmp_path / "calls"

    def asked(*arguments: str, plan: str = "") -> list[str]:
        calls.write_text("")
        variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "UV_PROJECT_ENVIRONMENT": str(environment),
                     "PLAN": plan, "CALLS": str(calls)}  # fmt: skip
        command = ["bash", str(ROOT / "run_scripts" / "setup_environment.sh"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, cwd="/")
        assert done.returncode == 0, done.stderr
        return calls.read_text().replace(str(environment), "{environment}").splitlines()

    return asked


def test_the_first_call_installs_the_lock_and_the_second_nothing(asked):
    assert asked(plan=" + torch==2.15.0") == [
        "venv {environment}", LOCKED, "pip install --python {environment} --no-deps --editable .",
    ]  # fmt: skip
    assert asked() == []


def test_decord_alone_is_not_installed_again(asked):
    asked()
    assert asked(plan=" ~ decord==0.6.0") == []
    assert asked(plan=" ~ decord==0.6.0\n - ruff==0.17.5\n + ruff==0.17.6") == [LOCKED]


def test_extras_are_installed_in_the_versions_of_the_lock(asked):
    asked()
    own = " - lavis-evlgen==0.1.0 (from file:///here)\n + lavis-evlgen @ file:///here"
    assert asked("quickstart", "demo", plan=own) == []
    expected = "pip install --python {environment} --editable .[quickstart,demo] --constraint requirements.lock"
    assert asked("quickstart", "demo", plan=f" + gradio==6.20.0\n{own}") == [expected]


def test_another_transformers_leaves_the_locks_out(asked, tmp_path):
    asked()
    calls = asked("--transformers", "4.49.0", plan=" + torch==2.15.0")
    assert calls[-1] == "pip install --python {environment} --no-config transformers==4.49.0"
    names = {line.split("==")[0] for line in (tmp_path / "calls.requirements").read_text().splitlines()}
    assert "torch" in names and names.isdisjoint({"transformers", "tokenizers", "huggingface-hub"})


def test_latest_resolves_anew(asked):
    assert asked("--latest") == ["sync --upgrade --extra=quickstart --extra=dev"]
    assert asked("--latest", "demo") == ["sync --upgrade --extra=demo"]
