"""Captioning that needs no download: ground truth from the data set, and the blind baseline beside every score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask

from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.keys import key
from lavis_evlgen.datasets import DataError
from lavis_evlgen.evaluation import caption_metrics, order_accuracy
from lavis_evlgen.evaluation.blind import score_with_blind
from lavis_evlgen.tasks.blind_baseline import BlindPairs, assign, paired_losses, prompts_of
from lavis_evlgen.tasks.settings import DecodingSettings
from lavis_evlgen.tasks.watching import watched


def decoding_of(run) -> dict:
    """Arguments of `EVLGen.generate` that the run section of a config asks for."""
    return _decoding(DecodingSettings.read(run, "run."))


def _decoding(settings: DecodingSettings) -> dict:
    return {
        "num_beams": settings.num_beams,
        "max_length": settings.max_len,
        "min_length": settings.min_len,
        "length_penalty": settings.length_penalty,
        "repetition_penalty": settings.repetition_penalty,
    }


@dataclass(kw_only=True)
class CaptionTaskSettings(DecodingSettings):
    metrics: list[str] = key(
        f"what to compute: any of {', '.join(caption_metrics.METRICS)}", list(caption_metrics.METRICS)
    )
    tokenizer: str = key("auto (ptb where Java is found), ptb, simple", "auto")
    blind_shuffles: int = key("shuffles that the blind scores are averaged over", 5, at_least=1, at_most=10_000)
    agg_metric: str = key("which metric chooses the best checkpoint", "CIDEr")


@registry.register_task("evlgen_captioning")
class EvlgenCaptionTask(BaseTask):
    """Captions a split and scores it: CIDEr, BLEU, ROUGE-L, METEOR, and what a model that does not look would get.

    Blind baseline: the same captions with the pictures shuffled among samples; and the validation loss under the
    right and under another picture's visual prompt (tasks/blind_baseline.py). Where a data set of clips has
    `order_captions`, also the share of captions that tell what happened in the right order.
    """

    Settings = CaptionTaskSettings
    LEAST_PICTURES = 2  # a single picture cannot be shuffled

    def __init__(self, decoding: dict, metrics=caption_metrics.METRICS, tokenizer="auto", shuffles=5, agg="CIDEr"):
        super().__init__()
        caption_metrics.check_metrics(metrics)
        # now, rather than after the first thousand steps
        caption_metrics.check_tokenizer(tokenizer)
        known = caption_metrics.score_names(metrics)
        if agg not in known:
            raise ConfigError(f"run.agg_metric={agg} will not be scored here; run.metrics gives {', '.join(known)}")
        self.decoding, self.metrics, self.tokenizer = decoding, tuple(metrics), tokenizer
        self.shuffles, self.agg = shuffles, agg
        self.references: dict = {}
        self.order_captions: dict = {}
        self.blind: BlindPairs

    @classmethod
    def setup_task(cls, cfg):
        settings = cls.Settings.read(cfg.run_cfg, "run.")
        return cls(
            _decoding(settings), settings.metrics, settings.tokenizer, settings.blind_shuffles, settings.agg_metric
        )

    def check_dataset(self, name: str, dataset):
        """Raises ConfigError for a data set without captions; the runner asks before anything runs."""
        if not hasattr(dataset, "references"):
            raise ConfigError(
                f"run.task=evlgen_captioning needs captions, and {name} has no references to score against: read its "
                "annotations with image_captions, as docs/your_own.md says (COCO); for questions there is "
                "run.task=evlgen_vqa"
            )
        if len(dataset.annotation) >= self.LEAST_PICTURES and not len(BlindPairs(dataset)):
            raise ConfigError(
                f"{name}: all {len(dataset.annotation)} {dataset.media}s of {dataset.split} are of one source "
                f"({dataset.source_of(dataset.annotation[0])!r:.80}), so none can stand in for another in the blind "
                "baseline: give the split more, or take it out of the run's splits"
            )

    def build_model(self, cfg):
        if not hasattr(registry.get_model_class(cfg.model_cfg.arch), "visual_prompt"):
            raise ConfigError(
                f"run.task=evlgen_captioning captions with EVLGen models; model.arch={cfg.model_cfg.arch} is none; "
                "use evlgen_blip2_stage1 for evlgen_blip2, image_text_pretrain for LAVIS's own blip2 and blip2_opt"
            )
        return super().build_model(cfg)

    def before_evaluation(self, model, dataset, **kwargs):
        self.references = dataset.references
        self.order_captions = getattr(dataset, "order_captions", {})
        self.blind = BlindPairs(dataset)

    @torch.no_grad()
    def evaluation(self, model, data_loader, cuda_enabled=False) -> list[dict]:
        """One row a readable picture of this rank: image_id, caption, loss (nats), tokens, and what its picture
        measured for another row's text; `bad` rows too."""
        rows, bad = [], []
        for batch in watched(data_loader):
            bad += batch["bad"]
            if batch["image"] is not None:
                batch["image"] = batch["image"].to(model.device, non_blocking=True)
                rows += self._caption_batch(model, batch)
        return rows + [{"bad": entry} for entry in bad]

    def _caption_batch(self, model, batch: dict) -> list[dict]:
        prompt = model.visual_prompt(batch["image"])
        captions = model.generate(batch, visual_prompt=prompt, **self.decoding)
        right, tokens = model.loss_of(prompt, batch)  # (B,), (B,)
        rows = []
        for i, caption in enumerate(captions):
            row = {"image_id": batch["image_id"][i], "instance_id": batch["instance_id"][i], "caption": caption}
            rows.append(row | {"loss": right[i].item(), "tokens": tokens[i].item(), "loss_shuffled": None})
        places, others = self.blind.of(batch["instance_id"])
        if places:
            shuffled, _ = model.loss_of(prompts_of(prompt, places), self.blind.dataset.texts_of(others))
            for place, other, loss in zip(places, others, shuffled.tolist(), strict=True):
                rows[place]["blind"] = {str(other): {"loss_shuffled": loss}}
        return rows

    def after_evaluation(self, val_result: list[dict], split_name: str, epoch, **kwargs) -> dict:
        """Scores of all ranks' rows (call on one rank): metrics, blind metrics, losses, `agg_metrics`, `rows`; and
        what evaluation.order_accuracy says, where the data set asks for the order of events."""
        rows = [row for row in val_result if "bad" not in row]
        bad = [row["bad"] for row in val_result if "bad" in row]
        assign(rows)
        if all(row["loss_shuffled"] is None for row in rows):
            raise DataError(
                f"{split_name}: {len(rows)} readable pictures ({len(bad)} unreadable), no two of which are of "
                "different sources and paired for the blind baseline: give the split more pictures"
            )
        predictions = {row["image_id"]: row["caption"] for row in rows}
        references = {key: self.references[key] for key in predictions}
        scores, blind = score_with_blind(
            predictions, references, self.shuffles, metrics=self.metrics, tokenizer=self.tokenizer
        )
        for row in rows:
            row["references"] = references[row["image_id"]]
            row["scores"] = scores.per_sample[row["image_id"]]
        return {
            "metrics": scores.scores,
            "blind": blind.mean,
            **paired_losses(rows),
            **self._order(predictions),
            "pictures": len(rows),
            "unreadable": bad,
            "scoring_tokenizer": scores.tokenizer,
            "unscored": scores.unscored,
            "agg_metrics": scores.scores[self.agg],
            "rows": rows,
        }

    def _order(self, predictions: dict) -> dict[str, float]:
        """Nothing where the data set says of no picture which order is right."""
        asked = {key: self.order_captions[key] for key in predictions if key in self.order_captions}
        return order_accuracy(predictions, asked) if asked else {}
