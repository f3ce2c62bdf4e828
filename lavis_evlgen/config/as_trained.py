"""What is evaluated is what was trained: the model section of an evaluation comes from the weights.

A checkpoint of a run and a bundle carry the model section that they were trained with. Evaluating them under other
settings (where BOS stands, how many tokens are merged, ...) scores another model than the one that was trained, so the
config file's own settings are used only where the weights carry none, as released files do. What is given with
--options wins, is logged, and stands in the run card.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavis_evlgen.config.keys import Settings, key

# where training started from: an evaluation does not repeat it, and a bundle's own weights take its place
STARTS = ("pretrained", "finetuned", "load_pretrained", "load_finetuned", "llm_adapter")
# no part of what was learnt: room for a text, number formats of frozen weights, where a file lies, whether code of
# others may run, how many tokens are left. The config file's own value is used where it gives one
OF_THE_EVALUATION = ("max_txt_len", "vit_precision", "llm_precision", "vit_path", "trust_remote_code", "tokens")
# frozen parts that may lie elsewhere on this machine; what they hold is checked when the weights are loaded
SOURCES = ("vit_model", "llm_model", "opt_model", "connector_init")
ALIASES = {"opt_model", "llm_model"}  # the same setting: both come from the same place


@dataclass(kw_only=True)
class StartSettings(Settings):
    """Which model, and the weights that it starts from."""

    arch: str | None = key("the model class in LAVIS's registry", None)
    model_type: str | None = key("which default config", None)
    load_pretrained: bool = key("LAVIS's switch; false: leave `pretrained` aside", True)
    load_finetuned: bool = key("LAVIS's switch; load `finetuned` in place of `pretrained`", False)
    pretrained: str | None = key(
        "trainable weights to start from: a checkpoint, a .safetensors file or a bundle's folder; empty: none", None
    )


@dataclass
class AsTrained:
    """A model section made from that of the weights, and in words what of the config file is not used.

    changed: {key: {"trained", "here"}} of what --options has otherwise.
    """

    section: dict
    notes: list[str] = field(default_factory=list)
    changed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def log(self):
        for note in self.notes:
            logging.warning("%s", note)
        for name, values in self.changed.items():
            place = "" if name == "tokens" else " by --options"  # which the evaluation's file may say too
            logging.warning("model.%s=%s%s; the weights were trained with %s",
                            name, values["here"], place, values["trained"])  # fmt: skip


def weights_of(model: Mapping) -> str | None:
    """The path of the trained weights that a model section loads, None where it loads none."""
    if model.get("load_finetuned"):
        return model.get("finetuned")
    return model.get("pretrained") if model.get("load_pretrained", StartSettings.load_pretrained) else None


def as_trained(trained: dict, merged: dict, given: dict, options: dict, keeps_arch: bool) -> AsTrained:
    """The model section of an evaluation, on top of which the caller sets what --options says.

    trained: the section that the weights carry; merged: the config's, defaults included; given: what its file says
    itself; options: what --options says. keeps_arch: weights of an image model are evaluated as a video model, whose
    own keys are not the weights'.
    """
    trained = {name: value for name, value in trained.items() if name not in STARTS}
    if keeps_arch:
        trained = {name: value for name, value in trained.items() if name not in ("arch", "model_type", "lr_scale")}
        others = {name: value for name, value in merged.items() if name not in ALIASES or not ALIASES & set(trained)}
    else:  # a key that they were trained without keeps the meaning that it had then: the class's own default
        # model_type only names defaults, and a model of none of its types has none
        others = {name: merged[name] for name in (*STARTS, "model_type") if name in merged}
    found = AsTrained({**others, **trained})
    for name in OF_THE_EVALUATION:
        if given.get(name) is not None:
            found.section[name] = given[name]
    for name in SOURCES:
        if _is_elsewhere(trained.get(name)) and merged.get(name) not in (None, trained[name]):
            found.section[name] = merged[name]
            found.notes.append(f"model.{name}: {trained[name]}, which it was trained with, is not here: {merged[name]}")
    for name, value in options.items():
        if name in trained and value != trained[name] and name != "tokens":
            found.changed[name] = {"trained": trained[name], "here": value}
    _tell_tokens(found, trained, options.get("tokens", given.get("tokens")))
    for name, value in given.items():
        if name in trained and name not in options and found.section[name] != value:
            found.notes.append(
                f"model.{name}={value} of the config is not used: the weights were trained with {found.section[name]} "
                f"(--options model.{name}={value} evaluates them otherwise)"
            )
    return found


def _tell_tokens(found: AsTrained, trained: dict, tokens: int | None):
    """What is said of an evaluation that asks for so many tokens: of elastic weights, which were trained with several
    numbers of them, a note; of others that it is not as trained."""
    tome_r, own = trained.get("tome_r"), trained.get("tokens")
    if tokens is None or tokens == own or (own is None and tome_r == {"target": tokens}):
        return
    if isinstance(tome_r, Mapping) and "elastic" in tome_r:
        listed = ", ".join(map(str, tome_r["elastic"]))
        found.notes.append(f"model.tokens={tokens}; the weights were trained with {listed} tokens")
        return
    found.changed["tokens"] = {"trained": f"tome_r={tome_r}" if own is None else own, "here": tokens}


def _is_elsewhere(source) -> bool:
    """Whether it is a path, not a public name, and nothing is there."""
    return isinstance(source, str) and source.startswith(("/", ".", "~")) and not Path(source).expanduser().exists()
