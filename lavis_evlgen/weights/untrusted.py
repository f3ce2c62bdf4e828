"""Checks of configs that came with weights: a bundle's config.json, the config in a checkpoint.

Somebody else may have written them. Allowed are names of public models, and plain values of sizes that fit the weights;
not interpolations, which could read this machine's environment, other packages than those of our extras, or keys that
run code.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
from itertools import count
from pathlib import Path

from lavis.common.registry import registry
from safetensors import safe_open

from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.keys import check_values, keys_of
from lavis_evlgen.config.limits import LARGEST
from lavis_evlgen.weights.sources import EXTRAS, WeightsError

MAX_DEPTH, MAX_VALUES = 32, 200_000
# keys that only the user sets, each time anew; in a file they are ignored
USER_ONLY_KEYS = ("trust_remote_code",)
SOURCES = ("vit_model", "vit_path", "connector_init", "llm_model", "opt_model")
# the same sizes as a BERT's config.json and the arguments of `generate` call them
MOST = LARGEST | {
    "num_hidden_layers": LARGEST["num_layers"], "num_attention_heads": LARGEST["num_heads"],
    "max_position_embeddings": LARGEST["max_positions"], "n_frms": LARGEST["num_frames"],
    "num_captions": LARGEST["num_beams"],
    **dict.fromkeys(("max_length", "min_length", "min_len"), LARGEST["max_len"]),
}  # fmt: skip
LENGTHS = {"num_beams": 1, "num_captions": 1, "max_length": 1, "min_length": 0}  # keys of `decoding`: their minimum
LAYERED = ("tomeformer", "qformer")


def read_json(path, what: str):
    """The content of a JSON file that came with weights; `what` is the key that named it. Raises WeightsError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise WeightsError(f"{what}: {path} is nested too deeply to be a config") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{what}: {path} cannot be read as JSON ({error})") from None
    check_plain(content, f"{what}: {path}")
    return content


def check_plain(content, source: str):
    """Raises WeightsError, with key and source, for what is no plain value: an interpolation (`${...}`, `???`), an
    object, an infinity, a size that is too large, content that is too deep or too long."""
    _check_plain(content, source, "", MAX_DEPTH, count())


def without_interpolations(section: dict, source: str) -> dict:
    """A section without its interpolations (`${...}`), which older checkpoints of runs hold unresolved. They are not
    resolved here: their keys get the defaults."""
    left_out = [key for key, value in section.items() if isinstance(value, str) and "${" in value]
    if left_out:
        logging.warning("%s: %s left out: what a file refers to is not read", source, ", ".join(map(str, left_out)))
    return {key: value for key, value in section.items() if key not in left_out}


def _check_plain(value, source: str, key: str, depth: int, seen):
    if depth < 0 or next(seen) > MAX_VALUES:  # values of a pickle may hold themselves, or one list many times
        raise WeightsError(f"{source}: {key[:200]} is nested too deeply or too long to be a config")
    if isinstance(value, dict):
        for name, item in value.items():
            _check_plain(item, source, f"{key}.{name}" if key else str(name), depth - 1, seen)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_plain(item, source, f"{key}[{number}]", depth - 1, seen)
    elif isinstance(value, str):
        if "${" in value or value == "???":
            raise WeightsError(
                f"{source}: {key}: {value[:100]!r} is an interpolation; a config that comes with weights holds plain "
                "values, and nothing of this machine is read for it. Write the value itself there"
            )
    elif isinstance(value, float) and not math.isfinite(value):
        raise WeightsError(f"{source}: {key}: {value} is no number to build a model with")
    elif value is not None and not isinstance(value, bool | int | float):
        raise WeightsError(f"{source}: {key}: a {type(value).__name__} is no plain value")
    most = MOST.get(key.rpartition(".")[2])
    if most is None or value is None or isinstance(value, dict | list | tuple):
        return
    _check_number(value, f"{source}: {key}", whole=True, most=float("inf"))
    if value > most:
        raise WeightsError(f"{source}: {key}={value:g} is too large: at most {most}")


def checked_model(section, source: str, shapes: dict[str, tuple] | None = None) -> dict:
    """The `model` section of a config that came with weights, without what only a person may set.

    source: the file, for messages. shapes: of the weights that it came with, to hold its sizes against.
    Raises WeightsError.
    """
    if not isinstance(section, dict):
        raise WeightsError(f"{source}: model is no section of keys but {type(section).__name__}")
    check_plain(section, f"{source}: model")
    if section.get("trust_remote_code"):
        logging.warning("%s: model.trust_remote_code is not taken from a file; set it yourself if you mean it", source)
    section = {key: value for key, value in section.items() if key not in USER_ONLY_KEYS}
    for key in ("arch", *SOURCES):
        if not isinstance(section.get(key), str | None):
            raise WeightsError(f"{source}: model.{key}: {section[key]!r:.80} is not text")
    try:
        check_values(_given(section), keys_of(registry.get_model_class(section.get("arch"))), f"{source}: model.")
    except ConfigError as error:
        raise WeightsError(str(error)) from None
    for key in SOURCES:
        _check_package(section.get(key) or "", f"{source}: model.{key}")
    if shapes:
        _check_sizes(section, shapes, source)
    return section


