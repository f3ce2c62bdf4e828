"""What a run leaves behind for people: run card, results with captions, picture sheet, the last words."""

from __future__ import annotations

import json
import logging

import torch

from lavis_evlgen import distributed
from lavis_evlgen.reporting.plots import caption_sheet
from lavis_evlgen.reporting.run_card import run_card, write_run_card
from lavis_evlgen.runners import checkpoints
from lavis_evlgen.runners.progress import part_rows
from lavis_evlgen.runners.step import amp_of

COLLAPSED = 1e-4  # share of a connector that answers one prompt to every picture; healthy starts dip to 5e-4


class Reporter:
    """Writes for one runner; used on the main rank only."""

    def __init__(self, runner):
        self.runner, self.folder = runner, runner.output_dir
        self.warned = False
        self.results: dict[str, dict] = {}

    def facts(self, data: dict, images_per_step: int) -> dict[str, str]:
        """The lines under the start-up table."""
        runner, run = self.runner, self.runner.config.run_cfg
        model = runner.bare_model
        facts = {}
        if hasattr(model, "token_counts"):
            facts["tokens"] = model.token_counts()
        device = torch.cuda.get_device_name(runner.device) if runner.device.type == "cuda" else "cpu"
        threads = f", {torch.get_num_threads()} threads" if runner.device.type == "cpu" else ""
        facts |= {
            "device": f"{device}{threads}, {distributed.world_size()} process(es), amp {amp_of(run)}",
            "batch": f"{images_per_step} images a step ({run.batch_size_train} x {distributed.world_size()} ranks x "
            f"{runner.accum_grad_iters} accumulated)",
            "compiled": ", ".join(runner.compiled) or "nothing",
            "steps": f"{runner.start_step} -> {runner.max_iters}, evaluated every {runner.iters_per_inner_epoch}",
            "data": "; ".join(getattr(d, "description", None) or f"{name}: {len(d)} rows" for name, d in data.items()),
            "run folder": str(self.folder),
        }
        return facts

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
        curve = scored_curve(result) if "metrics" in result else {}
        if curve and hasattr(self.runner, "progress") and split in self.runner.valid_splits:
            self.runner.progress.write({"step": step, **curve})
        if words := self._summary(result):
            logging.info("%s at step %s: %s", split, step, words)
        if rows and split in self.runner.test_splits:
            for row in rows[:8]:
                said, references, _ = self._shown(row)
                word = "answer" if hasattr(self.runner.task, "shown") else "caption"
                logging.info("  %s: %s\n      reference: %s", word, " ".join(said.split()), references[0])

    def _summary(self, result: dict) -> str | None:
        """One line of a result, by the task where it has its own way; LAVIS's own tasks have no line."""
        if hasattr(self.runner.task, "summary"):
            return self.runner.task.summary(result)
        return summary(result) if "loss_right" in result else None

    def _shown(self, row: dict) -> tuple[str, list[str], float | None]:
        """(what the model said, references, score) of a row, by the task where its rows are no captions."""
        if hasattr(self.runner.task, "shown"):
            return self.runner.task.shown(row)
        return row["caption"], row["references"], row["scores"].get("CIDEr")

    def _card(self, name: str, dataset, split: str, step, result: dict):
        model = self.runner.bare_model
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        fingerprint, trained = getattr(dataset, "fingerprint", None), getattr(self.runner.config, "trained", None)
        size = getattr(dataset, "num_images", len(dataset))
        card = run_card(
            config=self.runner.config.to_dict(),
            prompt=getattr(self.runner.task, "prompt", getattr(model, "prompt", "")),
            decoding=getattr(self.runner.task, "decoding", {}),
            data={"name": name, "split": split, "size": size, "fingerprint": fingerprint},
            scoring_tokenizer=result.get("scoring_tokenizer"),
            metrics={k: v for k, v in result.items() if k not in ("unreadable", "scoring_tokenizer")},
            model={
                "class": type(model).__name__,
                "trainable_parameters": trainable,
                "parameters": total,
                "precision": precisions(model),
                **({} if trained is None else {"not_as_trained": trained.changed}),
            },
            step=step,
            unreadable_images={split: len(result.get("unreadable", [])), "train": self._bad_in_training()},
        )
        write_run_card(self.folder / "result" / f"{split}_{step}.card.json", card)
        write_run_card(self.folder / "run.json", card)

    def _bad_in_training(self) -> int:
        """Distinct images, and what was met in shards."""
        return len(self.runner.bad.found) + self.runner.shards.bad.count if hasattr(self.runner, "bad") else 0

    def _sheet(self, dataset, rows: list[dict]):
        firsts: dict = {}
        for row in rows:  # one of each picture
            firsts.setdefault(row["image_id"], row)
        rows = list(firsts.values())[: int(self.runner.config.run_cfg.get("sheet_pictures", 12))]
        if not rows:
            return
        images = [dataset.pil_image(int(row["instance_id"])) for row in rows]
        said, references, scores = zip(*map(self._shown, rows), strict=True)
        name = getattr(self.runner.task, "score_name", "CIDEr")
        caption_sheet(self.folder / "captions.png", images, said, references, scores, score_name=name)

    def close(self):
        """The last words of a run."""
        for split, result in self.results.items():
            if words := self._summary(result):
                logging.info("%s: %s", split, words)
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


def scored_curve(result: dict) -> dict[str, float]:
    """What loss.png draws of an evaluation: losses, and CIDEr or the accuracy of answers, each with its blind twin."""
    names = {"CIDEr": "cider", "accuracy": "accuracy"}
    curve = {f"val_{key}": result[key] for key in ("loss_right", "loss_shuffled") if key in result}
    for metric, name in names.items():
        if metric in result["metrics"]:
            curve |= {name: result["metrics"][metric], f"blind_{name}": result["blind"].get(metric)}
    return curve | {key: result[key] for key in ("order_accuracy",) if key in result}


def summary(result: dict) -> str:
    """One line: CIDEr against blind CIDEr, loss with right against shuffled pictures."""
    cider, blind = result["metrics"].get("CIDEr", float("nan")), result["blind"].get("CIDEr", float("nan"))
    others = "  ".join(f"{k} {v:.3f}" for k, v in result["metrics"].items() if k != "CIDEr")
    bad = f"  {len(result['unreadable'])} unreadable pictures left out" if result.get("unreadable") else ""
    return (
        f"CIDEr {cider:.3f} (blind {blind:.3f})  loss {result['loss_right']:.3f} right, "
        f"{result['loss_shuffled']:.3f} shuffled (gap {result['loss_gap']:.3f} nats/token)  {others}{_order(result)}  "
        f"[{result['pictures']} pictures, {result['scoring_tokenizer']} tokenizer]{bad}"
    )


def _order(result: dict) -> str:
    """How often captions of clips tell events in the right order, as a whole and by kind; empty where not asked."""
    if "order_accuracy" not in result:
        return ""
    kinds = {key.partition(" ")[2]: value for key, value in result.items() if key.startswith("order_accuracy ")}
    kinds = (f"{kind} {value:.2f}" for kind, value in kinds.items())
    return f"  order of events {result['order_accuracy']:.3f} ({', '.join(kinds)}; at most 0.5 for who ignores it)"
