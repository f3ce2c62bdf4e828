"""environment.check() names the first thing that is wrong, before anything heavy is imported."""

import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lavis_evlgen.compat.environment import (
    NEEDS,
    BrokenEnvironment,
    MissingExtra,
    Need,
    build_tag,
    check,
    import_torchvision,
    installed_versions,
    release,
    require,
    torch_wanted_by_torchvision,
)

ROOT = Path(__file__).resolve().parents[2]
GOOD = {
    "salesforce-lavis": "1.0.2",
    "torch": "2.15.0",
    "torchvision": "0.29.2",
    "transformers": "4.57.6",
    "numpy": "2.4.6",
    "opencv-python-headless": "4.12.0.88",
    "timm": "0.4.12",
    "fairscale": "0.4.4",
    "decord": "0.6.0",
    "omegaconf": "2.3.0",
    "webdataset": "1.0.2",
}


def test_this_environment_and_a_good_table_pass():
    check()
    check(GOOD, (3, 10), Need("torch", exactly="2.15.0"))
    check(GOOD, (3, 12), None)


@pytest.mark.parametrize("name", [need.name for need in NEEDS])
def test_a_missing_package_is_named(name):
    installed = {key: version for key, version in GOOD.items() if key != name}
    with pytest.raises(BrokenEnvironment, match=f"^{name} is not installed"):
        check(installed, (3, 11))


@pytest.mark.parametrize(
    "name, version",
    [
        ("salesforce-lavis", "1.0.0"),
        ("salesforce-lavis", "1.0.3"),
        ("transformers", "4.48.3"),
        ("transformers", "6.0.0"),
        ("transformers", "6.0.0rc1"),
        ("numpy", "1.26.4"),
        ("opencv-python-headless", "4.5.5.64"),
        ("timm", "1.0.9"),
        ("torch", "2.3.1+cu121"),
        ("fairscale", "0.4.0"),
    ],
)
def test_a_wrong_version_is_one_sentence_with_found_needed_and_mend(name, version):
    with pytest.raises(BrokenEnvironment) as raised:
        check({**GOOD, name: version}, (3, 11))
    message = str(raised.value)
    assert message.startswith(f"{name} {version} was found but lavis_evlgen needs {name}")
    assert "bash run_scripts/setup_environment.sh" in message and "requirements.lock" in message
    assert "\n" not in message and message.endswith(".") and ". " not in message


@pytest.mark.parametrize("python", [(3, 9), (3, 13), (4, 0)])
def test_a_wrong_python_comes_first(python):
    with pytest.raises(BrokenEnvironment, match=f"^Python {python[0]}.{python[1]} was found"):
        check({}, python)


@pytest.mark.parametrize(
    "torch, torchvision, wanted",
    [
        ("2.15.0+cpu", "0.29.2", None),  # the pair behind "torchvision::nms does not exist"
        ("2.15.0", "0.29.2+cpu", None),
        ("2.15.0+cu130", "0.29.2+cu126", None),
        ("2.14.1", "0.29.2", Need("torch", exactly="2.15.0")),
        ("2.14.1", "0.29.2", Need("torch", least="2.15")),
    ],
)
def test_a_mismatched_torch_pair_is_refused(torch, torchvision, wanted):
    with pytest.raises(BrokenEnvironment, match="both from one build"):
        check({**GOOD, "torch": torch, "torchvision": torchvision}, (3, 11), wanted)


@pytest.mark.parametrize(
    "torch, torchvision",
    [
        ("2.15.0", "0.29.2"),
        ("2.15.0+cpu", "0.29.2+cpu"),
        ("2.15.0+cu130", "0.29.2"),
        ("2.15.0a0+git12ab", "0.29.2a0+34cd"),  # vendors' containers: tags that name a commit
    ],
)
def test_a_matching_torch_pair_passes(torch, torchvision):
    check({**GOOD, "torch": torch, "torchvision": torchvision}, (3, 11), Need("torch", exactly="2.15.0"))


