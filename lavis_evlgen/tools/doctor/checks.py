"""Checks before training: does the data exist and open, are the weights here, does it fit in memory?"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from lavis.common.registry import registry

from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.keys import Settings, keys_of
from lavis_evlgen.config.stages import Stage
from lavis_evlgen.datasets import ImageShards
from lavis_evlgen.datasets.packing import TextGroups
from lavis_evlgen.errors import UserError
from lavis_evlgen.media.file_checks import MISSING, Unreadable
from lavis_evlgen.models.connectors import CONNECTORS, READS, ConnectorSettings
from lavis_evlgen.models.language.loading import empty_language_model, folder_and_file
from lavis_evlgen.models.precision import DTYPES, check_precision
from lavis_evlgen.models.trains import train_as_in
from lavis_evlgen.models.vision.encoder import LAVIS_VITS, VisionSettings, vision_of
from lavis_evlgen.runners.feature_cache import cached_splits
from lavis_evlgen.runners.feature_filling import check_room, summary
from lavis_evlgen.runners.settings import RunSettings
from lavis_evlgen.weights.bundle import empty_model
from lavis_evlgen.weights.sources import WeightsError, resolve


@dataclass
class Finding:
    """One checked thing: `ok`, what it is, and what was seen."""

    ok: bool
    what: str
    seen: str
    details: list[str] = field(default_factory=list)


def epoch_words(run: RunSettings, train: dict) -> list[str]:
    """How many steps of one process an epoch of each training set is; shards do not know."""
    if run.batch_size_train is None:  # which train.py will ask for
        return []
    a_step, lines = run.batch_size_train * run.accum_grad_iters, []
    for name, dataset in train.items():
        if isinstance(dataset, ImageShards):
            continue
        samples, what = len(dataset), "rows"
        if run.texts_per_image > 1:
            samples, what = len(TextGroups(dataset, run.texts_per_image, run.seed)), "groups of texts of a picture"
            what += f" ({len(dataset)} texts of {dataset.num_images} {dataset.media}s)"
        lines.append(f"an epoch of {name}: {samples} {what}, {samples / a_step:.4g} steps of one process")
    return lines


def check_images(name: str, split: str, dataset, limit: int | None, say) -> Finding:
    """Open every picture of a split (or the first `limit`): found, missing, unreadable."""
    rows = _one_row_per_image(dataset)
    rows = rows[:limit] if limit else rows
    started, bad, done = time.time(), [], 0

    def open_one(row: int):
        try:
            dataset.pil_image(row)
        except Unreadable as error:
            return error
        return None

    with ThreadPoolExecutor(4) as pool:
        for error in pool.map(open_one, rows):
            done += 1
            if error is not None:
                bad.append(error)
            if done % 2000 == 0:
                left = (time.time() - started) / done * (len(rows) - done)
                say(f"  {name} {split}: {done} of {len(rows)}, {left:.0f} s left")
    missing = [error for error in bad if error.reason == MISSING]
    unreadable = len(bad) - len(missing)
    allowed = dataset.max_bad_fraction * dataset.num_images
    seen = f"{len(rows) - len(bad)} found and readable, {len(missing)} missing, {unreadable} unreadable"
    seen += f" (at most {allowed:g} tolerated)" if bad else ""
    seen += f"; {dataset.num_images - len(rows)} not looked at" if len(rows) < dataset.num_images else ""
    seen += f"; {first_clip(dataset)}" if dataset.media == "video" and len(bad) < len(rows) else ""
    details = [f"{error.path}: {error.reason}" for error in bad[:10]]
    details += [f"... and {len(bad) - 10} more"] if len(bad) > 10 else []
    return Finding(len(bad) <= allowed, f"data {name} {split}", seen, details)


def first_clip(dataset) -> str:
    """Frames, frames a second and size of the first clip that opens."""
    for row in range(len(dataset)):
        try:
            clip = dataset.clip(row)
            _, height, width, _ = clip.frames([0]).shape
        except Unreadable:
            continue
        fps = f" at {clip.fps:.4g} a second" if hasattr(clip, "fps") else ""
        return f"first clip: {len(clip)} frames{fps}, {width} x {height}"
    return "no clip opens"


def _one_row_per_image(dataset) -> list[int]:
    first: dict = {}
    for row, annotation in enumerate(dataset.annotation):
        first.setdefault(annotation["image_id"], row)
    return list(first.values())


def check_weights(model_cfg) -> Iterator[Finding]:
    """Each source of weights that the model config names: here, in the hub's cache, or to be downloaded."""
    llm_key = "llm_model" if model_cfg.get("llm_model") else "opt_model"
    connector = model_cfg.get("connector") or ConnectorSettings.connector
    if connector not in CONNECTORS:
        yield Finding(False, "connector", f"{connector!r} is not one of {', '.join(CONNECTORS)}")
    wanted = ("connector_init",) if "connector_init" in keys_of(READS.get(connector, Settings)) else ()
    for key in ("vit_model", "vit_path", *wanted, llm_key, "pretrained"):
        source = model_cfg.get(key)
        if not source or source == "random":
            continue
        if source in LAVIS_VITS:
            if not model_cfg.get("vit_path"):
                seen = f"{source}: LAVIS downloads it (set model.vit_path to avoid that)"
                yield Finding(True, f"weights {key}", seen)
            continue
        try:
            path = resolve(source, f"model.{key}")
        except (WeightsError, ImportError) as error:
            yield Finding(False, f"weights {key}", str(error))
            continue
        if Path(path).exists():
            yield Finding(True, f"weights {key}", f"{path}")
        elif isinstance(try_to_load_from_cache(path, "config.json"), str):
            yield Finding(True, f"weights {key}", f"{source}: in the hub's cache")
        else:
            yield Finding(True, f"weights {key}", f"{source}: not here; it will be downloaded from the hub")


