"""Answers scored against human answers: VQA accuracy, GQA's match, and plain exact match.

The rule and the normalisation follow the published description of the VQA evaluation (Antol et al. 2015, section
3; visualqa.org/evaluation) in the form that LAVIS runs, against which the tests compare every step.
"""

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

FEWEST_HUMANS = 4  # with three answers, even what all three say is worth only 2/3 of a point

_NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_NUMBERS["none"] = "0"
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # a decimal point stays

# contractions: stem -> what may follow it once the apostrophe is back ("hed" -> "he'd")
_NEGATED = "ai are ca could did does do had has have is might must need ought sha should was were wo would".split()
_ENDINGS = {
    "he": "d s d've", "how": "d ll s", "it": "d ll d've", "she": "d've", "somebody": "ll s d've",
    "someone": "d ll s d've", "something": "d ll d've", "that": "s", "there": "d re s d've", "they": "d ll re ve d've",
    "we": "ve d've", "what": "ll re s ve", "when": "s", "where": "d s ve", "who": "d ll s ve d've", "why": "ll re s",
    "you": "d ll re ve d've", "could": "ve", "might": "ve", "must": "ve", "not": "ve", "should": "ve", "would": "ve",
}  # fmt: skip
_IRREGULAR = {
    "maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at",
    "yall": "y'all", "yall'll": "y'all'll", "y'allll": "y'all'll",
    "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've",
}  # fmt: skip


def _contractions() -> dict[str, str]:
    found = dict(_IRREGULAR)
    for stem in _NEGATED:
        found[f"{stem}nt"] = f"{stem}n't"
        if stem in ("could", "had", "might", "should", "would"):
            found |= dict.fromkeys((f"{stem}nt've", f"{stem}n'tve"), f"{stem}n't've")
    for stem, endings in _ENDINGS.items():
        for ending in endings.split():
            if ending == "d've":
                found |= dict.fromkeys((f"{stem}d've", f"{stem}'dve"), f"{stem}'d've")
            else:
                found[stem + ending] = f"{stem}'{ending}"
    return found


_CONTRACTIONS = _contractions()


@dataclass(frozen=True)
class AnswerScores:
    """`accuracy` and `per_sample` in 0 to 1 (papers print percent); `by_kind`: accuracy of each kind of question.

    `unmatchable`: questions that no prediction can get right, because none of their answers is in the form that
    predictions are normalised to (the official rule does not normalise them fully).
    """

    accuracy: float
    per_sample: dict[Hashable, float]
    by_kind: dict[str, float]
    unmatchable: int


def strip_punctuation(text: str) -> str:
    """Punctuation becomes a space, or nothing where it stands at a space, or where digits hold a comma; periods
    that no digit follows go. Apostrophes and colons stay."""
    joined = _DIGIT_COMMA.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        gone = joined or mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if gone else " ")
    return _PERIOD.sub("", out, count=32)  # the official code hands a flag of that value to the count


def plain_words(text: str) -> str:
    """Lower case, digits for number words, no articles, apostrophes back in contractions, single spaces."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise_answer(text: str) -> str:
    """The form in which predicted answers are compared."""
    return plain_words(strip_punctuation(text))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy in 0 to 1: min(matches / 3, 1), averaged over leaving out each of the (ten) human answers.

    The prediction is normalised. Of the human answers only the punctuation is, and only where they are not all the
    same: so does the official code. Raises ValueError for fewer than FEWEST_HUMANS answers.
    """
    if len(answers) < FEWEST_HUMANS:
        raise ValueError(f"VQA accuracy needs {FEWEST_HUMANS} human answers or more, got {list(answers)}")
    mine = normalise_answer(prediction.replace("\n", " ").replace("\t", " ").strip())
    matches = sum(answer == mine for answer in _as_compared(answers))
    rest = len(answers) - matches
    left_out = matches * min((matches - 1) / 3, 1) + rest * min(matches / 3, 1)
    return left_out / len(answers)


def _as_compared(answers: Sequence[str]) -> list[str]:
    return [strip_punctuation(answer) for answer in answers] if len(set(answers)) > 1 else list(answers)


def gqa_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the normalised prediction is the one given answer as it stands, else 0 (as LAVIS's GQA task)."""
    return float(normalise_answer(prediction) in answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where prediction and one of the answers are the same after both are normalised, else 0."""
    return float(_own_form(prediction) in map(_own_form, answers))


def _own_form(text: str) -> str:
    """Normalised; an answer that is all article or punctuation ("A", "the") stays what it is, lower-cased."""
    return normalise_answer(text) or " ".join(text.lower().split())


_SCORERS = {"vqa": vqa_accuracy, "gqa": gqa_match, "exact": exact_match}
METRICS = tuple(_SCORERS)


def score_answers(
    predictions: Mapping[Hashable, str],
    answers: Mapping[Hashable, Sequence[str]],
    metric: str,
    kinds: Mapping[Hashable, str] | None = None,
) -> AnswerScores:
    """Score one predicted answer per question against the human ones, by `metric` (one of METRICS).

    `kinds` names the kind of each question that has one ("yes/no", "number", "other"). Raises ValueError for an
    unknown metric, no question, questions without an answer, and questions with too few for VQA accuracy.
    """
    check_metric(metric)
    if not predictions:
        raise ValueError("there are no answers to score")
    if bare := [key for key in predictions if not answers.get(key)]:
        raise ValueError(f"{len(bare)} question(s) have no human answer, such as {bare[0]!r}")
    scorer = _SCORERS[metric]
    per_sample = {key: scorer(text, answers[key]) for key, text in predictions.items()}
    groups: dict[str, list[float]] = {}
    for key, score in per_sample.items():
        if kinds and kinds.get(key):
            groups.setdefault(kinds[key], []).append(score)
    by_kind = {kind: sum(scores) / len(scores) for kind, scores in sorted(groups.items())}
    lost = sum(not _matchable(answers[key], metric) for key in predictions)
    return AnswerScores(sum(per_sample.values()) / len(per_sample), per_sample, by_kind, lost)


def _matchable(answers: Sequence[str], metric: str) -> bool:
    if metric == "exact":
        return True
    compared = _as_compared(answers) if metric == "vqa" else answers
    return any(normalise_answer(answer) == answer for answer in compared)


def check_metric(metric: str, known: Sequence[str] = METRICS) -> None:
    """Raise ValueError for an unknown metric, with the nearest known one."""
    if metric not in known:
        near = difflib.get_close_matches(str(metric), known, 1, 0.4)
        hint = f", did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"unknown answer metric {metric!r}{hint} Known: {', '.join(known)}")
