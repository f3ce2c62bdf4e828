"""Blind scores: what the captions would score if each belonged to another picture.

A model that ignores its pictures has equal right and blind scores. Their difference measures what it takes from the
pictures; the blind score itself, what captions score by their style alone.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lavis_evlgen.evaluation.caption_metrics import (
    METRICS,
    CaptionScores,
    TokenizedCaptions,
    check_metrics,
    score_tokenized,
    tokenize_captions,
)

BLIND_METRICS = ("CIDEr", "BLEU")


@dataclass(frozen=True)
class BlindScores:
    """`mean` over the shuffles and `per_shuffle` scores, on the scales of `CaptionScores.scores`."""

    mean: dict[str, float]
    per_shuffle: list[dict[str, float]]
    tokenizer: str
    seed: int


def derangement(n: int, rng: np.random.Generator) -> np.ndarray:
    """A uniformly random permutation (n,) of 0..n-1, int64, that moves every element. Needs n >= 2."""
    if n < 2:
        raise ValueError(f"a blind score needs at least 2 samples to shuffle, got {n}")
    fixed = np.arange(n)
    while True:  # a random permutation is a derangement with probability 1/e, so about 3 draws
        order = rng.permutation(n)
        if not (order == fixed).any():
            return order


def blind_scores(
    predictions: Mapping[Hashable, str],
    references: Mapping[Hashable, Sequence[str]],
    shuffles: int = 5,
    seed: int = 0,
    *,
    metrics: Sequence[str] = BLIND_METRICS,
    tokenizer: str = "auto",
) -> BlindScores:
    """Score the same captions with the pictures shuffled by derangements: no sample keeps its own caption.

    Raises `ValueError` for fewer than 2 samples or 1 shuffle; other errors as in `score_captions`.
    """
    _check(len(predictions), shuffles, metrics)
    return _blind(tokenize_captions(predictions, references, tokenizer), shuffles, seed, metrics)


def score_with_blind(
    predictions: Mapping[Hashable, str],
    references: Mapping[Hashable, Sequence[str]],
    shuffles: int = 5,
    seed: int = 0,
    *,
    metrics: Sequence[str] = METRICS,
    blind_metrics: Sequence[str] = BLIND_METRICS,
    tokenizer: str = "auto",
) -> tuple[CaptionScores, BlindScores]:
    """`score_captions` and `blind_scores` of the same captions, tokenised once. Errors as in those two."""
    check_metrics(metrics)
    _check(len(predictions), shuffles, blind_metrics)
    captions = tokenize_captions(predictions, references, tokenizer)
    return score_tokenized(captions, metrics), _blind(captions, shuffles, seed, blind_metrics)


def _check(samples: int, shuffles: int, metrics: Sequence[str]) -> None:
    check_metrics(metrics)
    if samples < 2:
        raise ValueError(f"a blind score needs at least 2 samples to shuffle, got {samples}")
    if shuffles < 1:
        raise ValueError(f"a blind score needs at least 1 shuffle, got {shuffles}")


def _blind(captions: TokenizedCaptions, shuffles: int, seed: int, metrics: Sequence[str]) -> BlindScores:
    rng = np.random.default_rng(seed)
    keys, texts = list(captions.predictions), list(captions.predictions.values())
    per_shuffle = []
    for _ in range(shuffles):
        order = derangement(len(keys), rng)
        shuffled = {key: texts[j] for key, j in zip(keys, order, strict=True)}
        per_shuffle.append(score_tokenized(replace(captions, predictions=shuffled), metrics).scores)
    mean = {name: float(np.mean([scores[name] for scores in per_shuffle])) for name in per_shuffle[0]}
    return BlindScores(mean, per_shuffle, captions.tokenizer, seed)
