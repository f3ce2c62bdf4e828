"""How config keys are declared, checked and read: one dataclass beside the class that reads them.

    @dataclass(kw_only=True)
    class PoolingSettings(Settings):
        num_query_token: int | None = key("tokens that avgpool leaves", 29, at_least=1, at_most=4096)

    PoolingSettings.read({}).num_query_token  # 29

The annotation says what a value may be (config/values.py); `| None`: a config may say null, which means the default.
Limits hold for every number in it. A key without a default must be in the config. A registered class names its
dataclass as `Settings`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf

from lavis_evlgen.config.values import Range, Refused, forms_of, taken, takes_null

S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Key:
    """What is declared of one key. default: MISSING where the config must give it."""

    name: str
    kind: Any  # the annotation
    meaning: str
    default: Any
    limits: Range
    not_above: str | None


def key(
    meaning: str, default: Any = MISSING, *, at_least=-math.inf, at_most=math.inf, not_above: str | None = None
) -> Any:
    """A field of a Settings dataclass. not_above: another key of the section that this one may not exceed."""
    about = {"meaning": meaning, "limits": Range(at_least, at_most), "not_above": not_above}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=about)
    return field(default=default, metadata=about)


@dataclass(kw_only=True)
class Settings:
    """Keys of a config section that one class reads; what others read of the same section is left alone."""

    @classmethod
    def read(cls: type[S], section: Mapping | None, prefix: str = "") -> S:
        """The section's values, defaults filled in; null means the default. The section stays as it is.

        prefix: of keys in messages, e.g. "run.". Raises Refused for a value that its key does not take, and for a key
        that must be given and is not.
        """
        values = {}
        for name, known in keys_of(cls).items():
            value = None if section is None else plain(section.get(name))
            if value is not None:
                value = taken(f"{prefix}{name}", value, known.kind, known.limits)
                values[name] = float(value) if isinstance(value, int) and _is_float(known.kind) else value
            elif known.default is MISSING:
                raise Refused(f"{prefix}{name} is not set: {known.meaning}")
        return cls(**values)

    @classmethod
    def meanings(cls) -> dict[str, str]:
        return {name: known.meaning for name, known in keys_of(cls).items()}


def keys_of(*classes) -> dict[str, Key]:
    """The keys of Settings dataclasses, and of classes that name theirs, which read one section; others have none."""
    found = {}
    for cls in classes:
        is_settings = isinstance(cls, type) and issubclass(cls, Settings)
        found |= _declared(cls if is_settings else getattr(cls, "Settings", Settings))
    return found


@cache
def _declared(settings: type[Settings]) -> dict[str, Key]:
    hints = get_type_hints(settings, include_extras=True)
    found = {}
    for one in fields(settings):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        found[one.name] = Key(one.name, hints[one.name], default=default, **one.metadata)
    return found


def declares(cls) -> bool:
    """Whether a registered class says which keys it reads; LAVIS's own do not."""
    return hasattr(cls, "Settings")


def plain(value):
    """An OmegaConf node as plain Python."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def drop_nulls(section: DictConfig, kept: Iterable[str] = ()):
    """null means not given: the class's own default holds. kept: keys whose null stays in the section."""
    for name in [name for name in section if section[name] is None and name not in kept]:
        del section[name]


def check_values(section: DictConfig | dict, keys: Mapping[str, Key], prefix: str):
    """Raises Refused for the first value that its key does not take. Whole floats become the ints that are meant."""
    for name in section:
        known, value = keys.get(name), plain(section[name])
        if known is None or (value is None and takes_null(known.kind)):
            continue
        meant = taken(f"{prefix}{name}", value, known.kind, known.limits)
        if repr(meant) != repr(value):
            section[name] = meant
    for name, known in keys.items():
        if known.default is MISSING and name not in section:
            raise Refused(f"{prefix}{name} is not set: {known.meaning}")
        if known.not_above is None or name not in section:
            continue
        most = section.get(known.not_above, keys[known.not_above].default)
        if most is not None and section[name] > most:
            raise Refused(f"{prefix}{name}={section[name]} must be at most {prefix}{known.not_above}={most}")


def _is_float(kind) -> bool:
    return [form for form in forms_of(kind) if form is not NoneType] == [float]
