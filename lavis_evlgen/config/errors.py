"""The error of a config, and the words that its messages are made of."""

from __future__ import annotations

import difflib
import traceback
from contextlib import contextmanager
from pathlib import Path

import lavis_evlgen
from lavis_evlgen.errors import UserError

_LONGEST = 80  # characters of a value in a message


class ConfigError(UserError, ValueError):
    """A config that cannot be used; the message names the file, the key, its value and what it must be."""


@contextmanager
def config_errors():
    """During set-up, a value that our own code refuses is a mistake in the config; other code's errors are bugs."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not raised_in.is_relative_to(Path(lavis_evlgen.__file__).parent):
            raise
        raise ConfigError(str(error)) from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def shown(value) -> str:
    """A value as a message shows it: cut, where it is long; null, true and false as in YAML."""
    plain = value is None or isinstance(value, bool)
    text = {None: "null", True: "true", False: "false"}[value] if plain else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def nearest(name: str, known) -> str:
    """"; did you mean X?", or the list of what is known when nothing is near."""
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(sorted(map(str, known)))}"
