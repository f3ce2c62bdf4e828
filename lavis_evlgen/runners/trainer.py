"""`runner_evlgen`: trains and evaluates, on CPU or GPU, in one process or many; a run that stops can go on."""

from __future__ import annotations

import itertools
import logging
import random
import signal
import time
from pathlib import Path

import numpy as np
import torch
from lavis.common.registry import registry
from torch.nn.parallel import DistributedDataParallel

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.stages import Stage
from lavis_evlgen.datasets.facts import adapted_sets
from lavis_evlgen.datasets.loading import train_loader
from lavis_evlgen.models.activation_checkpointing import recompute_llm
from lavis_evlgen.models.compile import check_parts, compile_parts, eager
from lavis_evlgen.models.facts import check_calibrated, check_packing, facts_of
from lavis_evlgen.models.precision import check_halves, check_precision
from lavis_evlgen.models.trains import train_mode
from lavis_evlgen.runners.calibration import calibrate, check_ranks
from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.runners.checkpointing.evaluation_resume import kept_rows, own_rows
from lavis_evlgen.runners.checkpointing.lock import RunLock
from lavis_evlgen.runners.checkpointing.resume import RunState
from lavis_evlgen.runners.checkpointing.stopping import StopCheck, exit_code, save_every, signals
from lavis_evlgen.runners.cost import flops_per_image
from lavis_evlgen.runners.feature_cache import cached_splits
from lavis_evlgen.runners.feature_filling import read_from_cache
from lavis_evlgen.runners.optim import adamw, schedule_of
from lavis_evlgen.runners.preflight import check_evaluation, check_splits, check_training, sets_with
from lavis_evlgen.runners.progress import Progress, startup_table
from lavis_evlgen.runners.report import Reporter
from lavis_evlgen.runners.settings import RunSettings
from lavis_evlgen.runners.shard_progress import ShardProgress
from lavis_evlgen.runners.skipped_samples import SkippedSamples, check_unreadable
from lavis_evlgen.runners.step import TrainingStep, amp_of
from lavis_evlgen.runners.trackers import Tracked, Trackers, check_trackers
from lavis_evlgen.tasks.base import adapted_task
from lavis_evlgen.weights.trainable import frozen_names, load_trainable


