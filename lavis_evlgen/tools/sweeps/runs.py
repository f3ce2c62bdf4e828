"""The processes of a sweep: one train.py after another, several beside each other on a CPU, or one on each GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lavis_evlgen.config import ConfigError
from lavis_evlgen.tools.compare import duration
from lavis_evlgen.tools.sweeps import sweep
from lavis_evlgen.tools.sweeps.sweep import Trial

_TRAIN = "from lavis_evlgen.launch import main; main('train.py', 'one run of a sweep')"
_PACKAGES = Path(__file__).resolve().parents[3]
_LAST_LINES = 12


def places_on(gpus: list[str] | None, jobs: int) -> dict[str, dict[str, str]]:
    """Where one run at a time can go: name in messages -> environment variables.

    Each of `gpus`; else `jobs` runs beside each other that share the CPU's threads; of one, all is left as it is.
    """
    if gpus is not None:
        return {f" on GPU {gpu}": {"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus}
    if jobs == 1:
        return {"": {}}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    return {f" as job {number} of {jobs}": threads for number in range(1, jobs + 1)}


def run_all(
    trials: list[Trial], cfg_path: str, out: Path, places: dict[str, dict[str, str]], say: Callable
) -> dict[str, str]:
    """Train each trial that has not ended well before; records are written as runs end. Returns name -> failure.

    places: of `places_on`, one run at a time in each. When this process is stopped the runs are too (each saves a
    checkpoint) and an error comes; called again, they go on.
    """
    waiting = [trial for trial in trials if sweep.finished(out, cfg_path, trial) is None]
    if len(waiting) < len(trials):
        say(f"{len(trials) - len(waiting)} of {len(trials)} runs have been made before")
    running: dict[str, tuple[Trial, subprocess.Popen, float]] = {}
    failed = {}
    try:
        while waiting or running:
            for place, environment in places.items():
                if place not in running and waiting:
                    trial = waiting.pop(0)
                    sweep.start_record(out, cfg_path, trial)
                    running[place] = (trial, _start(trial, cfg_path, out, environment), time.monotonic())
                    say(f"{trial.name}: started{place}, {_log(out, trial)}")
            for place, (trial, process, started) in list(running.items()):
                if process.poll() is not None:
                    del running[place]
                    problem = _problem(trial, process.returncode, cfg_path, out)
                    took = duration(time.monotonic() - started)
                    say(f"{trial.name}: {f'FAILED after {took}: {problem}' if problem else f'done in {took}'}")
                    failed |= {trial.name: problem} if problem else {}
            time.sleep(0.1)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
    return failed


def _start(trial: Trial, cfg_path: str, out: Path, environment: dict[str, str]) -> subprocess.Popen:
    place = [f"run.output_dir={(out / 'runs').absolute()}", f"run.run_name={trial.name}", "run.resume_ckpt_path=auto"]
    command = [sys.executable, "-c", _TRAIN, "--cfg-path", cfg_path, "--options", *trial.options, *place]
    path = os.pathsep.join(filter(None, [str(_PACKAGES), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    _log(out, trial).parent.mkdir(parents=True, exist_ok=True)
    with open(_log(out, trial), "a") as log:
        # a session of its own: Ctrl-C reaches this process, which then ends its runs in order
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def _log(out: Path, trial: Trial) -> Path:
    return out / "logs" / f"{trial.name}.log"


def _problem(trial: Trial, code: int, cfg_path: str, out: Path) -> str | None:
    """Why a run that has ended did not end well; None where it did, and its record is then written."""
    if code == 0:
        try:
            sweep.record(out, cfg_path, trial)
        except ConfigError as error:
            return str(error)
        return None
    lines = [line for line in _log(out, trial).read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join([f"exit code {code}; the last lines of {_log(out, trial)}:", *lines[-_LAST_LINES:]])
