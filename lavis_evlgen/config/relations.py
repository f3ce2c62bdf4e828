"""What keys of the run section must be to each other, and what their types do not say."""

from __future__ import annotations

import logging
import os

from omegaconf import DictConfig

from lavis_evlgen.config.values import Refused

_LONGEST_NAME = 200  # characters; file systems take 255 bytes


def check_run(run: DictConfig):
    """run: values that are each of the right kind. Raises Refused; warns of what is strange but can be meant."""
    _check_run_name(run)
    _check_ratios(run.get("train_dataset_ratios"))
    if os.environ.get("RANK", "0") == "0" and not run.get("evaluate"):
        _warn_of_warmup(run)


def check_packing(run: DictConfig, arch: str, packs_texts: bool):
    """Raises Refused where a training that learns one text of a picture at a time is asked for several."""
    asked = run.get("texts_per_image", 1)
    if asked == 1 or run.get("evaluate"):
        return
    why = None if packs_texts else f"model.arch={arch} learns one text of a picture at a time"
    if run.task == "scst":
        why = "run.task=scst draws its captions itself, run.num_samples of a picture"
    if why is not None:
        raise Refused(f"run.texts_per_image={asked}: {why}; leave it out")


def check_sandwich(run: DictConfig, model: DictConfig):
    """Raises Refused where a training with a loss of its own is asked for the loss of `draw: sandwich`."""
    tome_r = model.get("tome_r")
    draw = tome_r.get("draw") if isinstance(tome_r, DictConfig) else None
    if draw == "sandwich" and run.task == "scst" and not run.get("evaluate"):
        raise Refused("model.tome_r.draw=sandwich: run.task=scst has a loss of its own; take draw: one")


def _check_run_name(run: DictConfig):
    """One folder below output_dir; a number is a name too, such as a year."""
    if "run_name" not in run:
        return
    name = run.run_name = str(run.run_name)
    if set(name) & {"/", "\\"} or name in (".", ".."):
        raise Refused(f"run.run_name={name} must be the name of one folder; run.output_dir says where it lies")
    if len(name) > _LONGEST_NAME:
        raise Refused(f"run.run_name has {len(name)} characters; it must have at most {_LONGEST_NAME}")


def _check_ratios(ratios):
    if ratios is not None and not sum(ratios.values()) > 0:
        raise Refused(f"run.train_dataset_ratios={dict(ratios)} must have a share above 0")


def _warn_of_warmup(run: DictConfig):
    steps, most = run.get("warmup_steps", 0), run.get("max_iters")
    if most is not None and steps > most:
        logging.warning("run.warmup_steps=%s is more than run.max_iters=%s: the run ends before run.init_lr is reached",
                        steps, most)  # fmt: skip
    start, rate = run.get("warmup_lr", 0.0), run.get("init_lr")
    if rate is not None and steps and start > rate:
        logging.warning("run.warmup_lr=%s is above run.init_lr=%s: the rate falls during the warm-up", start, rate)
