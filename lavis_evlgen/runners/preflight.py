"""Checks, before a run starts, of what it will need later, so that a mistake costs no training."""

from __future__ import annotations

import logging
from pathlib import Path

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets import ImageShards
from lavis_evlgen.datasets.base import ReadableRows
from lavis_evlgen.runners.checkpointing.stopping import save_every


def sets_with(datasets: dict, split: str) -> dict:
    """{data set name: its split} of the sets that have `split`; an error that lists what there is when none has."""
    found = {name: splits[split] for name, splits in datasets.items() if split in splits}
    if not found:
        known = sorted({s for splits in datasets.values() for s in splits})
        raise ConfigError(f"no data set has the split {split!r}; there are {', '.join(known)}")
    return found


def check_splits(run, datasets: dict, task):
    """Splits exist, those to be scored in one data set that is large enough, and ratios name the training sets."""
    scored = list(run.get("test_splits") or [])
    if not run.get("evaluate"):
        scored = [*(run.get("valid_splits") or []), *scored]
        train = sets_with(datasets, "train")
        _check_ratios(run.get("train_dataset_ratios"), train)
        check_texts(run.get("texts_per_image") or 1, train)
        for name, dataset in train.items():
            if isinstance(dataset, ImageShards):
                check_shards(name, dataset, distributed.world_size() * max(1, int(run.get("num_workers", 0))))
            else:
                check_files(name, dataset)
    if scored:
        task.check_scored(scored)
    for split in scored:
        found = sets_with(datasets, split)
        if len(found) > 1:
            raise ConfigError(f"evaluation of {split}: {', '.join(found)} all have it; keep one")
        name, dataset = next(iter(found.items()))
        task.check_dataset(name, dataset)
        check_files(name, dataset)
        if len(dataset) < task.min_pictures:
            raise ConfigError(
                f"{name}: {split} has {len(dataset)} pictures; scoring needs {task.min_pictures}: give it more, or "
                "take it out of the run's splits"
            )


def check_files(name: str, dataset):
    """Raises ConfigError where more files are missing than `max_bad_fraction` allows; none is opened."""
    missing = dataset.missing_files()
    if len(missing) > dataset.max_bad_fraction * dataset.num_images:
        raise ConfigError(
            f"{name} {dataset.split}: {len(missing)} of {dataset.num_images} {dataset.media}s are not there, more than "
            f"max_bad_fraction={dataset.max_bad_fraction:g} allows; the first is {missing[0]}. Check "
            f"datasets.{name}.{dataset.media}s, or raise datasets.{name}.max_bad_fraction"
        )


def check_shards(name: str, dataset: ImageShards, streams: int):
    """Raises ConfigError where there are fewer shards than data workers, or too many of a sample are missing."""
    if streams > len(dataset.shards):
        raise ConfigError(
            f"datasets.{name}: {len(dataset.shards)} shards for {streams} data workers (ranks x run.num_workers); each "
            "reads shards of its own: lower run.num_workers, or write smaller shards (evlgen shards)"
        )
    looked_at = list(dataset.looked_at())
    missing = [path for path in looked_at if not Path(path).is_file()]
    if len(missing) > dataset.max_bad_fraction * len(looked_at):
        raise ConfigError(
            f"{name}: {len(missing)} of {len(looked_at)} shards looked at are not there, more than max_bad_fraction="
            f"{dataset.max_bad_fraction:g} allows; the first is {missing[0]}. Check datasets.{name}.shards and .folder"
        )


def check_texts(texts_per_image: int, data: dict):
    """Raises ConfigError where several texts of a picture are asked of training sets that give one a sample."""
    for name, dataset in data.items():
        if texts_per_image > 1 and not isinstance(dataset, ReadableRows | ImageShards):
            raise ConfigError(
                f"run.texts_per_image={texts_per_image}: datasets.{name}, none of this package's data sets, gives one "
                "text of a picture at a time; leave run.texts_per_image out, or read its files with a data set of "
                "docs/your_own.md"
            )


def _check_ratios(ratios, data: dict):
    unsized = [name for name, dataset in data.items() if isinstance(dataset, ImageShards)]
    if ratios is None and unsized and len(data) > 1:
        raise ConfigError(
            f"run.train_dataset_ratios is needed: shards do not say how many samples they hold ({', '.join(unsized)}); "
            f"give every training set its share, e.g. {{{', '.join(f'{name}: 1' for name in data)}}}"
        )
    if ratios is not None and set(ratios) != set(data):
        raise ConfigError(f"run.train_dataset_ratios names {sorted(ratios)}, the training sets are {sorted(data)}")


def check_training(run, meanings: dict[str, str]):
    """Raises ConfigError where a key that training needs is not set. meanings: {key: what it means}."""
    for key in ("max_iters", "iters_per_inner_epoch", "init_lr", "batch_size_train"):
        if run.get(key) is None:
            raise ConfigError(f"run.{key} is not set: {meanings[key]}")
    save_every(run.get("save_every"))
    for key in ("mix_per_rank", "deterministic"):
        if run.get(key) not in (None, True, False):
            raise ConfigError(f"run.{key}: {run[key]!r} is not true or false")


def check_evaluation(run, model):
    """Raises ConfigError where an evaluation has no splits, or its weights are given by run.resume_ckpt_path (auto: an
    evaluation goes on by run.keep_every, and has no checkpoint of its own to look for)."""
    if run.get("resume_ckpt_path") not in (None, "", "auto"):
        raise ConfigError(
            "run.resume_ckpt_path continues training; to evaluate a checkpoint set model.pretrained="
            f"{run.resume_ckpt_path} in its place"
        )
    if run.get("keep_every") and not run.get("run_name"):
        raise ConfigError("run.keep_every needs run.run_name, the folder that an evaluation goes on in")
    if not run.get("test_splits"):
        raise ConfigError("run.test_splits is empty: there is nothing to evaluate; set e.g. run.test_splits=[test]")
    if not (model.get("pretrained") or model.get("finetuned")):
        logging.warning("model.pretrained is not set: this evaluates an untrained connector")
