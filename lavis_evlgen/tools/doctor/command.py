"""`evlgen doctor`: a line for each check."""

from __future__ import annotations

from lavis_evlgen.config import ConfigError, EvlgenConfig
from lavis_evlgen.datasets import ImageShards
from lavis_evlgen.runners.preflight import check_splits
from lavis_evlgen.tasks.build import build_data
from lavis_evlgen.tools.doctor.checks import Finding, check_images, check_memory, check_weights
from lavis_evlgen.tools.doctor.shards import check_shards
from lavis_evlgen.weights.bundle import trained_section


def main(args) -> int:
    """Print a line for each check; exit code 1 when one failed."""
    cfg = EvlgenConfig(args, trained_section=trained_section)
    print(f"ok    config {args.cfg_path}: every key is known")
    findings = [*check_weights(cfg.model_cfg), check_memory(cfg.model_cfg)]
    for finding in findings:
        _show(finding)
    task, datasets = build_data(cfg)
    findings.append(_check_splits(cfg.run_cfg, datasets, task))
    _show(findings[-1])
    for name, splits in datasets.items():
        for split, dataset in splits.items():
            if isinstance(dataset, ImageShards):
                findings.append(check_shards(name, dataset, args.limit, print))
            else:
                findings.append(check_images(name, split, dataset, args.limit, print))
            _show(findings[-1])
    failed = sum(not finding.ok for finding in findings)
    print(f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed")
    return int(failed > 0)


def _check_splits(run, datasets: dict, task):
    """What train.py refuses before its first step."""
    try:
        check_splits(run, datasets, task)
    except ConfigError as error:
        return Finding(False, "splits", str(error))
    splits = [str(split) for key in ("train_splits", "valid_splits", "test_splits") for split in run.get(key) or []]
    return Finding(True, "splits", f"{', '.join(splits)} are there and large enough")


def _show(finding):
    print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what}: {finding.seen}")
    for line in finding.details:
        print(f"        {line}")
