"""Sweeps: a grid of config values and seeds, each trained once, tabulated with mean and spread over seeds.

A sweep is a folder: `runs/NAME` (run folders of train.py), `logs/NAME.log`, `trials/NAME.json` (written when a run has
ended well, so that it is not run again), and `ablation.md`, `.json`, `.png`. `evlgen ablate`; docs/ablate.md.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from lavis_evlgen.config import ConfigError, EvlgenConfig
from lavis_evlgen.reporting.json_lines import read_json_lines, training_totals
from lavis_evlgen.reporting.run_card import write_run_card
from lavis_evlgen.reporting.stage_files import stage_folders
from lavis_evlgen.tools.compare import duration, read_run

OWN = ("run.seed", "run.output_dir", "run.run_name", "run.resume_ckpt_path")  # keys that each trial sets for itself
# names of a card's scores: where they are in its metrics
SCORES = {
    "CIDEr": ("metrics", "CIDEr"),
    "blind CIDEr": ("blind", "CIDEr"),
    "accuracy": ("metrics", "accuracy"),
    "blind accuracy": ("blind", "accuracy"),
    "loss, right": ("loss_right",),
    "loss, shuffled": ("loss_shuffled",),
}
_FACTS = ("data", "scoring_tokenizer", "decoding", "prompt", "versions", "commit", "hardware", "date", "step")


@dataclass(frozen=True)
class Trial:
    """One run: swept key -> value (as written), the seed, and all options after --options but the run's place."""

    name: str
    values: dict[str, str]
    seed: int
    options: list[str]


@dataclass(frozen=True)
class Row:
    """One combination of values: score -> values over the seeds that ended well, and training seconds of each."""

    values: dict[str, str]
    seeds: list[int]
    scores: dict[str, list[float]]
    seconds: list[float]


def parse_sweep(text: str) -> tuple[str, list[str]]:
    """`model.tome_r=10,{target: 29},[40, 40]` -> key and values: commas inside brackets do not part."""
    key, equals, rest = text.partition("=")
    values = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", rest)]
    if not equals or not all(values):
        raise ConfigError(f"--sweep {text}: write KEY=VALUE,VALUE, e.g. model.tome_r=10,13,16")
    if key in OWN:
        words = "--seeds gives the seeds" if key == "run.seed" else "evlgen ablate sets it for each run"
        raise ConfigError(f"--sweep {key}: {words}")
    if len(set(values)) < len(values):
        raise ConfigError(f"--sweep {text}: a value is there twice")
    return key, values


def parse_seeds(text: str, first: int) -> list[int]:
    """`42,1,2` are these seeds; a lone `3` is three of them, from the config's on: 42, 43, 44."""
    try:
        numbers = [int(part) for part in text.rstrip(",").split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers) or numbers == [0]:
        raise ConfigError(f"--seeds {text}: give how many (3), or which (42,1,2), none twice")
    return numbers if "," in text else list(range(first, first + numbers[0]))


def grid(sweeps: dict[str, list[str]], seeds: list[int], options: list[str]) -> list[Trial]:
    """Every combination of the swept values with every seed; the seeds of one combination stand together."""
    trials = []
    for combination in itertools.product(*sweeps.values()):
        values = dict(zip(sweeps, combination, strict=True))
        for seed in seeds:
            swept = [f"{key}={value}" for key, value in values.items()]
            trials.append(Trial(_name(values, seed), values, seed, [*options, *swept, f"run.seed={seed}"]))
    return trials


def _name(values: dict[str, str], seed: int) -> str:
    """A folder's name: tome_r=19_seed=42; long or odd values end in a hash, so that no two are alike."""
    parts = []
    for key, value in {**values, "seed": str(seed)}.items():
        plain = re.sub(r"[^\w.+-]+", "-", value).strip("-")
        if plain != value or len(plain) > 40:
            plain = f"{plain[:40]}-{hashlib.sha256(value.encode()).hexdigest()[:6]}"
        parts.append(f"{key.rpartition('.')[2]}={plain}")
    return "_".join(parts)


