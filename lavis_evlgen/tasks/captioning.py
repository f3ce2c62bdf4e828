"""Captioning that needs no download: ground truth from the data set, and the blind baseline beside every score."""

from __future__ import annotations

from dataclasses import dataclass

from lavis.common.registry import registry

from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.keys import key
from lavis_evlgen.datasets import DataError
from lavis_evlgen.evaluation import caption_metrics, order_accuracy
from lavis_evlgen.evaluation.blind import score_with_blind
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.facts import check_packing
from lavis_evlgen.models.lengths import summary_of, tokens_of
from lavis_evlgen.tasks.base import Shown, Task
from lavis_evlgen.tasks.blind_baseline import BlindPairs, assign, paired_losses
from lavis_evlgen.tasks.settings import DecodingSettings


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
    eval_texts_per_image: int = key(
        "references of a picture that the evaluation's loss is over, where it has so many", 1, at_least=1,
        at_most=10_000,
    )  # fmt: skip


@registry.register_task("evlgen_captioning")
class EvlgenCaptionTask(Task):
    """Captions a split and scores it: CIDEr, BLEU, ROUGE-L, METEOR, and what a model that does not look would get.

    Blind baseline: the same captions with the pictures shuffled among samples; and the validation loss under the
    right and under another picture's visual prompt (tasks/blind_baseline.py). Where a data set of clips has
    `order_captions`, also the share of captions that tell what happened in the right order.
    """

    Settings = CaptionTaskSettings
    min_pictures = 2  # a single picture cannot be shuffled
    score_name = "CIDEr"

    def __init__(self, decoding: dict, metrics=caption_metrics.METRICS, tokenizer="auto", shuffles=5, agg="CIDEr",
                 texts_per_image: int = 1):
        """texts_per_image: references of a picture that the loss is over."""
        super().__init__()
        caption_metrics.check_metrics(metrics)
        # now, rather than after the first thousand steps
        caption_metrics.check_tokenizer(tokenizer)
        known = caption_metrics.score_names(metrics)
        if agg not in known:
            raise ConfigError(f"run.agg_metric={agg} will not be scored here; run.metrics gives {', '.join(known)}")
        self.decoding, self.metrics, self.tokenizer = decoding, tuple(metrics), tokenizer
        self.shuffles, self.agg, self.texts_per_image = shuffles, agg, texts_per_image
        self.references: dict = {}
        self.order_captions: dict = {}
        self.blind: BlindPairs

    @classmethod
    def setup_task(cls, cfg):
        settings = cls.Settings.read(cfg.run_cfg, "run.")
        return cls(
            _decoding(settings), settings.metrics, settings.tokenizer, settings.blind_shuffles, settings.agg_metric,
            settings.eval_texts_per_image,
        )  # fmt: skip

    def check_dataset(self, name: str, dataset):
        """Raises ConfigError for a data set without captions; the runner asks before anything runs."""
        if dataset.references is None:
            raise ConfigError(
                f"run.task=evlgen_captioning needs captions, and {name} has no references to score against: read its "
                "annotations with image_captions, as docs/your_own.md says (COCO); for questions there is "
                "run.task=evlgen_vqa"
            )
        if len(dataset.annotation) >= self.min_pictures and not len(BlindPairs(dataset)):
            raise ConfigError(
                f"{name}: all {len(dataset.annotation)} {dataset.media}s of {dataset.split} are of one source "
                f"({dataset.source_of(dataset.annotation[0])!r:.80}), so none can stand in for another in the blind "
                "baseline: give the split more, or take it out of the run's splits"
            )

    def check_arch(self, cfg):
        if not issubclass(registry.get_model_class(cfg.model_cfg.arch), EVLGen):
            raise ConfigError(
                f"run.task=evlgen_captioning captions with EVLGen models; model.arch={cfg.model_cfg.arch} is none; "
                "use evlgen_blip2_stage1 for evlgen_blip2, image_text_pretrain for LAVIS's own blip2 and blip2_opt"
            )

    def check_model(self, cfg, model):
        if self.texts_per_image > 1:
            check_packing(model, f"run.eval_texts_per_image={self.texts_per_image}")

    def before_evaluation(self, model, dataset, **kwargs):
        self.references = dataset.references
        self.order_captions = dataset.order_captions
        self.blind = BlindPairs(dataset, self.texts_per_image)

    def valid_step(self, model, samples: dict) -> list[dict]:
        """One row a picture: image_id, instance_id, caption, loss (nats), tokens, and under "blind" what the picture
        measured for another row's text."""
        prompt = model.visual_prompt(samples["image"])
        captions = model.generate(samples, visual_prompt=prompt, **self.decoding)
        right, tokens = self.blind.losses(model, prompt, [int(own) for own in samples["instance_id"]])
        rows, lengths = [], tokens_of(prompt)
        for i, caption in enumerate(captions):
            row = {"image_id": samples["image_id"][i], "instance_id": samples["instance_id"][i], "caption": caption}
            rows.append(row | {"loss": right[i], "tokens": tokens[i], "loss_shuffled": None} | lengths[i])
        self.blind.measure_losses(model, prompt, rows)
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
            **({"loss_texts_per_image": self.texts_per_image} if self.texts_per_image > 1 else {}),
            **self._order(predictions),
            **summary_of(rows),
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

    def curve(self, result: dict) -> dict[str, float]:
        """Losses, and CIDEr with its blind baseline; the order of events where it was asked."""
        curve = {f"val_{key}": result[key] for key in ("loss_right", "loss_shuffled") if key in result}
        if "CIDEr" in result["metrics"]:
            curve |= {"cider": result["metrics"]["CIDEr"], "blind_cider": result["blind"].get("CIDEr")}
        return curve | {key: result[key] for key in ("order_accuracy",) if key in result}

    def summary(self, result: dict) -> str | None:
        """One line: CIDEr against blind CIDEr, loss with right against shuffled pictures."""
        if "loss_right" not in result:
            return None
        cider, blind = result["metrics"].get("CIDEr", float("nan")), result["blind"].get("CIDEr", float("nan"))
        others = "  ".join(f"{k} {v:.3f}" for k, v in result["metrics"].items() if k != "CIDEr")
        bad = f"  {len(result['unreadable'])} unreadable pictures left out" if result.get("unreadable") else ""
        return (
            f"CIDEr {cider:.3f} (blind {blind:.3f})  loss {result['loss_right']:.3f} right, "
            f"{result['loss_shuffled']:.3f} shuffled (gap {result['loss_gap']:.3f} nats/token)  {others}"
            f"{_order_words(result)}  [{result['pictures']} pictures, {result['scoring_tokenizer']} tokenizer]{bad}"
        )

    def shown(self, row: dict) -> Shown:
        return Shown(row["caption"], row["references"], row["scores"].get("CIDEr"))


def _order_words(result: dict) -> str:
    """How often captions of clips tell events in the right order, as a whole and by kind; empty where not asked."""
    if "order_accuracy" not in result:
        return ""
    kinds = {key.partition(" ")[2]: value for key, value in result.items() if key.startswith("order_accuracy ")}
    words = ", ".join(f"{kind} {value:.2f}" for kind, value in kinds.items())
    return f"  order of events {result['order_accuracy']:.3f} ({words}; a model that ignores it gets at most 0.5)"
