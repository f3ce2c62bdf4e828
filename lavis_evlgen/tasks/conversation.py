"""Training on conversations about pictures; evaluation by their loss, with the right and with another picture."""

from __future__ import annotations

import logging
from functools import partial

from lavis.common.registry import registry

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets import DataError
from lavis_evlgen.datasets.conversations import ConversationDataset
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.lengths import summary_of, tokens_of
from lavis_evlgen.tasks.base import Shown, Task
from lavis_evlgen.tasks.blind_baseline import BlindPairs, SeenPictures, assign, paired_losses


@registry.register_task("evlgen_conversations")
class EvlgenConversationTask(Task):
    """Learns the assistant's words in conversations, and scores a split by their loss.

    Nothing is generated: there is no one right answer to score against. Blind baseline: the loss of the same
    conversations under the prompt of another picture (tasks/blind_baseline.py).
    """

    answer_word = "conversation"

    def __init__(self):
        super().__init__()
        self.built: dict[str, dict] = {}  # the data sets
        self.blind: BlindPairs

    def build_datasets(self, cfg) -> dict:
        self.built = super().build_datasets(cfg)
        return self.built

    def check_arch(self, cfg):
        if not issubclass(registry.get_model_class(cfg.model_cfg.arch), EVLGen):
            raise ConfigError(
                f"run.task=evlgen_conversations trains EVLGen models; model.arch={cfg.model_cfg.arch} is none"
            )

    def check_model(self, cfg, model):
        """Cut what is longer than the model's max_txt_len at a turn, and count it. Raises ConfigError."""
        for name, splits in self.built.items():
            for dataset in splits.values():
                if isinstance(dataset, ConversationDataset):
                    self._fit(name, dataset, model.language_model)

    def _fit(self, name: str, dataset: ConversationDataset, language_model):
        most, total = language_model.max_txt_len, len(dataset)
        try:
            shorter, dropped = dataset.shorten(partial(language_model.chat.cut, most=most))
        except DataError:
            shorter, dropped = 0, total
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
        words = (
            f"{name} {dataset.split}: {shorter} of {total} conversations are cut after the last turn that fits into "
            f"model.max_txt_len={most}"
        )
        if dropped:
            words += (
                f"; {dropped} have no turns with the picture that fit, or say a special token of the tokenizer, and "
                "are left out"
            )
        if dropped == total or dropped > dataset.max_bad_fraction * total:
            raise ConfigError(f"{words}: raise model.max_txt_len, or datasets.{name}.max_bad_fraction")
        if shorter or dropped:
            logging.warning(words)

    def check_dataset(self, name: str, dataset):
        """Raises ConfigError for a data set that cannot be scored; the runner asks before anything runs."""
        if not isinstance(dataset, ConversationDataset):
            raise ConfigError(
                f"run.task=evlgen_conversations scores conversations, {name} has none; see datasets.image_conversations"
            )

    def before_evaluation(self, model, dataset, **kwargs):
        self.blind = BlindPairs(dataset)

    def valid_step(self, model, samples: dict) -> list[dict]:
        """One row a conversation: its ids and messages, loss (nats) and tokens of the assistant's words, and under
        "blind" what the picture measured for another row's conversation."""
        seen = SeenPictures(model, samples)
        prompt = seen.prompts(range(len(seen.rows)), samples)
        loss, tokens = model.loss_of(prompt, samples)  # (B,), (B,)
        keys = ("instance_id", "conversation_id", "image_id", "conversations")
        rows = [{key: samples[key][i] for key in keys} | own for i, own in enumerate(tokens_of(prompt))]
        for row, nats, count in zip(rows, loss.tolist(), tokens.tolist(), strict=True):
            row |= {"loss": nats, "tokens": count}
        self.blind.measure_losses(model, seen, rows)
        return rows

    def after_evaluation(self, val_result: list[dict], split_name: str, epoch, **kwargs) -> dict:
        """Losses of all ranks' rows (call on one rank), in nats per token, and `rows`; `agg_metrics` is minus the
        loss."""
        rows = [row for row in val_result if "bad" not in row]
        if not rows:
            raise DataError(f"{split_name}: no conversation has a readable picture ({len(val_result)} have none)")
        distinct, expected = len({row["instance_id"] for row in rows}), len(self.blind.dataset)
        if distinct != len(rows) or len(val_result) != expected:
            raise DataError(
                f"{split_name}: {len(rows)} conversations, {distinct} of them different, of {expected} on "
                f"{distributed.world_size()} ranks: some were lost or met twice"
            )
        assign(rows)
        loss = sum(row["loss"] for row in rows) / sum(row["tokens"] for row in rows)
        return {
            "metrics": {"loss": loss},
            **paired_losses(rows),
            **summary_of(rows),
            "conversations": len(rows),
            "pictures": len({row["image_id"] for row in rows}),
            "unreadable": list({row["bad"]["image"]: row["bad"] for row in val_result if "bad" in row}.values()),
            "agg_metrics": -loss,
            "rows": rows,
        }

    def curve(self, result: dict) -> dict[str, float]:
        """Losses with the right and with another picture."""
        return {f"val_{key}": result[key] for key in ("loss_right", "loss_shuffled") if key in result}

    def summary(self, result: dict) -> str:
        """One line: loss with right against other pictures."""
        words = f"loss {result['metrics']['loss']:.3f}"
        if "loss_right" in result:
            words += f", {result['loss_shuffled']:.3f} other picture (gap {result['loss_gap']:.3f} nats/token)"
        bad = f"  {len(result['unreadable'])} unreadable pictures left out" if result["unreadable"] else ""
        return f"{words}  [{result['conversations']} conversations, {result['pictures']} pictures]{bad}"

    def shown(self, row: dict) -> Shown:
        words = [message["content"] for message in row["conversations"] if message["role"] != "system"]
        nats = row["loss"] / max(row["tokens"], 1)
        return Shown(f"{nats:.2f} nats/token", [" / ".join(words)], None)
