"""`runner_evlgen`: LAVIS's iteration runner, fixed: CPU or GPU, one process or many, resumable."""

from __future__ import annotations

import itertools
import logging
import random
import time
from pathlib import Path

import numpy as np
import torch
from lavis.common.registry import registry
from lavis.runners.runner_iter import RunnerIter
from torch.nn.parallel import DistributedDataParallel

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets.loading import train_loader
from lavis_evlgen.models.activation_checkpointing import recompute_llm
from lavis_evlgen.models.compile import check_parts, compile_parts, eager
from lavis_evlgen.models.precision import check_halves, check_precision
from lavis_evlgen.runners import checkpoints
from lavis_evlgen.runners.bad_images import BadImages, check_unreadable
from lavis_evlgen.runners.cost import flops_per_image
from lavis_evlgen.runners.evaluation_resume import KeepsRows
from lavis_evlgen.runners.lock import RunLock
from lavis_evlgen.runners.optim import adamw, schedule_of
from lavis_evlgen.runners.preflight import check_evaluation, check_splits, check_training, sets_with
from lavis_evlgen.runners.progress import Progress, startup_table
from lavis_evlgen.runners.report import Reporter
from lavis_evlgen.runners.resume import Resumable
from lavis_evlgen.runners.settings import RunSettings
from lavis_evlgen.runners.shard_progress import ShardProgress
from lavis_evlgen.runners.step import TrainingStep, amp_of
from lavis_evlgen.runners.stopping import Lookout, save_every, signals
from lavis_evlgen.weights.trainable import frozen_names


