"""Saving and continuing a run: the half of `runner_evlgen` that a bit-for-bit resume rests on."""

from __future__ import annotations

import logging

from lavis_evlgen import distributed
from lavis_evlgen.models.checkpoints import load_trainable, trainable_state
from lavis_evlgen.runners import state


class Resumable:
    """Mixin of a runner: what is in its checkpoints, and how a run goes on from one.

    Reads and sets the runner's `start_step`, `best`, `_scaler_state`.
    """

    def _content(self, step: int) -> dict:
        rng = distributed.gather_lists([state.rng_state()])
        return {
            "format": 1,
            "model": trainable_state(self._model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.step_fn.scaler_state(),
            "step": step,
            "rng": rng,
            "best": self.best,
            "world_size": distributed.world_size(),
            "config": self.config.to_dict(),
        }

    def _save(self, step: int, *names: str):
        """Write the run as it stands under each of `names` (state.LAST, state.BEST); every rank calls it."""
        content = self._content(step)
        for name in names:
            if distributed.is_main():
                state.write(self.output_dir / name, content)

    def _load_model(self, weights: dict, source):
        load_trainable(self._model, weights, str(source))

    def _resume(self):
        """Continue from `resume_ckpt_path`: model, optimizer, scaler, generators, and the place in the data."""
        self._scaler_state = None
        path = self.config.run_cfg.get("resume_ckpt_path")
        if path == "auto":
            path = state.find_last(self.output_dir)
        if not path:
            return
        saved = state.read(path)
        self._load_model(saved["model"], path)
        self.optimizer.load_state_dict(saved["optimizer"])
        self._scaler_state, self.start_step, self.best = saved["scaler"], saved["step"], saved["best"]
        if saved["world_size"] == distributed.world_size():
            state.set_rng_state(saved["rng"][distributed.rank()])
        else:
            logging.warning(
                "resuming a run of %d ranks on %d: the data order goes on, dropout draws anew",
                saved["world_size"], distributed.world_size(),
            )  # fmt: skip
        logging.info("resumed %s at step %d", path, self.start_step)
