"""README.md of a bundle: what it is, how to load it, what was measured. Knows no model, only plain dicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

TASK = "image-text-to-text"
TEXT = """---
{metadata}
---

# {title}

{contents}

```python
{usage}
```
"""
CONTENTS = """\
Trained parts ({numbers:.1f}M numbers) of a vision-language model: a frozen vision encoder, a connector, a frozen
language model. The frozen weights are not here; they come from where `config.json` says, under licences of their \
own."""
USAGE = """import lavis_evlgen
from lavis.models import load_model_and_preprocess
model, vis, txt = load_model_and_preprocess("{arch}", "{name}", is_eval=True)
model.generate({{"image": vis["eval"](picture)[None]}})"""
# of a bundle that transformers loads alone (evlgen export --transformers)
TRANSFORMERS_TASK = "image-to-text"
TRANSFORMERS_CONTENTS = """\
A vision-language model: a frozen vision encoder (`{vision}`), a trained connector, a frozen language model
(`{language}`). {numbers:.1f}M numbers were trained. Frozen parts have licences of their own. The code beside the
weights needs transformers, torch and Pillow, and is for inference."""
TRANSFORMERS_USAGE = """from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
inputs = processor(images=Image.open("picture.jpg"))  # text="Question: ... Short answer:" asks
print(processor.batch_decode(model.generate(**inputs)))"""
_HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
SETTINGS = ("vit_model", "vit_layer", "image_size", "connector", "num_layers", "tome_r", "tokens", "llm_model", "bos",
            "prompt")  # fmt: skip


def model_card(config: Mapping, numbers: int, card: Mapping | None = None, name: str | None = None) -> str:
    """Markdown for `config` (a bundle's config.json) and the run card of its evaluation (without its paths).

    numbers: how many numbers were trained; name: the repository (default: the words "this folder").
    """
    model = config["model"]
    title = name or f"{model['arch']}, trained parts"
    alone = "auto_map" in config
    contents, usage = (TRANSFORMERS_CONTENTS, TRANSFORMERS_USAGE) if alone else (CONTENTS, USAGE)
    said = {"arch": model["arch"], "name": name or "this/folder", "numbers": numbers / 1e6,
            "vision": config.get("vision_model"), "language": config.get("language_model")}  # fmt: skip
    metadata = _metadata(model, title, card, alone).to_yaml()
    lines = [TEXT.format(
        metadata=metadata, title=title, contents=contents.format(**said), usage=usage.format(**said)
    )]  # fmt: skip
    lines += ["## Settings", "", "| key | value |", "|---|---|"]
    lines += [f"| `{key}` | `{model[key]}` |" for key in SETTINGS if model.get(key) not in (None, "")]
    lines += ["", "## Measured", "", *(_measured(card) if card else ["No evaluation came with this bundle."])]
    if "source" in config:
        lines += ["", "## Origin", "", config["source"]]
    return "\n".join([*lines, "", f"Written by lavis_evlgen {config['lavis_evlgen']['version']}.", ""])


def _metadata(model: Mapping, title: str, card: Mapping | None, alone: bool) -> ModelCardData:
    """What the Hub reads of a README.md: frozen models that it has, and the metrics as a model index.

    license: other, for whoever trained the weights to fill in. alone: transformers loads it without this package.
    """
    sources = [str(model.get(key)) for key in ("llm_model", "vit_model")]
    public = [source for source in sources if re.fullmatch(_HUB_ID, source) and not Path(source).exists()]
    results, task = [], TRANSFORMERS_TASK if alone else TASK
    if card:
        data, metrics = card["data"], card["metrics"].get("metrics", card["metrics"])
        results = [
            EvalResult(task, data["name"], data["name"], metric, value, dataset_split=data["split"])
            for metric, value in _numbers(metrics)
        ]
    return ModelCardData(
        library_name="transformers" if alone else "lavis-evlgen", license="other", base_model=public or None,
        pipeline_tag=task,
        tags=["evlgen", "lavis", "image-captioning"], model_name=title, eval_results=results or None,
    )  # fmt: skip


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
