"""docs/faithful.md names tests and keys that exist."""

import ast
import re

import pytest

from lavis_evlgen import plugin  # noqa: F401
from lavis_evlgen.config.keys import keys_of
from lavis_evlgen.models.evlgen_video import EVLGenVideo
from lavis_evlgen.runners.trainer import Trainer
from lavis_evlgen.tasks.captioning import EvlgenCaptionTask
from lavis_evlgen.tasks.vqa import EvlgenVqaTask
from tests.run_tools import ROOT

PAGE = (ROOT / "docs" / "faithful.md").read_text(encoding="utf-8")
KNOWN = {
    "model": keys_of(EVLGenVideo),
    "run": keys_of(Trainer, EvlgenCaptionTask, EvlgenVqaTask),
}


@pytest.mark.parametrize("file", sorted(set(re.findall(r"(tests/[\w/]+\.py)::", PAGE))))
def test_its_tests_are_there(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(re.findall(rf"{re.escape(file)}::(\w+)", PAGE)) <= there


def test_its_keys_are_known():
    named = re.findall(r"`(model|run)\.([a-z_0-9]+)", PAGE)
    assert len(named) > 20
    assert {f"{section}.{key}" for section, key in named if key not in KNOWN[section]} == set()
