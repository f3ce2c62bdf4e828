"""The rooms and their floors, kept by reading imports: arrows only downwards, `nn` knows nobody.

The picture is in docs/architecture.md. A module that needs an arrow upwards is in the wrong room.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lavis_evlgen"
FLOOR = {
    "cli": 10,
    "launch": 9,  # what train.py and evaluate.py share
    "plugin": 8,
    "demo": 8,
    "tools": 7,
    "runners": 6,
    "tasks": 5,
    "models": 4,
    "evaluation": 4,
    "weights": 3,
    "datasets": 3,
    "processors": 3,
    "reporting": 2,
    "media": 1,
    "config": 1,
    "nn": 0,
    "compat": 0,
    "distributed": 0,
    "errors": -1,  # what a user can fix; nn knows not even this
}
# the package itself names the plugin, for LAVIS to have it imported: that is how everything gets registered
ENTRANCE = "__init__"
NN_MAY_IMPORT = {"torch", "lavis_evlgen"} | set(sys.stdlib_module_names)
MAX_LINES = 350
# built from pieces, so that this file does not hold what it forbids
FORBIDDEN = ["/" + "work/", "pypi" + ".org", "files.python" + "hosted.org", "download.py" + "torch.org"]
TEXT = {".py", ".md", ".sh", ".toml", ".yaml", ".yml", ".lock", ".json", ".txt", ".cfg", ".ini", ".ipynb", ""}


def room_of(path: Path) -> str:
    """lavis_evlgen/nn/merging.py -> nn; lavis_evlgen/cli.py -> cli."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(source: str, package: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import, also inside functions; relative ones made absolute.

    `from a import b` yields `a.b`: b may be a module, and only that name tells which room it is.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{stem}.{alias.name}", node.lineno


def room_imported(name: str) -> str | None:
    """lavis_evlgen.nn.merging -> nn; None for other packages and for names of the package itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == "lavis_evlgen" and len(parts) > 1 and parts[1] in FLOOR else None


def wrong_arrow(room: str, name: str) -> str | None:
    """Why a module of `room` may not import `name`, or None."""
    if room == "nn" and name.split(".")[0] not in NN_MAY_IMPORT:
        return f"nn imports {name}, but it is PyTorch only"
    target = room_imported(name)
    if target is None or target == room or room == ENTRANCE:
        return None
    if room == "nn":
        return f"nn imports {target}, but it knows nobody"
    if FLOOR[target] > FLOOR[room]:
        return f"{room} (floor {FLOOR[room]}) imports {target} (floor {FLOOR[target]}), an arrow upwards"
    if FLOOR[target] == FLOOR[room]:
        return f"{room} imports {target}, another room on floor {FLOOR[room]}"
    return None


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_module_is_in_a_room_with_a_floor():
    strange = {room_of(path) for path in modules()} - set(FLOOR) - {ENTRANCE}
    assert not strange, f"no floor is given for {sorted(strange)}: add them to FLOOR and docs/architecture.md"


def test_arrows_go_down_and_rooms_on_one_floor_do_not_meet():
    wrong = []
    for path in modules():
        package = ("lavis_evlgen", *path.relative_to(PACKAGE).parts[:-1])
        for name, line in imports_of(path.read_text(encoding="utf-8"), package):
            if reason := wrong_arrow(room_of(path), name):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "room, name, allowed",
    [
        ("models", "lavis_evlgen.nn.merging", True),
        ("models", "lavis_evlgen.tasks", False),
        ("models", "lavis_evlgen.evaluation.cider_d", False),
        ("weights", "lavis_evlgen.models.connectors", False),
        ("tasks", "lavis_evlgen.evaluation.cider_d", True),
        ("nn", "lavis_evlgen.compat.environment", False),
        ("nn", "transformers.models.bert", False),
        ("nn", "lavis.models", False),
        ("nn", "numpy", False),
        ("nn", "torch.nn.functional", True),
        ("nn", "lavis_evlgen.nn.losses", True),
        ("datasets", "lavis_evlgen.processors", False),
        ("datasets", "lavis_evlgen.compat.lavis_bridge", True),
        ("media", "lavis_evlgen.datasets", False),
        ("evaluation", "lavis_evlgen.models", False),
        ("tools", "lavis_evlgen.runners", True),
        ("runners", "lavis_evlgen.plugin", False),
        ("demo", "lavis_evlgen.tools.tokens.maps", True),
        ("compat", "lavis_evlgen.models", False),
        ("cli", "lavis_evlgen.plugin", True),
        ("models", "lavis_evlgen.__version__", True),
    ],
)
def test_the_rule_itself(room, name, allowed):
    assert (wrong_arrow(room, name) is None) == allowed


def test_relative_and_nested_imports_are_seen():
    source = "from . import merging\nfrom ..models import vision\ndef f():\n    import lavis_evlgen.cli\n"
    found = [name for name, _ in imports_of(source, ("lavis_evlgen", "nn"))]
    assert found == ["lavis_evlgen.nn.merging", "lavis_evlgen.models.vision", "lavis_evlgen.cli"]


def test_runners_and_tasks_ask_base_classes_and_do_not_probe():
    """Hooks and their defaults stand in tasks/base.py, datasets/facts.py and models/facts.py."""
    probe = re.compile(r"\b(?:hasattr|getattr)\((?!torch\.)")
    files = [path for path in modules() if room_of(path) in ("runners", "tasks")]
    wrong = [path.name for path in files if probe.search(path.read_text(encoding="utf-8"))]
    assert files and not wrong, f"hasattr or getattr in {wrong}"


def test_no_module_is_two_rooms_without_a_wall():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    long = {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_no_tracked_file_names_a_machine_or_a_package_host():
    """Such names would tie the project to the place it was written in."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix not in TEXT or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        wrong += [f"{name} holds {word}" for word in FORBIDDEN if word in text]
    assert not wrong, "\n".join(wrong)


def test_the_version_is_the_same_everywhere():
    """In setup.py, the package, CITATION.cff and CHANGELOG.md."""
    import lavis_evlgen

    version = re.escape(lavis_evlgen.__version__)
    for name, words in {"setup.py": f'version="{version}"', "CITATION.cff": f"\nversion: {version}\n",
                        "CHANGELOG.md": f"\n## {version}\n"}.items():  # fmt: skip
        assert re.search(words, (ROOT / name).read_text(encoding="utf-8")), f"{name}: not {lavis_evlgen.__version__}"


def test_paths_in_the_guides_exist():
    """CONTRIBUTING.md and docs/architecture.md send people to files: each `path` in them is there."""
    wrong = []
    for guide in ("CONTRIBUTING.md", "docs/architecture.md"):
        text = (ROOT / guide).read_text(encoding="utf-8")
        named = set(re.findall(r"`([\w./*]+(?:\.(?:py|yaml|sh|md)|/))`", text))
        named |= set(re.findall(r"`([\w/]+\.py)[: ]", text))
        assert len(named) > 20
        # rows of the table of folders name what is inside them
        bases = (ROOT, PACKAGE, *(PACKAGE / name for name in ("runners", "tools", "models", "datasets")))
        for path in named:
            if not any(list(base.glob(path.rstrip("/"))) for base in bases):
                wrong.append(f"{guide}: {path}")
    assert not wrong, "\n".join(wrong)
