"""What a figure was measured with: versions of packages, commit of the code, hardware, date."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent
_DISTRIBUTIONS = ("torch", "transformers", "salesforce-lavis", "lavis-evlgen", "numpy")


def provenance() -> dict[str, Any]:
    """What is written beside every figure: versions, commit, hardware and date (UTC)."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"versions": versions(), "commit": commit(), "hardware": hardware(), "date": now}


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
