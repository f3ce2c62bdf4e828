"""Caption metrics: CIDEr, BLEU, ROUGE-L and METEOR as the COCO caption evaluation computes them.

The scorers are pycocoevalcap's. What is added: both sides are checked before anything is scored, the
tokenizer is named in the result, and what cannot be scored where it runs is listed with the reason.
"""

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from lavis_evlgen.evaluation.java import INSTALL_JAVA, Meteor, find_java, ptb_tokenize

METRICS = ("CIDEr", "BLEU", "ROUGE_L", "METEOR")
TOKENIZERS = ("auto", "ptb", "simple")

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


@dataclass(frozen=True)
class TokenizedCaptions:
    """Captions ready to score: words joined by single spaces, and the tokenizer that made them."""

    predictions: dict[Hashable, str]
    references: dict[Hashable, list[str]]
    tokenizer: str
    java: str | None = None


@dataclass(frozen=True)
class CaptionScores:
    """Scores of one set of captions, on pycocoevalcap's native scales.

    `scores`: `CIDEr` (0 to 10; papers print it times 100, so 1.0 is their "100"), `BLEU-1` to `BLEU-4`,
    `ROUGE_L` and `METEOR` (each 0 to 1; papers print percent). `per_sample[id]` has CIDEr, ROUGE_L, METEOR
    and BLEU-4 of each caption. `tokenizer` is "ptb" (comparable with published numbers) or "simple" (not).
    `unscored` says why a metric that was asked for is missing.
    """

    scores: dict[str, float]
    per_sample: dict[Hashable, dict[str, float]]
    tokenizer: str
    unscored: dict[str, str] = field(default_factory=dict)


def score_names(metrics: Sequence[str]) -> list[str]:
    """The names that scores of `metrics` will have on this machine: METEOR only where Java is found."""
    names = []
    for metric in metrics:
        if metric != "METEOR" or find_java():
            names += [f"BLEU-{n}" for n in range(1, 5)] if metric == "BLEU" else [metric]
    return names


def score_captions(
    predictions: Mapping[Hashable, str],
    references: Mapping[Hashable, Sequence[str]],
    metrics: Sequence[str] = METRICS,
    tokenizer: str = "auto",
) -> CaptionScores:
    """Score one caption per sample against its references; see `CaptionScores` for the scales.

    `tokenizer="auto"` takes the PTB tokenizer where Java runs and the "simple" one elsewhere; METEOR needs
    Java. CIDEr takes its document frequencies from the references given, so it is 0 for a single sample and
    depends on the size of the set. Raises `ValueError` for ids that lack a caption or a reference and for
    unknown metrics or tokenizers, `TypeError` for a caption that is no string, `RuntimeError` for
    `tokenizer="ptb"` without Java. Source: Chen et al. 2015 (Microsoft COCO Captions); Vedantam et al. 2015
    (CIDEr).
    """
    check_metrics(metrics)
    return score_tokenized(tokenize_captions(predictions, references, tokenizer), metrics)


def tokenize_captions(
    predictions: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]], tokenizer: str = "auto"
) -> TokenizedCaptions:
    """Check both sides and tokenise every caption once (one Java start). Errors as in `score_captions`."""
    java = check_tokenizer(tokenizer)
    _check_sides(predictions, references)
    name = tokenizer if tokenizer != "auto" else ("ptb" if java else "simple")

    # references first, then predictions, each in its order: PTB looks one line ahead at abbreviations
    owners = [key for key in predictions for _ in references[key]]
    texts = [text for key in predictions for text in references[key]] + list(predictions.values())
    words = ptb_tokenize(texts, java) if name == "ptb" else [simple_tokenize(text) for text in texts]

    tokenized = {key: [] for key in predictions}
    for key, text in zip(owners, words, strict=False):
        tokenized[key].append(text)
    _refuse("no word in any reference", [key for key, own in tokenized.items() if not any(own)])
    answers = dict(zip(predictions, words[len(owners) :], strict=True))
    return TokenizedCaptions(answers, tokenized, name, java)


def simple_tokenize(caption: str) -> str:
    """Lower-cased words of `caption` joined by spaces: letters, digits and inner apostrophes; no punctuation.

    Near to PTB on plain captions but not equal to it (PTB splits "man's" and "don't" in two, keeps "t-shirt"
    in one), so scores made with it are comparable only with each other.
    """
    return " ".join(_WORD.findall(caption.lower().replace("\u2019", "'")))