def count_frozen(model_cfg) -> dict[str, tuple[int, int]]:
    """(parameters, bytes) of the ViT and the language model, built without memory; what cannot be is absent."""
    counts = {}
    try:
        with torch.device("meta"):
            vision = vision_of(model_cfg)
        weights = list(vision.parameters())
        counts["vision encoder"] = sum(p.numel() for p in weights), sum(p.numel() * p.element_size() for p in weights)
    except (OSError, ImportError):
        pass  # check_weights has said why
    source = model_cfg.get("llm_model") or model_cfg.get("opt_model")
    if not source:  # BLIP-2's first stage has none
        return counts
    try:
        path = resolve(str(source), "model.llm_model")
        folder, file = folder_and_file(path)
        with torch.device("meta"):
            model = empty_language_model(folder, VisionSettings.read(model_cfg).trust_remote_code, **file)
    except (OSError, ImportError):
        return counts
    counts["language model"] = _size(model, model_cfg.get("llm_precision"))
    return counts


def count_trainable(model_cfg, stage: Stage | None = None) -> int | None:
    """Parameters that train (in a stage), counted on a model without memory; None where a part's config cannot be had.

    Raises ConfigError where the stage's patterns select none.
    """
    return sum(p.numel() for p in trained.values()) if (trained := trained_by(model_cfg, stage)) is not None else None


def trained_by(model_cfg, stage: Stage | None = None) -> dict[str, torch.Tensor] | None:
    """What `count_trainable` counts, by name."""
    try:
        model = empty_model(registry.get_model_class(model_cfg.get("arch", "evlgen")), model_cfg)
    except (OSError, ImportError):
        return None
    train_as_in(model, stage)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_tokens(model_cfg) -> Finding | None:
    """How many visual tokens an elastic `tome_r` trains and evaluates with; None where it is not elastic."""
    tome_r = model_cfg.get("tome_r")
    if not (isinstance(tome_r, Mapping) and "elastic" in tome_r):
        return None
    try:
        model = empty_model(registry.get_model_class(model_cfg.get("arch", "evlgen")), model_cfg)
    except (OSError, ImportError):
        return Finding(True, "visual tokens", "not looked at: a part's config is not here")
    return Finding(True, "visual tokens", model.token_counts())


def check_stage(model_cfg, stage: Stage) -> Finding:
    """What trains in a stage, by part."""
    try:
        trained = trained_by(model_cfg, stage)
    except ConfigError as error:
        return Finding(False, stage.label, str(error))
    if trained is None:
        return Finding(True, stage.label, "what trains was not looked at: a part's config is not here")
    sizes = Counter()
    for name, parameter in trained.items():
        sizes[name.partition(".")[0]] += parameter.numel()
    parts = ", ".join(f"{part} {size / 1e6:.2f}M" for part, size in sizes.items())
    return Finding(True, stage.label, f"trains {parts} ({len(trained)} tensors)")


def check_cached_features(cfg, datasets: dict) -> Finding | None:
    """What `run.cache_features` will take on disk, and whether it fits; None where it is not set."""
    run, what = RunSettings.read(cfg.run_cfg, "run."), "cached features"
    if not run.cache_features:
        return None
    try:
        model = empty_model(registry.get_model_class(cfg.model_cfg.get("arch", "evlgen")), cfg.model_cfg)
    except (OSError, ImportError):
        return Finding(True, what, "not counted: a part's config is not here")
    try:
        splits = cached_splits(run, model, datasets)
        return Finding(True, what, f"{summary(splits)}: {check_room(splits, [split.missing() for split in splits])}")
    except UserError as error:
        return Finding(False, what, str(error))


def _size(module: torch.nn.Module, precision: str | None) -> tuple[int, int]:
    parameters = sum(p.numel() for p in module.parameters())
    return parameters, parameters * DTYPES[check_precision(precision or "fp16", "precision")].itemsize


def available_memory() -> tuple[str, int]:
    """(where, free bytes): the GPU where there is one, else the machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return "main memory", kilobytes * 1024


def check_memory(model_cfg, stage: Stage | None = None) -> Finding:
    """Weights of what is frozen, and weights, gradients and two Adam moments of what trains; not activations."""
    counts, trainable = count_frozen(model_cfg), count_trainable(model_cfg, stage)
    need = sum(size for _, size in counts.values()) + (trainable or 0) * 16
    where, free = available_memory()
    parts = ", ".join(f"{name} {n / 1e6:.0f}M = {size / 1e9:.1f} GB" for name, (n, size) in counts.items())
    has_language_model = bool(model_cfg.get("llm_model") or model_cfg.get("opt_model"))
    expected = ["vision encoder", *(["language model"] if has_language_model else [])]
    unknown = [name for name in expected if name not in counts]
    unknown += ["what trains"] if trainable is None else []
    trains = "" if trainable is None else f"{trainable / 1e6:.1f}M parameters train"
    parts = "; ".join(filter(None, [parts, f"not counted: {', '.join(unknown)}" if unknown else "", trains]))
    seen = f"{parts}: {need / 1e9:.1f} GB before activations; {where} has {free / 1e9:.1f} GB free"
    return Finding(need < free, "memory", seen)
