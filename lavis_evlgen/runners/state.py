"""Checkpoints of a run: everything that a bit-for-bit resume needs, written whole or not at all."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import torch

from lavis_evlgen.models.sources import WeightsError

LAST, PREVIOUS, BEST = "checkpoint_last.pth", "checkpoint_previous.pth", "checkpoint_best.pth"


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

    The last checkpoint before this one is kept as checkpoint_previous.pth.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    if path.name == LAST and path.exists() and not _of_step(path, content["step"]):
        os.replace(path, path.with_name(PREVIOUS))
    os.replace(temporary, path)


def _of_step(path: Path, step: int) -> bool:
    """Whether the checkpoint at `path` is of this step: it is then replaced, not kept beside its successor."""
    try:
        return torch.load(path, map_location="meta", weights_only=True, mmap=True)["step"] == step
    except Exception:  # broken, or of another kind: keep it
        return False


def find_last(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    for name in (LAST, PREVIOUS):
        if (folder / name).exists():
            return folder / name
    return None


def read(path: str | Path, key: str = "run.resume_ckpt_path") -> dict:
    """A run checkpoint, read without running pickled code; `key` named it. Raises WeightsError."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{key}: {path} does not exist (seen from {Path.cwd()})")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{key}: {path} cannot be read ({str(error).splitlines()[0][:120]}); "
            f"the checkpoint before it may be in {path.with_name(PREVIOUS)}"
        ) from error
    missing = {"model", "optimizer", "step", "rng"} - set(content)
    if missing:
        raise WeightsError(
            f"{key}: {path} has no {', '.join(sorted(missing))}: it holds weights, not a run; "
            "start a new run from it with model.pretrained instead"
        )
    return content
