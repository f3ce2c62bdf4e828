"""`evlgen keys`: what it prints of each key, and its JSON schema against the shipped configs."""

import copy
import json
import re

import pytest
from omegaconf import OmegaConf

from lavis_evlgen import cli
from lavis_evlgen.config.keys import keys_of
from lavis_evlgen.tools.keys import declaring, json_schema
from tests.run_tools import ROOT

PROJECTS = sorted(ROOT.glob("projects/**/*.yaml"))
KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": int | float}


@pytest.fixture(scope="module")
def schema():
    return json.loads(json.dumps(json_schema()))


def valid(value, schema, whole) -> bool:
    """Whether a value fits a schema of the keywords that ours uses; any other keyword is an error."""
    try:
        import jsonschema
    except ImportError:
        return structurally_valid(value, schema, whole)
    return jsonschema.Draft7Validator({**whole, **schema}).is_valid(value)


def structurally_valid(value, schema, whole) -> bool:
    if schema is True:
        return True
    fits = {
        "$ref": lambda path: inner(value, whole["definitions"][path.rpartition("/")[2]]),
        "type": lambda names: any(of_kind(value, name) for name in ([names] if isinstance(names, str) else names)),
        "enum": lambda choices: any(type(value) is type(choice) and value == choice for choice in choices),
        "const": lambda choice: value == choice,
        "minimum": lambda least: value >= least,
        "maximum": lambda most: value <= most,
        "pattern": lambda pattern: re.search(pattern, value) is not None,
        "anyOf": lambda schemas: any(inner(value, one) for one in schemas),
        "allOf": lambda schemas: all(inner(value, one) for one in schemas),
        "items": lambda item: all(inner(one, item) for one in value),
        "required": lambda names: set(names) <= set(value),
        "properties": lambda known: all(inner(value[key], known[key]) for key in known if key in value),
        "additionalProperties": lambda rest: all(rest and inner(value[key], rest) for key in others(value, schema)),
        "if": lambda condition: not inner(value, condition) or inner(value, schema["then"]),
    }

    def inner(value, schema):
        return structurally_valid(value, schema, whole)

    about = {"then", "description", "default", "title", "$schema", "definitions"}
    order = sorted(set(schema) - about, key=lambda word: word != "type")  # other words ask for the type
    if not isinstance(value, dict):
        order = [word for word in order if word not in ("properties", "additionalProperties", "required")]
    return all(fits[word](schema[word]) for word in order)


def others(value: dict, schema: dict) -> set:
    return set(value) - set(schema.get("properties", {}))


def of_kind(value, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer":
        return isinstance(value, int | float) and value == int(value)
    return isinstance(value, KINDS[name])


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(schema, project):
    assert valid(OmegaConf.to_container(OmegaConf.load(project)), schema, schema)


@pytest.mark.parametrize(
    "place, value, fits",
    [
        ("run.max_iters", "240", False),
        ("run.max_iters", 0, False),
        ("run.max_iters", 2.5e2, True),
        ("run.max_iters", None, True),
        ("run.max_iters", "${run.warmup_steps}", True),
        ("run.max_itres", 1, False),
        ("run.amp", True, True),
        ("run.amp", "bf61", False),
        ("run.baseline", "greedy", False),
        ("run.runner", "runner_iter", True),
        ("run.train_dataset_ratios", {"scenes": -1}, False),
        ("run.train_dataset_ratios", {"scenes": 1}, True),
        ("run.valid_splits", "val", False),
        ("model.tome_r", {"target": 29}, True),
        ("model.tome_r", {"tarjet": 29}, False),
        ("model.tome_r", {"target": 0}, False),
        ("model.tome_r", [3, -1], False),
        ("model.lr_scale", {"temporal": 1.0}, False),
        ("model.vit_model", None, False),
        ("model.pretrained", None, True),
        ("model.num_frames", 4, False),
        ("model.model_type", "opt", False),
        ("datasets.scenes.sizes", {"train": None}, True),
        ("datasets.scenes.sizes", {"trian": 1}, False),
        ("datasets.scenes.type", "default", True),
        ("datasets.scenes.captions", "x.json", False),
        ("datasets.scenes.vis_processor", {"train": {"name": "evlgen_image_train", "flip": "no"}}, False),
        ("datasets.scenes.vis_processor", {"train": {"name": "evlgen_image_train", "min_scale": 1}}, True),
        ("datasets.scenes.vis_processor", {"train": {"name": "blip2_image_train", "anything": 1}}, True),
        ("datasets.scenes.vis_processor", {"train": {"name": "evlgen_image"}}, False),
        ("datasets.scene", {}, False),
        ("sets", {}, False),
    ],
)
def test_a_wrong_value_is_not(schema, place, value, fits):
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "projects/evlgen/quickstart.yaml"))
    changed = copy.deepcopy(config)
    *above, last = place.split(".")
    section = changed
    for key in above:
        section = section[key]
    section[last] = value
    assert valid(changed, schema, schema) == fits


def test_the_schema_says_what_editors_show(schema, capsys):
    with pytest.raises(SystemExit):
        cli.main(["keys", "--json-schema"])
    assert json.loads(capsys.readouterr().out) == schema
    (case,) = (case for case in schema["properties"]["run"]["allOf"] if "evlgen_vqa" in str(case["if"]))
    assert case["then"]["properties"]["max_len"] == {
        "description": "most new tokens of an answer", "default": 10,
        "anyOf": [{"type": "integer", "minimum": 1, "maximum": 65_536}, {"type": "null"},
                  {"type": "string", "pattern": r"\$\{.+\}"}],
    }  # fmt: skip
    webvid = schema["properties"]["datasets"]["properties"]["webvid2m"]["properties"]
    assert webvid["max_bad_fraction"]["default"] == 0.05


def test_the_text_has_type_limits_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["keys"])
    words = capsys.readouterr().out
    assert not end.value.code
    for line in (
        "AdamW beta2  [a number of at least 0 and at most 0.999999; default 0.999]",
        "[plain, size; default \"plain\"]",
        "default {\"single\": 2, \"pair\": 3, \"count\": 1}]",
    ):
        assert line in words


def test_a_key_without_a_default_has_one_in_the_yaml_of_its_data_set():
    for name, cls in declaring("builder"):
        for path in cls.DATASET_CONFIG_DICT.values():
            given = OmegaConf.load(path).datasets[name]
            assert cls.Settings.read(given) and set(given) == set(keys_of(cls)), path


@pytest.mark.parametrize(
    "stages, fits",
    [([{"name": "align", "trains": ["connector.*"], "datasets": ["image_captions"], "run": {"max_iters": 3}}], True),
     ([{"datasets": {"image_captions": {"max_bad_fraction": 0.1}}}, None], True),
     ([{"run": {"task": "evlgen_vqa", "metric": "gqa"}}], True),
     ([{"trains": "connector.*"}], False),
     ([{"train": ["connector.*"]}], False),
     ([{"datasets": ["image_caption"]}], False),
     ([{"run": {"task": "evlgen_vqa", "metrics": ["CIDEr"]}}], False),
     ({"name": "align"}, False)],
)  # fmt: skip
def test_the_schema_knows_stages(schema, stages, fits):
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "projects" / "evlgen" / "flickr8k_mini.yaml"))
    assert valid(config | {"stages": stages}, schema, schema) == fits
