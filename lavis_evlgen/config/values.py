"""What the values of a section may be, by the tables of the class that reads them.

A class says what its keys take in tables of plain data; a key that is in several of them takes any of those:

    NUMBERS   {key: limits}          limits (least, most): a number; a whole one where the least is an int
    SWITCHES  (key, ...)             true or false
    CHOICES   {key: (value, ...)}    one of these
    TEXTS     (key, ...)             text
    LISTS     {key: item}            a list
    MAPPINGS  {key: {name: item}}    a mapping of these names; {key: item}: of any names
    OPTIONAL  (key, ...)             may also be null
    AT_MOST   {key: (other, value)}  no larger than the other key, or than `value` where the other is not given

An item is `str` (text), `list` (text, or a list of texts), a set (one of these words), or limits; limits of three,
(least, most, None), may be null. Keys in no table take anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from lavis_evlgen.config.errors import nearest, shown

TABLES = ("NUMBERS", "SWITCHES", "CHOICES", "TEXTS", "LISTS", "MAPPINGS")


class Refused(ValueError):
    """A value that its key does not take; the message begins with the key."""


def tables_of(*classes) -> dict[str, dict]:
    """The tables of several classes that read one section, as one."""
    found = {}
    for name in (*TABLES, "OPTIONAL", "AT_MOST"):
        tables = [getattr(cls, name, {}) for cls in classes]
        found[name] = {key: (t[key] if isinstance(t, dict) else True) for t in tables for key in t}
    return found


def drop_nulls(section: DictConfig, keys=None):
    """null means not given: the class's own default holds. keys: only of these."""
    for key in [key for key in section if section[key] is None and (keys is None or key in keys)]:
        del section[key]


def check_values(section: DictConfig, prefix: str, tables: dict[str, dict]):
    """Raises Refused for the first value that its key does not take. Whole floats become the ints that are meant."""
    for key in section:
        place, node = f"{prefix}{key}", section[key]
        value = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
        if not any(key in tables[name] for name in TABLES) or (value is None and key in tables["OPTIONAL"]):
            continue
        taken = _taken(place, value, {name: tables[name].get(key) for name in TABLES})
        if repr(taken) != repr(value):
            section[key] = taken
    for key, (other, default) in tables["AT_MOST"].items():
        value, most = section.get(key), section.get(other, default)
        if value is not None and most is not None and value > most:
            raise Refused(f"{prefix}{key}={value} must be at most {prefix}{other}={most}")


def _taken(place: str, value, kinds: dict):
    """`value` as the class gets it. kinds: what its key has in each of TABLES, None where it is not there."""
    choices = kinds["CHOICES"] or ()
    if any(type(choice) is type(value) and choice == value for choice in choices):
        return value
    if isinstance(value, bool):
        if kinds["SWITCHES"]:
            return value
    elif isinstance(value, int | float):
        if kinds["NUMBERS"]:
            return _number(place, value, kinds["NUMBERS"])
    elif isinstance(value, str):
        if kinds["TEXTS"]:
            return _text(place, value)
    elif isinstance(value, list):
        if kinds["LISTS"]:
            return [_item(f"{place}[{n}]", item, kinds["LISTS"]) for n, item in enumerate(value)]
    elif isinstance(value, dict) and kinds["MAPPINGS"]:
        return _mapping(place, value, kinds["MAPPINGS"])
    raise Refused(_words(place, value, kinds))


def _words(place: str, value, kinds: dict) -> str:
    """The sentence for a value of another kind than its key takes."""
    given = {name for name in TABLES if kinds[name]} if value is not None else set()
    if given == {"NUMBERS"} and isinstance(value, str):
        hint = f"; write it without quotes: {value.strip()}" if _reads_as_number(value) else ""
        return f"{place}: {shown(repr(value))} is not a number{hint}"
    if given == {"LISTS"}:
        return f"{place}={shown(value)} is not a list; write [{shown(value)}]"
    if given == {"SWITCHES"}:
        return f"{place}: {shown(repr(value))} is not true or false"
    if given == {"CHOICES"}:
        near = nearest(str(value), kinds["CHOICES"])
        near = near if "did you mean" in near else ""  # the list is in the message already
        return f"{place}: {shown(repr(value))} is not one of {_listed(kinds['CHOICES'])}{near}"
    words = {
        "SWITCHES": lambda _: "true or false",
        "CHOICES": _listed,
        "TEXTS": lambda _: "text",
        "NUMBERS": _limits,
        "LISTS": lambda item: f"a list of {_plural(item)}",
        "MAPPINGS": _mapping_words,
    }
    known = " or ".join(words[name](kinds[name]) for name in words if kinds[name])
    return f"{place}={shown(value)} must be {known}" + "; leave it out for the default" * (value is None)


def _reads_as_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(place: str, value: int | float, limits: Sequence):
    least, most = limits[:2]
    whole = isinstance(least, int)
    finite = isinstance(value, int) or math.isfinite(value)
    if not finite or (whole and value != int(value)) or not least <= value <= most:
        raise Refused(f"{place}={shown(value)} must be {_limits(limits)}")
    return int(value) if whole else value


def _text(place: str, value: str) -> str:
    if "\0" in value:
        raise Refused(f"{place}={shown(repr(value))} holds a null character; it must be plain text")
    return value


def _item(place: str, value, item):
    """A value of a list or mapping."""
    if value is None and (item in (str, list) or (isinstance(item, tuple) and len(item) == 3)):
        return None
    if isinstance(item, tuple):
        return _taken(place, value, dict.fromkeys(TABLES) | {"NUMBERS": item})
    if isinstance(item, set):
        return _taken(place, value, dict.fromkeys(TABLES) | {"CHOICES": sorted(item)})
    return _taken(place, value, dict.fromkeys(TABLES) | {"TEXTS": True, "LISTS": str if item is list else None})


def _mapping(place: str, value: dict, items) -> dict:
    for name in value:
        if isinstance(items, dict) and name not in items:
            raise Refused(f"unknown key {place}.{name}{nearest(str(name), items)}")
        if not isinstance(name, str):
            raise Refused(f"{place}: the name {name!r} is not text; write it in quotes")
    return {name: _item(f"{place}.{name}", v, items[name] if isinstance(items, dict) else items)
            for name, v in value.items()}  # fmt: skip


def _listed(choices) -> str:
    plain = {True: "true", False: "false"}
    return ", ".join(plain[c] if isinstance(c, bool) else str(c) for c in choices)


def _limits(limits: Sequence) -> str:
    least, most = (f"{limit:g}" if isinstance(limit, float) else str(limit) for limit in limits[:2])
    kind = "a whole number" if isinstance(limits[0], int) else "a number"
    return f"{kind} of at least {least} and at most {most}"


def _plural(item) -> str:
    if isinstance(item, tuple):
        return "numbers"
    return f"the words {_listed(sorted(item))}" if isinstance(item, set) else "texts"


def _mapping_words(items) -> str:
    return f"a mapping {{{', '.join(f'{name}: ...' for name in (items if isinstance(items, dict) else ('name',)))}}}"