@registry.register_runner("runner_evlgen")
class RunnerEvlgen(Resumable, KeepsRows, RunnerIter):
    """Trains for `max_iters` optimizer steps; every `iters_per_inner_epoch` it evaluates and saves."""

    Settings = RunSettings

    def __init__(self, cfg, task, model, datasets, job_id):
        run = cfg.run_cfg
        self.compiled = check_parts(run.get("compile"))
        if run.get("evaluate"):
            check_evaluation(run, cfg.model_cfg)
        else:
            check_training(run, RunSettings.meanings())
            check_halves(amp_of(run), check_precision(cfg.model_cfg.get("llm_precision") or "fp32", "llm_precision"))
            recompute_llm(model, run.get("llm_grad_checkpoint"))
            compile_parts(model, self.compiled)
        check_splits(run, datasets, task)
        self._folder = self._run_folder(run, job_id)
        # RunnerIter's own asks for max_iters where nothing is trained
        super(RunnerIter, self).__init__(cfg, task, model, datasets, job_id)
        self.max_iters = int(run.get("max_iters") or 0)
        self.iters_per_inner_epoch = int(run.get("iters_per_inner_epoch") or 0)
        self._device = distributed.start(run.get("device", "auto"))
        self.seed = int(run.get("seed", 42))
        self.start_step, self.best = 0, {"agg_metrics": None, "step": 0}
        model.to(self._device)
        self._optimizer = None if run.get("evaluate") else self._build_optimizer()

    @staticmethod
    def _run_folder(run, job_id: str) -> Path:
        resume = run.get("resume_ckpt_path")
        if resume and resume != "auto":
            return Path(resume).expanduser().absolute().parent
        if resume == "auto" and not run.get("run_name"):
            raise ConfigError("run.resume_ckpt_path=auto needs run.run_name, the folder to look in")
        return Path(run.output_dir).expanduser().absolute() / str(run.get("run_name") or job_id)

    def setup_output_dir(self):
        """LAVIS resolves output_dir against its own site-packages folder; ours is relative to the user."""
        self.output_dir, self.result_dir = self._folder, self._folder / "result"
        self.result_dir.mkdir(parents=True, exist_ok=True)
        for name, path in (("output_dir", self.output_dir), ("result_dir", self.result_dir)):
            registry.mapping["paths"][name] = str(path)  # register_path refuses a second run in one process

    def _build_optimizer(self):
        run = self.config.run_cfg
        return adamw(self._model, float(run.init_lr), float(run.weight_decay), float(run.get("beta2", 0.999)))

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def images_per_step(self) -> int:
        """Pictures of one optimizer step, over ranks and micro-steps."""
        return int(self.config.run_cfg.batch_size_train) * distributed.world_size() * self.accum_grad_iters

    @property
    def images_per_draw(self) -> int:
        """Pictures that one draw of a data set from a mix stands for."""
        run = self.config.run_cfg
        return int(run.batch_size_train) * (1 if run.get("mix_per_rank") else distributed.world_size())

    @property
    def evaluate_only(self) -> bool:
        return bool(self.config.run_cfg.get("evaluate", False))

    @property
    def use_distributed(self) -> bool:
        return distributed.initialized()

    @property
    def bare_model(self):
        """The model itself; any rank may ask for it alone."""
        return self._model

    @property
    def model(self):
        """The model to call in training: wrapped in DDP over its trainable parameters when there are ranks.

        The wrapping is a collective operation: the first call must come on every rank.
        """
        if self._wrapped_model is None:
            self._wrapped_model = self._model
            if self.use_distributed:
                # frozen weights are the same file on every rank: neither broadcast nor reduced
                ignored = sorted(frozen_names(self._model))
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self._model, ignored)
                ids = [self.device.index] if self.device.type == "cuda" else None
                self._wrapped_model = DistributedDataParallel(self._model, device_ids=ids)
        return self._wrapped_model

    def unwrap_dist_model(self, model):
        return getattr(model, "module", model)

    @property
    def lr_scheduler(self):
        if self._lr_sched is None:
            self._lr_sched = schedule_of(self.config.run_cfg, self.optimizer, self.max_iters)
        return self._lr_sched

    def _train_data(self):
        """Training sets and their ratios."""
        data, ratios = sets_with(self.datasets, "train"), self.config.run_cfg.get("train_dataset_ratios")
        return data, None if ratios is None else [float(ratios[name]) for name in data]

    def _train_loader(self, data, ratios):
        run = self.config.run_cfg
        return train_loader(
            list(data.values()),
            ratios,
            int(run.batch_size_train),
            self.seed,
            distributed.rank(),
            distributed.world_size(),
            self.start_step * self.accum_grad_iters,
            int(run.get("num_workers", 0)),
            self.device.type == "cuda",
            self.shards.places,
            bool(run.get("mix_per_rank")),
        )

    def train(self):
        """Train, evaluate and save as configured, or only evaluate; one run at a time in a folder."""
        lock = RunLock(self.output_dir)
        with signals.handled(last_words=lock.release):
            try:
                distributed.on_main(lock.take)
                return self.evaluate() if self.evaluate_only else self._train()
            finally:
                lock.release()

    def _train(self):
        run = self.config.run_cfg
        data, ratios = self._train_data()
        tensorboard = run.get("tensorboard", True) and distributed.is_main()
        self.progress = Progress(
            self.output_dir, self.max_iters, self.images_per_step, self.device, tensorboard
        )
        self.shards = ShardProgress(self.output_dir, data, int(run.get("num_workers", 0)))
        self._seed_everything()
        self._resume()
        with signals.deferred():
            if distributed.is_main():
                self.progress.resume_at(self.start_step)
                self.shards.bad.resume_at(self.start_step)
            self.bad = BadImages(self.output_dir, list(data.values()), resumed=self.start_step > 0)
            self.reporter = Reporter(self)
            if distributed.is_main():
                logging.info("\n%s", startup_table(self._model, self.reporter.facts(data, self.images_per_step)))
            self._loop(self.shards.follow(iter(self._train_loader(data, ratios))))
        self._finish()

    def _loop(self, batches):
        objective = getattr(self.task, "objective", None)
        step_fn = TrainingStep(self.model, self.optimizer, self.device, self.config.run_cfg, objective=objective)
        step_fn.load_state(self._step_state)
        self.step_fn, self.progress.skipped = step_fn, round(step_fn.skipped.item())
        asks_gpu = distributed.initialized() and self.device.type == "cuda"
        self.lookout = Lookout(self.start_step, *save_every(self.config.run_cfg.get("save_every")), asks_gpu)
        if self._unevaluated:  # the run was cut off in the evaluation at the step it resumes from
            self._evaluate_and_save(self.start_step)
        self._model.train()
        if self.start_step < self.max_iters:
            first = next(batches)
            with eager():  # compiled regions hide their operations
                self.progress.flops_per_image = flops_per_image(step_fn, first)
            batches = itertools.chain([first], batches)
        self.progress.started = time.perf_counter()
        for step in range(self.start_step, self.max_iters):
            lr = self.lr_scheduler.step(cur_step=step)
            values, waited, bad = step_fn(batches, step)
            self.bad.add(bad)
            self.progress.update(waited, **values)
            done = step + 1
            due = done % self.iters_per_inner_epoch == 0 or done == self.max_iters
            if done % self.log_freq == 0 or due:
                self._log(done, lr)
            if done == self.max_iters:
                self._check_end(done)
            if due:
                self._evaluate_and_save(done)
            if self.lookout.look(done) and not due:
                started, due = time.perf_counter(), True
                self._save(done, checkpoints.LAST)
                self.progress.pause(time.perf_counter() - started)
            if due and self.lookout.told_to_stop():  # while it was saved
                self._stop(done)
            if self.lookout.stop:
                self._save(done, checkpoints.LAST)
                self._stop(done)

    def _log(self, step: int, lr: float):
        self.bad.share()
        self.shards.share(step)
        self.shards.bad.check()
        self.step_fn.check_finite(step)
        self.progress.share()
        if distributed.is_main():
            row = self.progress.line(step, lr)
            self.reporter.watch_collapse(row)
            if hasattr(self.task, "watch"):
                self.task.watch(row)

    def _evaluate_and_save(self, step: int):
        started = time.perf_counter()
        if self.valid_splits:  # whatever becomes of the evaluation
            self._save(step, checkpoints.LAST, unevaluated=True)
            if self.lookout.told_to_stop():
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
        self._model.train()
        if distributed.is_main():
            self.progress.draw(str(self.output_dir.name))
        distributed.barrier()
        self.progress.pause(time.perf_counter() - started)

    @torch.no_grad()
    @eager()
    def eval_epoch(self, split_name, cur_epoch, skip_reload=True):
        """Evaluate one split: its metrics on every rank; files are written by the main one."""
        name, dataset = next(iter(sets_with(self.datasets, split_name).items()))
        self._model.eval()
        self.task.before_evaluation(model=self._model, dataset=dataset)
        kept = self._kept_rows(dataset, split_name)
        rows = distributed.gather_lists(self._own_rows(dataset, kept))
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

    def evaluate(self, cur_epoch="given", skip_reload=True) -> dict:
        """Evaluate test_splits with the weights the model has now."""
        self.reporter = Reporter(self)
        results = {split: self.eval_epoch(split, cur_epoch) for split in self.test_splits}
        if distributed.is_main():
            logging.info("%s", self.reporter.where())
        return results

    def _finish(self):
        """Test with the best weights (the last ones where nothing was validated), and say where things are."""
        best, step = self.output_dir / checkpoints.BEST, self.max_iters
        if self.test_splits and self.best["step"]:
            if best.exists():
                self._load_model(checkpoints.read(best)["model"], best)
                step = self.best["step"]
            else:
                logging.warning("%s is gone: testing the last weights, of step %d", best, step)
        for split in self.test_splits:
            self.eval_epoch(split, step)
        if distributed.is_main():
            self.reporter.close()
        distributed.barrier()

    def _seed_everything(self):
        """Dropout differs between ranks; everything else is drawn from functions of the seed."""
        seed = self.seed + distributed.rank()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
