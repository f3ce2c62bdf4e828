"""What an annotation says a value may be: the value as a class gets it, or a sentence that says why it is refused.

Annotations: int (whole floats become ints), float, bool, str, Literal[...], list[...], dict[str, ...],
dict[Literal[names], ...], a TypedDict, and unions of those; `Annotated[int, Range(...)]` is a number with limits of its
own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints, is_typeddict

from lavis_evlgen.config.errors import ConfigError, nearest, shown


class Refused(ConfigError):
    """A value that its key does not take; the message begins with the key."""


class Range(NamedTuple):
    """Limits of a number, both included."""

    at_least: float = -math.inf
    at_most: float = math.inf


def refuse_unknown(section: Iterable, known: Iterable, prefix: str):
    """Raises Refused for a name that is none of `known`, with the nearest of those. prefix: "run.", or "file: "."""
    file, separator, place = prefix.rpartition(": ")
    for name in section:
        if name not in known:
            raise Refused(f"{file}{separator}unknown key {place}{name}{nearest(str(name), known)}")


def forms_of(kind) -> list:
    """The alternatives of an annotation, NoneType among them."""
    return list(get_args(kind)) if get_origin(kind) in (Union, UnionType) else [kind]


def takes_null(kind) -> bool:
    return NoneType in forms_of(kind)


def limits_of(form, limits: Range) -> tuple[Any, Range]:
    """An alternative without Annotated, and its limits: its own, else those of the key."""
    if get_origin(form) is not Annotated:
        return form, limits
    inner, own = get_args(form)
    return inner, own


def names_of(form) -> dict[str, Any] | None:
    """{name: annotation} of a mapping of known names, None for any names."""
    if is_typeddict(form):
        return get_type_hints(form, include_extras=True)
    name, value = get_args(form) or (str, Any)
    return dict.fromkeys(get_args(name), value) if get_origin(name) is Literal else None


def origin_of(form) -> Any:
    """bool, int, float, str, list, dict or Literal."""
    return dict if is_typeddict(form) else get_origin(form) or form


def taken(place: str, value, kind, limits: Range):
    """`value` as the class gets it. Raises Refused."""
    forms = forms_of(kind)
    if kind is Any or (value is None and NoneType in forms):
        return value
    for form in forms:
        form, own_limits = limits_of(form, limits)
        origin = origin_of(form)
        if origin is Literal:
            if any(type(choice) is type(value) and choice == value for choice in get_args(form)):
                return value
        elif (origin is bool) == isinstance(value, bool) and isinstance(value, _TYPES.get(origin, ())):
            return _READ[origin](place, value, form, own_limits)
    raise Refused(_words(place, value, [form for form in forms if form is not NoneType], limits))


def _number(place: str, value: int | float, form, limits: Range):
    whole = form is int
    finite = isinstance(value, int) or math.isfinite(value)
    if not finite or (whole and value != int(value)) or not limits.at_least <= value <= limits.at_most:
        raise Refused(f"{place}={shown(value)} must be {number_words(whole, limits)}")
    return int(value) if whole else value


def _text(place: str, value: str, form, limits: Range) -> str:
    if "\0" in value:
        raise Refused(f"{place}={shown(repr(value))} holds a null character; it must be plain text")
    return value


def _mapping(place: str, value: dict, form, limits: Range) -> dict:
    known = names_of(form)
    if known is not None:
        refuse_unknown(value, known, f"{place}.")
    for name in value:
        if not isinstance(name, str):
            raise Refused(f"{place}: the name {name!r} is not text; write it in quotes")
    kinds = dict.fromkeys(value, (get_args(form) or (Any,))[-1]) if known is None else known
    return {name: taken(f"{place}.{name}", one, *limits_of(kinds[name], limits)) for name, one in value.items()}


def _list(place: str, value: list, form, limits: Range) -> list:
    return [taken(f"{place}[{n}]", one, get_args(form)[0], limits) for n, one in enumerate(value)]


# by origin: the Python types of a value, and what makes of it what the class gets
_TYPES = {bool: bool, int: (int, float), float: (int, float), str: str, list: (list, tuple), dict: dict}
_READ = {bool: lambda place, value, *_: value, int: _number, float: _number, str: _text, list: _list, dict: _mapping}


def _words(place: str, value, forms: list, limits: Range) -> str:
    """The sentence for a value of another kind than its key takes."""
    origins = [origin_of(form) for form in forms]
    if value is not None and len(forms) == 1:
        if origins[0] in (int, float) and isinstance(value, str):
            hint = f"; write it without quotes: {value.strip()}" if _reads_as_number(value) else ""
            return f"{place}: {shown(repr(value))} is not a number{hint}"
        if origins[0] is list:
            return f"{place}={shown(value)} is not a list; write [{shown(value)}]"
        if origins[0] is bool:
            return f"{place}: {shown(repr(value))} is not true or false"
        if origins[0] is Literal:
            near = nearest(str(value), get_args(forms[0]))
            near = near if "did you mean" in near else ""  # the list is in the message already
            return f"{place}: {shown(repr(value))} is not one of {listed(get_args(forms[0]))}{near}"
    known = " or ".join(words_of(form, limits) for form in forms)
    return f"{place}={shown(value)} must be {known}" + "; leave it out for the default" * (value is None)


def words_of(form, limits: Range) -> str:
    """What an alternative of an annotation takes, in words."""
    form, limits = limits_of(form, limits)
    origin = origin_of(form)
    if origin is dict:
        return f"a mapping {{{', '.join(f'{name}: ...' for name in names_of(form) or ('name',))}}}"
    if origin is list:
        item, _ = limits_of(*get_args(form), limits)
        if get_origin(item) is Literal:
            return f"a list of the words {listed(get_args(item))}"
        return f"a list of {'numbers' if item in (int, float) else 'texts'}"
    if origin is Literal:
        return listed(get_args(form))
    return {bool: "true or false", str: "text"}.get(origin) or number_words(origin is int, limits)


def number_words(whole: bool, limits: Range) -> str:
    ends = [f"at {word} {limit if whole else f'{limit:g}'}"
            for word, limit in zip(("least", "most"), limits, strict=True) if math.isfinite(limit)]  # fmt: skip
    return ("a whole number" if whole else "a number") + f" of {' and '.join(ends)}" * bool(ends)


def listed(choices: Iterable) -> str:
    plain_words = {True: "true", False: "false"}
    return ", ".join(plain_words[c] if isinstance(c, bool) else str(c) for c in choices)


def _reads_as_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
