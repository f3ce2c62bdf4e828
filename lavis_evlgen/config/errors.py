"""The error of a config, and the words that its messages are made of."""

from __future__ import annotations

import difflib

_LONGEST = 80  # characters of a value in a message


class ConfigError(ValueError):
    """A config that cannot be used; the message names the file, the key, its value and what it must be."""


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
