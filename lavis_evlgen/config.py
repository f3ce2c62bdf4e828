"""Run configs: LAVIS's two levels (defaults of the model and data sets, then projects/*.yaml, then --options),
with every key checked against the classes that read it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from lavis.common.config import Config
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lavis_evlgen.as_trained import AsTrained, as_trained, weights_of

SECTIONS = ("run", "model", "datasets")
# model keys that take one of several kinds of value ({target}, {r, inflection}, a list): what is given replaces the
# default, unless it only changes keys that the default has
REPLACED = ("tome_r",)
# model keys that image and video processors follow
SAID_ONCE = ("image_size", "num_frames")
# LAVIS's builders of captioned clips, and what reads the same files: theirs download, and give samples without `image`
LAVIS_CLIPS = {"msrvtt_caption": "video_captions.type=msrvtt", "msvd_caption": "video_captions.type=msvd",
               "vatex_caption": "video_captions"}


class ConfigError(ValueError):
    """A config that names something unknown; the message names the key, the nearest known one and the file."""


class EvlgenConfig(Config):
    """LAVIS's Config, with `--options` applied first: model.model_type=X selects that type's defaults too."""

    def __init__(self, args, evaluate: bool = False, trained_section: Callable[[str], dict] | None = None):
        """args: cfg_path and options; evaluate: as run.evaluate=true. trained_section: gives the model section that
        weights carry ({} for none), which an evaluation uses in place of the file's (as_trained.py)."""
        self.args, self.config = args, {}
        self.evaluate, self.trained_section = evaluate, trained_section
        self.trained: AsTrained | None = None  # of an evaluation whose weights carry their section
        registry.register("configuration", self)
        self.path = Path(args.cfg_path)
        if not self.path.is_file():
            raise ConfigError(f"--cfg-path: {self.path} does not exist (seen from {Path.cwd()})")
        options = self._options(args.options or [])
        config = self._file()
        self._check_sections(config)
        # strict: an option may not invent a section
        self._refuse_unknown(options, dict.fromkeys(SECTIONS, ""), "")
        try:
            self.config = self._merged(config, options)
        except (TypeError, OmegaConfBaseException) as error:
            kinds = "a list or number stands where the defaults have a mapping, or the other way round"
            raise ConfigError(f"{self.path}: {kinds} ({_one_line(error)})") from error
        self._check_keys()

    def _merged(self, config: DictConfig, options: DictConfig) -> DictConfig:
        """Defaults under the file under the options."""
        layers = [layer.model for layer in (config, options) if isinstance(layer.get("model"), DictConfig)]
        in_file, asked = (OmegaConf.create(layer.get("model") or {}) for layer in (config, options))
        given = [(key, layer.pop(key)) for key in REPLACED for layer in layers if key in layer]
        config = OmegaConf.merge(config, options)
        self._check_sections(config)
        self._check_names(config)
        merged = OmegaConf.merge(
            self.build_runner_config(config), self.build_model_config(config), self.build_dataset_config(config)
        )
        if self.evaluate:
            merged.run.evaluate = True
        if merged.run.get("evaluate") and self.trained_section is not None:
            given = given if self._use_trained(merged, in_file, asked) is None else list(asked.items())
        for key, value in given:
            merged.model[key] = _over(merged.model.get(key), value)
        for key in SAID_ONCE:
            self._said_once(key, merged, config)
        return merged

    def _use_trained(self, merged: DictConfig, in_file: DictConfig, asked: DictConfig) -> AsTrained | None:
        """Put the weights' own model section in place of the config's; None where they carry none.

        asked: what --options says of the model, for the caller to set on top.
        """
        path = weights_of(merged.model)
        section = self.trained_section(str(path)) if path else {}
        if not section:
            return None
        here = registry.get_model_class(merged.model.arch)
        there = self._known(f"model.pretrained={path}: model.arch", section.get("arch"),
                            registry.mapping["model_name_mapping"])  # fmt: skip
        keeps_arch = here is not there and issubclass(here, there)
        config, own = OmegaConf.to_container(merged.model), OmegaConf.to_container(in_file)
        self.trained = as_trained(section, config, own, OmegaConf.to_container(asked), keeps_arch)
        merged.model = OmegaConf.create(self.trained.section)
        return self.trained

    @staticmethod
    def _said_once(key: str, merged: DictConfig, given: DictConfig):
        """Image and video processors whose `key` nobody gave take the model's."""
        value = merged.model.get(key)
        for name, section in merged.datasets.items():
            for stage, processor in (section.get("vis_processor") or {}).items():
                place = f"datasets.{name}.vis_processor.{stage}.{key}"
                if value is not None and key in processor and OmegaConf.select(given, place) is None:
                    processor[key] = value

    def _check_sections(self, config):
        for section in SECTIONS:
            if not config.get(section) or not isinstance(config[section], DictConfig):
                known = ", ".join(SECTIONS)
                raise ConfigError(f"{self.path}: section {section!r} is missing; a run config has {known}")
        self._refuse_unknown(config, dict.fromkeys(SECTIONS, ""), "")

    def _file(self) -> DictConfig:
        try:
            config = OmegaConf.load(self.path)
        except YAMLError as error:
            raise ConfigError(f"{self.path}: not YAML: {_one_line(error)}") from error
        if not isinstance(config, DictConfig):
            raise ConfigError(f"{self.path}: holds a list; a run config has the sections {', '.join(SECTIONS)}")
        return config

    @staticmethod
    def _options(options: list[str]) -> DictConfig:
        for option in options:
            if "=" not in option:
                raise ConfigError(f"--options {option}: write key=value, e.g. run.max_iters=100")
        for key, row in groupby(option.partition("=")[0] for option in options):
            if (count := len(list(row))) > 1:
                words = "quote values with braces or stars, or the shell makes several of them"
                raise ConfigError(f"--options: {key} is given {count} times in a row; {words}")
        try:
            return OmegaConf.from_dotlist(options)
        except (OmegaConfBaseException, YAMLError) as error:
            raise ConfigError(f"--options {' '.join(options)}: {_one_line(error)}") from error

    def _check_names(self, config):
        """The model, its type, data sets, task and runner must be registered."""
        model_cls = self._registered("model.arch", config.model.get("arch"), "model_name_mapping")
        types = getattr(model_cls, "PRETRAINED_MODEL_CONFIG_DICT", {})
        self._known("model.model_type", config.model.get("model_type"), types)
        for name in config.datasets:
            builder = self._registered("datasets", name, "builder_name_mapping")
            if name in LAVIS_CLIPS and str(config.model.get("arch")).startswith("evlgen"):
                words = "LAVIS's own builder downloads when it is built, and its clips do not fit EVLGen"
                raise ConfigError(f"{self.path}: datasets.{name}: {words}; take datasets.{LAVIS_CLIPS[name]}")
            kind = config.datasets[name].get("type", "default")
            self._known(f"datasets.{name}.type", kind, builder.DATASET_CONFIG_DICT)
        self._registered("run.task", config.run.get("task"), "task_name_mapping")
        self._registered("run.runner", config.run.get("runner", "runner_evlgen"), "runner_name_mapping")

    def _registered(self, key: str, name, mapping: str):
        return self._known(key, name, registry.mapping[mapping])

    def _known(self, key: str, name, known: dict):
        if name not in known:
            raise ConfigError(f"{self.path}: {key}: {name!r} is unknown{nearest(str(name), known)}")
        return known[name] if isinstance(known, dict) else None

    def _check_keys(self):
        """Every key must be one that some class says it reads; classes that do not say are checked by defaults."""
        run, model = self.config.run, self.config.model
        runner = registry.get_runner_class(run.get("runner", "runner_evlgen"))
        task = registry.get_task_class(run.task)
        if hasattr(runner, "CONFIG_KEYS") and hasattr(task, "CONFIG_KEYS"):
            self._refuse_unknown(run, {**runner.CONFIG_KEYS, **task.CONFIG_KEYS}, "run.")
        model_cls = registry.get_model_class(model.arch)
        for section, name, cls in ((run, "run", runner), (run, "run", task), (model, "model", model_cls)):
            self._check_values(section, name, cls)
        if hasattr(model_cls, "CONFIG_KEYS"):
            self._refuse_unknown(model, model_cls.CONFIG_KEYS, "model.")
        if hasattr(model_cls, "PARTS"):
            self._refuse_unknown(model.get("lr_scale") or {}, dict.fromkeys(model_cls.PARTS), "model.lr_scale.")
        for name, section in self.config.datasets.items():
            keys = getattr(registry.get_builder_class(name), "CONFIG_KEYS", None)
            if keys:
                self._refuse_unknown(section, {**keys, "type": ""}, f"datasets.{name}.")
            self._check_processors(name, section)

    def _check_values(self, section, name: str, cls):
        """Numbers within what the class allows, lists where it reads lists."""
        for key, (least, most) in getattr(cls, "NUMBERS", {}).items():
            value = section.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{self.path}: {name}.{key}: {value!r} is not a number")
            whole = not isinstance(least, int) or value == int(value)
            if not whole or value < least or (most is not None and value > most):
                kind = "a whole number" if isinstance(least, int) else "a number"
                limits = f"of at least {least:g}" + (f" and at most {most:g}" if most is not None else "")
                raise ConfigError(f"{self.path}: {name}.{key}={value} must be {kind} {limits}")
        for key in getattr(cls, "LISTS", ()):
            if section.get(key) is not None and not OmegaConf.is_list(section[key]):
                raise ConfigError(f"{self.path}: {name}.{key}={section[key]} is not a list; write [{section[key]}]")

    def _check_processors(self, dataset: str, section):
        for kind in ("vis_processor", "text_processor"):
            stages = section.get(kind) or {}
            self._refuse_unknown(stages, {"train": "", "eval": ""}, f"datasets.{dataset}.{kind}.")
            for stage, processor in stages.items():
                place = f"datasets.{dataset}.{kind}.{stage}"
                found = self._registered(f"{place}.name", processor.get("name"), "processor_name_mapping")
                if hasattr(found, "CONFIG_KEYS"):
                    self._refuse_unknown(processor, {**found.CONFIG_KEYS, "name": ""}, f"{place}.")
                for key in SAID_ONCE:
                    given, wanted = processor.get(key), self.config.model.get(key)
                    if given is not None and wanted is not None and given != wanted:
                        words = f"{place}.{key}={given}, but model.{key}={wanted}; leave it out"
                        raise ConfigError(f"{self.path}: {words}")

    def _refuse_unknown(self, section, known: dict, prefix: str):
        for key in section:
            if key not in known:
                raise ConfigError(f"{self.path}: unknown key {prefix}{key}{nearest(str(key), known)}")


def _over(under, value):
    """`value` in place of `under`; a mapping that only changes keys of the one below is merged with it."""
    mappings = isinstance(under, DictConfig) and isinstance(value, DictConfig)
    return OmegaConf.merge(under, value) if mappings and set(value) <= set(under) else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def nearest(name: str, known) -> str:
    """"; did you mean X?", or the list of what is known when nothing is near."""
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(sorted(map(str, known)))}"
