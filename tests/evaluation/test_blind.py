import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_evlgen.evaluation import blind_scores, caption_metrics, score_captions, score_with_blind
from lavis_evlgen.evaluation.blind import derangement

WORDS = "cat dog bus tree car bird boat house horse train".split()
REFERENCES = {i: [f"a big {word} in the {word} park", f"one {word} here"] for i, word in enumerate(WORDS)}
RIGHT = {i: f"a big {word} in the {word} park" for i, word in enumerate(WORDS)}


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.integers(0, 2**32 - 1))
def test_derangement_moves_everything(n, seed):
    order = derangement(n, np.random.default_rng(seed))
    assert sorted(order) == list(range(n))
    assert not (order == np.arange(n)).any()


def test_derangements_are_uniform():
    rng = np.random.default_rng(0)
    drawn = [tuple(derangement(4, rng)) for _ in range(1800)]
    counts = [drawn.count(order) for order in set(drawn)]
    assert len(counts) == 9 and min(counts) > 140 and max(counts) < 260


def test_right_captions_beat_blind_ones():
    right, blind = score_with_blind(RIGHT, REFERENCES, metrics=["CIDEr"], tokenizer="simple")
    assert right.scores["CIDEr"] > 5 * blind.mean["CIDEr"]
    assert right == score_captions(RIGHT, REFERENCES, ["CIDEr"], "simple")
    assert blind == blind_scores(RIGHT, REFERENCES, tokenizer="simple")
    assert blind.tokenizer == "simple" and len(blind.per_shuffle) == 5
    for name in ("CIDEr", "BLEU-4"):
        assert blind.mean[name] == pytest.approx(np.mean([scores[name] for scores in blind.per_shuffle]))


def test_captions_that_ignore_the_picture_score_the_same_blind():
    same = {i: "a big cat in the park" for i in REFERENCES}
    right, blind = score_with_blind(same, REFERENCES, tokenizer="simple", metrics=["CIDEr"])
    assert blind.mean["CIDEr"] == pytest.approx(right.scores["CIDEr"])


def test_two_samples_can_only_swap():
    captions = {i: RIGHT[i] for i in (0, 1)}
    references = {i: [*REFERENCES[i], "a third"] for i in (0, 1)}
    swapped = score_captions({0: captions[1], 1: captions[0]}, references, ["BLEU"], "simple").scores
    blind = blind_scores(captions, references, shuffles=3, metrics=["BLEU"], tokenizer="simple")
    assert blind.per_shuffle == [swapped] * 3


def test_seed_decides():
    rng = np.random.default_rng(0)  # overlapping captions, so that the permutation matters
    captions = {i: " ".join(rng.choice(WORDS[:5], 4)) for i in range(10)}
    references = {i: [" ".join(rng.choice(WORDS[:5], 4))] for i in range(10)}
    scores = [blind_scores(captions, references, 2, seed, tokenizer="simple") for seed in (3, 3, 4)]
    assert scores[0] == scores[1] and scores[0].per_shuffle != scores[2].per_shuffle


def test_tokenised_once(monkeypatch):
    calls = []
    monkeypatch.setattr(caption_metrics, "find_java", lambda: "java")
    monkeypatch.setattr(caption_metrics, "ptb_tokenize", lambda texts, java: calls.append(java) or texts)
    right, blind = score_with_blind(RIGHT, REFERENCES, metrics=["CIDEr"])
    assert calls == ["java"] and right.tokenizer == blind.tokenizer == "ptb"


def test_too_few_samples():
    with pytest.raises(ValueError, match="at least 2 samples.* got 1"):
        blind_scores({0: "a cat"}, {0: ["a cat"]})
    with pytest.raises(ValueError, match="at least 2"):
        derangement(1, np.random.default_rng())
    with pytest.raises(ValueError, match="at least 1 shuffle"):
        blind_scores(RIGHT, REFERENCES, shuffles=0)
