"""README.md of a bundle: what it is, how to load it, what was measured. Knows no model, only plain dicts."""

from __future__ import annotations

from collections.abc import Mapping

HEADER = """---
library_name: lavis-evlgen
pipeline_tag: image-to-text
tags: [evlgen, lavis, image-captioning]
---

# {title}

Trained parts ({numbers:.1f}M numbers) of a vision-language model: a frozen vision encoder, a connector, a frozen
language model. The frozen weights are not here; they come from where `config.json` says.

```python
import lavis_evlgen
from lavis.models import load_model_and_preprocess
model, vis, txt = load_model_and_preprocess("{arch}", "{name}", is_eval=True)
model.generate({{"image": vis["eval"](picture)[None]}})
```
"""
SETTINGS = ("vit_model", "vit_layer", "image_size", "connector", "num_layers", "tome_r", "llm_model", "bos", "prompt")


def model_card(config: Mapping, numbers: int, card: Mapping | None = None, name: str | None = None) -> str:
    """Markdown for `config` (a bundle's config.json) and the run card of its evaluation (without its paths).

    numbers: how many numbers were trained; name: the repository (default: the words "this folder").
    """
    model = config["model"]
    lines = [HEADER.format(
        title=name or f"{model['arch']}, trained parts", arch=model["arch"], name=name or "this/folder",
        numbers=numbers / 1e6,
    )]  # fmt: skip
    lines += ["## Settings", "", "| key | value |", "|---|---|"]
    lines += [f"| `{key}` | `{model[key]}` |" for key in SETTINGS if model.get(key) not in (None, "")]
    lines += ["", "## Measured", "", *(_measured(card) if card else ["No evaluation came with this bundle."])]
    if "source" in config:
        lines += ["", "## Origin", "", config["source"]]
    return "\n".join([*lines, "", f"Written by lavis_evlgen {config['lavis_evlgen']['version']}.", ""])


def _measured(card: Mapping) -> list[str]:
    data, metrics = card["data"], card["metrics"]
    fingerprint = f", fingerprint `{data['fingerprint']}`" if data.get("fingerprint") else ""
    lines = [f"On `{data['name']}`, split `{data['split']}`: {data['size']} pictures{fingerprint}.", ""]
    lines += ["| metric | value |", "|---|---|"]
    lines += [f"| {name} | {value:.4g} |" for name, value in _numbers(metrics)]
    if card.get("scoring_tokenizer"):
        lines += ["", f"Captions were scored with the tokenizer `{card['scoring_tokenizer']}` (1.0 is 100 in papers)."]
    decoding = ", ".join(f"{key} {value}" for key, value in (card.get("decoding") or {}).items())
    versions = ", ".join(f"{key} {value}" for key, value in (card.get("versions") or {}).items() if value)
    lines += ["", *(f"{what}: {said}." for what, said in (("Decoding", decoding), ("Versions", versions)) if said)]
    return lines


def _numbers(metrics: Mapping, prefix: str = "") -> list[tuple[str, float]]:
    """Every number in nested metrics, by its path."""
    found = []
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{key} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix + key, value))
    return found
