"""Answers by their dictionary forms, as LAVIS's BLIP-2 scores OK-VQA: nouns and verbs as lemmas, the rest as is."""

from collections.abc import Callable

SPACY_MODEL = "en_core_web_sm"


class NoLemmatizer(RuntimeError):
    """spaCy or its English model is not installed."""


def load_lemmatizer() -> Callable[[str], str]:
    """A function from an answer to the answer with its nouns and verbs lemmatised. Raises NoLemmatizer."""
    try:
        import spacy

        pipeline = spacy.load(SPACY_MODEL)
    except (ImportError, OSError) as error:
        raise NoLemmatizer(
            f"run.lemmatize=true needs spaCy and its model {SPACY_MODEL} ({type(error).__name__}): install it with "
            f"`python -m spacy download {SPACY_MODEL}`, or set run.lemmatize=false, whose scores are lower than "
            "published ones, which were lemmatised"
        ) from error

    def lemmatize(answer: str) -> str:
        return " ".join(token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text for token in pipeline(answer))

    return lemmatize