@registry.register_runner("runner_evlgen")
class Trainer:
    """Trains for `max_iters` optimizer steps; every `iters_per_inner_epoch` it evaluates and saves.

    Attributes: `config`, `task` (tasks.base.Task), `datasets` {name: {split: data set}}, `model` (never wrapped),
    `device`, `optimizer`, `output_dir`, `start_step`, `best` {"agg_metrics", "step"}.
    """

    Settings = RunSettings

    def __init__(self, cfg, task, model, datasets, job_id: str, stage: Stage | None = None):
        """As LAVIS's train.py calls it. job_id: names the run's folder where `run.run_name` does not. stage: of a run
        with stages (runners/stages.py), which one this is."""
        section = cfg.run_cfg
        run = self.run = RunSettings.read(section, "run.")
        self.config, self.model, self.stage = cfg, model, stage
        self.task, self.datasets = adapted_task(task), adapted_sets(datasets)
        self.evaluate_only, self.seed = run.evaluate, run.seed
        self.compiled = check_parts(run.compile)
        if self.evaluate_only:
            check_evaluation(section, cfg.model_cfg)
        else:
            check_run(cfg, model)
            recompute_llm(model, run.llm_grad_checkpoint)
            compile_parts(model, self.compiled)
        check_splits(section, self.datasets, self.task)
        self.cached, self.cached_features = cached_splits(run, model, self.datasets), None
        self.output_dir, self.result_dir = make_run_folder(run, job_id)
        self.max_iters, self.iters_per_inner_epoch = run.max_iters or 0, run.iters_per_inner_epoch or 0
        self.accum_grad_iters, self.log_freq = run.accum_grad_iters, run.log_freq
        self.valid_splits, self.test_splits = run.valid_splits, run.test_splits
        self.device = distributed.start(run.device)
        model.to(self.device)
        self.start_step, self.best = 0, {"agg_metrics": None, "step": 0}
        self.reporter = Reporter(self)
        self.progress: Progress | None = None  # these two only in training
        self.skipped: SkippedSamples | None = None
        if not self.evaluate_only:
            self.optimizer = adamw(model, run.init_lr, run.weight_decay, run.beta2)
            self.lr_scheduler = schedule_of(run, self.optimizer, self.max_iters)

    @property
    def images_per_step(self) -> int:
        """Pictures of one optimizer step, over ranks and micro-steps."""
        return self.run.batch_size_train * distributed.world_size() * self.accum_grad_iters

    @property
    def images_per_draw(self) -> int:
        """Pictures that one draw of a data set from a mix stands for."""
        return self.run.batch_size_train * (1 if self.run.mix_per_rank else distributed.world_size())

    def train(self):
        """Train, evaluate and save as configured, or only evaluate; one run at a time in a folder."""
        lock = RunLock(self.output_dir)
        with signals.handled(at_end=lock.release):
            try:
                distributed.on_main(lock.take)
                self.cached_features = read_from_cache(self.cached, self.run, self.model, self.device)
                return self.evaluate() if self.evaluate_only else self._train()
            finally:
                lock.release()

    def _train(self):
        run, data = self.run, sets_with(self.datasets, "train")
        label = "" if self.stage is None else f"{self.stage.label}: "
        self.progress = Progress(self.output_dir, self.max_iters, self.images_per_step, self.device, label)
        self.skipped = SkippedSamples(self.output_dir, data)
        self.shards = ShardProgress(data, run.num_workers, self.skipped.shards)
        self.step = TrainingStep(
            with_ddp(self.model, self.device), self.optimizer, self.device, run, objective=self.task.objective,
            draws=facts_of(self.model).token_draws(), seed=self.seed,
        )  # fmt: skip
        seed_everything(self.seed + distributed.rank())
        self.state = RunState(self)
        saved = self.state.resume()
        self.start_step, self.best = saved.get("step", self.start_step), saved.get("best", self.best)
        with Trackers(run.trackers() if distributed.is_main() else [], self._tracked()) as self.progress.trackers:
            self._go_on(data, saved)
            self._finish()

    def _tracked(self) -> Tracked:
        name, group = self.output_dir.name, None if self.stage is None else self.output_dir.parent.name
        return Tracked(self.output_dir, name if group is None else f"{group}-{name}", group, self.config.to_dict())

    def _go_on(self, data: dict, saved: dict):
        """Train from where the run stands; data: the training sets; saved: of the checkpoint that it resumes from."""
        run = self.run
        with signals.deferred():
            self.skipped.resume_at(self.start_step)
            self.progress.skipped = round(self.step.skipped.item())
            if distributed.is_main():
                self.progress.resume_at(self.start_step)
                self.reporter.starts(resumed=self.start_step > 0)
                logging.info("\n%s", startup_table(self.model, self.reporter.facts(data, self.images_per_step)))
            asks_gpu = distributed.initialized() and self.device.type == "cuda"
            self.stop_check = StopCheck(self.start_step, *save_every(run.save_every), asks_gpu)
            batches = iter(self.train_loader(data, self.start_step * self.accum_grad_iters, self.shards.positions))
            if self.shards.sets:
                batches = self.shards.follow(batches)
            if saved.get("unevaluated"):  # the run was cut off in the evaluation at the step it resumes from
                self._evaluate_and_save(self.start_step)
            self._loop(batches)

    def train_loader(self, data: dict, start: int = 0, positions: dict | None = None):
        """The endless training stream from micro-step `start` on; positions: of shard sets (datasets/loading.py)."""
        run, ratios = self.run, self.run.train_dataset_ratios
        return train_loader(
            list(data.values()),
            None if ratios is None else [float(ratios[name]) for name in data],
            run.batch_size_train,
            self.seed,
            distributed.rank(),
            distributed.world_size(),
            start,
            run.num_workers,
            self.device.type == "cuda",
            positions,
            run.mix_per_rank,
            run.texts_per_image,
        )

    def _loop(self, batches):
        train_mode(self.model)
        if self.start_step < self.max_iters:
            first = next(batches)
            with eager():  # compiled regions hide their operations
                self.progress.flops_per_image = flops_per_image(self.step, first)
            batches = itertools.chain([first], batches)
        self.progress.started = time.perf_counter()
        for step in range(self.start_step, self.max_iters):
            lr = self.lr_scheduler.step(cur_step=step)
            values, waited, unreadable = self.step(batches, step)
            self.skipped.files.add(unreadable)
            self.progress.update(waited, **values)
            done = step + 1
            due = done % self.iters_per_inner_epoch == 0 or done == self.max_iters
            if done % self.log_freq == 0 or due:
                self._log(done, lr)
            if done == self.max_iters:
                self.state.check_end(done)
            if due:
                self._evaluate_and_save(done)
            if self.stop_check.check(done) and not due:
                started, due = time.perf_counter(), True
                self._save(done, checkpoints.LAST)
                self.progress.pause(time.perf_counter() - started)
            if due and self.stop_check.stop_requested():  # while it was saved
                self._stop(done)
            if self.stop_check.stop:
                self._save(done, checkpoints.LAST)
                self._stop(done)

    def _log(self, step: int, lr: float):
        self.skipped.share(step)
        self.step.check_finite(step)
        self.progress.share()
        if distributed.is_main():
            row = self.progress.line(step, lr)
            self.reporter.watch_collapse(row)
            self.task.watch(row)

    def _save(self, step: int, *names: str, unevaluated: bool = False):
        self.state.save(step, *names, unevaluated=unevaluated)
        self.stop_check.saved()

    def _stop(self, step: int):
        """End the process for the signal that ranks have agreed on; all is saved."""
        number = self.stop_check.stop
        if distributed.is_main():
            logging.warning("%s: saved step %d in %s; stopping", signal.Signals(number).name, step, self.output_dir)
        distributed.stop()
        raise SystemExit(exit_code(number))

    def _evaluate_and_save(self, step: int):
        started = time.perf_counter()
        calibrate(self)
        if self.valid_splits:  # before the evaluation, which may fail
            self._save(step, checkpoints.LAST, unevaluated=True)
            if self.stop_check.stop_requested():
                self._stop(step)
        names = [checkpoints.LAST]
        with signals.deferred(False):  # all is saved: there is nothing to wait for
            for split in self.valid_splits:
                result = self.eval_epoch(split, step)
                best, value = self.best["agg_metrics"], result["agg_metrics"]
                if split == self.valid_splits[0] and (best is None or value > best):
                    self.best = {"agg_metrics": value, "step": step}
                    names.append(checkpoints.BEST)
        self._save(step, *names)
        train_mode(self.model)
        if distributed.is_main():
            self.progress.draw(str(self.output_dir.name))
        distributed.barrier()
        self.progress.pause(time.perf_counter() - started)

    @torch.no_grad()
    @eager()
    def eval_epoch(self, split_name: str, cur_epoch) -> dict:
        """Evaluate one split: its metrics on every rank; files are written by the main one."""
        name, dataset = next(iter(sets_with(self.datasets, split_name).items()))
        self.model.eval()
        check_calibrated(self.model)
        self.task.before_evaluation(model=self.model, dataset=dataset)
        kept = kept_rows(self.result_dir, split_name, dataset, self.config, self.model)
        rows = distributed.gather_lists(own_rows(self._rows_of, dataset, self.run, self.device, kept))
        check_unreadable(self.output_dir, split_name, dataset, [row["bad"] for row in rows if "bad" in row])
        result = None
        if distributed.is_main():
            result = self.task.after_evaluation(val_result=rows, split_name=split_name, epoch=cur_epoch)
            self.reporter.result(name, dataset, split_name, cur_epoch, result)
        # what the best checkpoint is decided on must be the same on every rank
        result = distributed.from_main({k: v for k, v in (result or {}).items() if k != "rows"})
        if kept is not None:
            kept.done()
        return result

    def _rows_of(self, loader) -> list[dict]:
        return self.task.evaluation(self.model, loader, cuda_enabled=self.device.type == "cuda")

    def evaluate(self, cur_epoch="given", skip_reload=True) -> dict:
        """Evaluate test_splits with the weights the model has now. The arguments are LAVIS's."""
        results = {split: self.eval_epoch(split, cur_epoch) for split in self.test_splits}
        if distributed.is_main():
            logging.info("%s", self.reporter.where())
        return results

    def _finish(self):
        """Test with the best weights (the last ones where nothing was validated), and say where things are."""
        best, step = self.output_dir / checkpoints.BEST, self.max_iters
        if self.test_splits and self.best["step"]:
            if best.exists():
                load_trainable(self.model, checkpoints.read(best)["model"], str(best))
                step = self.best["step"]
            else:
                logging.warning("%s is gone: testing the last weights, of step %d", best, step)
        for split in self.test_splits:
            self.eval_epoch(split, step)
        if distributed.is_main():
            self.reporter.close()
        distributed.barrier()


