"""Checkpoints of a run: everything that a bit-for-bit resume needs, written whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from pathlib import Path

import numpy as np
import torch

from lavis_evlgen.weights.integrity import read_torch
from lavis_evlgen.weights.sources import WeightsError, why_unreadable
from lavis_evlgen.weights.trainable import check_numbers

LAST, PREVIOUS, BEST = "checkpoint_last.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
BROKEN = "checkpoint_broken.pth"  # what a checkpoint_last.pth that cannot be read is renamed to


def rng_state() -> dict:
    """Python, numpy, torch and CUDA generators of this process, as plain numbers and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": list(random.getstate()[1]),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict):
    random.setstate((3, tuple(state["python"]), None))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def write(path: Path, content: dict):
    """torch.save to a temporary name, then rename: a crash leaves the old file, never half a file.

    The last checkpoint before this one is kept as checkpoint_previous.pth, unless it is of the same step or broken.
    Raises WeightsError when the file cannot be written, as on a full disk.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST and step_of(path) not in (None, content["step"]):
            os.replace(path, path.with_name(PREVIOUS))
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the error that led here is the one to report
            temporary.unlink(missing_ok=True)
        reason = _os_error_behind(error)
        if reason is None:
            raise
        left = f"; the one written before it is whole, of step {step_of(path)}" if path.exists() else ""
        raise WeightsError(f"checkpoint {path} cannot be written: {reason.strerror or reason}{left}") from error


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """The OSError that an error of torch.save came from: it raises one of its own about the file it left unfinished."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def step_of(path: Path) -> int | None:
    """The step of the checkpoint at `path`, without reading its tensors; None where there is no readable one."""
    try:
        return torch.load(path, map_location="meta", weights_only=True, mmap=True)["step"]
    except Exception:  # torch raises a family of errors for what is not there, cut short or of another kind
        return None


def last_readable(folder: Path) -> Path | None:
    """The checkpoint to go on from in a run folder; None where there is none. Raises WeightsError when all are broken.

    A checkpoint_last.pth that cannot be read is renamed to checkpoint_broken.pth, and the one before it takes over.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if not (last.exists() and previous.exists()):
        return find_last(folder)
    try:
        read(last)
    except WeightsError as error:
        try:
            read(previous)
        except WeightsError as other:
            raise WeightsError(f"{error}. It cannot be read either: {other}") from other
        os.replace(last, last.with_name(BROKEN))
        logging.warning("%s; going on with %s (the broken file is kept as %s)", error, previous, BROKEN)
        return previous
    return last


def find_last(folder: Path) -> Path | None:
    """The newest checkpoint of a run folder, whether or not it can be read."""
    for name in (LAST, PREVIOUS):
        if (folder / name).exists():
            return folder / name
    return None


def read(path: str | Path, key: str = "run.resume_ckpt_path") -> dict:
    """A run checkpoint, read without running pickled code; `key` named it.

    Raises WeightsError for a file that is missing, damaged, of another kind, or whose weights are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{key}: {path} does not exist (seen from {Path.cwd()})")
    try:
        content = read_torch(path)
    except Exception as error:
        previous = path.with_name(PREVIOUS)
        before = f"; the checkpoint before it is {previous}" if previous.exists() and path != previous else ""
        raise WeightsError(f"{key}: {path} cannot be read ({why_unreadable(error, path)}){before}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{key}: {path} is not a checkpoint of a run: it holds a {type(content).__name__}")
    missing = {"model", "optimizer", "step", "rng"} - set(content)
    if missing:
        raise WeightsError(
            f"{key}: {path} has no {', '.join(sorted(missing))}: it holds weights, not a run; "
            "start a new run from it with model.pretrained instead"
        )
    check_numbers(content["model"], str(path))
    return content
