"""Runs of train.py that a benchmark needs: each is run once, and goes on where it was cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from lavis_evlgen.reporting.json_lines import read_json_lines
from lavis_evlgen.reporting.run_card import plain

ROOT = Path(__file__).resolve().parent.parent


def train(config: str, name: str, options: list[str], folder: Path, split: str, threads: int | None = None) -> dict:
    """The card of `split`'s last evaluation in folder/name, trained first unless it is there.

    config: seen from the repository's root; `options` as after --options. threads: of a CPU, for runs beside each
    other; their output then goes to folder/name.txt. Raises CalledProcessError when train.py fails.
    """
    run = folder.absolute() / name
    if not cards(run, split):
        command = [sys.executable, str(ROOT / "train.py"), "--cfg-path", str(ROOT / config), "--options", *options]
        command += [f"run.output_dir={run.parent}", f"run.run_name={name}", "run.resume_ckpt_path=auto"]
        if threads is None:
            subprocess.run(command, check=True)
        else:
            run.parent.mkdir(parents=True, exist_ok=True)
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            with open(run.parent / f"{name}.txt", "a") as output:
                subprocess.run(command, check=True, env=environment, stdout=output, stderr=subprocess.STDOUT)
    return json.loads(cards(run, split)[-1].read_text())


def together(what: str, function: Callable, calls: list[tuple], jobs: int) -> list:
    """Results of `function` in the order of `calls`, `jobs` at a time, with a line for each that is done.

    What is running when one fails is let to its end, the rest is not begun.
    """
    started = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(function, *call) for call in calls]
        for done, future in enumerate(as_completed(futures), 1):
            if future.exception():
                pool.shutdown(cancel_futures=True)
                raise future.exception()
            left = (time.monotonic() - started) / done * (len(calls) - done) / 60
            print(f"{what} {done} of {len(calls)} done, about {left:.0f} min left", flush=True)
    return [future.result() for future in futures]


def cards(run: Path, split: str) -> list[Path]:
    """Cards of a split's evaluations, the last step last."""
    found = (run / "result").glob(f"{split}_*.card.json")
    return sorted(found, key=lambda path: int(path.name.removeprefix(f"{split}_").removesuffix(".card.json")))


def scores(card: dict) -> dict[str, float]:
    """What tables show of a captioning card."""
    metrics = card["metrics"]
    return {
        "loss_right": metrics["loss_right"],
        "loss_shuffled": metrics["loss_shuffled"],
        "cider": metrics["metrics"]["CIDEr"],
        "blind_cider": metrics["blind"]["CIDEr"],
    }


def with_other_seeds(found: dict[str, list[dict]], path: Path, setting: dict) -> dict[str, list[dict]]:
    """`found` (label -> runs), and the runs of other seeds, or labels, that the results file has of the same setting.

    So a comparison can be made seed by seed, on several machines. setting: keys of the file that have to be equal.
    """
    before = json.loads(path.read_text()) if path.exists() else {}
    if any(before.get(key) != plain(value) for key, value in setting.items()):
        return found
    merged = dict(found)
    for label, runs in before["results"].items():
        seeds = {run["seed"] for run in found.get(label, [])}
        merged[label] = [run for run in runs if run["seed"] not in seeds] + found.get(label, [])
    return merged


def log_of(folder: Path, name: str) -> list[dict]:
    """Training windows of a run's log."""
    return [row for row in read_json_lines(folder / name / "log.jsonl") if "loss" in row]


def training_seconds(folder: Path, name: str, steps: int) -> float:
    """What `steps` take at the run's median window: runs beside each other slow each other down now and then."""
    windows = sorted(row["seconds_per_step"] for row in log_of(folder, name))
    return steps * windows[len(windows) // 2]


def threads_of(jobs: int) -> int | None:
    """CPU threads of each of `jobs` runs beside each other; None: a run alone takes what torch takes."""
    return max((os.cpu_count() or 1) // jobs, 1) if jobs > 1 else None
