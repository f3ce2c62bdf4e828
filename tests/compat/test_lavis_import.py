"""What an import brings with it, and that EVLGen is registered with LAVIS in whatever order a user imports.

Each test asks interpreters of its own.
"""

import json
import subprocess
import sys

import pytest

from lavis_evlgen import cli
from tests.run_tools import ROOT

HEAVY = ("torch", "torchvision", "transformers", "numpy", "omegaconf", "lavis")
LATER = ("pandas", "spacy", "matplotlib", "gradio", "tensorboard", "wandb", "trackio")  # imported by what uses them
COMMANDS = ("ablate", "caption", "compare", "convert", "demo", "doctor", "estimate", "evaluate", "export", "keys",
            "macs", "recipes", "shards", "tokens", "train")  # fmt: skip


def packages_after(script: str) -> set[str]:
    """Which of HEAVY a fresh interpreter has imported after `script`."""
    tell = f"import json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{script}\n{tell}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_imports_the_standard_library_only():
    """Of `evlgen` and of each of its commands."""
    script = f"""
from lavis_evlgen.cli import main
for words in [[], *([name] for name in {COMMANDS})]:
    try:
        main([*words, "--help"])
    except SystemExit as end:
        assert end.code == 0
"""
    assert packages_after(script) == set()


def test_every_command_is_listed_and_names_a_function_that_exists():
    parser = cli.parser()
    commands = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    assert sorted(commands) == sorted(COMMANDS)
    for name, command in commands.items():
        assert callable(cli.resolve_name(command.get_default("run_command"))), name


def test_a_command_line_that_is_refused_imports_nothing():
    script = """
from lavis_evlgen.cli import main
try:
    main(["estimate", "some.yaml", "--gpu", "none"])
except SystemExit as end:
    assert end.code == 2
"""
    assert packages_after(script) == set()


def test_the_package_alone_is_light():
    assert packages_after("import lavis_evlgen, lavis_evlgen.config.errors") == set()


def test_nn_needs_torch_alone():
    script = f"""
import sys, torch
before = [name for name in {HEAVY} if name in sys.modules]
import lavis_evlgen.nn
assert before == [name for name in {HEAVY} if name in sys.modules]
"""
    assert "torch" in packages_after(script)


def test_comparing_runs_needs_neither_lavis_nor_torch():
    script = """
from lavis_evlgen.cli import main
try:
    main(["compare", "nowhere"])
except SystemExit as end:
    assert end.code == 2
"""
    assert packages_after(script).isdisjoint({"lavis", "torch", "transformers"})


# first imports of a user's script
ORDERS = (
    "import lavis_evlgen; from lavis.models import load_model_and_preprocess",
    "import lavis; import lavis_evlgen",
    "import lavis_evlgen.nn; from lavis.common.registry import registry",
    "from lavis_evlgen.models.evlgen import EVLGen",
    "from lavis_evlgen.datasets import ScenesDataset",
    "from lavis_evlgen.processors import EvlgenCaptionProcessor",
    "from lavis_evlgen.config import EvlgenConfig",
    "import lavis_evlgen.weights.bundle",
    "import lavis_evlgen.runners.trainer",
    "import lavis_evlgen.tasks.captioning",
    "import lavis_evlgen.tools.cost.macs",
    "from lavis_evlgen import plugin",
    "from lavis_evlgen.launch import main",
)
# in one interpreter, where other packages stay imported: they take half a minute each time
ALL_ORDERS = """
import json, sys, traceback

def outcome(order):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lavis", "lavis_evlgen")]:
        del sys.modules[name]
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("lavis_evlgen")]
    try:
        exec(order, {})
        from lavis.common.registry import registry
        from lavis.models import model_zoo
    except Exception:
        return traceback.format_exc()
    found = {
        "model": registry.get_model_class("evlgen"),
        "builder": registry.get_builder_class("scenes"),
        "task": registry.get_task_class("evlgen_captioning"),
        "processor": registry.get_processor_class("evlgen_image_eval"),
        "runner": registry.get_runner_class("runner_evlgen"),
        "LAVIS's runner": registry.get_runner_class("runner_iter"),
        "model zoo": "evlgen" in dict(model_zoo),
    }
    return [name for name, there in found.items() if not there]

import lavis_evlgen, lavis  # the bridge of transformers stays, so that `import lavis` may come first below
imported = list(sys.modules)
print(json.dumps([imported, {order: outcome(order) for order in json.loads(sys.argv[1])}]))
"""


@pytest.fixture(scope="module")
def after_lavis() -> tuple[list[str], dict[str, list[str] | str]]:
    """(modules that LAVIS and EVLGen import; by order of imports: what is not registered after it, or its error)."""
    command = [sys.executable, "-W", "ignore", "-c", ALL_ORDERS, json.dumps(ORDERS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("order", ORDERS)
def test_everything_is_registered_whatever_is_imported_first(after_lavis, order):
    missing = after_lavis[1]
    assert missing[order] == [], missing[order]


def test_what_takes_long_and_is_seldom_used_is_imported_by_what_uses_it(after_lavis):
    assert {"lavis", "lavis_evlgen.runners.trainer"} <= set(after_lavis[0])
    assert set(after_lavis[0]).isdisjoint(LATER)
