"""The model of a run folder or of a bundle, ready to look at pictures: where commands on trained models start."""

from __future__ import annotations

from pathlib import Path

from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.models.bundle import is_bundle, read_config
from lavis_evlgen.models.sources import WeightsError
from lavis_evlgen.runners import state
from lavis_evlgen.tasks.captioning import decoding_of


def load(args):
    """(model, evaluation image processor, decoding, device, seed) of the run in `args.run`; a bundle has no seed."""
    device = distributed.start(args.device)
    if args.checkpoint is None and is_bundle(args.run):
        model, vis = _model_of_bundle(args.run, device)
        return model, vis, dict(model.decoding or {}), device, None
    cfg, checkpoint = run_config(Path(args.run), args.checkpoint)
    model, vis = _model_of_run(cfg, checkpoint, device)
    return model, vis, decoding_of(cfg["run"]), device, int(cfg["run"].get("seed", 42))


def run_config(folder: Path, checkpoint: str | None) -> tuple[dict, Path]:
    """(config, checkpoint) of a run folder: a checkpoint holds the config it was trained with. Raises WeightsError."""
    known = [folder / name for name in (state.BEST, state.LAST, state.PREVIOUS) if (folder / name).exists()]
    if checkpoint is None and not known:
        raise WeightsError(
            f"--run: {folder} has neither {state.BEST} nor {state.LAST}; give the folder that train.py named at its end"
        )
    path = Path(checkpoint) if checkpoint is not None else known[0]
    config = state.read(path, "--checkpoint").get("config")
    if config is None:
        raise WeightsError(f"--checkpoint: {path} holds no config; give a checkpoint that train.py wrote")
    return config, path


def _model_of_run(cfg: dict, checkpoint: Path, device):
    """(model, evaluation image processor) as the run had them."""
    # the run's own checkpoint holds all that trains: what it started from need not be there any more
    model_cfg = OmegaConf.create({**cfg["model"], "pretrained": None, "finetuned": None, "load_finetuned": False})
    model = registry.get_model_class(model_cfg.arch).from_config(model_cfg)
    model.load_checkpoint(str(checkpoint))
    dataset = next(iter(cfg["datasets"].values()))
    return model.to(device).eval(), _image_processor(dataset["vis_processor"]["eval"])


def _model_of_bundle(folder: str, device):
    """(model, evaluation image processor) of a bundle."""
    content = read_config(folder)
    stages = (content.get("preprocess") or {}).get("vis_processor")
    if not stages:
        raise ConfigError(f"{folder}/config.json has no preprocess.vis_processor: how to read a picture is not known")
    model = registry.get_model_class(content["model"]["arch"]).from_pretrained(folder)
    return model.to(device), _image_processor(stages["eval"])


def _image_processor(config):
    config = OmegaConf.create(config)
    return registry.get_processor_class(config.name).from_config(config)
