"""merge_schedule: every way to write `tome_r`, and what it refuses."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_evlgen.nn.merging import max_merges, merge_schedule, tokens_after

QUICK = settings(max_examples=150, deadline=None, derandomize=True)


def test_the_papers_schedule_leaves_28_tokens_and_cls():
    schedule = merge_schedule(19, 12, 257)
    assert schedule == [19] * 12
    assert tokens_after(257, schedule) == 29


def test_a_list_is_taken_as_it_is_and_needs_one_r_per_layer():
    assert merge_schedule([30, 0, 10], 3, 257) == [30, 0, 10]
    assert tokens_after(257, [30, 0, 10]) == 217
    with pytest.raises(ValueError, match="lists 2 layers, the TomeFormer has 3"):
        merge_schedule([30, 20], 3, 257)


def test_a_layer_merges_at_most_half_of_the_unprotected_tokens():
    assert tokens_after(257, [1000]) == 129
    assert tokens_after(257, [1000], protected=0) == 129
    assert tokens_after(256, [1000], protected=0) == 128
    assert tokens_after(261, [1000], protected=5) == 133
    assert tokens_after(1, [5]) == 1
    assert max_merges(0, 1) == 0


@QUICK
@given(st.integers(0, 40), st.floats(-1, 1), st.integers(1, 24))
def test_an_inflection_moves_merges_and_keeps_their_number(r, inflection, layers):
    schedule = merge_schedule({"r": r, "inflection": inflection}, layers, 10**6)
    assert len(schedule) == layers and min(schedule) >= 0
    assert sum(schedule) == r * layers
    half = layers // 2
    early, late = sum(schedule[:half]), sum(schedule[layers - half :])
    slack = 1  # rounding
    assert early >= late - slack if inflection <= 0 else early <= late + slack


def test_the_ends_of_an_inflection():
    early = merge_schedule({"r": 10, "inflection": -1}, 5, 257)
    assert early == [20, 15, 10, 5, 0]
    assert merge_schedule({"r": 10, "inflection": 1}, 5, 257) == early[::-1]
    assert merge_schedule({"r": 10, "inflection": 0}, 5, 257) == [10] * 5


@QUICK
@given(st.integers(1, 300), st.integers(1, 14), st.integers(-3, 320), st.sampled_from([0, 1, 5]))
def test_a_target_is_reached_or_the_reachable_range_is_named(tokens, layers, target, protected):
    least = tokens_after(tokens, [tokens] * layers, protected)
    if least <= target <= tokens:
        schedule = merge_schedule({"target": target}, layers, tokens, protected)
        left = tokens
        for r in schedule:
            assert 0 <= r <= max_merges(left, protected)  # none of it is capped away
            left -= r
        assert len(schedule) == layers and left == target
    else:
        message = f"{tokens} tokens cannot become {target} in {layers} layers.*reachable: {least} to {tokens}"
        with pytest.raises(ValueError, match=message):
            merge_schedule({"target": target}, layers, tokens, protected)


def test_a_target_is_spread_evenly_where_it_can_be():
    assert merge_schedule({"target": 29}, 12, 257) == [19] * 12
    assert merge_schedule({"target": 230}, 6, 257) == [5, 5, 5, 4, 4, 4]
    assert merge_schedule({"target": 257}, 6, 257) == [0] * 6


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"r": 19}, "keys ['r']"),
        ({"target": 29, "r": 3}, "keys ['r', 'target']"),
        ({"r": 19, "inflection": 1.5}, "inflection 1.5 is outside [-1, 1]"),
        (-1, "negative merges"),
        ([5, -1, 5], "negative merges"),
        ({"r": -2, "inflection": 0.5}, "negative merges"),
        ("many", "'many' is not an int, a list"),
        (None, "None is not an int, a list"),
    ],
)
def test_what_a_schedule_cannot_be(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        merge_schedule(spec, 3, 257)