def check_run(cfg, model):
    """Raises ConfigError where a key that training needs is not set or a tracker not installed, for two half precisions
    at once, and where the model cannot learn several texts of a picture that are asked for."""
    check_training(cfg.run_cfg, RunSettings.meanings())
    check_trackers(cfg.run_cfg)
    run = RunSettings.read(cfg.run_cfg, "run.")
    if run.texts_per_image > 1:
        check_packing(model, f"run.texts_per_image={run.texts_per_image}")
    check_ranks(run, model)
    precision = check_precision(cfg.model_cfg.get("llm_precision") or "fp32", "llm_precision")
    check_halves(amp_of(cfg.run_cfg), precision)


def run_folder(run: RunSettings, job_id: str) -> Path:
    """The folder that a run's settings name. Raises ConfigError."""
    resume = run.resume_ckpt_path
    if resume == "auto" and not run.run_name:
        raise ConfigError("run.resume_ckpt_path=auto needs run.run_name, the folder to look in")
    if resume and resume != "auto":
        return Path(resume).expanduser().absolute().parent
    return Path(run.output_dir).expanduser().absolute() / str(run.run_name or job_id)


def make_run_folder(run: RunSettings, job_id: str) -> tuple[Path, Path]:
    """(run folder, folder of results) of a run's settings, made; relative ones start at the current folder.

    LAVIS would resolve output_dir against its own site-packages folder.
    """
    folder = run_folder(run, job_id)
    results = folder / "result"
    results.mkdir(parents=True, exist_ok=True)
    # where LAVIS's tasks look; register_path would refuse a second run in one process
    registry.mapping["paths"] |= {"output_dir": str(folder), "result_dir": str(results)}
    return folder, results


def with_ddp(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model to call in training: in DDP over its trainable parameters where there are ranks, which all call this.

    Frozen weights are the same file on every rank: neither broadcast nor reduced.
    """
    if not distributed.initialized():
        return model
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(frozen_names(model)))
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def seed_everything(seed: int):
    """Seeds dropout, which differs between ranks; everything else is drawn from functions of `run.seed`."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
