"""VQA accuracy equals the official evaluation as LAVIS ships it, step by step and as a whole."""

import contextlib
import io
import types

import numpy as np
import pytest
from lavis.common.vqa_tools.vqa_eval import VQAEval

from lavis_evlgen.evaluation import lemmas
from lavis_evlgen.evaluation.vqa_metrics import (
    exact_match,
    gqa_match,
    normalise_answer,
    plain_words,
    score_answers,
    strip_punctuation,
    vqa_accuracy,
)

OFFICIAL = VQAEval()
WORDS = ["yes", "no", "a", "an", "The", "two", "none", "10", "2:50", "pm", "dont", "Im", "cat's", "it's", "o", "red",
         "ten", "1,000", "3.5", ".5", "5.", "p.m.", "t-shirt", "he'dve", "and/or", "left"]  # fmt: skip
MARKS = list(";/[]\"{}()=+\\_-><@`,?!.:'&") + [" ", " ", " ", "  ", "\n", "\t"]


def random_text(rng) -> str:
    pieces = []
    for _ in range(rng.integers(1, 6)):
        pieces.append(str(rng.choice(WORDS)))
        pieces.append("".join(rng.choice(MARKS, rng.integers(0, 3))) if rng.random() < 0.7 else " ")
    return "".join(pieces)


def official_accuracy(prediction: str, answers: list[str]) -> float:
    """LAVIS's VQAEval on one question."""
    truth = {1: {"answers": [{"answer": a, "answer_id": n} for n, a in enumerate(answers)], "question_type": "",
                 "answer_type": ""}}  # fmt: skip
    truth = types.SimpleNamespace(qa=truth, getQuesIds=lambda: [1])
    said = types.SimpleNamespace(qa={1: {"answer": prediction}})
    official = VQAEval(truth, said, n=6)
    with contextlib.redirect_stdout(io.StringIO()):
        official.evaluate()
    return official.evalQA[1] / 100


@pytest.mark.parametrize("seed", range(4))
def test_normalisation_equals_the_official_one(seed):
    rng = np.random.default_rng(seed)
    changed = 0
    for _ in range(1500):
        text = random_text(rng)
        expected = OFFICIAL.processPunctuation(text)
        assert strip_punctuation(text) == expected, text
        assert plain_words(text) == OFFICIAL.processDigitArticle(text), text
        assert normalise_answer(text) == OFFICIAL.processDigitArticle(expected), text
        changed += normalise_answer(text) != text
    assert changed > 1000


def test_every_official_contraction_and_number_is_known():
    for word in [*OFFICIAL.contractions, *VQAEval().manualMap, *VQAEval().articles]:
        for text in (word, word.upper(), f"on {word} side"):
            assert plain_words(text) == OFFICIAL.processDigitArticle(text), text
    assert plain_words("Dont wed Hed") == "don't wed he'd"  # wed is a word


def test_many_periods_count_as_officially():
    for text in ("." * 40 + "yes", "yes" + "." * 31, "3.5.", "p.m. 2.30."):
        assert strip_punctuation(text) == OFFICIAL.processPunctuation(text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Yes.", "yes"), ("The two dogs", "2 dogs"), ("1,000", "1000"), ("t-shirt", "t shirt"),
        ("red, blue", "red blue"), ("dont know", "don't know"), ("2:50 p.m.", "2:50 pm"), ("3.5", "3.5"),
        ("an apple / a pear", "apple pear"),
    ],
)  # fmt: skip
def test_normalisation_by_hand(text, expected):
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(
    "prediction, answers, expected",
    [
        # ten answers; leaving out one of m matches gives min((m - 1) / 3, 1), leaving out another min(m / 3, 1)
        ("red", ["red"] * 10, 1.0),
        ("red", ["red"] * 4 + ["blue"] * 6, 1.0),
        ("red", ["red"] * 3 + ["blue"] * 7, (3 * 2 / 3 + 7) / 10),  # 0.9
        ("red", ["red"] * 2 + ["blue"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),  # 0.6
        ("red", ["red"] + ["blue"] * 9, 9 * (1 / 3) / 10),  # 0.3
        ("red", ["blue"] * 10, 0.0),
        ("Two.", ["2"] * 10, 1.0),
        ("2", ["two"] * 10, 0.0),  # human answers are not normalised ...
        ("t shirt", ["t-shirt"] * 9 + ["shirt"], 1.0),  # ... but for punctuation, where they differ
        ("t shirt", ["t-shirt"] * 10, 0.0),
    ],
)
def test_accuracy_by_hand(prediction, answers, expected):
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected)
    assert official_accuracy(prediction, answers) == pytest.approx(expected, abs=1e-6)