def _check_package(path: str, source: str):
    if not path.startswith("package:"):
        return
    name, _, inside = path.removeprefix("package:").partition("/")
    if ".." in inside.split("/"):
        raise WeightsError(f"{source}: {path!r} leaves the folder of package {name}")
    if name not in EXTRAS:
        raise WeightsError(
            f"{source}: {path!r} names a package, and a config that comes with weights may name these only: "
            f"{', '.join(EXTRAS)}. Put the weights in a folder and give that yourself"
        )


def _given(section: dict) -> dict:
    """A section without what is null, which whoever asks for it reads as its default."""
    return {key: _given(value) if isinstance(value, dict) else value
            for key, value in section.items() if value is not None}  # fmt: skip


def _check_number(value, source: str, least: float = 0, most: float = 1e6, whole: bool = False):
    if value is None:
        return
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float) or (whole and value != int(value)):
        raise WeightsError(f"{source}: {value!r:.80} is not {kind}")
    if value < least:
        raise WeightsError(f"{source}: {value:g} is not {kind} of {least:g} or more")
    if value > most:
        raise WeightsError(f"{source}: {value:g} is not {kind} of at most {most:g}")


def _check_sizes(section: dict, shapes: dict[str, tuple], source: str):
    """Sizes of connector and adapters must be those of the weights: building them takes as much memory as they say."""
    largest = max((side for shape in shapes.values() for side in shape), default=0)
    training = section.get("llm_train")
    rank = (training.get("lora") or {}).get("rank") if isinstance(training, dict) else None
    if (rank or 0) > largest:
        raise WeightsError(f"{source}: model.llm_train.lora.rank={rank}, but its weights are at most {largest} wide")
    if (section.get("connector") or "tomeformer") not in LAYERED:
        return
    random = (section.get("connector_init") or "random") == "random"  # a BERT has sizes of its own
    layers, sizes = section.get("num_layers") or 0, (section.get("connector_sizes") or {}) if random else {}
    if layers > len(shapes):
        raise WeightsError(f"{source}: model.num_layers={layers}, but its weights are {len(shapes)} tensors")
    for key in ("hidden_size", "intermediate_size", "max_positions"):
        if (sizes.get(key) or 0) > largest:
            raise WeightsError(
                f"{source}: model.connector_sizes.{key}={sizes[key]}, but its weights are at most {largest} wide"
            )
    needed = layers * 4 * (sizes.get("hidden_size") or 0) ** 2  # of the attention alone
    held = sum(math.prod(shape) for shape in shapes.values())
    if needed > held:
        raise WeightsError(
            f"{source}: model.num_layers={layers} of width {sizes['hidden_size']} are more than {needed} numbers, but "
            f"its weights are {held}"
        )


def shapes_in(file) -> dict[str, tuple]:
    """Shapes by name in the header of a .safetensors file. Raises WeightsError."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # its own family of errors
        raise WeightsError(f"{file} is not a file of plain tensors: it is broken ({error!s:.200})") from error


def check_decoding(decoding, cls, source: str):
    """Raises WeightsError unless `decoding` has arguments of `cls.generate` only: others reach into transformers."""
    if not isinstance(decoding, dict | None):
        raise WeightsError(f"{source}: decoding: {decoding!r:.80} is no section of keys")
    known = [*inspect.signature(cls.generate).parameters][2:]
    for key, value in (decoding or {}).items():
        if key not in known or key == "visual_prompt":
            raise WeightsError(f"{source}: decoding.{key} is unknown; known: {', '.join(known)}")
        if key in LENGTHS:
            _check_number(value, f"{source}: decoding.{key}", LENGTHS[key], whole=True)
        elif not isinstance(value, bool):
            _check_number(value, f"{source}: decoding.{key}", -1000, 1000)


def check_frozen_weights(identity, source: str):
    """Raises WeightsError unless it is {part: {"dtype": text, "values": {tensor: [numbers]}}}, or nothing."""
    check_plain(identity, f"{source}: frozen_weights")
    parts = list(identity.values()) if isinstance(identity, dict) else [identity] * (identity is not None)
    for part in parts:
        values = part.get("values") if isinstance(part, dict) and isinstance(part.get("dtype"), str) else None
        rows = list(values.values()) if isinstance(values, dict) else [None]
        if not all(isinstance(row, list) and all(isinstance(x, int | float) for x in row) for row in rows):
            raise WeightsError(f"{source}: frozen_weights are not values of tensors by part")
