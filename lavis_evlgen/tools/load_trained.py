"""The model of a run folder or of a bundle, ready to look at pictures: where commands on trained models start."""

from __future__ import annotations

from pathlib import Path

from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.reporting.stage_files import stage_folders
from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.tasks.captioning import decoding_of
from lavis_evlgen.tasks.settings import SharedRunSettings
from lavis_evlgen.weights.bundle import check_keys, is_bundle, read_config
from lavis_evlgen.weights.sources import WeightsError
from lavis_evlgen.weights.trainable import shapes_of
from lavis_evlgen.weights.untrusted import check_plain, checked_model, without_interpolations


def load(args):
    """(model, evaluation image processor, decoding, device, seed) of the run in `args.run`; a bundle has no seed.

    args.tokens: how many visual tokens the model shall leave, of commands that have it; None: as it was trained.
    """
    device, tokens = distributed.start(args.device), vars(args).get("tokens")
    changes = {} if tokens is None else {"tokens": tokens}
    if args.checkpoint is None and is_bundle(args.run):
        model, vis = _model_of_bundle(args.run, device, changes)
        return model, vis, dict(model.decoding or {}), device, None
    cfg, checkpoint = run_config(Path(args.run), args.checkpoint)
    model, vis = _model_of_run(cfg, checkpoint, device, changes)
    return model, vis, decoding_of(cfg["run"]), device, SharedRunSettings.read(cfg["run"], "run.").seed


def run_config(folder: Path, checkpoint: str | None) -> tuple[dict, Path]:
    """(config, checkpoint) of a run folder: a checkpoint holds the config it was trained with. Raises WeightsError."""
    names = (checkpoints.BEST, checkpoints.LAST, checkpoints.PREVIOUS)
    known = [folder / name for name in names if (folder / name).exists()]
    if checkpoint is None and not known and (stages := stage_folders(folder)):
        raise WeightsError(f"--run: {folder} holds a run with stages; give the folder of one, such as {stages[-1]}")
    if checkpoint is None and not known:
        raise WeightsError(
            f"--run: {folder} has neither {checkpoints.BEST} nor {checkpoints.LAST}; "
            "give the folder that train.py named at its end"
        )
    path = Path(checkpoint) if checkpoint is not None else known[0]
    content = checkpoints.read(path, "--checkpoint")
    config, place = content.get("config"), f"--checkpoint: the config in {path}"
    if config is None:
        raise WeightsError(f"--checkpoint: {path} holds no config; give a checkpoint that train.py wrote")
    sections = config if isinstance(config, dict) else {}
    for key in ("run", "model", "datasets"):
        if not isinstance(sections.get(key), dict):
            raise WeightsError(f"{place} has no section {key!r}; give a checkpoint that train.py wrote")
    # of these, only what a model is built and pictures are read with may not be left out
    config = config | {"run": without_interpolations(config["run"], f"{place}: run"), "datasets": {
        name: without_interpolations(section, f"{place}: datasets.{name}") if isinstance(section, dict) else section
        for name, section in config["datasets"].items()
    }}  # fmt: skip
    check_plain(config, place)
    return config | {"model": checked_model(config["model"], place, shapes_of(content["model"]))}, path


def _model_of_run(cfg: dict, checkpoint: Path, device, changes: dict):
    """(model, evaluation image processor) as the run had them, but for `changes` of the model section."""
    # the run's own checkpoint holds all that trains: what it started from need not be there any more
    starts = {"pretrained": None, "finetuned": None, "load_finetuned": False, "llm_adapter": None}
    model_cfg = OmegaConf.create({**cfg["model"], **starts, **changes})
    cls = known("arch", model_cfg.get("arch"), registry.get_model_class, checkpoint)
    check_keys(cls, changes, f"{checkpoint}, a model of arch {model_cfg.arch}")
    model = cls.from_config(model_cfg)
    model.load_checkpoint(str(checkpoint))
    dataset = next((section for section in cfg["datasets"].values() if isinstance(section, dict)), {})
    return model.to(device).eval(), _image_processor(dataset, checkpoint)


def _model_of_bundle(folder: str, device, changes: dict):
    """(model, evaluation image processor) of a bundle, but for `changes` of the model section."""
    content = read_config(folder)
    vis = _image_processor(content.get("preprocess") or {}, f"{folder}/config.json")
    model = registry.get_model_class(content["model"]["arch"]).from_pretrained(folder, **changes)
    return model.to(device), vis


def _image_processor(section: dict, source):
    """The processor `vis_processor.eval` of a section that came with weights. Raises ConfigError."""
    stages = section.get("vis_processor")
    config = stages.get("eval") if isinstance(stages, dict) else None
    if not isinstance(config, dict):
        raise ConfigError(f"{source} has no vis_processor.eval: how to read a picture is not known")
    cls = known("vis_processor.eval.name", config.get("name"), registry.get_processor_class, source)
    try:
        return cls.from_config(OmegaConf.create(config))
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # of LAVIS's processors too
        raise ConfigError(f"{source}: vis_processor.eval: {error}") from error


def known(key: str, name, look_up, source):
    """The class that `look_up` of LAVIS's registry has for `name`. Raises ConfigError."""
    found = look_up(name) if isinstance(name, str) else None
    if found is None:
        raise ConfigError(f"{source}: {key}: {name!r} is not known here")
    return found
