"""`stages:` of a run config: trainings one after another, each laid over the file's `run` and `datasets`.

The model is the same in all of them: a stage says what trains, on which data, for how long. docs/stages.md.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_evlgen.config.errors import nearest, one_line, shown
from lavis_evlgen.config.keys import Settings, key, keys_of
from lavis_evlgen.config.values import Refused, refuse_unknown, taken

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,59}")
# keys of `run` that belong to the run as a whole
OF_THE_RUN = ("runner", "output_dir", "run_name", "resume_ckpt_path", "seed", "device", "deterministic", "evaluate",
              "compile", "llm_grad_checkpoint", "world_size", "dist_url", "distributed")  # fmt: skip


@dataclass(kw_only=True)
class StageSettings(Settings):
    """The keys of one stage."""

    name: str | None = key("of the stage and its folder: letters, digits, - and _; left out: stage1, stage2, ...", None)
    trains: list[str] | None = key(
        "what trains in this stage, of what the model trains: patterns (*, ?) of parameter names, such as connector.*; "
        "left out: all of it (evlgen doctor CFG --parameters prints the names)", None,
    )  # fmt: skip
    datasets: list[str] | dict[str, Any] | None = key(
        "data sets in place of the file's: names of some of the file's, or a section of its own; left out: the file's",
        None,
    )  # fmt: skip
    run: dict[str, Any] | None = key("keys of the run section that are otherwise in this stage", None)


@dataclass(frozen=True)
class Stage:
    """One stage of `of`. number: from 1. trains: None for all that the model trains."""

    name: str
    number: int
    of: int
    trains: tuple[str, ...] | None
    datasets: list[str] | dict[str, Any] | None
    run: dict[str, Any]

    @property
    def folder(self) -> str:
        """Of this stage, in the run's folder."""
        return f"{self.number}_{self.name}"

    @property
    def label(self) -> str:
        return f"stage {self.number}/{self.of} {self.name}"

    @property
    def key(self) -> str:
        """Where it stands in a config and in --options."""
        return f"stages.{self.name}"

    def facts(self) -> dict[str, Any]:
        """For the configs in checkpoints and run cards of this stage."""
        trains = None if self.trains is None else list(self.trains)
        return {"name": self.name, "number": self.number, "of": self.of, "trains": trains}


def take_stages(config: DictConfig, options: DictConfig) -> list[Stage]:
    """Take `stages` out of a file's content and of --options, where `stages.NAME.run.KEY` reaches one. Raises Refused.

    Returns [] for a config without stages.
    """
    in_file, asked = (OmegaConf.to_container(layer).get("stages") for layer in (config, options))
    for layer in (config, options):
        if "stages" in layer:
            del layer["stages"]
    if isinstance(asked, list):  # stages=[...]: in place of the file's
        in_file, asked = asked, None
    sections = [] if in_file is None else _named(in_file)
    if asked is not None:
        sections = _laid_over(sections, asked)
    return [_checked(section, number, len(sections)) for number, section in enumerate(sections, start=1)]


def _named(sections) -> list[dict]:
    """The sections of a file, each with its name."""
    if not isinstance(sections, list) or not sections or not all(isinstance(one, dict | None) for one in sections):
        raise Refused(f"stages={shown(sections)} must be a list of mappings {{{', '.join(keys_of(StageSettings))}}}; "
                      "leave it out for a single training")  # fmt: skip
    found = []
    for number, section in enumerate(sections, start=1):
        section = dict(section or {})
        name = section.get("name")
        name = f"stage{number}" if name is None else name
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise Refused(f"stages[{number - 1}].name={shown(repr(name))} must be a letter, then letters, digits, - or "
                          "_, 60 at most")  # fmt: skip
        if name in [one["name"] for one in found]:
            raise Refused(f"stages[{number - 1}].name={name}: another stage has this name")
        found.append({**section, "name": name})
    return found


def _laid_over(sections: list[dict], asked) -> list[dict]:
    """The sections with what --options says of them by name."""
    names = [section["name"] for section in sections]
    if not names:
        raise Refused("stages: the file has none that --options could change")
    if not isinstance(asked, dict):
        raise Refused(f"stages={shown(asked)}: give stages.NAME.run.KEY=VALUE; the stages are {', '.join(names)}")
    for name in map(str, asked):
        if name not in names:
            raise Refused(f"stages.{name}: no stage has this name{nearest(name, names)}")
    found = []
    for section in sections:
        try:
            merged = OmegaConf.merge(section, asked.get(section["name"]) or {})
        except (OmegaConfBaseException, TypeError) as error:
            raise Refused(f"stages.{section['name']}: {one_line(error)}") from error
        found.append(OmegaConf.to_container(merged))
    return found


