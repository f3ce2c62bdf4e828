"""Checkpoints of the released implementation (`{"model": {...}}`), to a bundle of ours (back: `to_released.py`).

Every key of the file is used, kept aside, left out or refused, and the report says which:

| released name | here |
|---|---|
| `ln_vision.*` | `ln_vision.*` |
| `VL_proj.*` | `connector.input_proj.*` |
| `VLconnector.*` | `connector.tomeformer.*` (BERT's names) |
| `opt_proj.*` or `llm_proj.*` | `llm_proj.*` |
| `VLconnector.pooler.*`, `VLconnector.embeddings.position_ids` | unused by the model: kept in `extra.safetensors` |
| `visual_encoder.blocks.N.temporal_merge.*` (a video model's) | `visual_encoder.temporal.N.*` |
| other `visual_encoder.*`, `opt_model.*`, `llm_model.*` | frozen, public elsewhere: counted and left out |
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import Tensor, nn

from lavis_evlgen.config.as_trained import STARTS
from lavis_evlgen.models.connectors import TomeFormerConnector
from lavis_evlgen.nn import TemporalMixing, TomeFormerConfig
from lavis_evlgen.weights.bundle import (
    EXTRA,
    check_keys,
    compose,
    default_preprocess,
)
from lavis_evlgen.weights.sources import WeightsError, check_floating, read_state_dict
from lavis_evlgen.weights.trainable import RELEASED

PROJECTIONS = ("opt_proj", "llm_proj")
NAMES = {"VL_proj.": "connector.input_proj.", "VLconnector.": "connector.tomeformer."}
THEIR_TEMPORAL = re.compile(r"visual_encoder\.blocks\.(\d+)\.temporal_merge\.(.+)")
FROZEN = ("visual_encoder.", "opt_model.", "llm_model.")
UNUSED = ("VLconnector.pooler.", "VLconnector.embeddings.position_ids", "VLconnector.embeddings.word_embeddings.")
# (projection, LLM width) -> model type; the same for ViT width -> vit_model: what the paper trained
TYPES = {
    ("opt_proj", 2560): "opt2.7b", ("opt_proj", 4096): "opt6.7b",
    ("llm_proj", 4096): "vicuna7b", ("llm_proj", 5120): "vicuna13b",
}  # fmt: skip
VITS = {1408: "eva_clip_g", 1024: "clip_L"}
BLOCKS = {"eva_clip_g": 39, "clip_L": 23}  # that the released code runs; of clip_L, LAVIS runs 21
# decoding of captions: beams and lengths of the released configs, the penalty that `generate` defaults to there
REPETITION = {"opt_proj": 1.0, "llm_proj": 1.5}
LENGTHS = {"evlgen": {"max_length": 30, "min_length": 8}, "evlgen_video": {"max_length": 20, "min_length": 5}}


@dataclass
class Report:
    """Where every key of a released file went, under its released name."""

    used: dict[str, tuple[str, Tensor]] = field(default_factory=dict)  # released name: (ours, tensor)
    kept: dict[str, Tensor] = field(default_factory=dict)
    unknown: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, list[int]] = field(default_factory=dict)  # prefix: [tensors, numbers]
    merging: TomeFormerConfig | None = None

    def lines(self) -> list[str]:
        """A table of all keys, then a line for each kind."""
        rows = [f"used    {name}  {shape_of(t)} -> {ours}" for name, (ours, t) in self.used.items()]
        unused = f"-> {EXTRA} (the model does not use it)"
        rows += [f"kept    {name}  {shape_of(t)} {unused}" for name, t in self.kept.items()]
        rows += [f"kept    {name}  {shape_of(t)} -> {EXTRA} (unknown)" for name, t in self.unknown.items()]
        rows += [f"left    {prefix}*  {n} tensors (frozen: not trained)" for prefix, (n, _) in self.frozen.items()]
        used = [t for _, t in self.used.values()]
        left = [sum(counts) for counts in zip(*self.frozen.values(), strict=True)] or [0, 0]
        return [
            *rows,
            f"used: {len(used)} tensors, {_millions(t.numel() for t in used)}; none is missing",
            f"kept aside: {len(self.kept)} unused, {len(self.unknown)} unknown",
            f"left out, frozen: {left[0]} tensors, {_millions([left[1]])}",
            *self._assumed(),
        ]

    def _assumed(self) -> list[str]:
        """What the config says and the file does not."""
        cfg = self.merging
        merging = f"tome_r {cfg.tome_r} ({cfg.num_tokens} -> {cfg.num_output_tokens} tokens)"
        sizes = f"num_heads {cfg.num_heads}, layer_norm_eps {cfg.layer_norm_eps:g}"
        return [f"not in the file: {merging}, {sizes}, which ViT and language model; --options model.KEY=VALUE"]


def shape_of(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _millions(numbers) -> str:
    return f"{sum(numbers) / 1e6:.1f}M numbers"


def from_released(path: str, cls, changes: dict | None = None, allow_unknown: bool = False):
    """(state by our names, config.json, extra tensors, report) of the released checkpoint at `path`.

    cls: EVLGen (for a video model's file, EVLGenVideo is taken); changes: keys of the model section that the file does
    not tell (tome_r, vit_model, llm_model, ...).
    Raises WeightsError for a file of another kind, for missing, misshapen or unknown tensors, and ValueError for
    a setting that cannot be.
    """
    state = read_state_dict(str(path), "convert")
    _check_kind(state, path)
    more = {}
    if _is_video(state):
        cls, more = registry.get_model_class("evlgen_video"), _one_wide_gates(state)
    projection = _projection(state, path)
    check_keys(cls, changes or {}, "--options")
    kind, section = _section(state, projection, cls, changes or {}, path)
    parts = _empty_parts(section, state, projection)
    own = parts.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    report = sort_keys(state, lambda name: _our_name(name, projection), expected)
    report.merging = parts["connector"].tomeformer.cfg
    _refuse(report, expected, allow_unknown, path)
    used = {ours: tensor for ours, tensor in report.used.values()}
    check_floating(used, own, f"convert: {path}")
    shape = state[f"{projection}.weight"].shape
    # Vicuna is a LLaMA; the file tells no more of the frozen parts
    frozen = {
        "vision encoder": {"width": state[RELEASED].shape[1]},
        "language model": {"model_type": "opt" if projection == "opt_proj" else "llama", "width": shape[0]},
    }
    source = f"Converted from a released checkpoint, `{Path(path).name}`."
    preprocess = default_preprocess(cls, kind, section)
    lengths = LENGTHS["evlgen_video" if _is_video(state) else "evlgen"]
    decoding = {"num_beams": 5, **lengths, "repetition_penalty": REPETITION[projection]}
    content = compose(section, preprocess, decoding, frozen, source=source, released={"projection": projection, **more})
    return used, content, report.kept | report.unknown, report


def _is_video(state: dict) -> bool:
    return any(THEIR_TEMPORAL.fullmatch(name) for name in state)


def _check_kind(state: dict, path):
    strange = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if strange is not None:
        raise WeightsError(f"convert: {path}: {strange} is no tensor: this is no checkpoint")
    if RELEASED not in state:
        ours = next((name for name in state if name.startswith("connector.")), None)
        why = f"it has {ours}, so it is in our layout already" if ours else f"it has no {RELEASED}"
        raise WeightsError(f"convert: {path} is not in the layout of released EVLGen checkpoints: {why}")


def _one_wide_gates(state: dict) -> dict:
    """Gates without dimension become (1,), as ours are; what the way back must know to turn them back."""
    gates = [name for name in state if name.endswith(".temporal_merge.alpha") and state[name].ndim == 0]
    for name in gates:
        state[name] = state[name].reshape(1)
    return {"alpha_shape": []} if gates else {}


def _projection(state: dict, path) -> str:
    found = [name for name in PROJECTIONS if f"{name}.weight" in state]
    if len(found) != 1:
        held = " and ".join(found) or "neither"
        raise WeightsError(f"convert: {path} must have one of {' and '.join(PROJECTIONS)}; it has {held}")
    for name in (RELEASED, f"{found[0]}.weight"):
        if state[name].ndim != 2:
            raise WeightsError(f"convert: {path}: {name} is {tuple(state[name].shape)}, and no matrix")
    return found[0]


def _our_name(name: str, projection: str) -> str:
    if temporal := THEIR_TEMPORAL.fullmatch(name):
        return "visual_encoder.temporal.{}.{}".format(*temporal.groups())
    head = name.partition(".")[0]
    if head == projection:
        return "llm_proj" + name[len(head) :]
    if head in PROJECTIONS:  # the other one's
        return name + " (of another language model)"
    return next((ours + name.removeprefix(theirs) for theirs, ours in NAMES.items() if name.startswith(theirs)), name)


def _section(state: dict, projection: str, cls, changes: dict, path) -> tuple[str, dict]:
    """(model type, model section): the paper's for these widths, what the file tells, and what `changes` says.

    For other widths the type is that of the same LLM family, and its language model is not taken over.
    """
    width, vit_width = state[f"{projection}.weight"].shape[0], state[RELEASED].shape[1]
    known = TYPES.get((projection, width))
    known = known if known in cls.PRETRAINED_MODEL_CONFIG_DICT else None
    kind = known or TYPES[projection, {"opt_proj": 2560, "llm_proj": 4096}[projection]]
    section = OmegaConf.to_container(OmegaConf.load(cls.default_config_path(kind)).model)
    for key in STARTS + (() if known else ("model_type", "llm_model")):
        section.pop(key, None)
    section["vit_model"] = VITS.get(vit_width)
    sizes = {"num_layers": _num_layers(state, path), "connector_init": None, "connector_sizes": _sizes(state)}
    section = OmegaConf.to_container(OmegaConf.merge(section, sizes, changes))
    if section["vit_model"] == "clip_L" and section.get("vit_layer") is None:
        section["vit_layer"] = BLOCKS["clip_L"]
    for key, part, seen in (("vit_model", "ViT", vit_width), ("llm_model", "language model", width)):
        if not section.get(key):
            raise WeightsError(
                f"convert: {path} was trained with a {part} of width {seen}, none of the paper's; say which: "
                f"--options model.{key}=..."
            )
    return kind, section


def _num_layers(state: dict, path) -> int:
    prefix = "VLconnector.encoder.layer."
    found = [re.match(rf"{re.escape(prefix)}(\d{{1,9}})\.", name) for name in state]
    numbers = {int(match[1]) for match in found if match}
    layers = max(numbers, default=0) + 1
    if layers > len(state):  # a number in a name may be anything
        raise WeightsError(f"convert: {path} names layer {layers - 1}, but holds {len(state)} tensors")
    return layers


def _sizes(state: dict) -> dict:
    """connector_sizes, as far as shapes tell: the heads are BERT's 64 wide, the norms have BERT's epsilon."""
    hidden = state[RELEASED].shape[0]
    sizes = {"hidden_size": hidden, "num_heads": max(hidden // 64, 1), "layer_norm_eps": 1e-12}
    for size, name in (
        ("max_positions", "VLconnector.embeddings.position_embeddings.weight"),
        ("intermediate_size", "VLconnector.encoder.layer.0.intermediate.dense.weight"),
    ):
        if name in state:
            sizes[size] = state[name].shape[0]
    return sizes


def _empty_parts(section: dict, state: dict, projection: str) -> nn.Module:
    """The trained parts with these sizes and no weights; also refuses what cannot be (`tome_r`, `num_heads`)."""
    names = ("num_layers", "merge_mean", "partition", "proportional_attention", "dropout")
    body = {name: section[name] for name in names if name in section}
    if section["vit_model"] in VITS.values():
        body["num_tokens"] = (section["image_size"] // 14) ** 2 + 1
    else:  # as many as it has positions for
        body["num_tokens"] = section["connector_sizes"].get("max_positions", 257)
    width, llm_width = state[RELEASED].shape[1], state[f"{projection}.weight"].shape[0]
    with torch.device("meta"):
        config = TomeFormerConfig(tome_r=section["tome_r"], **section["connector_sizes"], **body)
        connector = TomeFormerConnector(width, config)
        parts = {"ln_vision": nn.LayerNorm(width), "connector": connector, **_temporal(section, state, width)}
        return nn.ModuleDict({**parts, "llm_proj": nn.Linear(connector.width, llm_width)})


def _temporal(section: dict, state: dict, width: int) -> dict[str, nn.Module]:
    """The temporal modules of every block of the section's ViT, of an unknown ViT as many as the file has."""
    blocks = [int(found[1]) for found in map(THEIR_TEMPORAL.fullmatch, state) if found]
    if not blocks or not section["temporal"]:
        return {}
    if max(blocks) >= len(state):
        raise WeightsError(f"convert: the file names block {max(blocks)}, but holds {len(state)} tensors")
    count = BLOCKS.get(section["vit_model"], max(blocks) + 1)
    count = section["vit_layer"] if section["vit_model"] == "clip_L" else count
    max_frames = section["num_frames"] if section["temporal_positions"] else None
    mixings = nn.ModuleList(TemporalMixing(width, section["residual"], max_frames) for _ in range(count))
    return {"visual_encoder": nn.ModuleDict({"temporal": mixings})}


def sort_keys(state: dict[str, Tensor], our_name: Callable[[str], str], expected: dict) -> Report:
    """Which of the file's tensors is used under which of our names, kept, left out, unknown."""
    report = Report()
    for name, tensor in state.items():
        ours, frozen = our_name(name), next((p for p in FROZEN if name.startswith(p)), None)
        if frozen and not THEIR_TEMPORAL.fullmatch(name):
            counts = report.frozen.setdefault(frozen, [0, 0])
            counts[0] += 1
            counts[1] += tensor.numel()
        elif ours in expected:
            report.used[name] = ours, tensor
        elif name.startswith(UNUSED):
            report.kept[name] = tensor
        else:
            report.unknown[name] = tensor
    return report


def _refuse(report: Report, expected: dict, allow_unknown: bool, path):
    """Raises WeightsError that names what is missing, misshapen or unknown."""
    found = {ours: (name, tuple(tensor.shape)) for name, (ours, tensor) in report.used.items()}
    problems = []
    missing = [name for name in expected if name not in found]
    if missing:
        problems.append(f"{len(missing)} tensors are missing, first what is here {missing[0]}")
    shapes = [f"{found[n][0]} is {found[n][1]}, not {shape}" for n, shape in expected.items()
              if n in found and found[n][1] != shape]  # fmt: skip
    if shapes:
        problems.append(f"{len(shapes)} tensors have another shape than the rest of the file asks: {shapes[0]}")
    if report.unknown and not allow_unknown:
        some = ", ".join(list(report.unknown)[:5])
        problems.append(
            f"{len(report.unknown)} tensors are unknown: {some}; --allow-unknown keeps them aside in {EXTRA}"
        )
    if problems:
        raise WeightsError(f"convert: {path}: {'; '.join(problems)}")
