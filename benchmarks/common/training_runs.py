"""Training runs of the experiments. `evlgen ablate`'s runner makes each once, and goes on with what was cut off."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lavis_evlgen.reporting.json_lines import read_json_lines
from lavis_evlgen.reporting.run_card import plain
from lavis_evlgen.tools.compare import read_runs
from lavis_evlgen.tools.paired import arms_of, difference
from lavis_evlgen.tools.sweeps.runs import places_on, run_all
from lavis_evlgen.tools.sweeps.sweep import Trial

ROOT = Path(__file__).resolve().parents[2]


class Run(NamedTuple):
    """One run of train.py: its config, seen from the repository's root, its name, and what follows --options."""

    config: str
    name: str
    options: list[str]


def photo_options(images: str | Path, captions: str | Path) -> list[str]:
    """--options that name the photos of `image_captions` and their captions."""
    files = {"images": images, "captions": captions}
    return [f"datasets.image_captions.{key}={Path(path).absolute()}" for key, path in files.items()]


def train(runs: Iterable[Run], folder: Path, jobs: int = 1):
    """Make the runs that have not ended well before in `folder`, `jobs` beside each other on a CPU.

    Each writes to folder/runs/NAME and folder/logs/NAME.log. Raises SystemExit with what failed, after all others.
    """
    by_config: dict[str, dict[str, Trial]] = {}
    for run in runs:
        by_config.setdefault(run.config, {})[run.name] = Trial(run.name, {}, 0, run.options)
    failed = {}
    for config, trials in by_config.items():
        say = functools.partial(print, flush=True)
        failed |= run_all(list(trials.values()), str(ROOT / config), folder, places_on(None, jobs), say)
    if failed:
        raise SystemExit("\n".join(f"{name} failed: {problem}" for name, problem in failed.items()))


def run_folder(folder: Path, name: str) -> Path:
    return folder / "runs" / name


def last_card(folder: Path, name: str, split: str) -> dict:
    """The run card of a split's last evaluation."""
    cards = (run_folder(folder, name) / "result").glob(f"{split}_*.card.json")
    last = max(cards, key=lambda path: int(path.name.removeprefix(f"{split}_").removesuffix(".card.json")))
    return json.loads(last.read_text())


def card_of(folder: Path, name: str) -> dict:
    """The run card of the last evaluation, of a training or of given weights."""
    return json.loads((run_folder(folder, name) / "run.json").read_text())


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


def less_than_first(folder: Path, found: dict[str, list[dict]]) -> list[str]:
    """For each label of `found` (label -> runs, seeds of one config): its loss less that of the first label's, of the
    same photos, with the 95 % interval; nothing for the first itself."""
    label = {run["name"]: name for name, runs in found.items() for run in runs}
    first, *others = arms_of(read_runs([run_folder(folder, name) for name in label]), lambda run: label[run.name])
    gaps = (difference(first, other) for other in others)
    return ["", *(f"{gap.mean:+.3f} ({gap.least:+.3f} to {gap.most:+.3f})" for gap in gaps)]


def log_of(folder: Path, name: str) -> list[dict]:
    """Training windows of a run's log."""
    return [row for row in read_json_lines(run_folder(folder, name) / "log.jsonl") if "loss" in row]


def training_seconds(folder: Path, name: str, steps: int) -> float:
    """What `steps` take at the run's median window: runs beside each other slow each other down now and then."""
    windows = sorted(row["seconds_per_step"] for row in log_of(folder, name))
    return steps * windows[len(windows) // 2]
