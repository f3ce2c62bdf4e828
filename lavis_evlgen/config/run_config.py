"""Run configs: LAVIS's two levels (defaults of the model and data sets, then projects/*.yaml, then --options),
with every key and value checked against the classes that read it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

from lavis.common.config import Config
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_evlgen.config import relations
from lavis_evlgen.config.as_trained import AsTrained, as_trained, weights_of
from lavis_evlgen.config.errors import ConfigError, nearest, one_line, shown
from lavis_evlgen.config.keys import Settings, check_values, declares, drop_nulls, key, keys_of
from lavis_evlgen.config.limits import LARGEST
from lavis_evlgen.config.parsing import read_file, read_options, resolve_references
from lavis_evlgen.config.recipes import config_path
from lavis_evlgen.config.stages import Stage, check_options, overlaid, take_stages, tasks_of
from lavis_evlgen.config.values import Refused, refuse_unknown, takes_null

SECTIONS = ("run", "model", "datasets")
PROCESSORS = ("vis_processor", "text_processor")
# model keys that take one of several kinds of value ({target}, {r, inflection}, a list): what is given replaces the
# default, unless it only changes keys that the default has
REPLACED = ("tome_r",)
# model keys that image and video processors follow
SAID_ONCE = ("image_size", "num_frames")
# LAVIS's builders of captioned clips, and what reads the same files: theirs download, and give samples without `image`
LAVIS_CLIPS = {"msrvtt_caption": "video_captions.type=msrvtt", "msvd_caption": "video_captions.type=msvd",
               "vatex_caption": "video_captions"}


@dataclass(kw_only=True)
class LavisProcessorSettings(Settings):
    """What keys of LAVIS's own processors take, which say nothing themselves; None: LAVIS's default."""

    image_size: int = key("side of the square picture", None, at_least=1, at_most=LARGEST["image_size"])
    min_scale: float = key("smallest share of a crop", None, at_least=1e-6, at_most=1.0)
    max_scale: float = key("largest share of a crop", None, at_least=1e-6, at_most=1.0)
    max_words: int = key("cut the caption after this many words", None, at_least=1, at_most=10**6)
    num_frames: int = key("frames of a clip", None, at_least=1, at_most=LARGEST["num_frames"])
    n_frms: int = key("frames of a clip", None, at_least=1, at_most=LARGEST["num_frames"])
    prompt: str = key("text in front of every caption", None)


class EvlgenConfig(Config):
    """LAVIS's Config, with `--options` applied first: model.model_type=X selects that type's defaults too.

    `stages`: of a training with stages, the config of each, and the sections are then those of the last; [] otherwise.
    `stage`: which one this is the config of.
    """

    def __init__(
        self, args, evaluate: bool = False, trained_section: Callable[[str], dict] | None = None,
        stage: str | None = None,
    ):  # fmt: skip
        """args: cfg_path (a path, or the name of a recipe) and options; evaluate: as run.evaluate=true.
        trained_section: gives the model section that weights carry ({} for none), which an evaluation uses in place of
        the file's (config/as_trained.py). stage: of an evaluation, the stage whose task and data are used (None: the
        last)."""
        self.args, self.config = args, {}
        self.evaluate, self.trained_section = evaluate, trained_section
        self.trained: AsTrained | None = None  # of an evaluation whose weights carry their section
        registry.register("configuration", self)
        self.path = config_path(args.cfg_path)
        self.stages: list[EvlgenConfig] = []
        self.stage: Stage | None = None
        config, options = read_file(self.path), read_options(args.options or [])
        with self._named():
            stages = {one.name: one for one in take_stages(config, options)}
            if stage is not None and stage not in stages:
                known = nearest(stage, stages) if stages else "; the file has no stages"
                raise Refused(f"--stage {stage}: no stage has this name{known}")
            if stages:
                check_options(list(stages.values()), config, options)
        if not stages:
            self._read(config, options)
            return
        wanted = list(stages.values()) if not evaluate else [stages[stage or list(stages)[-1]]]
        tasks = tasks_of(list(stages.values()), config, options)
        cfgs = [self._of_stage(one, config, options, tasks) for one in wanted]
        self.config, self.trained, self.stage = cfgs[-1].config, cfgs[-1].trained, cfgs[-1].stage
        if not self.config.run.get("evaluate"):
            self.stages, self.stage = cfgs, None

    def _read(self, config: DictConfig, options: DictConfig):
        """Take the sections of one training or evaluation from a file's content and --options."""
        with self._named():
            self._check_sections(config)
            # strict: an option may not invent a section
            refuse_unknown(options, dict.fromkeys(SECTIONS, ""), "")
            self.config = self._merged(config, options)
        self.check()

    def _of_stage(self, stage: Stage, config: DictConfig, options: DictConfig, tasks: set[str]) -> EvlgenConfig:
        """The config of a stage, as of a run of its own; the configs in its checkpoints say which stage it was.

        tasks: of the file and of all stages.
        """
        cfg = copy(self)
        cfg.path, cfg.stage = f"{self.path}, stage {stage.name}", stage
        with self._named():
            config, options = overlaid(stage, config, options)
        leave_other_tasks_keys(config.get("run"), stage, tasks)
        cfg._read(config, options)
        cfg.config.stage = stage.facts()
        return cfg

    @contextmanager
    def _named(self):
        """Errors of a key, with the file."""
        try:
            yield
        except Refused as error:
            raise ConfigError(f"{self.path}: {error}") from None
        except OmegaConfBaseException as error:  # names the key too
            raise ConfigError(f"{self.path}: {one_line(error)}") from error

    def check(self):
        """Put values in place of `${...}`; every key and value must be one that its class takes. Raises ConfigError."""
        with self._named():
            resolve_references(self.config, self.path)
            self._check_shapes(self.config)
            self._check_names(self.config)
            self._check_keys()

    def _merged(self, config: DictConfig, options: DictConfig) -> DictConfig:
        """Defaults under the file under the options."""
        sections = [layer.get("model") for layer in (config, options)]
        layers = [section if isinstance(section, DictConfig) else OmegaConf.create() for section in sections]
        in_file, asked = (OmegaConf.create(layer) for layer in layers)
        given = [item for layer in layers for item in _as_written(layer) if item[0] in REPLACED]
        for layer in layers:
            for name in set(REPLACED) & set(layer):
                del layer[name]
        config = self._laid_over(config, options)
        self._check_sections(config)
        self._check_names(config)
        try:
            model, datasets = self.build_model_config(config), self.build_dataset_config(config)
        except TypeError as error:
            raise self._other_kind(error) from error
        merged = self._laid_over(self.build_runner_config(config), model, datasets)
        if self.evaluate:
            merged.run.evaluate = True
        if merged.run.get("evaluate") and self.trained_section is not None:
            given = given if self._use_trained(merged, in_file, asked) is None else _as_written(asked)
        for name, value in given:
            merged.model[name] = _over(merged.model.get(name), value)
        self._check_shapes(merged)
        self._drop_other_defaults(merged, config)
        for name in SAID_ONCE:
            self._said_once(name, merged, config)
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

    def _laid_over(self, *layers) -> DictConfig:
        try:
            return OmegaConf.merge(*layers)
        except TypeError as error:
            raise self._other_kind(error) from error

    def _other_kind(self, error: Exception) -> ConfigError:
        kinds = "a list or number stands where the defaults have a mapping, or the other way round"
        return ConfigError(f"{self.path}: {kinds} ({one_line(error)})")

    @staticmethod
    def _drop_other_defaults(merged: DictConfig, given: DictConfig):
        """Where another processor is named than a data set's default, take out default keys that it does not have."""
        for dataset, section in merged.datasets.items():
            for kind in PROCESSORS:
                for stage, processor in (section.get(kind) or {}).items():
                    asked = OmegaConf.select(given, f"datasets.{dataset}.{kind}.{stage}") or {}
                    name = processor.get("name") if "name" in asked else None
                    found = registry.get_processor_class(name) if isinstance(name, str) else None
                    if found is not None:
                        keys = keys_of(found if declares(found) else LavisProcessorSettings)
                        for name in set(processor) - set(asked) - set(keys):
                            del processor[name]

    @staticmethod
    def _said_once(key: str, merged: DictConfig, given: DictConfig):
        """Image and video processors whose `key` nobody gave take the model's."""
        value = merged.model.get(key)
        for name, section in merged.datasets.items():
            for stage, processor in (section.get("vis_processor") or {}).items():
                place = f"datasets.{name}.vis_processor.{stage}.{key}"
                if value is not None and key in (processor or ()) and OmegaConf.select(given, place) is None:
                    processor[key] = value

    def _check_sections(self, config):
        for section in SECTIONS:
            if not config.get(section) or not isinstance(config[section], DictConfig):
                known = ", ".join(SECTIONS)
                raise ConfigError(f"{self.path}: section {section!r} is missing; a run config has {known}")
        refuse_unknown(config, dict.fromkeys((*SECTIONS, "stages"), ""), "")
        self._check_shapes(config)

    def _check_shapes(self, config):
        """Data sets are mappings, and so are their processors where they are given."""
        for name, section in config.datasets.items():
            self._check_mapping(f"datasets.{name}", section, "write {} for its defaults")
            for kind in PROCESSORS:
                place, stages = f"datasets.{name}.{kind}", section.get(kind)
                if stages is None:
                    continue
                self._check_mapping(place, stages, "write {train: {name: ...}, eval: {name: ...}}")
                for stage, processor in stages.items():
                    if processor is not None:
                        self._check_mapping(f"{place}.{stage}", processor, "write {name: ...}")

    def _check_mapping(self, place: str, value, fix: str):
        if not isinstance(value, DictConfig):
            raise ConfigError(f"{self.path}: {place}={shown(value)} is not a mapping; {fix}")

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
        if not isinstance(name, str) or name not in known:
            raise ConfigError(f"{self.path}: {key}: {shown(repr(name))} is unknown{nearest(str(name), known)}")
        return known[name] if isinstance(known, dict) else None

    def _check_keys(self):
        """Every key must be one that some class says it reads; classes that do not say are checked by defaults."""
        run, model = self.config.run, self.config.model
        drop_nulls(run)
        runner = registry.get_runner_class(run.get("runner", "runner_evlgen"))
        task = registry.get_task_class(run.task)
        keys = keys_of(runner, task)
        if declares(runner) and declares(task):
            refuse_unknown(run, keys, "run.")
        model_cls = registry.get_model_class(model.arch)
        if declares(model_cls):
            refuse_unknown(model, keys_of(model_cls), "model.")
        check_values(run, keys, "run.")
        if declares(runner):
            relations.check_run(run)
            relations.check_packing(run, model.arch, getattr(model_cls, "packs_texts", False))
        check_values(model, keys_of(model_cls), "model.")
        relations.check_sandwich(run, model)
        for name, section in self.config.datasets.items():
            builder = registry.get_builder_class(name)
            if declares(builder):
                refuse_unknown(section, {**keys_of(builder), "type": ""}, f"datasets.{name}.")
            check_values(section, keys_of(builder), f"datasets.{name}.")
            self._check_processors(name, section)

    def _check_processors(self, dataset: str, section):
        for kind in PROCESSORS:
            stages = section.get(kind) or {}
            refuse_unknown(stages, {"train": "", "eval": ""}, f"datasets.{dataset}.{kind}.")
            for stage, processor in stages.items():
                if processor is not None:
                    self._check_processor(f"datasets.{dataset}.{kind}.{stage}", processor)

    def _check_processor(self, place: str, processor):
        found = self._registered(f"{place}.name", processor.get("name"), "processor_name_mapping")
        keys = keys_of(found if declares(found) else LavisProcessorSettings)
        if declares(found):
            refuse_unknown(processor, {**keys, "name": ""}, f"{place}.")
        drop_nulls(processor, [name for name in processor if name not in keys or takes_null(keys[name].kind)])
        check_values(processor, keys, f"{place}.")
        for name in SAID_ONCE:
            given, wanted = processor.get(name), self.config.model.get(name)
            if given is not None and wanted is not None and given != wanted:
                words = f"{place}.{name}={given}, but model.{name}={wanted}; leave it out"
                raise ConfigError(f"{self.path}: {words}")


def leave_other_tasks_keys(run, stage: Stage, tasks: set[str]):
    """Drop the file's keys of `run` that this stage's task does not read and another one of `tasks` does."""
    named = [run.get("task"), run.get("runner", "runner_evlgen")] if isinstance(run, DictConfig) else [None]
    if not all(isinstance(name, str) for name in named):
        return  # the checks of the whole config tell of it
    task, runner = registry.get_task_class(named[0]), registry.get_runner_class(named[1])
    if declares(task) and declares(runner):
        own, others = keys_of(runner, task), keys_of(*map(registry.get_task_class, tasks))
        for name in [name for name in run if name in others and name not in (*own, *stage.run)]:
            del run[name]


def _over(under, value):
    """`value` in place of `under`; a mapping that only changes keys of the one below is merged with it."""
    mappings = isinstance(under, DictConfig) and isinstance(value, DictConfig)
    return OmegaConf.merge(under, value) if mappings and set(value) <= set(under) else value


def _as_written(section: DictConfig) -> list[tuple]:
    """Keys and values of a section, references as they are written: what they stand for may lie in another layer."""
    content = OmegaConf.to_container(section).items()
    return [(key, OmegaConf.create(value) if isinstance(value, dict | list) else value) for key, value in content]
