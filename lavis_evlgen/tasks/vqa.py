"""Visual question answering: answers by generation, scored against human answers, with a blind baseline beside them."""

from __future__ import annotations

from dataclasses import dataclass

from lavis.common.registry import registry

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.keys import key
from lavis_evlgen.config.limits import LARGEST
from lavis_evlgen.datasets import DataError
from lavis_evlgen.datasets.questions import TEMPLATE, QuestionDataset
from lavis_evlgen.evaluation import vqa_metrics
from lavis_evlgen.evaluation.lemmas import load_lemmatizer
from lavis_evlgen.models.lengths import summary_of, tokens_of
from lavis_evlgen.tasks.base import Shown, Task
from lavis_evlgen.tasks.blind_baseline import BlindPairs, assign, paired_losses, prompts_by_picture, prompts_of
from lavis_evlgen.tasks.settings import DecodingSettings, SharedRunSettings

AUTO = "auto"
LONGEST = 200  # questions, the longest in letters, that are tried against max_txt_len


@dataclass(kw_only=True)
class VqaTaskSettings(DecodingSettings):
    prompt: str = key("what a question is asked in, in training too; {} stands for the question", TEMPLATE)
    max_len: int = key("most new tokens of an answer", 10, at_least=1, at_most=LARGEST["max_len"])
    length_penalty: float = key("above 0 favours longer answers in beam search", 0.0, at_least=-10.0, at_most=100.0)
    metric: str = key(
        "vqa (ten human answers), gqa (the answer as it stands), exact (both sides normalised), auto (vqa where every "
        "question has human answers enough, else exact)", "exact",
    )  # fmt: skip
    lemmatize: bool = key(
        "score nouns and verbs of answers as lemmas, as OK-VQA's results are; needs spaCy's model", False
    )
    blind_share: float = key(
        "share of the questions that are asked again with another picture", 1.0, at_least=0.0, at_most=1.0
    )


