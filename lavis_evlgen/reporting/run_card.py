"""Run cards: one JSON file that says what was measured, on what, with what."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lavis_evlgen.errors import writing
from lavis_evlgen.reporting.provenance import provenance

_DATA_KEYS = ("name", "split", "size", "fingerprint")


def run_card(
    config: Any,
    prompt: str,
    decoding: Mapping,
    data: Mapping,
    scoring_tokenizer: str | None,
    metrics: Mapping,
    model: Mapping | None = None,
    **extra: Any,
) -> dict:
    """Everything needed to judge or repeat a measurement, as plain JSON types.

    `config` is a dict or an OmegaConf container, `data` has name, split, size (samples) and fingerprint (None
    if unknown), `scoring_tokenizer` is "ptb", "simple" or None, `extra` becomes further top-level keys.
    Versions, commit, hardware and date (UTC) are added; the host's name is not. Raises `ValueError` for
    missing `data` keys and for an `extra` key the card already has.
    """
    missing = [key for key in _DATA_KEYS if key not in data]
    if missing:
        raise ValueError(f"the run card's data lacks {', '.join(missing)}; give None for what is unknown")
    card = {
        "metrics": metrics,
        "model": model,
        "prompt": prompt,
        "decoding": decoding,
        "data": data,
        "scoring_tokenizer": scoring_tokenizer,
        "config": config,
        **provenance(),
    }
    taken = sorted(set(extra) & set(card))
    if taken:
        raise ValueError(f"the run card already has the keys {', '.join(taken)}")
    return plain({**card, **extra})


def write_run_card(path: str | os.PathLike, card: Mapping) -> Path:
    """Write `card` as sorted JSON under `path`, whole or not at all (temporary file, then rename)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(card), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path), open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def plain(value: Any) -> Any:
    """`value` as JSON types: containers, dataclasses, OmegaConf, numpy and torch scalars and arrays.

    Keys become strings; NaN and infinities become the strings "nan", "inf" and "-inf", which JSON can hold;
    whatever else is unknown becomes its `str`.
    """
    if value is None or isinstance(value, (bool, str)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if type(value).__module__.startswith("omegaconf"):
        return plain(_omegaconf(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, (np.ndarray, np.generic)) or hasattr(value, "detach"):
        return plain(value.tolist())
    return str(value)


def _omegaconf(value: Any) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException:  # an interpolation to nowhere: keep it as it was written
        return OmegaConf.to_container(value, resolve=False)