def _checked(section: dict, number: int, of: int) -> Stage:
    prefix = f"stages.{section['name']}."
    if "model" in section:
        raise Refused(f"{prefix}model: the model is the same in all stages; set it in model")
    keys = keys_of(StageSettings)
    refuse_unknown(section, keys, prefix)
    values = {name: taken(f"{prefix}{name}", value, keys[name].kind, keys[name].limits)
              for name, value in section.items()}  # fmt: skip
    run, trains = values.get("run") or {}, values.get("trains")
    for name in run:
        if name in OF_THE_RUN:
            raise Refused(f"{prefix}run.{name}: the same in all stages; set run.{name}")
    if trains == []:
        raise Refused(f"{prefix}trains=[]: nothing would train; leave it out for all that the model trains")
    return Stage(section["name"], number, of, None if trains is None else tuple(trains), values.get("datasets"), run)


def tasks_of(stages: list[Stage], config: DictConfig, options: DictConfig) -> set[str]:
    """The tasks that the file and its stages name."""
    run = {**_section(OmegaConf.to_container(config), "run"), **_section(OmegaConf.to_container(options), "run")}
    return {str(section.get("task")) for section in (run, *(stage.run for stage in stages))}


def check_options(stages: list[Stage], config: DictConfig, options: DictConfig):
    """Raises Refused for a data set of --options that no stage takes from the file; warns of the file's own."""
    if any(stage.datasets is None for stage in stages):
        return
    taken_over = {name for stage in stages if isinstance(stage.datasets, list) for name in stage.datasets}
    for name in _section(OmegaConf.to_container(options), "datasets"):
        if name not in taken_over:
            own = [one.key for one in stages if isinstance(one.datasets, dict) and name in one.datasets]
            way = f": set {own[0]}.datasets.{name}" if own else nearest(name, taken_over) if taken_over else ""
            raise Refused(f"--options datasets.{name}: no stage takes it from the file{way}")
    unused = sorted(set(_section(OmegaConf.to_container(config), "datasets")) - taken_over)
    if unused and os.environ.get("RANK", "0") == "0":
        logging.warning("no stage takes datasets.%s from the file", ", datasets.".join(unused))


def overlaid(stage: Stage, config: DictConfig, options: DictConfig) -> tuple[DictConfig, DictConfig]:
    """File and --options as those of a run of this stage alone: options on the file, the stage on both. Raises Refused.

    A key of the stage's `run` replaces the file's as a whole, mappings too.
    """
    config, options = (OmegaConf.to_container(layer) for layer in (config, options))
    run, given = (_section(layer, "run") for layer in (config, options))
    for name in set(given) & set(stage.run):
        _warn_of_own(f"run.{name}", stage, f"={given[name]}")
    if run or stage.run:
        merged = OmegaConf.to_container(OmegaConf.merge(run, given))
        config["run"] = {**merged, **stage.run}
        options.pop("run", None)
    if isinstance(stage.datasets, dict):
        for name in set(_section(options, "datasets")) & set(stage.datasets):
            _warn_of_own(f"datasets.{name}", stage)
        config["datasets"] = stage.datasets
        options.pop("datasets", None)
    elif stage.datasets is not None:
        merged = OmegaConf.to_container(OmegaConf.merge(_section(config, "datasets"), _section(options, "datasets")))
        for name in stage.datasets:
            if name not in merged:
                raise Refused(f"{stage.key}.datasets: {name} is none of the file's data sets{nearest(name, merged)}")
        config["datasets"] = {name: merged[name] for name in stage.datasets}
        options.pop("datasets", None)
    return OmegaConf.create(config), OmegaConf.create(options)


def _warn_of_own(place: str, stage: Stage, value: str = ""):
    if os.environ.get("RANK", "0") == "0":
        logging.warning("%s%s by --options does not reach stage %s, which has its own: set %s.%s",
                        place, value, stage.name, stage.key, place)  # fmt: skip


def _section(layer: dict, name: str) -> dict:
    """A section of a layer; {} where it is no mapping, which the checks of the whole config tell of."""
    section = layer.get(name)
    return section if isinstance(section, dict) else {}


def starts_from(model: DictConfig, checkpoint: str):
    """Let a model section start from a checkpoint: what it said of a start before held for the first stage."""
    model.pretrained, model.load_pretrained, model.load_finetuned = checkpoint, True, False
    if "llm_adapter" in model:
        model.llm_adapter = None
