"""Saving and continuing a run: what is in a checkpoint, so that a resumed run goes on bit for bit."""

from __future__ import annotations

import logging

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.reporting.stage_files import LEDGER
from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.runners.preflight import sets_with
from lavis_evlgen.runners.step import ADVICE, NonFinite
from lavis_evlgen.weights.frozen_identity import NAMED_BY, frozen_identity, other_parts
from lavis_evlgen.weights.trainable import load_trainable, trainable_state


class RunState:
    """Saves and restores the run of a trainer (runners/trainer.py); every rank calls every method."""

    def __init__(self, trainer):
        self.trainer, self.folder = trainer, trainer.output_dir

    def _content(self, step: int) -> dict:
        trainer, rng = self.trainer, distributed.gather_lists([checkpoints.rng_state()])
        return {
            "format": 1,
            "model": trainable_state(trainer.model),
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": trainer.step.scaler_state(),
            "loss_mean": trainer.step.loss_mean,
            "skipped_steps": trainer.step.skipped.item(),
            "skipped_in_a_row": trainer.step.in_a_row.item(),
            "images_per_step": trainer.images_per_step,
            "images_per_draw": trainer.images_per_draw,
            "step": step,
            "rng": rng,
            "best": trainer.best,
            "world_size": distributed.world_size(),
            "shards": trainer.shards.state(step),
            "config": trainer.config.to_dict(),
            "frozen_weights": frozen_identity(trainer.model),
        }

    def save(self, step: int, *names: str, unevaluated: bool = False, diverged: str | None = None):
        """Write the run as it stands under each of `names` (checkpoints.LAST, checkpoints.BEST).

        unevaluated: the evaluation due at this step is still to come; diverged: why the run has failed. Raises
        NonFinite rather than write weights or moments that are not finite, WeightsError when a file cannot be written.
        """
        if distributed.any_rank(not self.trainer.step.finite()):
            self._refuse_non_finite(step)
        content = {**self._content(step), "unevaluated": unevaluated, "diverged": diverged}

        def write():
            for name in names:
                checkpoints.write(self.folder / name, content)

        distributed.on_main(write)

    def _refuse_non_finite(self, step: int):
        def fail():
            good = checkpoints.find_last(self.folder)
            left = "nothing was saved"
            if good:
                left = f"the last good checkpoint is {good}, of step {checkpoints.step_of(good)}"
            raise NonFinite(
                f"weights or moments are not finite (NaN or infinity) at step {step} and were not saved; {left}. To go "
                f"on, {ADVICE}"
            )

        distributed.on_main(fail)

    def check_end(self, step: int):
        """After the last step: a run that ends in numbers that are not finite has failed; its weights are kept."""
        words = self.trainer.step.diverged_at_end()
        if not distributed.any_rank(words is not None):
            return
        words = words or "so another rank says"
        self.save(step, checkpoints.LAST, unevaluated=bool(self.trainer.valid_splits), diverged=words)
        self._fail_at_end(step, words)

    def _fail_at_end(self, step: int, words: str):
        def fail():
            raise NonFinite(
                f"training ended at step {step} without a finite loss: {words}. "
                f"{self.folder / checkpoints.LAST} holds weights from before that; {ADVICE}"
            )

        distributed.on_main(fail)

    def resume(self) -> dict:
        """Go on from `run.resume_ckpt_path`: sets model, optimizer, loss scale, generators and shard streams.

        Returns the checkpoint's `step`, `best` and `unevaluated`, or {} for a new run.
        """
        trainer, path = self.trainer, self.trainer.run.resume_ckpt_path
        if path == "auto":
            path = distributed.on_main(lambda: checkpoints.last_readable(self.folder))
        if not path:
            self._refuse_used_folder()
            return {}
        saved = checkpoints.read(path)
        self._check_saved(saved, path)
        # a launcher that starts a failed run again must not be told that it ended well
        if saved.get("diverged") and saved["step"] == trainer.max_iters:
            self._fail_at_end(saved["step"], saved["diverged"])
        trainer.shards.load(saved.get("shards"), path)
        load_trainable(trainer.model, saved["model"], str(path))
        load_optimizer(trainer.optimizer, saved["optimizer"])
        trainer.step.load_state(saved)
        if saved["world_size"] == distributed.world_size():
            checkpoints.set_rng_state(saved["rng"][distributed.rank()])
        else:
            logging.warning(
                "resuming a run of %d ranks on %d: the data order goes on, dropout draws anew",
                saved["world_size"], distributed.world_size(),
            )  # fmt: skip
        logging.info("resumed %s at step %d", path, saved["step"])
        return {key: saved[key] for key in ("step", "best", "unevaluated") if key in saved}

    def _refuse_used_folder(self):
        names = (checkpoints.LAST, checkpoints.PREVIOUS, checkpoints.BEST, LEDGER)
        used = [name for name in names if (self.folder / name).exists()]
        if used:
            raise ConfigError(
                f"{self.folder} holds the {used[0]} of another run: go on with it by run.resume_ckpt_path=auto, "
                "or give this run another run.run_name"
            )

    def _check_saved(self, saved: dict, path):
        """Refuse what cannot go on; name every setting that is not what the checkpoint was made with."""
        most = self.trainer.max_iters
        images = self.trainer.images_per_step  # the position in the data is counted in these
        if saved["step"] > most:
            raise ConfigError(f"run.max_iters={most}, but {path} is of step {saved['step']}; raise it")
        if saved.get("images_per_step", images) != images:
            raise ConfigError(
                f"{path} was trained with {saved['images_per_step']} images a step, this run has {images}, and would "
                "lose its position in the data: keep run.batch_size_train x ranks x run.accum_grad_iters, or start a "
                f"new run from these weights with model.pretrained={path}"
            )
        check_frozen(self.trainer.model, saved, path)
        self._check_draws(saved, path)
        self._check_texts(saved, path)
        now = flat(self.trainer.config.to_dict())
        then = flat(saved.get("config", now))
        changed = [key for key in sorted(now | then) if now.get(key) != then.get(key) and key not in MAY_CHANGE]
        if changed:
            words = ", ".join(f"{key}: {then.get(key)} -> {now.get(key)}" for key in changed)
            logging.warning("resumed with other settings than %s was made with: %s", path, words)

    def _check_texts(self, saved: dict, path):
        """Refuse other groups of texts: the stream of a data set is one of groups (not so that of shards)."""
        then = flat(saved.get("config", {})).get("run.texts_per_image") or 1
        now = self.trainer.run.texts_per_image
        rows = len(sets_with(self.trainer.datasets, "train")) > len(self.trainer.shards.sets)
        if then != now and rows:
            raise ConfigError(
                f"{path} was trained with run.texts_per_image={then}, this run has {now}, and would lose its position "
                f"in the data: keep it, or start a new run from these weights with model.pretrained={path}"
            )

    def _check_draws(self, saved: dict, path):
        """Refuse a mix whose draws are of another size: how often each set was drawn would no longer be known."""
        if len(sets_with(self.trainer.datasets, "train")) < 2:
            return
        accumulated = flat(saved.get("config", {})).get("run.accum_grad_iters") or 1
        # checkpoints that do not say: all ranks drew the same set
        then = saved.get("images_per_draw", saved.get("images_per_step", 0) // accumulated)
        now = self.trainer.images_per_draw
        if then and then != now:
            raise ConfigError(
                f"{path} drew a data set for every {then} images, this run would for every {now}, and would "
                "lose its position in the data: keep run.batch_size_train x ranks (run.batch_size_train alone with "
                "run.mix_per_rank=true) and run.accum_grad_iters, or start a new run from these weights with "
                f"model.pretrained={path}"
            )


def check_frozen(model, saved: dict, path):
    """Raises ConfigError where a run's checkpoint was trained with other frozen weights than `model` has."""
    for part in other_parts(saved.get("frozen_weights") or {}, frozen_identity(model)):
        raise ConfigError(
            f"{path} was trained with another {part} than this run has: resume with the same one "
            f"({' or '.join(f'model.{key}' for key in NAMED_BY.get(part, ('...',)))}), or start a new run from "
            f"these weights with model.pretrained={path}"
        )


# settings that say where and how fast, not what
MAY_CHANGE = {
    f"run.{key}"
    for key in ("resume_ckpt_path", "output_dir", "run_name", "num_workers", "device", "log_freq", "save_every",
                "track")
}


def flat(config: dict, prefix: str = "") -> dict:
    """{"run.seed": 42, ...}: nested keys joined by dots."""
    items = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        items |= flat(value, name + ".") if isinstance(value, dict) else {name: value}
    return items


def load_optimizer(optimizer, saved: dict):
    """Load the moments; betas, weight decay and rate factors stay those of the config, not of the checkpoint."""
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
