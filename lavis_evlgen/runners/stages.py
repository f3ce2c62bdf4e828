"""A run with stages: one model, trained in one stage after another, each in a run folder of its own below RUN.

A stage starts from the last checkpoint of the one before, read from its file whether or not the run was interrupted, so
that both ways are one. Optimizer, schedule, loss scale and DDP are new in each stage; the frozen parts are loaded once.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import torch

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError, EvlgenConfig, config_errors
from lavis_evlgen.config.as_trained import weights_of
from lavis_evlgen.config.stages import starts_from
from lavis_evlgen.datasets.seeding import mix
from lavis_evlgen.models.trains import TrainedParts
from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.runners.checkpointing.lock import RunLock
from lavis_evlgen.runners.checkpointing.resume import check_frozen
from lavis_evlgen.runners.checkpointing.stopping import signals
from lavis_evlgen.runners.feature_cache import CachedSplit, cached_splits, check_shared
from lavis_evlgen.runners.preflight import check_splits
from lavis_evlgen.runners.settings import RunSettings
from lavis_evlgen.runners.stage_ledger import StageLedger, summary
from lavis_evlgen.runners.trainer import Trainer, check_run, run_folder
from lavis_evlgen.tasks.build import build_data
from lavis_evlgen.weights.trainable import load_trainable

SEEDS = 4 * 10**9  # seeds of stages are below this, as run.seed must be
_STAGE = 13  # tells these seeds from those of order, augmentation and drawing


def seed_of(seed: int, number: int) -> int:
    """run.seed of stage `number` (from 1): the first has the run's own."""
    return seed if number == 1 else mix(seed, _STAGE, number) % SEEDS


class StagedRun:
    """Builds what all stages need, checks it, and trains the stages that are not done.

    Attributes: `model`, `output_dir` (RUN), `ledger` (runners/stage_ledger.py), `trainer` (of the last stage that ran).
    """

    def __init__(self, cfgs: list[EvlgenConfig], runner_cls, job_id: str):
        """cfgs: `EvlgenConfig.stages`. Raises ConfigError for whatever a later stage would fail on that can be seen."""
        if not issubclass(runner_cls, Trainer):
            raise ConfigError(f"run.runner={cfgs[0].run_cfg.runner}: stages need run.runner=runner_evlgen")
        self.cfgs, self.runner_cls, self.job_id, self.trainer = cfgs, runner_cls, job_id, None
        run = RunSettings.read(cfgs[0].run_cfg, "run.")
        if run.resume_ckpt_path not in (None, "auto"):
            raise ConfigError(
                f"run.resume_ckpt_path={run.resume_ckpt_path}: a run with stages goes on by run.resume_ckpt_path=auto "
                "with run.run_name; to start from a checkpoint give model.pretrained"
            )
        self.resumes, self.output_dir = run.resume_ckpt_path == "auto", run_folder(run, job_id)
        self.ledger = StageLedger(self.output_dir, cfgs)
        starts_trained = bool(weights_of(cfgs[0].model_cfg) or cfgs[0].model_cfg.get("llm_adapter"))
        for n, cfg in enumerate(cfgs):
            cfg.run_cfg.output_dir, cfg.run_cfg.run_name = str(self.output_dir), cfg.stage.folder
            cfg.run_cfg.seed = seed_of(run.seed, cfg.stage.number)
            if n:
                starts_from(cfg.model_cfg, str(self._last(n - 1)))
        self.data = [build_data(cfgs[0])]
        self.model = self.data[0][0].build_model(cfgs[0])
        self._check_later_stages()
        self.parts = TrainedParts(self.model, starts_trained)
        self.names = [self.parts.names(cfg.stage) for cfg in cfgs]

    def _check_later_stages(self):
        """Build their data, and ask what their trainers will ask."""
        cached = [(self.cfgs[0].stage.key, self._cached(self.cfgs[0], self.data[0][1]))]
        for cfg in self.cfgs[1:]:
            try:
                task, datasets = build_data(cfg)
                task.check_arch(cfg)
                task.check_model(cfg, self.model)
                check_run(cfg, self.model)
                check_splits(cfg.run_cfg, datasets, task)
                cached.append((cfg.stage.key, self._cached(cfg, datasets)))
            except ConfigError as error:
                raise ConfigError(f"{cfg.stage.key}: {error}") from error
            self.data.append((task, datasets))
        check_shared(cached)

    def _cached(self, cfg: EvlgenConfig, datasets: dict) -> list[CachedSplit]:
        return cached_splits(RunSettings.read(cfg.run_cfg, "run."), self.model, datasets)

    def _last(self, n: int) -> Path:
        """The checkpoint that stage n (from 0) ends with."""
        return self.output_dir / self.cfgs[n].stage.folder / checkpoints.LAST

    def train(self):
        """Train what is left to do, and say what all stages did; one run at a time in RUN."""
        lock = RunLock(self.output_dir)

        def begin():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            lock.take()
            return self.ledger.begin(self.resumes)

        with signals.handled(at_end=lock.release):
            try:
                self.ledger.rows = distributed.on_main(begin)
                for n, row in enumerate(self.ledger.rows):
                    if row["state"] == "done":
                        logging.info("%s: done before", self.cfgs[n].stage.label)
                    else:
                        self._train_stage(n)
                if distributed.is_main():
                    logging.info("\n%s\nrun folder: %s", summary(self.ledger.rows), self.output_dir)
            finally:
                lock.release()

    def _apply(self, n: int):
        self.parts.train_only(self.names[n], self.parts.kept(self.names[: n + 1]))

    def _train_stage(self, n: int):
        cfg, (task, datasets) = self.cfgs[n], self.data[n]
        own = checkpoints.find_last(self._last(n).parent)  # which the trainer goes on from
        if n and own is None:
            self._load(n - 1)
        self._apply(n)
        self._free()
        with config_errors():
            self.trainer = self.runner_cls(
                cfg=cfg, task=task, model=self.model, datasets=datasets, job_id=self.job_id, stage=cfg.stage
            )
        start = str(self._last(n - 1).relative_to(self.output_dir)) if n else weights_of(cfg.model_cfg)
        trains = sum(self.parts.parameters[name].numel() for name in self.names[n])
        distributed.on_main(lambda: self.ledger.start(n, start, trains, len(self.names[n])))
        self.trainer.train()
        distributed.on_main(lambda: self.ledger.end(n))

    def _load(self, n: int):
        """Put the weights that stage n ended with into the model, which may hold its best ones, or none of its own."""
        path = self._last(n)
        self._apply(n)
        saved = checkpoints.read(path, f"{self.cfgs[n + 1].stage.key}, which starts from the stage before")
        check_frozen(self.model, saved, path)
        load_trainable(self.model, saved["model"], str(path))

    def _free(self):
        """Let go of the stage before: moments and DDP's hooks, which are in reference cycles, and compiled code, of
        which torch keeps a limited number of versions."""
        if self.trainer is not None and self.trainer.compiled:
            torch.compiler.reset()
        self.trainer = None
        gc.collect()
