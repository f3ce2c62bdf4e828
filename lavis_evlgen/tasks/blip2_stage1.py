"""BLIP-2's first stage writes no captions worth scoring: it is evaluated by its own losses."""

from __future__ import annotations

import logging

import torch
from lavis.common.registry import registry

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets import DataError
from lavis_evlgen.models.blip2_stage1 import Blip2Stage1
from lavis_evlgen.tasks.base import Task, with_progress


@registry.register_task("evlgen_blip2_stage1")
class Blip2Stage1Task(Task):
    """Validation losses: contrastive (itc), matching (itm), captioning (lm), and their sum; the lowest sum is best.

    The first two are told from the other pictures of a batch, so they depend on run.batch_size_eval.
    """

    def check_arch(self, cfg):
        if not issubclass(registry.get_model_class(cfg.model_cfg.arch), Blip2Stage1):
            raise ConfigError(
                f"run.task=evlgen_blip2_stage1 is for model.arch=evlgen_blip2, not {cfg.model_cfg.arch}: set "
                "run.task=evlgen_captioning"
            )

    def check_dataset(self, name: str, dataset):
        """Raises ConfigError where no rank would get two pictures: one alone has nothing to be told from."""
        if -(-len(dataset) // distributed.world_size()) < 2:
            raise ConfigError(
                f"{name}: {dataset.split} has {len(dataset)} pictures for {distributed.world_size()} ranks; scoring "
                "needs 2 on one rank: give it more pictures, or take it out of the run's splits"
            )

    @torch.no_grad()
    def evaluation(self, model, data_loader, cuda_enabled=False) -> list[dict]:
        """One row a batch of this rank: its losses and number of pictures; `bad` rows too."""
        rows = []
        for batch in with_progress(data_loader):
            rows += [{"bad": entry} for entry in batch["bad"]]
            count = 0 if batch["image"] is None else len(batch["image"])
            if count < 2:  # nothing to be told from
                rows.append({"left_out": count})
                continue
            batch["image"] = batch["image"].to(model.device, non_blocking=True)
            rows.append({"pictures": count, **model.validation_losses(batch)})
        return rows

    def after_evaluation(self, val_result: list[dict], split_name: str, epoch, **kwargs) -> dict:
        """Means over the pictures of all ranks' batches (call on one rank); `agg_metrics` is minus the loss."""
        rows = [row for row in val_result if "pictures" in row]
        bad = [row["bad"] for row in val_result if "bad" in row]
        left_out = sum(row.get("left_out", 0) for row in val_result)
        pictures = sum(row["pictures"] for row in rows)
        if not pictures:
            raise DataError(
                f"{split_name}: no batch of 2 readable pictures ({len(bad)} unreadable) on "
                f"{distributed.world_size()} ranks: raise run.batch_size_eval"
            )
        names = [name for name in rows[0] if name.startswith("loss")]
        losses = {name: sum(row[name] * row["pictures"] for row in rows) / pictures for name in names}
        words = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        alone = f", {left_out} alone in their batch left out" if left_out else ""
        logging.info("%s at step %s: %s  [%d pictures%s]", split_name, epoch, words, pictures, alone)
        return {
            "metrics": losses,
            "pictures": pictures,
            "left_out": left_out,
            "unreadable": bad,
            "agg_metrics": -losses["loss"],
        }
