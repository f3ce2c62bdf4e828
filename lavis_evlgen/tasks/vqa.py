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
from lavis_evlgen.models.facts import facts_of
from lavis_evlgen.models.lengths import summary_of, tokens_of
from lavis_evlgen.tasks.base import Shown, Task
from lavis_evlgen.tasks.blind_baseline import BlindPairs, SeenPictures, assign, paired_losses, prompts_of
from lavis_evlgen.tasks.condition_gap import condition_gap, other_questions
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
        self.swaps: list[int | None] | None = None  # rows with the other question, where merging looks at one
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
        self.swaps = other_questions(dataset.annotation) if facts_of(model).reads_questions else None

    def _metric(self) -> str:
        """That of `run.metric`, or which one fits the data set that is evaluated."""
        if self.metric != AUTO:
            return self.metric
        return "vqa" if min(map(len, self.dataset.answers.values())) >= vqa_metrics.FEWEST_HUMANS else "exact"

    def valid_step(self, model, samples: dict) -> list[dict]:
        """One row a question: its ids, question, answer, loss (nats) and tokens of the human answer, and under "blind"
        what the picture measured for another row's question."""
        seen = SeenPictures(model, samples)
        prompt = seen.prompts(range(len(seen.rows)), samples)
        answers = self._answers(model, prompt, samples)
        keys = ("instance_id", "question_id", "image_id", "question")
        rows = [
            {key: samples[key][i] for key in keys} | {"answer": answer} | own
            for i, (answer, own) in enumerate(zip(answers, tokens_of(prompt), strict=True))
        ]
        asked_again = [position for position, own in enumerate(samples["instance_id"]) if self._asks_again(int(own))]
        if asked_again:
            texts = _texts_at(samples, asked_again)
            loss, tokens = self._truth_loss(model, prompts_of(prompt, asked_again), texts)
            for position, nats, count in zip(asked_again, loss, tokens, strict=True):
                rows[position] |= {"loss": nats, "tokens": count}
        positions, others = self.blind.of(samples["instance_id"], self._asks_again)
        if positions:
            texts = self.dataset.texts_of(others)
            prompt = seen.prompts(positions, texts)
            answers = self._answers(model, prompt, texts)
            loss, _ = self._truth_loss(model, prompt, texts)
            for position, other, answer, nats in zip(positions, others, answers, loss, strict=True):
                rows[position]["blind"] = {str(other): {"blind_answer": answer, "loss_shuffled": nats}}
        if self.swaps is not None:
            self._ask_swapped(model, seen, samples, rows)
        return rows

    def _ask_swapped(self, model, seen: SeenPictures, samples: dict, rows: list[dict]):
        """Answers and losses with another question of the same picture in merging."""
        owns = map(int, samples["instance_id"])
        other_of = {position: self.swaps[own] for position, own in enumerate(owns) if self._asks_again(own)}
        positions = [position for position, other in other_of.items() if other is not None]
        others = [other_of[position] for position in positions]
        if not positions:
            return
        texts = _texts_at(samples, positions)
        prompt = seen.prompts(positions, self.dataset.texts_of(others))
        answers, (loss, _) = self._answers(model, prompt, texts), self._truth_loss(model, prompt, texts)
        for position, other, answer, nats in zip(positions, others, answers, loss, strict=True):
            asked = self.dataset.annotation[other]["question"]
            rows[position] |= {"swapped_answer": answer, "loss_swapped": nats, "swapped_question": asked}

    def _answers(self, model, prompt, texts: dict) -> list[str]:
        return model.predict_answers(texts, prompt=self.prompt, visual_prompt=prompt, **self.decoding)

    def _truth_loss(self, model, prompt, texts: dict) -> tuple[list[float], list[int]]:
        """Nats and tokens of the most frequent human answers to the questions of `texts`."""
        asked = [self.prompt.format(question) for question in texts["question"]]
        nats, tokens = model.loss_of(prompt, {"text_input": texts["answer"], "prompt": asked})
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
            **self._condition(rows, groups),
            "questions": len(rows),
            "pictures": len({row["image_id"] for row in rows}),
            "unreadable": list(bad.values()),
            "unasked": unasked,
            "unmatchable": scores.unmatchable,
            "agg_metrics": scores.accuracy,
            "rows": rows,
        }

    def _condition(self, rows: list[dict], groups: dict[str, list[dict]]) -> dict[str, dict]:
        """With the right against a swapped question in merging, as a whole and by kind; {} where it looks at none."""
        if self.swaps is None:
            return {}
        kinds = {kind: found for kind, own in groups.items() if (found := condition_gap(own))}
        return {"condition": condition_gap(rows), "condition_by_kind": kinds}

    def _score(self, rows: list[dict], metric: str, prefix: str = "") -> vqa_metrics.AnswerScores:
        """Scores of the answers; each row gets its own as `score`, and as `blind_score` that of its blind answer (of
        its answer to a swapped question, `swapped_score`)."""
        twins = ("", "blind_") if self.swaps is None else ("", "blind_", "swapped_")
        truth, kinds, found = self.dataset.answers, self.dataset.kinds, {}
        for twin in twins:
            answers = {row["question_id"]: row[f"{twin}answer"] for row in rows if f"{twin}answer" in row}
            if self.lemmatize:
                answers = {key: self.lemmatize(text) for key, text in answers.items()}
            found[twin] = vqa_metrics.score_answers(answers, truth, metric, kinds) if answers else None
            scores = found[twin].per_sample if answers else {}
            for row in rows:
                row[f"{prefix}{twin}score"] = scores.get(row["question_id"])
        return found[""]

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
        if gap := result.get("condition"):
            curve |= {"val_loss_swapped": gap["loss_swapped"], "swapped_accuracy": gap["accuracy_swapped"]}
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
        if gap := result.get("condition"):
            words.append(
                f"merging for another question: accuracy {gap['accuracy_swapped']:.3f} on {gap['questions']} "
                f"(condition gap {gap['gap']:.3f}), loss {gap['loss_swapped']:.3f}"
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


def _texts_at(samples: dict, positions: list[int]) -> dict[str, list]:
    """The texts of a batch at these positions."""
    return {key: [samples[key][position] for position in positions] for key in ("text_input", "question", "answer")}
