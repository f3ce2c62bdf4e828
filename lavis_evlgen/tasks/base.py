"""What a task is to the trainer: every hook that trainer, checks and reports call, each with its default."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lavis.tasks.base_task import BaseTask
from lavis.tasks.image_text_pretrain import ImageTextPretrainTask

from lavis_evlgen import distributed
from lavis_evlgen.compat.adapting import take_over
from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.keys import Settings

Objective = Callable[[Any, Any, dict], dict]  # (model, visual prompt, samples) -> what `forward` returns


class Shown(NamedTuple):
    """One row of an evaluation, for people."""

    said: str
    references: list[str]
    score: float | None


class Task(BaseTask):
    """Base class of all tasks here. A task of LAVIS's own gets the defaults from `adapted_task`.

    In the order in which they are called: `setup_task`, `build_datasets`, `check_arch`, `build_model` (in the first
    stage of a run), `check_model`, `check_scored`, `check_dataset`; in training `objective` and `watch`; for each split
    `before_evaluation`, `evaluation` (on every rank, which calls `valid_step`), `after_evaluation`, then `curve`,
    `summary` and `shown` for the reports.
    """

    Settings = Settings  # the task's keys of the run section
    min_pictures = 1  # that a split must have to be scored
    prompt: str | None = None  # the task's own, for the run card; None: the model's
    decoding: dict[str, Any] = {}  # arguments of the search, for the run card
    answer_word = "caption"  # what the model says, in the log
    score_name = "score"  # of `shown`, on captions.png

    @classmethod
    def setup_task(cls, cfg):
        """The task of a config, of which it may read `run_cfg` and `model_cfg`."""
        return cls()

    def check_arch(self, cfg):
        """Raises ConfigError for a model.arch that the task cannot train; asked before a model is built."""

    def check_model(self, cfg, model):
        """Raises ConfigError for a model that the task's data does not fit."""

    def build_model(self, cfg):
        """LAVIS's, with the checks before and after it."""
        self.check_arch(cfg)
        model = super().build_model(cfg)
        self.check_model(cfg, model)
        return model

    def check_scored(self, splits: list[str]):
        """Raises ConfigError for a task that cannot score; `splits`: those that will be scored, at least one."""

    def check_dataset(self, name: str, dataset):
        """Raises ConfigError for a data set that cannot be scored; the trainer asks before anything runs."""

    def objective(self, micro_step: int) -> Objective | None:
        """The loss of micro-step `micro_step` of the run, computed in the model's `forward`; None: the model's own."""
        return None

    def watch(self, row: dict):
        """Look at a row of log.jsonl when it has been written, on the main rank; a task may warn."""

    def before_evaluation(self, model, dataset, **kwargs):
        """Called on every rank before the rows of `dataset` are evaluated."""

    @torch.no_grad()
    def evaluation(self, model, data_loader, cuda_enabled: bool = False) -> list[dict]:
        """This rank's rows of one split: those of `valid_step`, and {"bad": entry} for what could not be read."""
        rows, bad = [], []
        for batch in with_progress(data_loader):
            bad += batch["bad"]
            if batch["image"] is not None:
                batch["image"] = batch["image"].to(model.device, non_blocking=True)
                rows += self.valid_step(model, batch)
        return rows + [{"bad": entry} for entry in bad]

    def valid_step(self, model, samples: dict) -> list[dict]:
        """The rows (JSON-able) of one batch, whose images are readable and on the model's device."""
        raise NotImplementedError(f"{type(self).__name__} must say what it evaluates")

    def after_evaluation(self, val_result: list[dict], split_name: str, epoch, **kwargs) -> dict:
        """The result of all ranks' rows, on the main rank: `agg_metrics` (the best checkpoint has the largest) and
        what result/SPLIT_STEP.json shall hold; `rows`, where there are any, are what `shown` is asked about."""
        raise NotImplementedError(f"{type(self).__name__} must score its rows")

    def curve(self, result: dict) -> dict[str, float]:
        """Numbers of a result that log.jsonl and loss.png follow over the run."""
        return {}

    def summary(self, result: dict) -> str | None:
        """A result in one line of the log; None: no line."""
        return None

    def shown(self, row: dict) -> Shown:
        """One of the result's `rows` for the log and captions.png; called where there are rows only."""
        raise NotImplementedError(f"{type(self).__name__} must say how a row is shown")


def with_progress(data_loader) -> Iterator[dict]:
    """The batches; after half a minute the main rank logs every tenth of them, with the time left."""
    started, total = time.monotonic(), len(data_loader)
    for done, batch in enumerate(data_loader, start=1):
        yield batch
        seconds = time.monotonic() - started
        if seconds > 30 and done % max(1, total // 10) == 0 and distributed.is_main():
            logging.info("evaluation: %d of %d batches, %.0f s left", done, total, seconds / done * (total - done))


class LavisTask(Task):
    """A task of LAVIS's own, such as image_text_pretrain, with the default of every hook that LAVIS does not know."""

    def __init__(self, task: BaseTask):
        super().__init__()
        self.task = task
        take_over(self, Task, task)
        self.build_datasets = task.build_datasets

    def check_scored(self, splits: list[str]):
        if isinstance(self.task, ImageTextPretrainTask):
            raise ConfigError(
                f"run.task=image_text_pretrain trains and scores nothing, but {', '.join(splits)} should be scored: "
                "empty run.valid_splits and run.test_splits"
            )


def adapted_task(task: BaseTask) -> Task:
    return task if isinstance(task, Task) else LavisTask(task)