def score_tokenized(captions: TokenizedCaptions, metrics: Sequence[str] = METRICS) -> CaptionScores:
    """Score captions that `tokenize_captions` made; scales and errors as in `score_captions`."""
    check_metrics(metrics)
    keys = list(captions.predictions)
    wrapped = {key: [captions.predictions[key]] for key in keys}
    scores: dict[str, float] = {}
    columns: dict[str, Sequence[float]] = {}
    unscored: dict[str, str] = {}
    if "CIDEr" in metrics:
        from pycocoevalcap.cider.cider import Cider

        scores["CIDEr"], columns["CIDEr"] = Cider().compute_score(captions.references, wrapped)
    if "BLEU" in metrics:
        from pycocoevalcap.bleu.bleu import Bleu

        corpus, each = Bleu(4).compute_score(captions.references, wrapped, verbose=0)
        scores.update({f"BLEU-{n}": value for n, value in enumerate(corpus, start=1)})
        columns["BLEU-4"] = each[3]
    if "ROUGE_L" in metrics:
        from pycocoevalcap.rouge.rouge import Rouge

        scores["ROUGE_L"], columns["ROUGE_L"] = Rouge().compute_score(captions.references, wrapped)
    if "METEOR" in metrics:
        _add_meteor(captions, scores, columns, unscored)
    per_sample = {
        key: {name: float(column[i]) for name, column in columns.items()} for i, key in enumerate(keys)
    }
    scores = {name: float(value) for name, value in scores.items()}
    return CaptionScores(scores, per_sample, captions.tokenizer, unscored)


def _add_meteor(captions: TokenizedCaptions, scores: dict, columns: dict, unscored: dict) -> None:
    """METEOR into `scores` and `columns`, or the reason into `unscored`: a failure must not lose the other metrics."""
    if captions.java is None:
        unscored["METEOR"] = f"Java was not found on PATH. {INSTALL_JAVA}"
        return
    try:
        with Meteor(captions.java) as meteor:
            predictions, references = captions.predictions, captions.references
            scores["METEOR"], columns["METEOR"] = meteor.score(
                list(predictions.values()), [references[key] for key in predictions]
            )
    except (OSError, RuntimeError, ValueError) as error:
        unscored["METEOR"] = f"METEOR failed: {error}. It needs about 2 GB of free memory."


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise `ValueError` for an unknown metric name, with the nearest known one."""
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be a list of names, not the string {metrics!r}")
    for name in metrics:
        if name not in METRICS:
            near = difflib.get_close_matches(name.upper(), [known.upper() for known in METRICS], 1, 0.4)
            hint = next((f", did you mean {known!r}?" for known in METRICS if known.upper() in near), "")
            raise ValueError(f"unknown caption metric {name!r}{hint} Known: {', '.join(METRICS)}")


def check_tokenizer(tokenizer: str) -> str | None:
    """The path of Java, or None where there is none. Raises as `score_captions` does."""
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer {tokenizer!r}; choose one of {', '.join(TOKENIZERS)}")
    java = find_java()
    if tokenizer == "ptb" and java is None:
        raise RuntimeError(f'tokenizer="ptb" needs Java, which was not found on PATH. {INSTALL_JAVA}')
    return java


def _check_sides(predictions: Mapping, references: Mapping) -> None:
    if not predictions and not references:
        raise ValueError("there are no captions to score")
    _refuse("a reference but no prediction", [key for key in references if key not in predictions])
    _refuse("a prediction but no reference", [key for key in predictions if not references.get(key)])
    for key, caption in predictions.items():
        if not isinstance(caption, str):
            raise TypeError(f"the prediction of sample {key!r} is a {type(caption).__name__}, not a string")
        own = references[key]
        if isinstance(own, str) or not all(isinstance(text, str) for text in own):
            raise TypeError(f"the references of sample {key!r} must be a list of strings")


def _refuse(fault: str, keys: list) -> None:
    if keys:
        first = ", ".join(repr(key) for key in keys[:5]) + (", ..." if len(keys) > 5 else "")
        raise ValueError(f"{len(keys)} sample(s) have {fault}: {first}")
