"""`evlgen keys`: every config key with its meaning, type, limits and default; as text, or as a JSON schema for editors.

Both are printed from the dataclasses that the registered classes name as `Settings` (config/keys.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING
from types import NoneType
from typing import Any, Literal, get_args

from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_evlgen.config.keys import Key, declares, keys_of
from lavis_evlgen.config.run_config import PROCESSORS, SECTIONS
from lavis_evlgen.config.stages import StageSettings
from lavis_evlgen.config.values import Range, forms_of, limits_of, names_of, origin_of, words_of

# section: kinds of classes that read it, by LAVIS's names in the registry
READERS = {"run": ("runner", "task"), "model": ("model",), "datasets": ("builder", "processor")}
REFERENCE = {"type": "string", "pattern": r"\$\{.+\}"}  # to another value of the config


def print_keys(args) -> int:
    """Print the keys that each registered class says it reads."""
    if args.json_schema:
        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return 0
    for section in [args.section] if args.section else (*SECTIONS, "stages"):
        if section == "stages":
            _print("stages: of each", keys_of(StageSettings).values())
            continue
        for kind in READERS[section]:
            for name, cls in declaring(kind):
                keys = {**keys_of(cls), **_type_key(cls)}.values()
                _print(f"{section}: {name}", keys, lambda key, name=name, cls=cls: _default(name, cls, key))
    return 0


def _print(title: str, keys: Iterable[Key], default: Callable = lambda key: key.default):
    print(f"\n{title}")
    for key in keys:
        print(f"  {key.name:<24} {key.meaning}  [{_takes(key, default(key))}]")


def declaring(kind: str) -> Iterator[tuple[str, type]]:
    """(name, class) of the registered classes of a kind that say which keys they read."""
    return ((name, cls) for name, cls in registry.mapping[f"{kind}_name_mapping"].items() if declares(cls))


def _type_key(cls) -> dict[str, Key]:
    """The key of a data set that LAVIS reads itself."""
    if not hasattr(cls, "DATASET_CONFIG_DICT"):
        return {}
    kinds = tuple(cls.DATASET_CONFIG_DICT)
    return {"type": Key("type", Literal[kinds], "which defaults: those of a YAML file", "default", Range(), None)}


def _takes(key: Key, default) -> str:
    """What a key takes, and its default, in words."""
    words = [" or ".join(words_of(form, key.limits) for form in forms_of(key.kind) if form is not NoneType)]
    if default not in (None, MISSING):
        words.append(f"default {json.dumps(default, ensure_ascii=False)}")
    return "; ".join(words)


def _default(name: str, cls, key: Key):
    """The default of a key; where the class has none, that of the YAML that a data set's defaults are in."""
    if key.default is not MISSING or not hasattr(cls, "DATASET_CONFIG_DICT"):
        return key.default
    return OmegaConf.to_container(OmegaConf.load(cls.DATASET_CONFIG_DICT["default"]).datasets[name]).get(key.name)


def json_schema() -> dict:
    """A JSON schema (draft 7) of run configs as they are written, before defaults are laid under them.

    A section whose class says which keys it reads takes those alone; LAVIS's own classes take anything.
    """
    ((runner_name, runner),) = declaring("runner")
    run = {name: _section(keys_of(runner, cls), nulls=True) for name, cls in declaring("task")}
    model = {name: _section(keys_of(cls), {"model_type": {"enum": list(cls.PRETRAINED_MODEL_CONFIG_DICT)}})
             for name, cls in declaring("model")}  # fmt: skip
    datasets = dict.fromkeys(registry.mapping["builder_name_mapping"], {"type": "object"})
    sections = {
        "run": _by_name("task", run, {"runner": {"const": runner_name}}),
        "model": _by_name("arch", model),
        "datasets": _object(datasets | {name: _data_set(name, cls) for name, cls in declaring("builder")}),
    }
    processors = {name: _section(keys_of(cls), {"name": {}}, nulls=True) for name, cls in declaring("processor")}
    names = {"properties": {"name": {"enum": list(registry.mapping["processor_name_mapping"])}}}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "run config of lavis_evlgen",
        **_object(sections | {"stages": _stages(sections)}),
        "required": list(sections),
        "definitions": {"processor": _by_name("name", processors) | names},
    }


def _stages(sections: dict[str, dict]) -> dict:
    """The list of stages: each takes sections of its own, laid over those of the file."""
    found = _section(keys_of(StageSettings))["properties"]
    names = {"type": "array", "items": {"enum": list(sections["datasets"]["properties"])}}
    null = {"type": "null"}
    found["run"]["anyOf"] = [sections["run"], null]
    found["datasets"]["anyOf"] = [names, sections["datasets"], null]
    return {"anyOf": [{"type": "array", "items": {"anyOf": [_object(found), null]}}, null]}


def _data_set(name: str, cls) -> dict:
    stage = {"anyOf": [{"$ref": "#/definitions/processor"}, {"type": "null"}]}
    stages = _object({"train": stage, "eval": stage}) | {"type": ["object", "null"]}
    found = {key.name: _property(key, default=_default(name, cls, key)) for key in keys_of(cls).values()}
    found |= {kind: {"description": found[kind]["description"], **stages} for kind in PROCESSORS}
    return _object(found | {key: _property(about) for key, about in _type_key(cls).items()})


def _object(properties: dict) -> dict:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _by_name(name: str, schemas: dict[str, dict], more: dict | None = None) -> dict:
    """A mapping whose other keys depend on the value of `name` (and on `more` properties)."""
    cases = [{"if": {"required": [name], "properties": {name: {"const": value}, **(more or {})}}, "then": schema}
             for value, schema in schemas.items()]  # fmt: skip
    return {"type": "object", "allOf": cases}


def _section(keys: Mapping[str, Key], more: dict | None = None, nulls: bool = False) -> dict:
    """nulls: null means not given, whatever the key."""
    return _object({name: _property(key, nulls) for name, key in keys.items()} | (more or {}))


def _property(key: Key, nulls: bool = False, default: Any = MISSING) -> dict:
    forms = [form for form in forms_of(key.kind) if form is not NoneType]
    kinds = [_value(form, key.limits) for form in forms]
    if nulls or len(forms) < len(forms_of(key.kind)):
        kinds.append({"type": "null"})
    default = key.default if default is MISSING else default
    about = {"description": key.meaning, **({} if default in (None, MISSING) else {"default": default})}
    return about | {"anyOf": [*kinds, REFERENCE]}


def _value(form, limits: Range) -> dict:
    """The schema of one alternative of an annotation."""
    form, limits = limits_of(form, limits)
    origin = origin_of(form)
    if origin is Literal:
        return {"enum": list(get_args(form))}
    if origin is list:
        return {"type": "array", "items": _alternatives(get_args(form)[0], limits)}
    if origin is dict:
        known = names_of(form)
        if known is not None:
            return _object({name: _alternatives(kind, limits) for name, kind in known.items()})
        return {"type": "object", "additionalProperties": _alternatives((get_args(form) or (Any,))[-1], limits)}
    if origin in (int, float):
        ends = {"minimum": limits.at_least, "maximum": limits.at_most}
        ends = {name: end for name, end in ends.items() if math.isfinite(end)}
        return {"type": "integer" if origin is int else "number", **ends}
    return {"type": {bool: "boolean", str: "string", NoneType: "null"}[origin]}


def _alternatives(kind, limits: Range):
    if kind is Any:
        return True
    kinds = [_value(form, limits) for form in forms_of(kind)]
    return {"anyOf": [*kinds, REFERENCE]}
