"""Elastic budgets: the same weights leave several numbers of tokens, each as a model of that number alone does."""

import pytest
import torch

from lavis_evlgen.nn import Budgets, TomeFormerConfig
from tests.nn.test_tomeformer import SIZES, tomeformer, visual_tokens

LISTED = [4, 7, 12, 21]  # of 21


@pytest.mark.parametrize("options", [{}, {"merge_mean": "size", "proportional_attention": True}, {"merge_at": "input"}])
@pytest.mark.parametrize("budget", LISTED)
def test_each_budget_is_a_model_of_its_own(options, budget):
    """Tokens and groups, of the same weights; `tokens` plans any number, listed or not."""
    elastic = tomeformer(tome_r={"elastic": LISTED}, **options)
    fixed = tomeformer(tome_r={"target": budget}, **options)
    given = tomeformer(tome_r={"elastic": [5, 9]}, tokens=budget, **options)
    x = visual_tokens(2, 21, SIZES["hidden_size"])
    folded = {"elastic": None, "fixed": None, "given": None}
    if "merge_at" in options:
        folded = {"elastic": elastic.fold(x, budget)[-1], "fixed": fixed.fold(x)[-1], "given": given.fold(x)[-1]}
        assert all(torch.equal(one.slot, folded["fixed"].slot) for one in folded.values())

    def run(model, name, **kw):
        return model(x if folded[name] is None else folded[name].merge(x), True, folded[name], **kw)

    (tokens, source), (expected, wanted) = run(elastic, "elastic", budget=budget), run(fixed, "fixed")
    assert tokens.shape[1] == budget and torch.equal(tokens, expected) and torch.equal(source.slot, wanted.slot)
    assert torch.equal(run(given, "given")[0], expected) and given.cfg.num_output_tokens == budget


def test_an_evaluation_leaves_the_largest():
    cfg = TomeFormerConfig(**SIZES | {"num_tokens": 21, "tome_r": {"elastic": [12, 4, 7], "draw": "sandwich"}})
    assert cfg.num_output_tokens == 12 and cfg.budgets == Budgets((4, 7, 12), "sandwich", 1.0)
    assert cfg.budgets.draws == [(12, 4), (12, 7)] and Budgets((4, 7, 12)).draws == [(4,), (7,), (12,)]
    with pytest.raises(ValueError, match=r"a budget of 5 tokens is none of tome_r.elastic: \[4, 7, 12\]"):
        cfg.plan(5)


@pytest.mark.parametrize(
    "tome_r, says",
    [
        ({"elastic": []}, r"tome_r.elastic: \[\] names no number of tokens; list those to train with"),
        ({"elastic": [7, 4, 7]}, "tome_r.elastic: 7 is listed twice"),
        ({"elastic": [7, 1]}, r"tome_r.elastic: 21 tokens cannot become 1 in 4 layers .*reachable: 3 to 21"),
        ({"elastic": [7, 22]}, "tome_r.elastic: 21 tokens cannot become 22"),
        ({"elastic": [7, 4], "draw": "two"}, "tome_r.draw: 'two' is not one of one, sandwich"),
        ({"elastic": [7], "draw": "sandwich"}, "tome_r.draw: sandwich .* 7 alone; list another, or take draw: one"),
        ({"elastic": [7, 4], "beta": -1}, "tome_r.beta: -1.0 must be a number of at least 0"),
        ({"elastic": [7, 4], "target": 7}, "tome_r: elastic takes draw and beta beside it, not target"),
        ({"draw": "one"}, r"tome_r: keys \['draw'\]; use .*{elastic, draw, beta}"),
    ],
)
def test_what_cannot_be_is_refused(tome_r, says):
    with pytest.raises(ValueError, match=says):
        tomeformer(tome_r=tome_r, num_layers=4)


def test_tokens_that_cannot_be_left_are_refused():
    with pytest.raises(ValueError, match=r"^tokens: 21 tokens cannot become 1 in 4 layers .*reachable: 3 to 21"):
        tomeformer(tome_r=4, tokens=1, num_layers=4)