def test_accuracy_equals_the_official_one():
    rng = np.random.default_rng(7)
    scores = set()
    for _ in range(400):
        pool = [random_text(rng) for _ in range(rng.integers(1, 4))]
        pool += [normalise_answer(text) for text in pool]
        answers = [str(text) for text in rng.choice(pool, 10)]
        prediction = str(rng.choice(pool))
        mine = vqa_accuracy(prediction, answers)
        assert mine == pytest.approx(official_accuracy(prediction, answers), abs=1e-6), (prediction, answers)
        scores.add(round(mine, 6))
    assert len(scores) >= 5  # of the values it can take


def test_gqa_matches_the_answer_as_it_stands():
    assert gqa_match("The Dog.", ["dog"]) == 1 and gqa_match("dog", ["Dog"]) == 0 and gqa_match("dogs", ["dog"]) == 0


def test_exact_normalises_both_sides():
    assert exact_match("2 dogs", ["The two dogs."]) == 1 and exact_match("cat", ["dog", "Cat"]) == 1
    assert exact_match("b", ["A"]) == 0 and exact_match("a", ["A"]) == 1 and exact_match("the", ["A"]) == 0


def test_scores_of_a_set():
    answers = {1: ["yes"] * 10, 2: ["two"] * 10, 3: ["red"] * 3 + ["blue"] * 7}
    found = score_answers({1: "Yes", 2: "2", 3: "red"}, answers, "vqa", {1: "yes/no", 2: "number", 3: "other"})
    assert found.accuracy == pytest.approx((1 + 0 + 0.9) / 3)
    assert found.per_sample == pytest.approx({1: 1.0, 2: 0.0, 3: 0.9})
    assert found.by_kind == pytest.approx({"yes/no": 1.0, "number": 0.0, "other": 0.9})
    assert found.unmatchable == 1  # "two": predictions are turned into "2"
    exact = score_answers({1: "Yes", 2: "2", 3: "green"}, answers, "exact")
    assert (exact.accuracy, exact.by_kind, exact.unmatchable) == (pytest.approx(2 / 3), {}, 0)


@pytest.mark.parametrize(
    "predictions, answers, metric, words",
    [
        ({}, {}, "exact", "no answers to score"),
        ({1: "x"}, {1: []}, "exact", "1 question.* no human answer, such as 1"),
        ({1: "x"}, {1: ["x"]}, "vqa", "needs 4 human answers or more, got"),
        ({1: "x"}, {1: ["x"]}, "exakt", "unknown answer metric 'exakt', did you mean 'exact'"),
    ],
)
def test_what_cannot_be_scored_says_so(predictions, answers, metric, words):
    with pytest.raises(ValueError, match=words):
        score_answers(predictions, answers, metric)


def token(text, lemma, pos):
    return types.SimpleNamespace(text=text, lemma_=lemma, pos_=pos)


def test_nouns_and_verbs_are_lemmatised(monkeypatch):
    spacy = pytest.importorskip("spacy")
    known = {"dogs": ("dog", "NOUN"), "running": ("run", "VERB"), "bigger": ("big", "ADJ")}
    seen = []

    def load(name):
        seen.append(name)
        return lambda text: [token(word, *known.get(word, (word, "X"))) for word in text.split()]

    monkeypatch.setattr(spacy, "load", load)
    assert lemmas.load_lemmatizer()("bigger dogs running fast") == "bigger dog run fast"
    assert seen == ["en_core_web_sm"]


def test_a_missing_lemmatizer_says_what_to_do(monkeypatch):
    spacy = pytest.importorskip("spacy")

    def load(name):
        raise OSError("[E050] Can't find model")

    monkeypatch.setattr(spacy, "load", load)
    with pytest.raises(lemmas.NoLemmatizer, match="spacy download en_core_web_sm.*run.lemmatize=false"):
        lemmas.load_lemmatizer()
