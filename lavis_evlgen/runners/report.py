"""What a run leaves behind for people: run card, results with captions, picture sheet, the last lines of the log."""

from __future__ import annotations

import json
import logging

import torch

from lavis_evlgen import distributed
from lavis_evlgen.config import EvlgenConfig
from lavis_evlgen.models.facts import facts_of
from lavis_evlgen.reporting.plots import caption_sheet
from lavis_evlgen.reporting.run_card import run_card, write_run_card
from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.runners.progress import part_rows
from lavis_evlgen.runners.step import amp_of

TEXT_LOSS = "text_loss_before.json"  # in the run folder, where the language model learns
COLLAPSED = 1e-4  # share of a connector that answers one prompt to every picture; healthy starts dip to 5e-4


class Reporter:
    """Writes for one trainer (runners/trainer.py); used on the main rank only."""

    def __init__(self, trainer):
        self.trainer, self.task, self.folder = trainer, trainer.task, trainer.output_dir
        self.warned = False
        self.results: dict[str, dict] = {}
        self.text_loss_before: dict | None = None  # of a language model that learns, when the run started

    def facts(self, data: dict, images_per_step: int) -> dict[str, str]:
        """The lines under the start-up table."""
        trainer, run = self.trainer, self.trainer.run
        tokens, on_gpu = facts_of(trainer.model).token_counts(), trainer.device.type == "cuda"
        device = torch.cuda.get_device_name(trainer.device) if on_gpu else f"cpu, {torch.get_num_threads()} threads"
        stage = trainer.stage
        trains = "all that the model trains" if stage is None or stage.trains is None else ", ".join(stage.trains)
        return {
            **({} if stage is None else {"stage": f"{stage.number} of {stage.of}: {stage.name}, trains {trains}"}),
            **({} if tokens is None else {"tokens": tokens}),
            "device": f"{device}, {distributed.world_size()} process(es), amp {amp_of(run)}",
            "batch": f"{images_per_step} images a step ({run.batch_size_train} x {distributed.world_size()} ranks x "
            f"{trainer.accum_grad_iters} accumulated)"
            + (f", up to {run.texts_per_image} texts of each" if run.texts_per_image > 1 else ""),
            "compiled": ", ".join(trainer.compiled) or "nothing",
            "steps": f"{trainer.start_step} -> {trainer.max_iters}, evaluated every {trainer.iters_per_inner_epoch}",
            "data": "; ".join(d.description or f"{name}: {len(d)} rows" for name, d in data.items()),
            **({} if trainer.cached_features is None else {"cached features": trainer.cached_features}),
            "run folder": str(self.folder),
        }

    def starts(self, resumed: bool):
        """Measure what the language model knows of text before it learns; a resumed run has it in a file."""
        path = self.folder / TEXT_LOSS
        if resumed:
            self.text_loss_before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        elif before := facts_of(self.trainer.model.eval()).text_loss():
            self.text_loss_before = before
            write_run_card(path, before)

    def _text_loss(self) -> dict:
        """The run card's entry on forgetting, where the language model learns."""
        now = facts_of(self.trainer.model).text_loss()
        if now is None:
            return {}
        before = self.text_loss_before
        start = "" if before is None else f", {before['nats_per_token']:.3f} when the run started"
        logging.info("language model on text nobody trains on: %.3f nats a token%s", now["nats_per_token"], start)
        return {"text_loss": {"before": before, "now": now}}

    def watch_collapse(self, row: dict):
        """Warn once when the prompt no longer depends on the picture (NaN, of one picture, does not say)."""
        share = row.get("across_picture_share")
        if share is not None and share < COLLAPSED and not self.warned:
            self.warned = True
            logging.warning(
                "the connector has collapsed: the across-picture share of the prompt is %.1e at step %d, so the "
                "model sees the same prompt for every picture and learns captions blind. Try model.prompt_scale="
                "embedding, a smaller model.lr_scale.connector, or model.bos=before (docs/training.md)",
                share, row["step"],
            )  # fmt: skip

    def result(self, name: str, dataset, split: str, step, result: dict):
        """Write result/SPLIT_STEP.json and run.json, extend the curves, draw the sheet, log the summary."""
        rows = result.pop("rows", None)
        self.results[split] = result
        with open(self.folder / "result" / f"{split}_{step}.json", "w", encoding="utf-8") as file:
            json.dump({"split": split, "step": step, **result, "rows": rows}, file, indent=1, ensure_ascii=False)
        self._card(name, dataset, split, step, result)
        if rows:
            self._sheet(dataset, rows)
        if (progress := self.trainer.progress) is not None:
            if split in self.trainer.valid_splits and (curve := self.task.curve(result)):
                progress.write({"step": step, **curve})
            progress.track({"step": step, split: result})
        if line := self.task.summary(result):
            logging.info("%s at step %s: %s", split, step, line)
        if rows and split in self.trainer.test_splits:
            for said, references, _ in map(self.task.shown, rows[:8]):
                text = " ".join(said.split())
                logging.info("  %s: %s\n      reference: %s", self.task.answer_word, text, references[0])

    def _card(self, name: str, dataset, split: str, step, result: dict):
        trainer, model, config = self.trainer, self.trainer.model, self.trainer.config
        trained = config.trained if isinstance(config, EvlgenConfig) else None
        skipped = trainer.skipped
        card = run_card(
            config=config.to_dict(),
            prompt=facts_of(model).prompt if self.task.prompt is None else self.task.prompt,
            decoding=self.task.decoding,
            data={"name": name, "split": split, "size": dataset.num_images, "fingerprint": dataset.fingerprint},
            scoring_tokenizer=result.get("scoring_tokenizer"),
            metrics={k: v for k, v in result.items() if k not in ("unreadable", "scoring_tokenizer")},
            model={
                "class": type(model).__name__,
                "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "parameters": sum(p.numel() for p in model.parameters()),
                "precision": precisions(model),
                "tokens": facts_of(model).token_counts(),
                **({} if trained is None else {"not_as_trained": trained.changed}),
            },
            step=step,
            **self._text_loss(),
            unreadable_images={
                split: len(result.get("unreadable", [])), "train": 0 if skipped is None else skipped.count,
            },
        )  # fmt: skip
        write_run_card(self.folder / "result" / f"{split}_{step}.card.json", card)
        write_run_card(self.folder / "run.json", card)

    def _sheet(self, dataset, rows: list[dict]):
        first_of: dict = {}
        for row in rows:
            first_of.setdefault(row["image_id"], row)
        rows = list(first_of.values())[: self.trainer.run.sheet_pictures]
        if not rows:
            return
        images = [dataset.pil_image(int(row["instance_id"])) for row in rows]
        said, references, scores = zip(*map(self.task.shown, rows), strict=True)
        caption_sheet(
            self.folder / "captions.png", images, said, references, scores, score_name=self.task.score_name
        )

    def close(self):
        """The last lines of a run."""
        for split, result in self.results.items():
            if line := self.task.summary(result):
                logging.info("%s: %s", split, line)
            for metric, reason in result.get("unscored", {}).items():
                logging.info("%s was not scored: %s", metric, reason)
        logging.info("%s", self.where())

    def where(self) -> str:
        """The run folder and what is in it."""
        parts = {name: name for name in ("run.json", "loss.png", "captions.png", "log.jsonl", "result/")}
        parts["checkpoints"] = checkpoints.LAST
        there = [part for part, file in parts.items() if (self.folder / file).exists()]
        return f"run folder: {self.folder} ({', '.join(there)})"


def precisions(model) -> dict[str, str]:
    """Number format of each part's weights, after `auto` has been resolved."""
    return {part: ", ".join(dtypes) for part, *_, dtypes, _ in part_rows(model)}
