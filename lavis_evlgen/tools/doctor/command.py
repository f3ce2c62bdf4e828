"""`evlgen doctor`: a line for each check."""

from __future__ import annotations

from lavis_evlgen.config import ConfigError, EvlgenConfig
from lavis_evlgen.config.stages import starts_from
from lavis_evlgen.datasets import ImageShards
from lavis_evlgen.datasets.facts import adapted_sets
from lavis_evlgen.runners.preflight import check_splits, sets_with
from lavis_evlgen.runners.settings import RunSettings
from lavis_evlgen.runners.trackers import check_trackers
from lavis_evlgen.tasks.build import build_data
from lavis_evlgen.tools.doctor.checks import (
    Finding,
    check_cached_features,
    check_images,
    check_memory,
    check_stage,
    check_tokens,
    check_weights,
    epoch_words,
    trained_by,
)
from lavis_evlgen.tools.doctor.shards import check_shards
from lavis_evlgen.weights.bundle import trained_section


def main(args) -> int:
    """Print a line for each check; exit code 1 when one failed."""
    cfg = EvlgenConfig(args, trained_section=trained_section)
    cfgs = cfg.stages or [cfg]
    if args.parameters:
        return _print_parameters(cfgs[0].model_cfg)
    print(f"ok    config {args.cfg_path}: every key is known")
    findings = [_shown(finding) for finding in check_weights(cfgs[0].model_cfg)]
    looked_at = []  # data sets, which stages share
    for one in cfgs:
        findings += _check_training(one, args.limit, looked_at)
    failed = sum(not finding.ok for finding in findings)
    print(f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed")
    return int(failed > 0)


def _check_training(cfg: EvlgenConfig, limit: int | None, looked_at: list) -> list[Finding]:
    """Memory, splits and data of a run, or of one stage."""
    findings = []
    if cfg.stage is not None:
        if cfg.stage.number > 1:
            starts_from(cfg.model_cfg, "the stage before")
        findings.append(_shown(check_stage(cfg.model_cfg, cfg.stage)))
        if not findings[0].ok:
            return findings
    if tokens := check_tokens(cfg.model_cfg):
        findings.append(_shown(tokens))
    findings.append(_shown(check_memory(cfg.model_cfg, cfg.stage)))
    task, datasets = build_data(cfg)
    findings.append(_shown(_check_splits(cfg.run_cfg, datasets, task)))
    if cached := check_cached_features(cfg, datasets):
        findings.append(_shown(cached))
    for name, splits in datasets.items():
        section = (name, cfg.datasets_cfg[name])
        if section in looked_at:
            continue
        looked_at.append(section)
        for split, dataset in splits.items():
            check = check_shards(name, dataset, limit, print) if isinstance(dataset, ImageShards) else (
                check_images(name, split, dataset, limit, print)
            )  # fmt: skip
            findings.append(_shown(check))
    return findings


def _print_parameters(model_cfg) -> int:
    """The names that `trains` of a stage chooses from, with their shapes."""
    trained = trained_by(model_cfg)
    if trained is None:
        raise ConfigError("--parameters: the config of a part of the model is not here, so its names are not known")
    for name, parameter in trained.items():
        print(f"{name}  {tuple(parameter.shape)}")
    return 0


def _check_splits(run, datasets: dict, task):
    """What train.py refuses before its first step."""
    try:
        check_splits(run, datasets, task)
        check_trackers(run)
    except ConfigError as error:
        return Finding(False, "splits", str(error))
    splits = [str(split) for key in ("train_splits", "valid_splits", "test_splits") for split in run.get(key) or []]
    train = {} if run.get("evaluate") else sets_with(adapted_sets(datasets), "train")
    epochs = epoch_words(RunSettings.read(run, "run."), train)
    return Finding(True, "splits", f"{', '.join(splits)} are there and large enough", epochs)


def _shown(finding: Finding) -> Finding:
    print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what}: {finding.seen}")
    for line in finding.details:
        print(f"        {line}")
    return finding
