"""Recipes: the run configs of projects/, by name wherever one stands. Standard library only, for `evlgen recipes`.

A checkout has them in projects/; setup.py puts the same files beside this package's modules in a wheel.
"""

from __future__ import annotations

from pathlib import Path

from lavis_evlgen.config.errors import ConfigError, nearest

_PACKAGE = Path(__file__).resolve().parent.parent
_SUFFIXES = (".yaml", ".yml")


def folder() -> Path:
    """Where the recipes are: of an installed wheel in the package, of a checkout in projects/."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "projects"


def recipes() -> dict[str, Path]:
    """{name: file}, sorted by folder. A name is the path below projects/ without its first folder and without .yaml:
    quickstart, eval/coco."""
    files = sorted(folder().rglob("*.yaml"))
    return {Path(*path.relative_to(folder()).parts[1:]).with_suffix("").as_posix(): path for path in files}


def config_path(given: str | Path) -> Path:
    """The file of a run config that is given as a path or as a recipe's name; a file of that name comes first.

    What is neither is returned as it is: reading it says that it does not exist (`unknown` has the hint).
    """
    path = Path(given)
    return path if path.is_file() else recipes().get(str(given), path)


def recipe(name: str) -> Path:
    """The file of a recipe. Raises ConfigError for a name that there is not."""
    known = recipes()
    if name not in known:
        raise ConfigError(f"{name}: no recipe has this name{nearest(name, known)}")
    return known[name]


def unknown(path: Path) -> str:
    """The end of a message on a config that does not exist: which recipe may have been meant."""
    known = recipes()
    if path.suffix not in _SUFFIXES:
        return f", and no recipe has this name{nearest(str(path), known)}"
    below = folder() / Path(*path.parts[1:])
    same = [name for name, file in known.items() if path.parts[0] == "projects" and file == below]
    return f"; as a recipe it is given by its name: {same[0]}" if same else ""


def about(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# ") or line.startswith("#   "):  # indented: a command
            break
        words.append(line[2:])
    return " ".join(words).partition(". ")[0].rstrip(".:")
