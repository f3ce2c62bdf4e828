"""CIDEr-D of single captions against a fixed corpus of references: a reward that can be asked for at any time.

pycocoevalcap's `Cider` is CIDEr-D (clipped counts, Gaussian length penalty) and scores a whole set at once, taking its
document frequencies from that set. Here they are taken once, from the training captions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from lavis_evlgen.evaluation.caption_metrics import check_tokenizer, simple_tokenize
from lavis_evlgen.evaluation.java import ptb_tokenize
from lavis_evlgen.evaluation.ptb_tokenizer import ptb_like

LONGEST_NGRAM = 4
SIGMA = 6.0  # of the length penalty, in words
END = "<end>"  # no tokenizer makes this word
CACHED_PICTURES = 5000  # whose references are kept as vectors: about 30 kB a picture of five captions


class _Vector(NamedTuple):
    """tf-idf weights of a caption's n-grams, their norms by n, and its length in bigrams, as pycocoevalcap counts."""

    weights: dict[tuple[str, ...], float]
    norms: tuple[float, ...]
    length: int


class CiderD:
    """`score(key, caption)`: CIDEr-D of one caption, 0 to 10, equal to pycocoevalcap's on the same corpus.

    references: tokenised captions (words joined by spaces) of at least two pictures, by picture; they are also the
    corpus of the document frequencies. Raises ValueError for fewer. Source: Vedantam et al. 2015, section 4.
    """

    def __init__(self, references: Mapping[Hashable, Sequence[str]]):
        if len(references) < 2:
            raise ValueError(f"CIDEr-D of {len(references)} pictures is 0 for any caption; give more references")
        self.references = references
        self.frequency: Counter = Counter()
        for own in references.values():
            self.frequency.update(set(chain.from_iterable(map(ngrams, own))))
        self._log_pictures = math.log(len(references))
        self._of_picture = lru_cache(CACHED_PICTURES)(self._vectors)

    def _vectors(self, key: Hashable) -> list[_Vector]:
        return [self._vector(caption) for caption in self.references[key]]

    def _vector(self, caption: str) -> _Vector:
        counts = ngrams(caption)
        weights, squares, length = {}, [0.0] * LONGEST_NGRAM, 0
        for ngram, count in counts.items():
            weight = count * (self._log_pictures - math.log(max(1, self.frequency.get(ngram, 0))))
            weights[ngram] = weight
            squares[len(ngram) - 1] += weight * weight
            length += count * (len(ngram) == 2)
        return _Vector(weights, tuple(map(math.sqrt, squares)), length)

    def score(self, key: Hashable, caption: str) -> float:
        """CIDEr-D of a tokenised caption against the references of picture `key`. Raises KeyError."""
        own, references = self._vector(caption), self._of_picture(key)
        return 10 * sum(_similarity(own, reference) for reference in references) / (LONGEST_NGRAM * len(references))


def ngrams(caption: str) -> Counter:
    """Counts of the n-grams, n = 1 to 4, of a tokenised caption."""
    words = caption.split()
    return Counter(
        tuple(words[at : at + n]) for n in range(1, LONGEST_NGRAM + 1) for at in range(len(words) - n + 1)
    )


def _similarity(own: _Vector, reference: _Vector) -> float:
    """Sum over n of the clipped cosine, times the length penalty."""
    products = [0.0] * LONGEST_NGRAM
    for ngram, weight in own.weights.items():
        other = reference.weights.get(ngram)
        if other is not None:
            products[len(ngram) - 1] += min(weight, other) * other
    cosines = (
        product / (a * b) for product, a, b in zip(products, own.norms, reference.norms, strict=True) if a and b
    )
    return sum(cosines) * math.exp(-((own.length - reference.length) ** 2) / (2 * SIGMA**2))


class CaptionReward:
    """`reward(key, caption)`: CIDEr-D of a raw caption, and its words, against raw training captions.

    tokenizer: auto, ptb, simple, as in caption_metrics. Under ptb the references go through Java once, here, and
    captions through `ptb_like`, which starts no process; `agreement` is the share of references on which the two give
    the same words. `end`: an end mark is a word of every reference, and of every caption that `ended` by itself, so
    that a caption cut off in mid-sentence does not score like a whole one. Source: Hu et al. 2023, "A Request for
    Clarity over the End of Sequence Token in the Self-Critical Sequence Training".
    """

    def __init__(self, references: Mapping[Hashable, Sequence[str]], tokenizer: str = "auto", end: bool = True):
        java = check_tokenizer(tokenizer)
        self.tokenizer = tokenizer if tokenizer != "auto" else ("ptb" if java else "simple")
        self.end, self._words = end, ptb_like if self.tokenizer == "ptb" else simple_tokenize
        raw = [caption for own in references.values() for caption in own]
        words = ptb_tokenize(raw, java) if self.tokenizer == "ptb" else list(map(simple_tokenize, raw))
        same = sum(self._words(caption) == tokens for caption, tokens in zip(raw, words, strict=True))
        self.agreement = same / max(1, len(raw))
        self.mean_words = sum(len(tokens.split()) for tokens in words) / max(1, len(raw))
        rest = iter(words)
        self.cider_d = CiderD({key: [self._whole(next(rest)) for _ in own] for key, own in references.items()})

    def _whole(self, words: str) -> str:
        return f"{words} {END}" if self.end else words

    def __call__(self, key: Hashable, caption: str, ended: bool = True) -> tuple[float, int]:
        """(CIDEr-D, number of words) of a caption of picture `key`; the end mark is not counted."""
        words = self._words(caption)
        return self.cider_d.score(key, self._whole(words) if ended else words), len(words.split())

    def facts(self) -> dict:
        """What a run card says of the reward."""
        candidates = "ptb_like" if self.tokenizer == "ptb" else "simple"
        return {
            "metric": "CIDEr-D",
            "document_frequencies": f"training captions of {len(self.cider_d.references)} pictures",
            "tokenizer_of_references": self.tokenizer,
            "tokenizer_of_captions": candidates,
            "same_words_on_references": self.agreement,
            "end_mark": self.end,
            "mean_reference_words": self.mean_words,
        }
