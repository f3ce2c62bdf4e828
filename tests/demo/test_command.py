"""`evlgen demo`: what it refuses before it serves."""

import argparse
import sys

import pytest

from lavis_evlgen import cli
from lavis_evlgen.compat.environment import MissingExtra
from lavis_evlgen.demo import command


def arguments(*words: str) -> argparse.Namespace:
    return cli.parser().parse_args(["demo", "--run", "somewhere", *words])


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    def never(args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(command, "load", never)


def test_without_gradio_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtra, match="gradio is not installed: run `uv sync --extra demo`"):
        command.main(arguments())


@pytest.mark.parametrize(
    "words, says",
    [
        (["--port", "0"], "--port: 0 is none; give 1 to 65535"),
        (["--max-upload", "0"], "--max-upload: 0 must be above 0"),
        (["--max-pixels", "nan"], "--max-pixels: nan must be above 0"),
    ],
)
def test_arguments_that_cannot_be(words, says, monkeypatch):
    monkeypatch.setattr(command, "require", lambda *names: None)
    with pytest.raises(command.ConfigError, match=says):
        command.main(arguments(*words))


def test_it_serves_this_machine_alone_unless_told_otherwise():
    args = arguments()
    assert (args.host, args.port, args.device) == ("127.0.0.1", 7860, "cpu")


def test_models_without_a_connector_are_named(monkeypatch):
    monkeypatch.setattr(command, "require", lambda *names: None)
    monkeypatch.setattr(command, "load", lambda args: (3, None, {}, None, None))
    with pytest.raises(command.ConfigError, match="int has no connector"):
        command.main(arguments())
