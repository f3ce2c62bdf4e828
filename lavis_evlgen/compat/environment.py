"""Is this Python environment one that LAVIS 1.0.2 and EVLGen can live in?

LAVIS's own metadata names versions that cannot work (`transformers<4.27`, an OpenCV that numpy 2
cannot import), so a plain `pip install` quietly builds a wrong environment, and the failure then
surfaces far away from its cause. `check()` reads the installed versions before torch, transformers
or LAVIS are imported and stops with one sentence that names what is wrong and what fixes it.

Standard library only: this module has to run in a broken environment.
"""

import importlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

from lavis_evlgen.errors import UserError

FIX = "run `bash run_scripts/setup_environment.sh`, or `pip install --no-deps -r requirements.lock`"
PYTHON = ((3, 10), (3, 12))


class BrokenEnvironment(ImportError):
    """The environment cannot run EVLGen; the message names the package, the need and the fix."""


class MissingExtra(UserError, ImportError):
    """A package of an optional extra is not installed."""


@dataclass(frozen=True)
class Need:
    """One distribution: inclusive `least`, exclusive `below`, and why the limits are what they are."""

    name: str
    least: str | None = None
    below: str | None = None
    exactly: str | None = None
    why: str = ""

    def __str__(self) -> str:
        limits = [("==", self.exactly), (">=", self.least), ("<", self.below)]
        return self.name + ",".join(sign + version for sign, version in limits if version)

    def met_by(self, version: str) -> bool:
        found = release(version)
        return (
            (self.exactly is None or found == release(self.exactly))
            and (self.least is None or found >= release(self.least))
            and (self.below is None or found < release(self.below))
        )


NEEDS = (
    Need("salesforce-lavis", exactly="1.0.2", why="an unpinned install gives 1.0.0, another library"),
    Need("torch", least="2.4"),
    Need("torchvision"),
    Need("transformers", least="4.49", below="6", why="LAVIS's metadata asks for <4.27, which has no LLaMA"),
    Need("numpy", least="2"),
    Need("opencv-python-headless", least="4.10", why="the 4.5.5 that LAVIS pins cannot load with numpy 2"),
    Need("timm", exactly="0.4.12", why="LAVIS imports modules that later versions moved"),
    Need("fairscale", least="0.4.4"),
    Need("decord", least="0.6"),
    Need("omegaconf", least="2.3"),
    Need("webdataset"),
)


def release(version: str) -> tuple[int, ...]:
    """`"2.15.0+cu130"` -> `(2, 15)`: the numbers, without trailing zeros, so that 5 == 5.0.0."""
    numbers = [int(part) for part in re.match(r"[\d.]*", version).group().split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def build_tag(version: str) -> str:
    """`"2.15.0+cpu"` -> `"cpu"`; `""` for a registry wheel or a tag that names no accelerator."""
    found = re.search(r"\+(cpu|cu\d+|rocm[\d.]*|xpu)", version)
    return found.group(1) if found else ""


def installed_versions(names: list[str]) -> dict[str, str]:
    """Name -> version of the distributions that are installed, those that are not left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def torch_wanted_by_torchvision() -> Need | None:
    """The torch that the installed torchvision says it fits: one release, or in some builds a least one."""
    for line in metadata.requires("torchvision") or ():
        found = re.match(r"torch\s*\(?(==|>=)\s*([\w.]+)", line)
        if found:
            sign, version = found.groups()
            return Need("torch", exactly=version) if sign == "==" else Need("torch", least=version)
    return None


def check(
    installed: Mapping[str, str] | None = None,
    python: tuple[int, ...] | None = None,
    torch_wanted: Need | None = None,
) -> None:
    """Raise `BrokenEnvironment` for the first thing that is wrong; return quietly otherwise.

    The arguments stand in for what is read from this interpreter (versions by distribution name,
    the Python version, the torch that torchvision fits).
    """
    python = tuple(python or sys.version_info[:2])[:2]
    if not PYTHON[0] <= python <= PYTHON[1]:
        raise BrokenEnvironment(
            f"Python {'.'.join(map(str, python))} was found but lavis_evlgen needs 3.10, 3.11 or 3.12: "
            "run `bash run_scripts/setup_environment.sh`, which finds or fetches one."
        )
    if installed is None:
        installed = installed_versions([need.name for need in NEEDS])
        torch_wanted = torch_wanted_by_torchvision() if "torchvision" in installed else None
    for need in NEEDS:
        version = installed.get(need.name)
        if version is not None and need.met_by(version):
            continue
        found = f"{need.name} {version} was found" if version else f"{need.name} is not installed"
        why = f" ({need.why})" if need.why else ""
        raise BrokenEnvironment(f"{found} but lavis_evlgen needs {need}{why}: {FIX}.")
    check_torch_pair(installed["torch"], installed["torchvision"], torch_wanted)


def check_torch_pair(torch: str, torchvision: str, torch_wanted: Need | None) -> None:
    """torch and torchvision share compiled operators, so both must come from one build.

    A mismatched pair installs without complaint and dies at import with
    `operator torchvision::nms does not exist`; nearly always the versions already tell.
    """
    tags = build_tag(torch), build_tag(torchvision)
    # a registry torchvision has no tag and fits any CUDA build of its release, but never a CPU one
    mixed = tags[0] != tags[1] and ("cpu" in tags or all(tags))
    if mixed or (torch_wanted and not torch_wanted.met_by(torch)):
        wanted = f", which fits {torch_wanted}" if torch_wanted else ""
        raise BrokenEnvironment(
            f"torch {torch} was found with torchvision {torchvision}{wanted} but lavis_evlgen needs both "
            f"from one build (else `operator torchvision::nms does not exist`): {FIX}."
        )


def import_torchvision() -> None:
    """Import torchvision, and turn the failure that its versions did not foretell into one sentence."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BrokenEnvironment(
            f"torchvision does not load with this torch ({reason}) but lavis_evlgen needs both from one "
            f"build: {FIX}."
        ) from error


def require(module: str, extra: str) -> ModuleType:
    """Import and return a module that only the optional `extra` installs, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:  # installed, but broken inside: its own error says more
            raise
        raise missing_extra(module, extra) from error


def missing_extra(module: str, extra: str) -> MissingExtra:
    """The error that says how to get a module of an optional extra."""
    return MissingExtra(
        f"{module} is not installed: run `uv sync --extra {extra}`, "
        "or `pip install --no-deps -r requirements.lock`, which holds every extra."
    )
