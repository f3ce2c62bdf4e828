"""CIDEr-D of single captions is pycocoevalcap's, and the reward's words are those of the references."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.cider.cider_scorer import CiderScorer

from lavis_evlgen.evaluation import cider_d
from lavis_evlgen.evaluation.cider_d import CaptionReward, CiderD
from lavis_evlgen.evaluation.java import find_java, ptb_tokenize
from lavis_evlgen.evaluation.ptb_tokenizer import ptb_like

CAPTION = st.lists(st.sampled_from("a red blue dog cat runs sits on the <end>".split()), max_size=12).map(" ".join)
WORDY = CAPTION.filter(bool)  # pycocoevalcap cannot count a corpus without a word
CORPUS = st.lists(st.tuples(CAPTION, st.lists(WORDY, min_size=1, max_size=4)), min_size=2, max_size=6)


@settings(deadline=None, max_examples=200)
@given(CORPUS)
def test_it_is_pycocoevalcaps(corpus):
    references = {n: own for n, (_, own) in enumerate(corpus)}
    candidates = {n: [caption] for n, (caption, _) in enumerate(corpus)}
    _, expected = Cider().compute_score(references, candidates)
    scorer = CiderD(references)
    for n, (caption, _) in enumerate(corpus):
        assert scorer.score(n, caption) == pytest.approx(expected[n], abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(CORPUS, st.lists(CAPTION, min_size=1, max_size=4))
def test_document_frequencies_are_those_of_the_corpus_whatever_is_scored(corpus, captions):
    """Several captions of one picture, scored by pycocoevalcap's scorer under the frequencies of the whole corpus."""
    references = {n: own for n, (_, own) in enumerate(corpus)}
    whole = CiderScorer()
    for own in references.values():
        whole += (own[0], own)
    whole.compute_doc_freq()
    frequencies = whole.document_frequency
    for caption in captions:
        one = CiderScorer()
        for n, own in references.items():
            one += (caption if n == 0 else "", own)
        one.document_frequency = frequencies
        assert CiderD(references).score(0, caption) == pytest.approx(one.compute_cider()[0], abs=1e-6)


def test_pycocoevalcaps_cider_is_cider_d():
    """The D: clipped counts, and a Gaussian penalty on length; without them repeating would pay."""
    references = {0: ["a red dog runs fast"], 1: ["the cat sits"], 2: ["two birds fly high"]}
    scorer = CiderD(references)
    perfect = scorer.score(0, "a red dog runs fast")
    assert perfect == pytest.approx(10.0)
    longer = scorer.score(0, "a red dog runs fast" + " dog" * 6)
    assert longer < math.exp(-(6**2) / (2 * cider_d.SIGMA**2)) * perfect


def test_a_single_picture_is_refused():
    with pytest.raises(ValueError, match="CIDEr-D of 1 pictures is 0"):
        CiderD({0: ["a dog"]})


RAW = {"a": ["A red dog's ball.", "Red dog!"], "b": ["Two cats sleep", "Cats can't fly (really)."], "c": ["A bird."]}


def test_the_end_mark_tells_a_whole_caption_from_one_cut_off():
    with_end, without = CaptionReward(RAW, "simple", end=True), CaptionReward(RAW, "simple", end=False)
    whole, words = with_end("b", "Two cats sleep", ended=True)
    cut, same = with_end("b", "Two cats sleep", ended=False)
    assert whole > cut and words == same == 3
    assert without("b", "Two cats sleep", True) == without("b", "Two cats sleep", False)
    assert with_end.mean_words == without.mean_words  # the mark is no word of a length


def test_frequencies_and_vectors_survive_a_small_cache(monkeypatch):
    monkeypatch.setattr(cider_d, "CACHED_PICTURES", 1)
    small, usual = CaptionReward(RAW, "simple"), CaptionReward(RAW, "simple")
    for key in ("a", "b", "a", "c", "a"):
        assert small(key, "a red dog") == usual(key, "a red dog")


def test_captions_are_split_as_the_references_were():
    reward = CaptionReward(RAW, "simple")
    assert reward.tokenizer == "simple" and reward.agreement == 1
    assert reward.facts()["tokenizer_of_captions"] == "simple"
    assert reward("a", "a RED dog's ball")[0] == reward("a", "A red dog's ball.")[0]


@pytest.mark.skipif(not find_java(), reason="PTB needs Java")
def test_ptb_references_meet_ptb_like_captions():
    reward = CaptionReward(RAW, "auto")
    assert reward.tokenizer == "ptb" and reward.agreement == 1
    assert reward.facts()["tokenizer_of_captions"] == "ptb_like"
    assert reward.cider_d.references["b"][1] == "cats ca n't fly -lrb- really -rrb- <end>"
    odd = CaptionReward({**RAW, "d": ["rock 'n' roll"]}, "ptb")  # a word that only PTB knows
    assert odd.agreement == pytest.approx(5 / 6)


@pytest.mark.skipif(not find_java(), reason="PTB needs Java")
def test_ptb_like_is_ptb_on_captions():
    captions = [
        "It's a man's t-shirt, isn't it?", "You cannot go; they're gonna run.", "A (red) dog - runs -- fast...",
        "the boys' dog", "Mr. Smith vs. the U.S. army.", "7:30 a.m. at 1,000 ft", "a man 's dog", "Don\u2019t!",
        "a caf\u00e9 on/off", "a 3-year-old at 5 o'clock", '"quoted" \'word\' [here] {there}', "$5 & 20%", "", "  .  ",
    ]  # fmt: skip
    expected = ptb_tokenize(captions, find_java())
    assert [ptb_like(caption) for caption in captions] == expected
