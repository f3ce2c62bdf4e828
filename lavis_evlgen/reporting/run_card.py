"""Run cards: one JSON file that says what was measured, on what, with what; and the log lines beside it."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lavis_evlgen.media.file_checks import writing

_PACKAGE = Path(__file__).resolve().parent.parent
_DISTRIBUTIONS = ("torch", "transformers", "salesforce-lavis", "lavis-evlgen", "numpy")
_DATA_KEYS = ("name", "split", "size", "fingerprint")


def run_card(
    config: Any,
    prompt: str,
    decoding: Mapping,
    data: Mapping,
    scoring_tokenizer: str | None,
    metrics: Mapping,
    model: Mapping | None = None,
    **extra: Any,
) -> dict:
    """Everything needed to judge or repeat a measurement, as plain JSON types.

    `config` is a dict or an OmegaConf container, `data` has name, split, size (samples) and fingerprint (None
    if unknown), `scoring_tokenizer` is "ptb", "simple" or None, `extra` becomes further top-level keys.
    Versions, commit, hardware and date (UTC) are added; the host's name is not. Raises `ValueError` for
    missing `data` keys and for an `extra` key the card already has.
    """
    missing = [key for key in _DATA_KEYS if key not in data]
    if missing:
        raise ValueError(f"the run card's data lacks {', '.join(missing)}; give None for what is unknown")
    card = {
        "metrics": metrics,
        "model": model,
        "prompt": prompt,
        "decoding": decoding,
        "data": data,
        "scoring_tokenizer": scoring_tokenizer,
        "config": config,
        **provenance(),
    }
    taken = sorted(set(extra) & set(card))
    if taken:
        raise ValueError(f"the run card already has the keys {', '.join(taken)}")
    return plain({**card, **extra})


def provenance() -> dict[str, Any]:
    """What every figure is kept with: versions, commit, hardware and date (UTC)."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"versions": versions(), "commit": commit(), "hardware": hardware(), "date": now}


def write_run_card(path: str | os.PathLike, card: Mapping) -> Path:
    """Write `card` as sorted JSON under `path`, whole or not at all (temporary file, then rename)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(card), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path), open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_json_lines(file: Path) -> list[dict]:
    """The rows of a .jsonl file that a run appends to; a last line that a crash cut short is left out."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines[:-1]]
    try:
        return rows + [json.loads(line) for line in lines[-1:]]
    except json.JSONDecodeError:
        return rows


def drop_rows_after(file: Path, step: int):
    """Forget the rows of a .jsonl file after `step`: a resumed run makes them again (0: all, of an earlier run)."""
    if file.exists():
        kept = [row for row in read_json_lines(file) if row["step"] <= step]
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))


def plain(value: Any) -> Any:
    """`value` as JSON types: containers, dataclasses, OmegaConf, numpy and torch scalars and arrays.

    Keys become strings; NaN and infinities become the strings "nan", "inf" and "-inf", which JSON can hold;
    whatever else is unknown becomes its `str`.
    """
    if value is None or isinstance(value, (bool, str)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if type(value).__module__.startswith("omegaconf"):
        return plain(_omegaconf(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, (np.ndarray, np.generic)) or hasattr(value, "detach"):
        return plain(value.tolist())
    return str(value)


def _omegaconf(value: Any) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException:  # an interpolation to nowhere: keep it as it was written
        return OmegaConf.to_container(value, resolve=False)


def versions() -> dict[str, str | None]:
    """Versions of Python, of the packages a score depends on, and of the CUDA that torch was built for."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    try:
        import torch

        found["cuda"] = torch.version.cuda
    except ImportError:
        found["cuda"] = None
    return found


def hardware() -> dict[str, Any]:
    """Processor count and architecture, and the GPU's name and count (None and 0 without one)."""
    found: dict[str, Any] = {"cpu_count": os.cpu_count(), "machine": platform.machine()}
    found.update(gpu=None, gpu_count=0)
    try:
        import torch

        if torch.cuda.is_available():
            found.update(gpu=torch.cuda.get_device_name(), gpu_count=torch.cuda.device_count())
    except (ImportError, RuntimeError) as error:
        found["gpu"] = f"unknown ({error})"
    return found


def commit(package: Path = _PACKAGE) -> dict[str, Any]:
    """The code's identity: {"sha", "dirty"} if `package` is tracked in a git checkout, else {"version"}.

    `dirty` means changed tracked files. A package installed inside another project's checkout is not tracked
    there and reports its version. Never fails.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        sha = _git(package, "rev-parse", "HEAD")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no")
        if sha:
            return {"sha": sha, "dirty": None if changed is None else bool(changed)}
    try:
        return {"version": importlib.metadata.version("lavis-evlgen")}
    except importlib.metadata.PackageNotFoundError:
        return {"version": None}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None if it fails. GIT_* (set inside hooks) would point it at another repository."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
