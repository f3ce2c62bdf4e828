"""Stores tokens of pictures that a run's cache lacks, and lets data sets read them (runners/feature_cache.py)."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets.cached_features import FeatureWriter, PicturesToStore
from lavis_evlgen.datasets.loading import eval_loader
from lavis_evlgen.models.compile import eager
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.reporting.provenance import versions
from lavis_evlgen.runners.checkpointing.lock import RunLock
from lavis_evlgen.runners.checkpointing.stopping import signals
from lavis_evlgen.runners.feature_cache import CachedSplit

LOCK = "features.lock"  # not that of a run, whose folder this may be


def read_from_cache(splits: list[CachedSplit], run, model: EVLGen, device: torch.device) -> str | None:
    """Store what is missing, and let the data sets read their tokens; one line on it, None without a cache.

    Every rank calls it: each stores its share of the pictures. What a kill leaves is continued, by any number of ranks.
    """
    if not splits:
        return None
    folder = splits[0].store.folder
    if distributed.on_main(lambda: any(split.missing() for split in splits)):
        lock = RunLock(folder, "run.cache_features", LOCK)
        with signals.handled(at_end=lock.release):
            try:
                todo = distributed.on_main(lambda: _begin(folder, lock, splits))
                distributed.on_all(lambda: [_fill(*one, run, model, device) for one in zip(splits, todo, strict=True)])
                distributed.on_main(lambda: [split.store.merge() for split in splits])
            finally:
                lock.release()
    for split in splits:
        split.attach()
    if run.evaluate and distributed.is_main():
        logging.info("cached features: %s", summary(splits))
    return summary(splits)


def summary(splits: list[CachedSplit]) -> str:
    """Folder, pictures and size of what is stored."""
    views = max(split.views for split in splits)
    size = sum(len(split.rows) * split.picture_bytes for split in splits)
    each = f" (of training, {views} views each)" if views > 1 else ""
    return f"{splits[0].store.folder}, {sum(len(s.rows) for s in splits)} pictures{each}, {size / 1e9:.2f} GB"


def check_room(splits: list[CachedSplit], missing: list[list[str]]) -> str:
    """How much the `missing` pictures of the splits take, and what is free. Raises ConfigError for too little."""
    folder = splits[0].store.folder.absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    need = sum(len(names) * split.picture_bytes for split, names in zip(splits, missing, strict=True))
    words = f"{need / 1e9:.2f} GB to be stored, {free / 1e9:.2f} GB free"
    if need > free:
        raise ConfigError(
            f"run.cache_features={splits[0].store.folder}: {words}: free space, or give a folder on another disk"
        )
    return words


def _begin(folder: Path, lock: RunLock, splits: list[CachedSplit]) -> list[list[str]]:
    """What is to be stored, by split, in files that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    lock.take()
    for split in splits:
        if split.store.index() is None:
            split.store.create(split.identity, list(split.rows), versions())
        else:
            split.store.merge()  # records that were cut short get no further lines
    missing = [split.missing() for split in splits]
    check_room(splits, missing)
    return missing


@torch.no_grad()
@eager()
def _fill(split: CachedSplit, names: list[str], run, model: EVLGen, device: torch.device):
    """Store this rank's share of the pictures `names`."""
    dataset, rank, world = split.dataset, distributed.rank(), distributed.world_size()
    own = names[rank::world]
    if not own:
        return
    batch = max(1, (run.batch_size_eval or run.batch_size_train or 1) // split.views)
    pictures = PicturesToStore(dataset, [split.rows[name] for name in own], split.views)
    loader = eval_loader(pictures, batch, 0, 1, run.num_workers, device.type == "cuda")
    writer = FeatureWriter(split.store, split.index(), rank)
    logging.info("cached features of %s %s: %d of %d pictures to do", dataset.name, dataset.split, len(names),
                 len(split.rows))  # fmt: skip
    title, often = f"cached features, {dataset.name} {dataset.split}", 1.0 if sys.stderr.isatty() else 30.0
    with tqdm(total=len(own), desc=title, unit="picture", disable=not distributed.is_main(), mininterval=often) as bar:
        for facts, images in loader:
            tokens = iter(() if images is None else _encode(split, model, images.to(device)).split(split.views))
            for name, record, readable in facts:
                of_one = next(tokens) if readable else None  # (views, L, D_v)
                if readable and not torch.isfinite(of_one).all():
                    raise ConfigError(
                        f"run.cache_features: tokens of {name} ({dataset.name} {dataset.split}) are not finite as "
                        f"{split.identity['dtype']}: set model.vit_precision=bf16, or run.amp=bf16"
                    )
                writer.add(name, record, of_one)
            bar.update(len(facts))
    writer.close()


def _encode(split: CachedSplit, model: EVLGen, images: Tensor) -> Tensor:
    """images (B, 3, H, W) -> tokens (B, L, D_v) in the store's type."""
    with torch.autocast(images.device.type, split.amp or torch.bfloat16, enabled=split.amp is not None):
        return model.visual_encoder(images).to(split.dtype)