def check(cfg_path: str, trials: list[Trial], options: list[str]):
    """Every config of the grid is read before anything runs. Raises ConfigError that names the first bad one."""
    own = next((option for option in options if option.partition("=")[0] in OWN), None)
    if own is not None:
        raise ConfigError(f"--options {own}: evlgen ablate sets it for each run")
    twice = next((option for option in options if option.partition("=")[0] in trials[0].values), None)
    if twice is not None:
        raise ConfigError(f"--options {twice}: --sweep sets this key; give it in one place")
    names = [trial.name for trial in trials]
    if len(set(names)) < len(names):
        raise ConfigError("--sweep: two swept keys end in the same word and take the same values: sweep one at a time")
    for trial in trials:
        run = EvlgenConfig(argparse.Namespace(cfg_path=cfg_path, options=trial.options)).run_cfg
        if not (run.get("valid_splits") or run.get("test_splits")):
            raise ConfigError(f"{cfg_path}: nothing would be scored; set run.valid_splits or run.test_splits")


def settings(cfg_path: str, trial: Trial) -> dict:
    """What makes a finished trial the one that is asked for: the config's text and the options."""
    text = Path(cfg_path).read_bytes()
    return {"config_sha256": hashlib.sha256(text).hexdigest(), "options": trial.options}


def finished(out: Path, cfg_path: str, trial: Trial) -> dict | None:
    """The record of a trial that has ended well. Raises ConfigError for one of the same name with other settings."""
    file = out / "trials" / f"{trial.name}.json"
    started = out / "trials" / f"{trial.name}.started.json"
    for known in (file, started):
        if known.exists() and json.loads(known.read_text())["settings"] != settings(cfg_path, trial):
            raise ConfigError(
                f"--out {out}: {trial.name} was run there with another config or other --options; give another folder"
            )
    return json.loads(file.read_text()) if file.exists() else None


def start_record(out: Path, cfg_path: str, trial: Trial):
    """Write down what a run is started with: going on with another config would mix two runs."""
    write_run_card(out / "trials" / f"{trial.name}.started.json", {"settings": settings(cfg_path, trial)})


def record(out: Path, cfg_path: str, trial: Trial) -> dict:
    """Write and return the record of a run that has just ended well: scores, training seconds, provenance."""
    folder = out / "runs" / trial.name
    folders = stage_folders(folder) or [folder]
    run, found = read_run(folders[-1]), {}  # the last stage's scores, and what all stages took
    ends = [rows[-1] for one in folders if (rows := training_totals(read_json_lines(one / "log.jsonl")))]
    for score, path in SCORES.items():
        value = run.card["metrics"]
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            found[score] = float(value)
    content = {
        "name": trial.name, "values": trial.values, "seed": trial.seed, "settings": settings(cfg_path, trial),
        "scores": found, "card": {key: run.card.get(key) for key in _FACTS},
        **{key: sum(row[key] for row in ends) if ends else None for key in ("seconds", "images")},
    }  # fmt: skip
    write_run_card(out / "trials" / f"{trial.name}.json", content)
    return content


def rows_of(trials: list[Trial], records: dict[str, dict]) -> list[Row]:
    """The table's rows, one for each combination of values, over the seeds in `records`."""
    rows = []
    for _, group in itertools.groupby(trials, key=lambda trial: trial.values):
        group = list(group)
        found = [records[trial.name] for trial in group if trial.name in records]
        scores = {name: [r["scores"][name] for r in found if name in r["scores"]] for name in SCORES}
        seconds = [r["seconds"] for r in found if r["seconds"] is not None]
        rows.append(Row(group[0].values, [r["seed"] for r in found], {k: v for k, v in scores.items() if v}, seconds))
    return rows


def columns_of(rows: list[Row]) -> list[str]:
    scores = [name for name in SCORES if any(name in row.scores for row in rows)]
    return [*rows[0].values, "seeds", *scores, "training time"]


def cells_of(rows: list[Row]) -> list[list[str]]:
    """Mean ± sample standard deviation over seeds; one seed has no spread, none gives no number."""
    scores = columns_of(rows)[len(rows[0].values) + 1 : -1]
    lines = []
    for row in rows:
        seeds = ", ".join(map(str, row.seeds)) or "failed"
        numbers = [spread(row.scores.get(name, [])) for name in scores]
        lines.append([*row.values.values(), seeds, *numbers, duration(mean(row.seconds)) if row.seconds else ""])
    return lines


def spread(values: list[float]) -> str:
    """0.512 ± 0.034."""
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
