"""Does a caption tell what happened in the right order? For events whose reverse shows the same frames."""

from collections.abc import Mapping, Sequence

# words for an event and for its reverse
OPPOSITES = (("left", "right"), ("up", "down"), ("appears", "leaves"), ("collide", "part"))
_TURNS = "turns"  # "red circle turns blue": what it turns into says the order


def order_word(caption: str, kind: Sequence[str] | None = None) -> tuple[tuple[str, ...], str] | None:
    """(kind, word): the word of `caption` that says in which order things happened; kind is a pair of OPPOSITES or
    ("turns",). Of that `kind` only, where one is given. None where there is no such word, or both of a pair."""
    words = caption.lower().replace(".", " ").replace(",", " ").split()
    for pair in (*OPPOSITES, (_TURNS,)):
        if kind is not None and tuple(kind) != pair:
            continue
        if pair == (_TURNS,):
            said = {words[n + 1] for n, word in enumerate(words[:-1]) if word == _TURNS}
        else:
            said = set(words) & set(pair)
        if len(said) == 1:
            return pair, said.pop()
    return None


def order_accuracy(predicted: Mapping, true: Mapping) -> dict[str, float]:
    """Share of captions with the right order word, as a whole and by kind ("order_accuracy left/right").

    predicted {id: caption}; true {id: caption, or captions of which the first counts}; `order_asked` is the number of
    true captions with an order word, the others are not asked. A prediction with no such word, or with both, is
    wrong. Where every clip is asked beside its reverse, a model that ignores the order of frames answers both alike
    and gets at most 0.5. Raises ValueError where a prediction is missing, or nothing can be asked.
    """
    right: dict[str, list[bool]] = {}
    for key, captions in true.items():
        told = order_word(captions if isinstance(captions, str) else captions[0])
        if told is None:
            continue
        if key not in predicted:
            raise ValueError(f"there is no predicted caption of {key!r}")
        right.setdefault("/".join(told[0]), []).append(order_word(predicted[key], told[0]) == told)
    answers = [answer for found in right.values() for answer in found]
    if not answers:
        words = ", ".join(word for pair in OPPOSITES for word in pair)
        raise ValueError(f"no true caption says an order: none has {words} or {_TURNS}")
    return {
        "order_accuracy": sum(answers) / len(answers),
        **{f"order_accuracy {kind}": sum(found) / len(found) for kind, found in sorted(right.items())},
        "order_asked": len(answers),
    }
