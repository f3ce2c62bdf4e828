"""Where a training's curves go beside log.jsonl (`run.track`): TensorBoard, W&B and trackio, each through its package.

A package is imported only where it is named, and on the main rank alone. Whatever a tracker raises is told once and
counted: it never ends a training. docs/training.md.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lavis_evlgen.compat import environment
from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.keys import Settings, key
from lavis_evlgen.runners.checkpointing import checkpoints

PROJECT = "evlgen"  # in W&B and trackio, where WANDB_PROJECT and TRACKIO_PROJECT do not name another
INSTALL = {
    "wandb": "run `bash run_scripts/setup_environment.sh quickstart dev wandb` (the extra wandb), or `pip install "
    "wandb`",
    "trackio": "run `bash run_scripts/setup_environment.sh --transformers 5.24.0 quickstart dev trackio` (the extra "
    "trackio, which needs transformers 5)",
}
RUN_ID = "tracking_id.txt"  # in the run folder: a resumed run goes on in the trackers' run of this id


@dataclass(kw_only=True)
class TrackSettings(Settings):
    """Keys of the run section that this module reads."""

    tensorboard: bool = key("write TensorBoard events to the run folder", True)
    track: list[Literal["tensorboard", "wandb", "trackio"]] | None = key(
        "where a training's curves go beside log.jsonl, any of tensorboard, wandb, trackio; left out: as tensorboard "
        "says", None,
    )  # fmt: skip

    def trackers(self) -> list[str]:
        if self.track is None:
            return ["tensorboard"] if self.tensorboard else []
        return list(dict.fromkeys(self.track))


@dataclass(frozen=True)
class Tracked:
    """What trackers are told of a run. group: of a stage, the whole run's name."""

    folder: Path
    name: str
    group: str | None
    config: dict


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, run: Tracked):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"))

    def log(self, step: int, values: dict[str, float]):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, code: int):
        self.writer.close()


class WeightsAndBiases:
    """A W&B run; what W&B itself reads of the environment holds (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, ...)."""

    def __init__(self, run: Tracked):
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.run = wandb.init(
            project=project, name=run.name, group=run.group, id=run_id(run.folder), resume="allow", config=run.config,
            allow_val_change=True, dir=str(run.folder),
        )  # fmt: skip
        # W&B's own step may not go back, as it does where a run resumes from before its last line
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]):
        self.run.log({"step": step, **values})

    def close(self, code: int):
        self.run.finish(exit_code=code)


class Trackio:
    """A trackio run, which its name identifies; on this machine, or where TRACKIO_SPACE_ID says."""

    def __init__(self, run: Tracked):
        import trackio

        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{run.name}-{run_id(run.folder)}"
        self.run = trackio.init(project=project, name=name, group=run.group, config=run.config, resume="allow")

    def log(self, step: int, values: dict[str, float]):
        self.run.log(values, step=step)

    def close(self, code: int):
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}


class Trackers:
    """The trackers of one run, as a context: they are closed at its end, with exit code 1 where it ended in an error.

    Attributes: `open` {name: tracker}, `failures` {name: how often it failed}.
    """

    def __init__(self, names: list[str], run: Tracked):
        self.open, self.failures = {}, {}
        drawn = checkpoints.rng_state()  # training draws the same numbers, whatever a tracker draws
        for name in names:
            with self._guarded(name):
                self.open[name] = TRACKERS[name](run)
        checkpoints.set_rng_state(drawn)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind, error, trace):
        for name, tracker in self.open.items():
            with self._guarded(name):
                tracker.close(0 if kind is None else 1)
        for name, times in self.failures.items():
            logging.info("%s failed %d time(s)", name, times)

    def log(self, row: dict):
        """A row of log.jsonl, or of results, by its `step`."""
        values = {name: value for name, value in numbers(row) if name != "step"}
        for name, tracker in self.open.items():
            with self._guarded(name):
                tracker.log(row["step"], values)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if name not in self.failures:
                words = " ".join(f"{type(error).__name__}: {error}".split())
                logging.warning("%s failed (%s); training goes on, and log.jsonl has every value", name, words)
            self.failures[name] = self.failures.get(name, 0) + 1


def numbers(row: dict, folder: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of all finite numbers of a row; names of nested ones have slashes, as W&B and TensorBoard group."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{folder}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{folder}{name}", value


def check_trackers(section):
    """Raises ConfigError where a run section names a tracker that is not installed, or says two things."""
    run = TrackSettings.read(section, "run.")
    names = run.trackers()
    if "tensorboard" in names and not run.tensorboard:
        raise ConfigError("run.tensorboard=false, but run.track names tensorboard: leave one of them out")
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # the latter: a folder of this name, as W&B makes one
            raise ConfigError(f"run.track: {name} is not installed: {INSTALL.get(name, environment.FIX)}")


def run_id(folder: Path) -> str:
    """Of the run in this folder, in every tracker: drawn once, then read from its file."""
    file = folder / RUN_ID
    kept = file.read_text(encoding="utf-8").strip() if file.exists() else ""
    if not re.fullmatch("[0-9a-f]{8}", kept):
        kept = secrets.token_hex(4)
        file.write_text(kept + "\n", encoding="utf-8")
    return kept
