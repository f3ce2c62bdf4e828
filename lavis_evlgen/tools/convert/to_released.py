"""A bundle as a checkpoint of the released implementation, the way back of `from_released.py`, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from lavis_evlgen.errors import writing
from lavis_evlgen.nn import TomeFormerConfig
from lavis_evlgen.tools.convert.from_released import NAMES, PROJECTIONS, shape_of
from lavis_evlgen.weights.bundle import EXTRA, WEIGHTS, find_bundle, read_config
from lavis_evlgen.weights.sources import WeightsError, read_state_dict

OUR_TEMPORAL = re.compile(r"visual_encoder\.temporal\.(\d+)\.(.+)")
# settings that the released code does not have: what it does in their place
RELEASED_SETTINGS = {
    "bos": "after", "merge_mean": "plain", "partition": "alternate", "proportional_attention": False,
    "temporal": True, "residual": "gated", "frame_pooling": "mean",
}  # fmt: skip
# the same by language model: None leaves the choice to the family (models/language/tokenizer.py)
RELEASED_TEXT = {
    "opt_proj": {"bos_token": (None, "</s>"), "label_bos": (None, True)},
    "llm_proj": {"bos_token": ("</s>",), "label_bos": (None, False)},
}


def to_released(folder: str, cls) -> tuple[dict[str, Tensor], list[str]]:
    """(state by the released names, report) of a bundle; raises WeightsError where the layout has no place for it."""
    folder = find_bundle(str(folder), cls)
    content = read_config(folder)
    section = content["model"]
    if section.get("connector", "tomeformer") != "tomeformer":
        raise WeightsError(f"convert: {folder} has a {section['connector']}; the released layout has TomeFormer only")
    if section.get("temporal_positions"):
        raise WeightsError(f"convert: {folder} has temporal positions, for which the released layout has no place")
    for key in ("merge_at", "readout", "skip", "condition"):
        if (section.get(key) or getattr(TomeFormerConfig, key)) != getattr(TomeFormerConfig, key):
            raise WeightsError(
                f"convert: {folder} was trained with model.{key}={section[key]}, which the released code does not "
                "have: its model would compute something else"
            )
    if isinstance(section.get("tome_r"), dict) and "average" in section["tome_r"]:
        raise WeightsError(
            f"convert: {folder} was trained with model.tome_r={section['tome_r']}: the released code merges as many "
            "tokens of every picture, and would compute something else"
        )
    if section.get("soft_prompt"):
        raise WeightsError(f"convert: {folder} has a soft prompt, for which the released layout has no place")
    opt = (content.get("frozen") or {}).get("language model", {}).get("model_type") == "opt"
    released = content.get("released") or {}
    projection, gate = released.get("projection", PROJECTIONS[0 if opt else 1]), released.get("alpha_shape", [1])
    if projection not in PROJECTIONS or gate not in ([], [1]):
        raise WeightsError(f"convert: {folder}/config.json: released: {released!r:.80} is not of the released layout")
    theirs = {ours: name for name, ours in NAMES.items()} | {"llm_proj.": projection + "."}
    state, lines = {}, []
    for name, tensor in read_state_dict(str(folder / WEIGHTS), "convert").items():
        prefix = next((p for p in theirs if name.startswith(p)), None)
        their_name = theirs[prefix] + name.removeprefix(prefix) if prefix else name
        if temporal := OUR_TEMPORAL.fullmatch(name):
            their_name = "visual_encoder.blocks.{}.temporal_merge.{}".format(*temporal.groups())
            tensor = tensor.reshape(gate) if name.endswith(".alpha") else tensor
        state[their_name] = tensor
        lines.append(f"used    {name}  {shape_of(tensor)} -> {their_name}")
    extra = read_state_dict(str(folder / EXTRA), "convert") if (folder / EXTRA).exists() else {}
    lines += [f"kept    {name}  {shape_of(tensor)} from {EXTRA}" for name, tensor in extra.items()]
    if not any(name.startswith("VLconnector.pooler.") for name in extra):
        lines.append("missing VLconnector.pooler.*: this bundle never had one; the model does not use it")
    lines.append("missing visual_encoder.*, opt_model.*, llm_model.*: frozen, public elsewhere")
    for key, value in RELEASED_SETTINGS.items():
        if section.get(key, value) != value:
            lines.append(f"differs {key}={section[key]}: the released code has {value} only, and will do otherwise")
    for key, values in RELEASED_TEXT[projection].items():
        if section.get(key) not in values:
            here = f"{key}={section.get(key)}"
            lines.append(f"differs {here}: the released code has {values[-1]} only, and will do otherwise")
    return state | extra, lines


def write_released(folder: str, out: str, cls) -> list[str]:
    """Write a bundle as a released checkpoint (`{"model": {...}}`); returns the report. Raises WeightsError."""
    path = Path(out)
    if path.exists():
        raise WeightsError(f"convert: {path} is there already; give another name")
    state, lines = to_released(folder, cls)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), open(path, "wb") as file:
        torch.save({"model": state}, file)
    return lines