def test_versions_are_read_from_this_interpreter():
    import torch

    found = installed_versions(["torch", "no-such-distribution"])
    assert list(found) == ["torch"] and release(found["torch"]) == release(torch.__version__)
    assert torch_wanted_by_torchvision().met_by(torch.__version__)


@pytest.mark.parametrize("line", ["torch==2.14.1", "torch (==2.14.1)", "torch (>=2.99)", "torch>=2.99"])
def test_the_pin_in_torchvisions_metadata_is_read(line, monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy", "torch-extra==9", line])
    assert not torch_wanted_by_torchvision().met_by("2.15.0+cu130")
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy", "torch"])
    assert torch_wanted_by_torchvision() is None


def test_a_torchvision_that_does_not_load_is_one_sentence(monkeypatch):
    def load(name):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    import_torchvision()
    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(BrokenEnvironment, match="nms does not exist.*setup_environment.sh") as raised:
        import_torchvision()
    assert "\n" not in str(raised.value)


def test_release_and_build_tag():
    assert release("2.15.0+cu130") == (2, 15) and release("5") == release("5.0.0")
    assert release("4.10") > release("4.9.1")
    assert build_tag("2.1+cpu") == "cpu" and build_tag("2.1+cu121") == "cu121" and build_tag("2.1+git9") == ""
    assert str(Need("a", least="1", below="2")) == "a>=1,<2"


def test_the_check_comes_before_any_heavy_import():
    """In a broken environment the one sentence must win over whatever torch or LAVIS would say."""
    script = (
        "import sys, importlib.metadata as metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '4.26.1' if name == 'transformers' else real(name)\n"
        "try:\n"
        "    import lavis_evlgen\n"
        "except ImportError as error:\n"
        "    heavy = {'torch', 'lavis', 'transformers', 'numpy'} & set(sys.modules)\n"
        "    print(type(error).__name__, sorted(heavy), error)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("BrokenEnvironment [] transformers 4.26.1 was found"), done.stdout


def test_require_returns_the_module_or_names_the_extra(tmp_path, monkeypatch):
    assert require("json.decoder", "quickstart").JSONDecoder
    with pytest.raises(MissingExtra, match="no_such_weights is not installed.*uv sync --extra quickstart"):
        require("no_such_weights", "quickstart")
    # an installed module that fails inside is not "missing"
    (tmp_path / "broken_inside.py").write_text("import another_missing_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="another_missing_module") as raised:
        require("broken_inside", "quickstart")
    assert not isinstance(raised.value, MissingExtra)


# ---- requirements.lock -------------------------------------------------------------------------


def lock_requirements():
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def wanted_by_setup(monkeypatch):
    """INSTALL and every extra of setup.py but the trackers, read by running it with a `setup` that does nothing."""
    import runpy

    import setuptools
    from packaging.requirements import Requirement

    given = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    trackers = runpy.run_path(str(ROOT / "setup.py"))["TRACKERS"]
    extras = [line for name, lines in given["extras_require"].items() if name not in trackers for line in lines]
    return [Requirement(line) for line in given["install_requires"] + extras]


def test_the_lock_holds_names_and_versions_only():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert ":" + "//" not in text and "--hash" not in text and "@" not in text
    for requirement in lock_requirements():
        pins = list(requirement.specifier)
        assert [pin.operator for pin in pins] == ["=="] and not requirement.url, str(requirement)


@pytest.mark.parametrize("python", ["3.10.13", "3.11.7", "3.12.1"])
def test_the_lock_satisfies_setup_and_check_on_each_python(python, monkeypatch):
    locked = {}
    for requirement in lock_requirements():
        if requirement.marker is None or requirement.marker.evaluate({"python_full_version": python}):
            assert requirement.name not in locked, f"two versions of {requirement.name} for Python {python}"
            locked[requirement.name] = next(iter(requirement.specifier)).version
    for wanted in wanted_by_setup(monkeypatch):
        assert wanted.name in locked, f"{wanted} is in setup.py and not in the lock: run run_scripts/make_lock.py"
        assert wanted.specifier.contains(locked[wanted.name]), f"{wanted} but {locked[wanted.name]} is locked"
    check(locked, tuple(map(int, python.split(".")[:2])))
