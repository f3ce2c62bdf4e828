import math
import os
from collections import Counter

import numpy as np
import pytest

from lavis_evlgen.evaluation import java
from lavis_evlgen.evaluation.caption_metrics import score_captions, simple_tokenize, tokenize_captions

needs_java = pytest.mark.skipif(java.find_java() is None, reason="needs Java on PATH")

REFERENCES = {
    1: ["A man rides a wave on a surfboard.", "a surfer in the blue ocean", "The man's surfing a large wave"],
    2: ["a red bus is parked on the street", "A bus on a street, near a building."],
    "x": ["two dogs play with a ball in the park", "dogs running on the green grass", "two dogs play"],
    4: ["a plate of food on a wooden table", "some food on a plate"],
}
PREDICTIONS = {
    1: "a man riding a wave on a surfboard",
    2: "A red bus on the street!",
    "x": "two dogs play with a ball",
    4: "a table",
}
FAST = ("CIDEr", "BLEU", "ROUGE_L")


def cider_by_hand(predictions, references, sigma=6.0):
    """CIDEr-D of Vedantam et al. 2015: clipped tf-idf cosine, Gaussian length penalty, times 10."""

    def grams(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    scores = {}
    for key, caption in predictions.items():
        total = 0.0
        for n in range(1, 5):
            per_image = [set().union(*(grams(text, n) for text in own)) for own in references.values()]
            documents = Counter(gram for found in per_image for gram in found)

            def weights(text, n=n, documents=documents):
                idf = {g: math.log(len(references) / max(1, documents[g])) for g in grams(text, n)}
                return {g: count * idf[g] for g, count in grams(text, n).items()}

            mine = weights(caption)
            for reference in references[key]:
                theirs = weights(reference)
                dot = sum(min(mine[g], theirs[g]) * theirs[g] for g in mine.keys() & theirs.keys())
                norm = math.hypot(*mine.values()) * math.hypot(*theirs.values())
                # the length pycocoevalcap compares is the number of 2-grams
                gap = grams(caption, 2).total() - grams(reference, 2).total()
                penalty = math.exp(-(gap**2) / (2 * sigma**2))
                total += penalty * dot / norm / len(references[key]) if norm else 0.0
        scores[key] = 10 * total / 4
    return scores


@pytest.mark.parametrize("name", ["simple", pytest.param("ptb", marks=needs_java)])
def test_scores_equal_pycocoevalcap(name):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if name == "ptb":
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        sides = REFERENCES, {key: [text] for key, text in PREDICTIONS.items()}
        gts, res = (
            PTBTokenizer().tokenize({key: [{"caption": text} for text in own] for key, own in side.items()})
            for side in sides
        )
    else:
        gts = {key: [simple_tokenize(text) for text in own] for key, own in REFERENCES.items()}
        res = {key: [simple_tokenize(text)] for key, text in PREDICTIONS.items()}
    mine = score_captions(PREDICTIONS, REFERENCES, FAST, tokenizer=name)
    assert mine.tokenizer == name and not mine.unscored
    cider, each = Cider().compute_score(gts, res)
    assert mine.scores["CIDEr"] == pytest.approx(cider, abs=1e-9)
    assert [row["CIDEr"] for row in mine.per_sample.values()] == pytest.approx(list(each), abs=1e-9)
    bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
    assert [mine.scores[f"BLEU-{n}"] for n in range(1, 5)] == pytest.approx(bleu, abs=1e-9)
    assert mine.scores["ROUGE_L"] == pytest.approx(Rouge().compute_score(gts, res)[0], abs=1e-9)
    assert all(type(value) is float for value in mine.scores.values())


def test_cider_equals_its_formula():
    tokens = tokenize_captions(PREDICTIONS, REFERENCES, "simple")
    expected = cider_by_hand(tokens.predictions, tokens.references)
    result = score_captions(PREDICTIONS, REFERENCES, ["CIDEr"], "simple")
    assert {key: row["CIDEr"] for key, row in result.per_sample.items()} == pytest.approx(expected, abs=1e-6)
    assert result.scores["CIDEr"] == pytest.approx(np.mean(list(expected.values())), abs=1e-6)
    assert set(result.scores) == {"CIDEr"}


def test_scores_do_not_depend_on_the_order_of_ids():
    turned = dict(reversed(REFERENCES.items()))
    one = score_captions(PREDICTIONS, REFERENCES, FAST, "simple")
    two = score_captions(PREDICTIONS, turned, FAST, "simple")
    assert one == two
    backwards = score_captions(dict(reversed(PREDICTIONS.items())), turned, FAST, "simple")
    assert backwards.per_sample["x"] == one.per_sample["x"]
    assert backwards.scores == pytest.approx(one.scores)


def test_identical_captions_score_full_marks():
    same = {key: own[0] for key, own in REFERENCES.items() if key != 4}
    result = score_captions(same, {key: [text] for key, text in same.items()}, FAST, "simple")
    assert result.scores["CIDEr"] == pytest.approx(10.0)
    assert result.scores["BLEU-4"] == pytest.approx(1.0, abs=1e-6)
    assert result.scores["ROUGE_L"] == pytest.approx(1.0)


def test_empty_captions_score_nothing():
    result = score_captions({key: "" for key in REFERENCES}, REFERENCES, FAST, "simple")
    assert max(result.scores.values()) == pytest.approx(0.0)


def test_simple_tokenizer_drops_punctuation_only():
    assert simple_tokenize("  A man\u2019s T-shirt, (naïve) café_3! ''  ") == "a man's t shirt naïve café 3"
    assert simple_tokenize("...") == simple_tokenize("") == ""


def test_without_java_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = score_captions(PREDICTIONS, REFERENCES)
    assert result.tokenizer == "simple"
    assert "METEOR" not in result.scores and "Java" in result.unscored["METEOR"]
    with pytest.raises(RuntimeError, match="needs Java.*Install"):
        score_captions(PREDICTIONS, REFERENCES, tokenizer="ptb")


@pytest.mark.skipif(os.name != "posix", reason="needs shell scripts")
def test_a_java_that_does_not_run_is_no_java(monkeypatch, tmp_path):
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert java.find_java() is None
    # answers as a Java would, then breaks: the cause is named and the other scores survive
    stub.write_text('#!/bin/sh\n[ "$1" = -version ] && exit 0\necho no memory >&2\nexit 3\n')
    with pytest.raises(RuntimeError, match="(?s)exit status 3.*no memory"):
        score_captions(PREDICTIONS, REFERENCES)
    broken = score_captions(PREDICTIONS, REFERENCES, tokenizer="simple")
    assert "METEOR failed" in broken.unscored["METEOR"] and broken.scores["CIDEr"] > 0


@needs_java
def test_ptb_keeps_every_caption_on_its_line(capfd, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    captions = ["A man's dog.", "", " ", "¿Qué? café 犬 😀", "a\u2028b\x85c\x0bd\re\nf", "..."]
    captions += ["x <", "\ud800 \x00 q"]
    words = java.ptb_tokenize(captions, java.find_java())
    assert words == ["a man 's dog", "", "", "¿ qué café 犬", "a b c d e f", "", "x <", "q"]
    assert java.ptb_tokenize([], "no java needed") == []
    assert capfd.readouterr().err == ""


@needs_java
def test_meteor():
    predictions = {1: "a dog runs", 2: "", 3: "a café 犬", 4: "a ||| red bus", 5: "a man riding a wave"}
    references = {1: ["a dog runs", "dogs"], 2: ["a cat"], 3: ["café"], 4: ["", "a red ||| bus", "a bus"]}
    references[5] = ["a man rides a wave", "surfer"]
    result = score_captions(predictions, references, ["METEOR"])
    assert result.tokenizer == "ptb" and not result.unscored
    each = {key: row["METEOR"] for key, row in result.per_sample.items()}
    assert each[1] == pytest.approx(1.0) and each[2] == 0.0 and 0 < each[3] < 1 and each[4] > 0.3
    assert each[5] == pytest.approx(0.890909090909091)  # as pycocoevalcap's own wrapper scores it
    assert 0 < result.scores["METEOR"] < 1


def test_missing_ids_are_counted_and_named():
    fewer = {key: text for key, text in PREDICTIONS.items() if key != "x"}
    with pytest.raises(ValueError, match="1 sample.* no prediction: 'x'"):
        score_captions(fewer, REFERENCES, FAST, "simple")
    many = {i: "a dog" for i in range(20)}
    with pytest.raises(ValueError, match=r"19 sample.* no reference: 1, 2, 3, 4, 5, \.\.\."):
        score_captions(many, {0: ["a dog"]}, FAST, "simple")
    with pytest.raises(ValueError, match="no reference: 2"):
        score_captions(PREDICTIONS, {**REFERENCES, 2: []}, FAST, "simple")
    with pytest.raises(ValueError, match="no word in any reference: 2"):
        score_captions(PREDICTIONS, {**REFERENCES, 2: ["...", ""]}, FAST, "simple")
    with pytest.raises(ValueError, match="no captions"):
        score_captions({}, {})


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="'Cider'.*did you mean 'CIDEr'"):
        score_captions(PREDICTIONS, REFERENCES, ["Cider"])
    with pytest.raises(ValueError, match="not the string"):
        score_captions(PREDICTIONS, REFERENCES, "CIDEr")
    with pytest.raises(ValueError, match="unknown tokenizer 'PTB'"):
        score_captions(PREDICTIONS, REFERENCES, tokenizer="PTB")
    with pytest.raises(TypeError, match="sample 2 must be a list"):
        score_captions(PREDICTIONS, {**REFERENCES, 2: "a red bus"})
    with pytest.raises(TypeError, match="sample 4 is a list"):
        score_captions({**PREDICTIONS, 4: ["a table"]}, REFERENCES)
