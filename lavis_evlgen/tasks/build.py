"""A task and its data sets, built as a config says."""

from __future__ import annotations

from lavis.common.registry import registry

from lavis_evlgen.datasets.facts import adapted_sets
from lavis_evlgen.tasks.base import adapted_task


def build_data(cfg):
    """(task, data sets by name and split) of a config, LAVIS's own adapted to the base classes here."""
    task = adapted_task(registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg))
    return task, adapted_sets(task.build_datasets(cfg))
