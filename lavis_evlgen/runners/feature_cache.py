"""`run.cache_features`: the frozen ViT runs once a picture, before training; data sets then read its tokens.

The files are those of datasets/cached_features.py, which runners/feature_filling.py fills. What is stored is what the
ViT would have said in the run itself: of the training split under the run's autocast, of evaluated splits without.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.keys import Settings, key
from lavis_evlgen.datasets import ImageShards
from lavis_evlgen.datasets.base import ReadableRows
from lavis_evlgen.datasets.builders.image_folder import ImageFolder
from lavis_evlgen.datasets.cached_features import CachedFeatures, FeatureStore, has_changed
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.evlgen_video import EVLGenVideo
from lavis_evlgen.models.precision import DTYPES, PRECISIONS, autocast_type
from lavis_evlgen.models.vision.encoder import VisionEncoder, VisionSettings
from lavis_evlgen.processors.images import ImageProcessor
from lavis_evlgen.runners.checkpointing.resume import flat
from lavis_evlgen.runners.preflight import sets_with
from lavis_evlgen.runners.step import amp_of
from lavis_evlgen.weights.frozen_identity import frozen_identity

_VALUES = "encoder.weights.values."  # of an identity, flat: numbers, too long for a message


@dataclass(kw_only=True)
class FeatureCacheSettings(Settings):
    """Keys of the run section that this module reads."""

    cache_features: str | None = key(
        "folder for the frozen ViT's tokens of each picture, which are computed once and then read in place of the "
        "pictures; left out: the ViT runs at every step", None,
    )  # fmt: skip
    cache_views: int = key(
        "with cache_features: augmentations of each training picture that are stored; epoch e reads number e modulo "
        "this", 1, at_least=1, at_most=1000,
    )  # fmt: skip
    cache_precision: Literal[PRECISIONS] = key(
        "with cache_features: type of stored tokens, fp32 (as the ViT gives them), fp16, bf16, or auto: that of "
        "model.vit_precision, else of run.amp", "auto",
    )  # fmt: skip


class CachedSplit:
    """One data set's split and its store.

    Attributes: `dataset` (a ReadableRows), `store`, `identity` (what tokens depend on), `rows` {name of a picture: its
    first row}, `amp` (autocast's type, None for none), `dtype` (of stored tokens).
    """

    def __init__(
        self, folder: Path, dataset: ReadableRows, encoder: VisionEncoder, facts: dict, amp: torch.dtype | None,
        views: int, precision: str,
    ):  # fmt: skip
        """facts: `encoder_facts` of the model; precision: a value of cache_precision."""
        self.dataset, self.amp = dataset, amp
        self.store = FeatureStore(folder, f"{dataset.name}-{dataset.split}")
        self.rows: dict[str, dict] = {}
        for row in dataset.annotation:
            self.rows.setdefault(str(row["image"]), row)
        processor, own = dataset.vis_processor, DTYPES[encoder.precision]
        computed = (amp or own) if own == torch.float32 else own
        self.dtype = computed if precision == "auto" else DTYPES[precision]
        identity = {
            "encoder": facts,
            "tokens": [encoder.num_tokens, encoder.width],
            "computed": str(computed).removeprefix("torch."),
            "dtype": str(self.dtype).removeprefix("torch."),
            "processor": {"name": processor.NAME, **asdict(processor.settings)},
            "views": views if processor.draws else 1,
            # pictures of a folder, or of Parquet, are told apart by their content
            "data": None if isinstance(dataset, ImageFolder) else dataset.fingerprint,
        }
        self.identity = json.loads(json.dumps(identity))

    @property
    def views(self) -> int:
        return self.identity["views"]

    @property
    def picture_bytes(self) -> int:
        return self.views * math.prod(self.identity["tokens"]) * self.dtype.itemsize

    def missing(self) -> list[str]:
        """Names of the pictures that are still to be stored. Raises ConfigError for a store of something else."""
        index = self.store.index()
        if index is None:
            return list(self.rows)
        self._check_identity(index["identity"])
        names, records = set(index["names"]), index["records"]
        if unknown := [name for name in self.rows if name not in names]:
            raise self._stale(f"{len(unknown)} of the {len(self.rows)} pictures are not in it, such as {unknown[0]}")
        missing, changed = [], []
        for name, row in self.rows.items():
            if name not in records:
                missing.append(name)
            elif has_changed(records[name], self.dataset.file_of(row)):
                # one that could not be read is looked at again; tokens of others may be in use
                (missing if "reason" in records[name] else changed).append(name)
        if changed:
            where = self.dataset.file_of(self.rows[changed[0]])
            raise self._stale(f"{len(changed)} pictures have changed since, the first is {where}")
        return missing

    def _check_identity(self, there: dict):
        here, there = flat(self.identity), flat(there)
        unknown = "encoder.weights." if not self.identity["encoder"]["weights"] else _VALUES  # a model without memory
        differs = [
            f"{name} ({there.get(name)} there, {here.get(name)} here)"
            for name in sorted(set(here) | set(there))
            if not name.startswith(unknown) and here.get(name) != there.get(name)
        ]
        values = [{name: own[name] for name in own if name.startswith(_VALUES)} for own in (there, here)]
        if not differs and values[1] and values[0] != values[1]:
            differs = ["vision encoder: its weights are others"]
        if differs:
            raise self._stale(f"it was made with another {', '.join(differs)}")

    def _stale(self, why: str) -> ConfigError:
        return ConfigError(
            f"run.cache_features: {self.store.index_file} does not fit {self.dataset.name} {self.dataset.split}: "
            f"{why}; {self.store.remedy}"
        )

    def index(self) -> dict:
        """Of the store. Raises ConfigError where this rank does not see it."""
        index = self.store.index()
        if index is None:
            raise ConfigError(f"run.cache_features: {self.store.index_file} is not here on rank {distributed.rank()}: "
                              "give a folder that all nodes share")  # fmt: skip
        return index

    def attach(self):
        """From here on the data set reads the store."""
        index = self.index()
        if lacking := [name for name in self.rows if name not in index["records"]]:
            raise ConfigError(
                f"run.cache_features: {self.store.index_file} lacks {len(lacking)} pictures on rank "
                f"{distributed.rank()}, such as {lacking[0]}: start again, in a folder that all nodes share"
            )
        self.dataset.features = CachedFeatures(self.store, index)


def encoder_facts(model: EVLGen) -> dict:
    """What tells the model's ViT from others; without values of its weights on the meta device."""
    return {
        "weights": frozen_identity(model).get("visual_encoder", {}),
        "parameters": sum(p.numel() for p in model.visual_encoder.parameters()),
        "layer": VisionSettings.read(model.config).vit_layer,
    }


def cached_splits(run, model, datasets: dict) -> list[CachedSplit]:
    """What a run (RunSettings) reads from its cache; [] without `cache_features`. Raises ConfigError for a model, data
    set or processor whose tokens are no function of the row."""
    if not run.cache_features:
        for name in ("cache_views", "cache_precision"):
            if vars(run)[name] != vars(FeatureCacheSettings())[name]:
                raise ConfigError(f"run.{name}={vars(run)[name]} needs run.cache_features, the folder of a cache")
        return []
    check_model(model)
    found = {} if run.evaluate else {("train", name): d for name, d in sets_with(datasets, "train").items()}
    for split in run.test_splits if run.evaluate else [*run.valid_splits, *run.test_splits]:
        for name, dataset in sets_with(datasets, split).items():
            found.setdefault((split, name), dataset)
    folder, facts, splits = Path(run.cache_features).expanduser(), encoder_facts(model), []
    for (split, name), dataset in found.items():
        views = run.cache_views if split == "train" else 1
        check_dataset(name, dataset, views)
        amp = autocast_type(amp_of(run)) if split == "train" and not run.evaluate else None
        splits.append(CachedSplit(folder, dataset, model.visual_encoder, facts, amp, views, run.cache_precision))
    if run.cache_views > 1 and not run.evaluate and all(split.views == 1 for split in splits):
        raise ConfigError(
            f"run.cache_views={run.cache_views}: no training processor draws anything, so that all views would be the "
            "same; leave it out"
        )
    return splits


def check_model(model):
    """Raises ConfigError for a model whose ViT's output is no function of the picture alone, or is read elsewhere."""
    refused = "run.cache_features stores what a frozen ViT says of single pictures: "
    if isinstance(model, EVLGenVideo):
        raise ConfigError(f"{refused}model.arch=evlgen_video reads clips, whose frames may meet in trained modules of "
                          "the ViT; leave it out")  # fmt: skip
    if not isinstance(model, EVLGen):
        raise ConfigError(f"{refused}{type(model).__name__} is no model.arch=evlgen; leave it out")
    if trained := [name for name, p in model.visual_encoder.named_parameters() if p.requires_grad]:
        raise ConfigError(f"{refused}here the ViT trains (visual_encoder.{trained[0]}); leave it out")


def check_dataset(name: str, dataset, views: int):
    """Raises ConfigError for a data set, or processor, of which `views` stored tensors cannot stand for a picture."""
    refused = f"run.cache_features: {name}"
    if isinstance(dataset, ImageShards):
        raise ConfigError(f"{refused} is of tar shards, which have no fixed rows to find tokens by; unpack them and "
                          "read the files, or leave it out")  # fmt: skip
    if not isinstance(dataset, ReadableRows) or not isinstance(dataset.vis_processor, ImageProcessor):
        raise ConfigError(f"{refused} is not read by a data set and an image processor of this package, so nothing "
                          "says whether a picture is the same in every epoch; leave it out")  # fmt: skip
    if dataset.media != "image":
        raise ConfigError(f"{refused} holds {dataset.media}s; only pictures are stored")
    processor = dataset.vis_processor
    if processor.draws and views == 1:
        raise ConfigError(
            f"{refused} {dataset.split}: {processor.NAME} crops or mirrors at random, and one stored view would fix "
            "what it drew: set run.cache_views=K to store K augmentations of each picture, or "
            f"datasets.{name}.vis_processor.train.min_scale=1 and flip=false for none"
        )


def check_shared(stages: list[tuple[str, list[CachedSplit]]]):
    """Raises ConfigError where two stages (key, splits) would put different tokens into one file."""
    first: dict[Path, tuple[str, CachedSplit]] = {}
    for stage, splits in stages:
        for split in splits:
            before, other = first.setdefault(split.store.index_file, (stage, split))
            if other.identity != split.identity or not set(split.rows) <= set(other.rows):
                raise ConfigError(
                    f"{stage} and {before} have other pictures, processors or precision for {split.store.name}, which "
                    f"one folder of run.cache_features cannot hold: set {stage}.run.cache_features=ANOTHER"
                )
