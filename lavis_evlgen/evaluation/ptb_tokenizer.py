"""PTB-like words without Java: for captions that must be tokenised one by one, while training waits.

Follows what Stanford's PTBTokenizer makes of plain lower-cased captions, after which the COCO evaluation drops the
punctuation. Where a caption comes out otherwise than there, it is in rare signs; who uses this measures how often.
"""

import re

_CLITICS = r"'(?:s|m|d|re|ve|ll)"
_ABBREVIATIONS = r"(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|ave|blvd)\."
_TOKEN = re.compile(
    rf"""(?P<abbreviation>\b{_ABBREVIATIONS}(?=\s))
    | (?P<initials>\b(?:[a-z]\.){{2,}})
    | (?P<number>\d+(?:[.,:]\d+)+)
    | (?P<word>[^\W_]+(?:['\-./][^\W_]+)*)
    | (?P<clitic>{_CLITICS}\b)
    | (?P<sign>[^\s\w]|_)""",
    re.VERBOSE,
)
_ENDING = re.compile(rf"^(.+?)(n't|{_CLITICS})$")
_IN_TWO = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# the COCO evaluation's list, and the signs that PTB turns into those of it
_DROPPED = set("'\".?!,:;-`\u2014\u2013\u2026\u201c\u201d\u2018")


def ptb_like(caption: str) -> str:
    """Words of `caption` joined by spaces, as PTB splits them, lower-cased and freed of punctuation."""
    words = []
    for match in _TOKEN.finditer(caption.lower().replace("\u2019", "'")):
        token = match.group()
        if match.lastgroup == "sign":
            if token not in _DROPPED:
                words.append(_BRACKETS.get(token, token))
        elif match.lastgroup == "word":
            words += _split(token)
        else:
            words.append(token)
    return " ".join(words)


def _split(word: str) -> list[str]:
    """A contraction as its two words, anything else as it is."""
    if word in _IN_TWO:
        return _IN_TWO[word].split()
    found = _ENDING.match(word)
    return list(found.groups()) if found else [word]
