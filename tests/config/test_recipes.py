"""Recipes by name: of a checkout, of an installed wheel, and what is said of names that there are not."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

from lavis_evlgen.config import ConfigError, recipes
from lavis_evlgen.config.parsing import read_file
from lavis_evlgen.tools import recipes as command
from tests.run_tools import ROOT


def test_every_config_of_projects_has_a_name_and_a_sentence():
    known, files = recipes.recipes(), set(ROOT.glob("projects/**/*.yaml"))
    assert len(files) > 20 and set(known.values()) == files  # no name stands for two files
    assert known["quickstart"] == ROOT / "projects/evlgen/quickstart.yaml"
    assert known["eval/coco"] == ROOT / "projects/evlgen/eval/coco.yaml"
    for path in files:
        assert 15 < len(recipes.about(path)) < 200, path


def test_a_file_comes_before_a_recipe_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes.config_path("quickstart") == ROOT / "projects/evlgen/quickstart.yaml"
    (tmp_path / "quickstart").mkdir()  # a folder is no config
    assert recipes.config_path("quickstart") == ROOT / "projects/evlgen/quickstart.yaml"
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "coco").write_text("run: 1")
    assert recipes.config_path("eval/coco") == Path("eval/coco")
    assert recipes.config_path("mine.yaml") == Path("mine.yaml")


@pytest.mark.parametrize(
    "given, says",
    [
        ("quickstrat", "quickstrat does not exist (seen from {here}), and no recipe has this name; did you mean quick"),
        ("zzz", ", and no recipe has this name; known: ccs, clips, "),
        ("projects/evlgen/opt.yaml", "does not exist (seen from {here}); as a recipe it is given by its name: opt"),
        ("projects/evlgen/gone.yaml", "does not exist (seen from {here})$"),
        ("opt.yaml", "does not exist (seen from {here})$"),
    ],
)
def test_what_is_neither_a_file_nor_a_recipe(given, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        read_file(recipes.config_path(given))
    assert says.format(here=tmp_path) in f"{error.value}$" and "\n" not in str(error.value)


def test_setup_puts_every_recipe_where_an_installed_package_looks_for_it(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **given: asked.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    name = "lavis_evlgen.recipes"
    assert name in asked["packages"]
    source, (pattern,) = ROOT / asked["package_dir"][name], asked["package_data"][name]
    package = tmp_path / "lavis_evlgen"
    for file in source.glob(pattern):  # as setuptools copies them into a wheel
        target = package / "recipes" / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    in_checkout = recipes.recipes()
    monkeypatch.setattr(recipes, "_PACKAGE", package)
    installed = recipes.recipes()
    assert list(installed) == list(in_checkout) and installed["quickstart"].is_relative_to(tmp_path)
    assert recipes.unknown(Path("projects/evlgen/opt.yaml")).endswith(": opt")


def test_the_command_lists_them_and_prints_one(capsys):
    assert command.main(SimpleNamespace(name=None)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(recipes.recipes())
    assert any(line.split(maxsplit=1) == ["eval/coco", "COCO captions, Karpathy's splits"] for line in lines)
    assert command.main(SimpleNamespace(name="opt")) == 0
    assert capsys.readouterr().out == (ROOT / "projects/evlgen/opt.yaml").read_text()
    with pytest.raises(ConfigError, match="quickstrat: no recipe has this name; did you mean quickstart"):
        command.main(SimpleNamespace(name="quickstrat"))
