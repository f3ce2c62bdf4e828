"""Merging in front of the body: against plain loops, and what every fold keeps; the body on what is left."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavis_evlgen.nn import TomeFormerConfig
from lavis_evlgen.nn.merging import fold, fold_schedule, tokens_after
from tests.nn.slow import slow_groups, slow_mean, slow_tomeformer
from tests.nn.test_merging import QUICK, protected_counts, tensor
from tests.nn.test_tomeformer import tomeformer, visual_tokens


def slow_fold(features, schedule, protected):
    """features (T, C) -> the members of each group."""
    members = [[i] for i in range(len(features))]
    for r in schedule:
        means = slow_mean(features, members)
        members = [sum((members[i] for i in of), []) for of in slow_groups(means, r, protected)]
    return members


def test_257_tokens_fold_to_29_in_four():
    assert fold_schedule(257, 29, 1) == [128, 64, 32, 4]
    cfg = TomeFormerConfig(merge_at="input")  # the paper's r = 19 in twelve layers leaves as many
    assert (cfg.folds, cfg.schedule, cfg.num_output_tokens) == ([128, 64, 32, 4], [0] * 12, 29)
    released = TomeFormerConfig()
    assert (released.folds, released.schedule, released.num_output_tokens) == ([], [19] * 12, 29)


@QUICK
@given(tokens=st.integers(1, 300), share=st.floats(0, 1), protected=protected_counts)
def test_folds_are_the_fewest_that_reach_the_target(tokens, share, protected):
    least = tokens_after(tokens, [tokens] * 20, protected)
    target = round(least + share * (tokens - least))
    schedule = fold_schedule(tokens, target, protected)
    assert tokens_after(tokens, schedule, protected) == target and all(r > 0 for r in schedule)
    if schedule:
        assert tokens_after(tokens, [tokens] * (len(schedule) - 1), protected) > target
    if least > 0:
        with pytest.raises(ValueError, match=f"cannot become {least - 1}"):
            fold_schedule(tokens, least - 1, protected)


@QUICK
@given(seed=st.integers(0, 10**6), tokens=st.integers(8, 30), left=st.integers(1, 30), protected=protected_counts)
def test_a_fold_equals_the_loops(seed, tokens, left, protected):
    features = tensor(seed, 2, tokens, 6)
    least = tokens_after(tokens, [tokens] * 20, protected)
    schedule = fold_schedule(tokens, min(max(left, least), tokens), protected)
    maps = fold(features, schedule, protected)
    assert [one.num_slots for one in maps] == [tokens - sum(schedule[:n]) for n in range(len(schedule) + 1)]
    for i in range(2):
        members = slow_fold(features[i], schedule, protected)
        expected = [next(s for s, of in enumerate(members) if token in of) for token in range(tokens)]
        assert maps[-1].slot[i].tolist() == expected
    assert (maps[-1].sizes().sum(1) == tokens).all()
    assert (maps[-1].slot[:, :protected] == torch.arange(protected)).all()  # protected tokens stay in front ...
    assert (maps[-1].sizes()[:, :protected] == 1).all()  # ... and alone


@QUICK
@given(seed=st.integers(0, 10**6), tokens=st.integers(3, 30))
def test_means_step_by_step_weighted_by_size_are_means_over_all_members(seed, tokens):
    features = tensor(seed, 1, tokens, 5)
    maps = fold(features, fold_schedule(tokens, 2, 1))
    x, sizes = features, torch.ones(1, tokens, dtype=torch.float64)
    for before, after in zip(maps, maps[1:], strict=False):
        # the step from one map to the next: where the first member of each group goes
        first = [before.slot[0].tolist().index(s) for s in range(before.num_slots)]
        step = type(after)(after.slot[:, first], after.num_slots)
        x, sizes = step.merge(x, sizes), step.sizes(sizes)
    torch.testing.assert_close(x, maps[-1].merge(features), rtol=0, atol=1e-12)
    assert sizes.sum() == tokens


def test_autocast_and_half_features_do_not_choose_other_groups():
    features = (1 + 0.05 * tensor(3, 4, 257, 16)).to(torch.bfloat16)
    exact = fold(features.double(), [128, 64, 32, 4])[-1].slot
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fold(features.float(), [128, 64, 32, 4])[-1].slot, exact)
        assert torch.equal(fold(features, [128, 64, 32, 4])[-1].slot, exact)


@pytest.mark.parametrize("proportional", [False, True])
@torch.no_grad()
def test_the_body_behind_a_fold_equals_the_loops(proportional):
    """It is a TomeFormer that merges nothing, on means, at the means of its members' positions."""
    model = tomeformer(merge_at="input", tome_r=[6, 3, 2], proportional_attention=proportional)
    assert model.cfg.num_output_tokens == 10
    x = visual_tokens(2, 21, 24)
    folded = model.fold(x)[-1]
    tokens, source = model(folded.merge(x), folded=folded)
    assert source is folded and tokens.shape == (2, 10, 24)
    state, positions = dict(model.state_dict()), model.embeddings.position_embeddings.weight[:21]
    for i in range(2):
        members = slow_fold(x[i], model.cfg.folds, 1)
        state["embeddings.position_embeddings.weight"] = slow_mean(positions, members)
        expected, _ = slow_tomeformer(
            state, slow_mean(x[i], members), 3, [0, 0, 0], 1, proportional=proportional, sizes=list(map(len, members))
        )
        torch.testing.assert_close(tokens[i], expected, rtol=0, atol=1e-6 if proportional else 1e-10)