@registry.register_task("evlgen_vqa")
class EvlgenVqaTask(Task):
    """Answers the questions of a split by `model.predict_answers` and scores them.

    Blind baseline: the same questions asked again with the prompt of another picture (tasks/blind_baseline.py), scored
    against the same answers: what question and habit alone are worth. And the loss of the most frequent human answer
    under the right and under the other picture's prompt.
    """

    Settings = VqaTaskSettings
    answer_word, score_name = "answer", "accuracy"

    def __init__(self, decoding: dict, prompt: str = TEMPLATE, metric="exact", lemmatize=False, blind_share=1.0):
        super().__init__()
        vqa_metrics.check_metric(metric, known=(*vqa_metrics.METRICS, AUTO))
        try:
            fits = prompt.format("QUESTION").count("QUESTION") == 1
        except (IndexError, KeyError, ValueError):
            fits = False
        if not fits:
            raise ConfigError(f"run.prompt: {prompt!r} must hold {{}} once, where the question stands")
        self.decoding, self.prompt, self.metric = decoding, prompt, metric
        self.lemmatize = load_lemmatizer() if lemmatize else None
        self.blind_share, self.dataset = blind_share, None
        self.blind: BlindPairs
        self.built: dict[str, dict] = {}  # the data sets

    @classmethod
    def setup_task(cls, cfg):
        run = cls.Settings.read(cfg.run_cfg, "run.")
        names = ("num_beams", "max_len", "min_len", "length_penalty", "repetition_penalty")
        decoding = {name: vars(run)[name] for name in names}
        return cls(decoding, run.prompt, run.metric, run.lemmatize, run.blind_share)

    def build_datasets(self, cfg) -> dict:
        """LAVIS's; every set of questions asks in this task's prompt, so that training and evaluation agree."""
        self.built = super().build_datasets(cfg)
        for dataset in self._question_sets():
            dataset.template = self.prompt
        return self.built

    def check_model(self, cfg, model):
        """What will be learnt, or scored by its loss, must fit into the model's max_txt_len."""
        run = SharedRunSettings.read(cfg.run_cfg, "run.")
        splits = run.test_splits if self.blind_share else []
        if not run.evaluate:
            splits = [*splits, "train", *(run.valid_splits if self.blind_share else [])]
        for dataset in self._question_sets():
            if dataset.split in splits:
                self._check_room(model.language_model, dataset)

    def _question_sets(self) -> list:
        return [d for splits in self.built.values() for d in splits.values() if isinstance(d, QuestionDataset)]

    def _check_room(self, language_model, dataset):
        """Question and answer must fit into max_txt_len, else the answer is cut. Raises ConfigError."""
        longest = sorted(dataset.annotation, key=lambda row: len(row["question"]) + max(map(len, row["answers"])))
        for row in longest[-LONGEST:]:
            asked = self.prompt.format(dataset.text_processor(row["question"]))
            for answer in set(row["answers"]):
                need = len(language_model.text.encode(f"{asked.rstrip()} {answer}")) + 1  # the end token
                if need > language_model.text_limit:
                    raise ConfigError(
                        f"{dataset.name}: {asked!r} with the answer {answer!r} is {need} tokens, but model.max_txt_len="
                        f"{language_model.max_txt_len} has room for {language_model.text_limit}; raise it"
                    )

    def check_dataset(self, name: str, dataset):
        """Raises ConfigError for a data set that cannot be scored; the runner asks before anything runs."""
        if dataset.answers is None:
            raise ConfigError(f"run.task=evlgen_vqa needs questions, {name} has none; see run.task=evlgen_captioning")
        counts = [len(answers) for answers in dataset.answers.values()]
        if self.metric == "vqa" and min(counts) < vqa_metrics.FEWEST_HUMANS:
            raise ConfigError(
                f"run.metric=vqa needs {vqa_metrics.FEWEST_HUMANS} human answers a question or more (officially ten), "
                f"and {name} {dataset.split} has questions with {min(counts)}; set run.metric=exact or auto"
            )
        if self.metric == "gqa" and max(counts) > 1:
            raise ConfigError(f"run.metric=gqa takes one answer a question, {name} has {max(counts)}; see run.metric")

    def before_evaluation(self, model, dataset, **kwargs):
        self.dataset, self.blind = dataset, BlindPairs(dataset)

    def _metric(self) -> str:
        """That of `run.metric`, or which one fits the data set that is evaluated."""
        if self.metric != AUTO:
            return self.metric
        return "vqa" if min(map(len, self.dataset.answers.values())) >= vqa_metrics.FEWEST_HUMANS else "exact"

    def valid_step(self, model, samples: dict) -> list[dict]:
        """One row a question: its ids, question, answer, loss (nats) and tokens of the human answer, and under "blind"
        what the picture measured for another row's question."""
        prompt = prompts_by_picture(model, samples)
        answers = model.predict_answers(samples, prompt=self.prompt, visual_prompt=prompt, **self.decoding)
        keys = ("instance_id", "question_id", "image_id", "question")
        rows = [
            {key: samples[key][i] for key in keys} | {"answer": answer} | own
            for i, (answer, own) in enumerate(zip(answers, tokens_of(prompt), strict=True))
        ]
        asked_again = [position for position, own in enumerate(samples["instance_id"]) if self._asks_again(int(own))]
        if asked_again:
            loss, tokens = self._truth_loss(model, prompts_of(prompt, asked_again), samples, asked_again)
            for position, nats, count in zip(asked_again, loss, tokens, strict=True):
                rows[position] |= {"loss": nats, "tokens": count}
        positions, others = self.blind.of(samples["instance_id"], self._asks_again)
        if positions:
            prompt, texts = prompts_of(prompt, positions), self.dataset.texts_of(others)
            answers = model.predict_answers(texts, prompt=self.prompt, visual_prompt=prompt, **self.decoding)
            loss, _ = self._truth_loss(model, prompt, texts, range(len(others)))
            for position, other, answer, nats in zip(positions, others, answers, loss, strict=True):
                rows[position]["blind"] = {str(other): {"blind_answer": answer, "loss_shuffled": nats}}
        return rows

    def _truth_loss(self, model, prompt, texts: dict, positions) -> tuple[list[float], list[int]]:
        """Nats and tokens of the most frequent human answers to the questions at `positions` of `texts`."""
        asked = [self.prompt.format(texts["question"][position]) for position in positions]
        answers = [texts["answer"][position] for position in positions]
        nats, tokens = model.loss_of(prompt, {"text_input": answers, "prompt": asked})
        return nats.tolist(), tokens.tolist()

    def _asks_again(self, row: int) -> bool:
        """`blind_share` of the rows, spread as if at random, the same whatever the batches and ranks."""
        return row * 2654435761 % 2**32 < self.blind_share * 2**32

    def after_evaluation(self, val_result: list[dict], split_name: str, epoch, **kwargs) -> dict:
        """Scores of all ranks' rows (call on one rank): accuracy, blind accuracy, losses, `agg_metrics`, `rows`."""
        rows = [row for row in val_result if "bad" not in row]
        bad = {row["bad"]["image"]: row["bad"] for row in val_result if "bad" in row}
        unasked = len(val_result) - len(rows)
        self._check_complete(rows, unasked, split_name)
        assign(rows)
        metric, kinds = self._metric(), self.dataset.kinds
        scores = self._score(rows, metric)
        for row in rows:
            row["answers"] = self.dataset.answers[row["question_id"]]
        metrics = {"accuracy": scores.accuracy} | {f"accuracy {k}": value for k, value in scores.by_kind.items()}
        if metric == "vqa":
            exact = self._score(rows, "exact", "exact_")
            metrics |= {"exact": exact.accuracy} | {f"exact {k}": value for k, value in exact.by_kind.items()}
        groups = {kind: [row for row in rows if kinds.get(row["question_id"]) == kind] for kind in scores.by_kind}
        return {
            "metrics": metrics,
            "metric": metric,
            "lemmatized": self.lemmatize is not None,
            "blind": _blind(rows),
            "blind_by_kind": {kind: found for kind, own in groups.items() if (found := _blind(own))},
            **paired_losses(rows),
            **summary_of(rows),
            "questions": len(rows),
            "pictures": len({row["image_id"] for row in rows}),
            "unreadable": list(bad.values()),
            "unasked": unasked,
            "unmatchable": scores.unmatchable,
            "agg_metrics": scores.accuracy,
            "rows": rows,
        }

    def _score(self, rows: list[dict], metric: str, prefix: str = "") -> vqa_metrics.AnswerScores:
        """Scores of the answers; each row gets its own as `score`, and as `blind_score` that of its blind answer."""
        answers = {row["question_id"]: row["answer"] for row in rows}
        blind = {row["question_id"]: row["blind_answer"] for row in rows if "blind_answer" in row}
        if self.lemmatize:
            answers, blind = ({key: self.lemmatize(text) for key, text in own.items()} for own in (answers, blind))
        truth, kinds = self.dataset.answers, self.dataset.kinds
        scores = vqa_metrics.score_answers(answers, truth, metric, kinds)
        blind_scores = vqa_metrics.score_answers(blind, truth, metric).per_sample if blind else {}
        for row in rows:
            row[f"{prefix}score"] = scores.per_sample[row["question_id"]]
            row[f"{prefix}blind_score"] = blind_scores.get(row["question_id"])
        return scores

    def _check_complete(self, rows: list[dict], unasked: int, split_name: str):
        """Every question once, over all ranks: a wrong shard would be a wrong accuracy."""
        distinct = len({row["question_id"] for row in rows})
        if not rows:
            raise DataError(f"{split_name}: no question has a readable picture ({unasked} have none)")
        if distinct != len(rows) or len(rows) + unasked != len(self.dataset):
            raise DataError(
                f"{split_name}: {len(rows)} answers to {distinct} questions, {unasked} with unreadable pictures, of "
                f"{len(self.dataset)} on {distributed.world_size()} ranks: questions were lost or asked twice"
            )

    def curve(self, result: dict) -> dict[str, float]:
        """Losses, and accuracy with its blind baseline."""
        curve = {f"val_{key}": result[key] for key in ("loss_right", "loss_shuffled") if key in result}
        return curve | {"accuracy": result["metrics"]["accuracy"], "blind_accuracy": result["blind"].get("accuracy")}

    def summary(self, result: dict) -> str:
        """One line: accuracy against blind accuracy, loss with right against other pictures."""
        words = [f"accuracy {result['metrics']['accuracy']:.3f}"]
        if result["blind"]:
            words[0] += f" (blind {result['blind']['accuracy']:.3f} on {result['blind']['questions']})"
            words.append(
                f"loss {result['loss_right']:.3f} right, {result['loss_shuffled']:.3f} other picture "
                f"(gap {result['loss_gap']:.3f} nats/token)"
            )
        for name, value in result["metrics"].items():
            if name != "accuracy":
                kind = name.removeprefix("accuracy ")
                blind = result["blind_by_kind"].get(kind)
                words.append(f"{kind} {value:.3f}" + (f" (blind {blind['accuracy']:.3f})" if blind else ""))
        words.append(f"[{result['questions']} questions, {result['metric']}]")
        if result["unreadable"]:
            pictures = len(result["unreadable"])
            words.append(f"{result['unasked']} questions about {pictures} unreadable pictures left out")
        if result["unmatchable"]:
            words.append(f"{result['unmatchable']} questions have no answer that could match (docs/evaluation.md)")
        return "  ".join(words)

    def shown(self, row: dict) -> Shown:
        return Shown(f"{row['question']} {row['answer']}", list(dict.fromkeys(row["answers"])), row["score"])


def _blind(rows: list[dict]) -> dict:
    """Accuracy with another picture, and with the right one on the same questions; {} where none was asked again."""
    paired = [row for row in rows if row["blind_score"] is not None]
    if not paired:
        return {}
    names = {"accuracy": "blind_score", "accuracy_same_questions": "score"}
    if "exact_score" in paired[0]:
        names |= {"exact": "exact_blind_score", "exact_same_questions": "exact_score"}
    means = {name: sum(row[key] for row in paired) / len(paired) for name, key in names.items()}
    return means | {"questions": len(paired)}
