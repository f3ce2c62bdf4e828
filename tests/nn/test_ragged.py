"""`tome_r: {average, least, most}`: merging by thresholds, against plain loops over one picture at a time."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_evlgen.nn import TomeFormer, TomeFormerConfig
from lavis_evlgen.nn.merging import match, max_merges, merge_schedule, tokens_after
from lavis_evlgen.nn.ragged import ALL, NONE, UNSET, USED, Pairs, RaggedMap, RaggedPass, cut, limits_of

SPEC = {"average": 9, "least": 6, "most": 13}


def slow_pairs(keys, left, protected):
    """[(cosine, a, b)] of one row, strongest first: each token of A with its most similar token of B."""
    keys = torch.nn.functional.normalize(keys[:left].double(), dim=-1)
    if protected > 1:
        rest = list(range(protected, left))
        set_a, set_b = rest[1::2], rest[::2]
    else:
        set_a, set_b = list(range(protected and 2, left, 2)), list(range(1, left, 2))
    found = []
    for a in set_a if set_b else []:
        cosines = [float(keys[a] @ keys[b]) for b in set_b]
        best = max(range(len(set_b)), key=cosines.__getitem__)
        found.append((cosines[best], a, set_b[best]))
    return sorted(found, reverse=True)


def slow_groups(keys, left, protected, r):
    """The tokens of each slot of one row after its r strongest pairs have merged."""
    if r == 0:
        return [[token] for token in range(left)]
    chosen = {a: b for _, a, b in slow_pairs(keys, left, protected)[:r]}
    if protected > 1:
        rest = list(range(protected, left))
        set_a, set_b = [*range(protected), *rest[1::2]], rest[::2]
    else:
        set_a, set_b = list(range(0, left, 2)), list(range(1, left, 2))
    order = [a for a in set_a if a not in chosen] + set_b
    return [sorted([token, *(a for a, b in chosen.items() if b == token)]) for token in order]


def groups_of(step: RaggedMap, row: int):
    slot = step.slot[row, : step.given[row]].tolist()
    return [[t for t, s in enumerate(slot) if s == n] for n in range(int(step.left[row]))]


@st.composite
def layers(draw):
    """keys (B, T, C), left (B,), protected, and the limits of a layer that these rows can keep."""
    protected, tokens = draw(st.sampled_from([0, 1, 3])), draw(st.integers(6, 15))
    batch = draw(st.integers(1, 4))
    keys = torch.randn(batch, tokens, 4, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    widest = draw(st.integers(tokens - (tokens - protected) // 2, tokens))
    least = draw(st.integers(protected + 1, widest))
    left = torch.tensor([draw(st.integers(max(least, tokens // 2), tokens)) for _ in range(batch)])
    return keys, left, protected, least, widest


@settings(max_examples=60, deadline=None)
@given(layers(), st.sampled_from([-0.5, 0.0, 0.3, 0.7, float("inf"), -1.001]))
def test_a_row_merges_what_is_as_strong_as_the_threshold_within_its_limits(layer, threshold):
    keys, left, protected, least, widest = layer
    step = Pairs(keys, left, protected, least, widest).merged(torch.tensor(threshold))
    assert step.num_slots == widest
    for row, count in enumerate(left.tolist()):
        strong = sum(cosine >= threshold for cosine, *_ in slow_pairs(keys[row], count, protected))
        fewest, most = max(0, count - widest), min(count - least, (count - protected) // 2)
        r = min(max(strong, fewest), most)
        assert step.left[row] == count - r
        assert groups_of(step, row) == slow_groups(keys[row], count, protected, r)
        if threshold > 1:
            assert r == fewest
        if threshold < -1:
            assert r == most


@settings(max_examples=40, deadline=None)
@given(layers())
def test_padding_has_no_weight_and_no_gradient(layer):
    keys, left, protected, least, widest = layer
    step = Pairs(keys, left, protected, least, widest).merged(torch.tensor(0.2))
    x = torch.randn(*keys.shape[:2], 5, requires_grad=True)
    sizes = torch.randint(1, 9, x.shape[:2]).float() * (torch.arange(x.shape[1]) < left[:, None])
    for weights in (None, sizes):
        merged = step.merge(x, weights)
        for row in range(len(x)):
            groups = groups_of(step, row)
            for slot, group in enumerate(groups):
                own = torch.ones(len(group)) if weights is None else weights[row, group]
                torch.testing.assert_close(merged[row, slot], (own[:, None] * x[row, group]).sum(0) / own.sum())
            assert not merged[row, len(groups) :].any()
    assert torch.equal(step.sizes().sum(1), left.float()) and torch.equal(step.sizes(sizes).sum(1), sizes.sum(1))
    merged.square().sum().backward()
    assert x.grad.isfinite().all() and not x.grad[torch.arange(x.shape[1]) >= left[:, None]].any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_a_rows_own_kth_strength_gives_todays_match(seed, r):
    keys = torch.randn(1, 17, 4, generator=torch.Generator().manual_seed(seed))
    kth = slow_pairs(keys[0], 17, 1)[r - 1][0]
    step = Pairs(keys, torch.tensor([17]), 1, 9, 17).merged(torch.tensor(kth - 1e-6))
    assert step.left.item() == 17 - r
    assert torch.equal(step.slot, match(keys, r).slot)


@settings(max_examples=40, deadline=None)
@given(layers(), st.integers(1, 12))
def test_the_cut_is_where_the_rows_have_the_average(layer, average):
    """Also over several calls' rows, as in calibration; where the limits decide alone they do."""
    keys, left, protected, least, widest = layer
    average = min(max(average, least), widest)
    whole = Pairs(keys, left, protected, least, widest)
    parts = [Pairs(keys[i : i + 1], left[i : i + 1], protected, least, widest) for i in range(len(keys))]
    threshold = cut([whole], average)
    torch.testing.assert_close(threshold, cut(parts, average))
    fewest, most = (whole.merged(torch.tensor(value)).left.sum() for value in (ALL, NONE))
    assert whole.merged(threshold).left.sum() == min(max(average * len(keys), fewest), most)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.sampled_from([17, 197, 257]), st.sampled_from([0, 1, 5]), st.data())
def test_the_mean_picture_has_room_in_every_layer(num_layers, tokens, protected, data):
    fewest = tokens_after(tokens, [tokens] * num_layers, protected)
    average = data.draw(st.integers(fewest, tokens))
    limits = limits_of({"average": average, "least": fewest, "most": tokens}, num_layers, tokens, protected)
    assert (limits.average[0], limits.average[-1]) == (tokens, average)
    merges = [a - b for a, b in itertools.pairwise(limits.average)]
    possible = [max_merges(n, protected) for n in limits.average[:-1]]
    assert all(0 <= r <= most for r, most in zip(merges, possible, strict=True))
    schedule = merge_schedule({"target": average}, num_layers, tokens, protected)
    if merges != schedule:  # that of {target} where there are too few layers for more
        for before, least, r in list(zip(limits.average, limits.least, merges, strict=False))[1:]:
            assert before == least or r <= USED * (before - protected) / 2 + 1  # rounded


def test_limits_are_those_of_fixed_schedules_and_wrong_ones_are_refused():
    limits = limits_of(SPEC, 2, 17)
    for key in SPEC:
        schedule = merge_schedule({"target": SPEC[key]}, 2, 17)
        assert getattr(limits, key) == tuple(tokens_after(17, schedule[:n]) for n in range(3))
    assert limits_of(19, 2, 17) is None and limits_of({"target": 9}, 2, 17) is None
    for wrong, words in (
        ({"average": 9}, "give all of {average, least, most}"),
        (SPEC | {"target": 9}, "and no others"),
        (SPEC | {"least": 10}, "least 10, average 9, most 13; give least <= average <= most"),
        (SPEC | {"least": 2}, r"least: 17 tokens cannot become 2 in 2 layers .* reachable: 5 to 17"),
        (SPEC | {"most": 18}, "most: 17 tokens cannot become 18"),
    ):
        with pytest.raises(ValueError, match=f"^tome_r: .*{words}"):
            TomeFormerConfig(tome_r=wrong, num_layers=2, num_tokens=17)
    for name, value in (("partition", "random"), ("merge_at", "input")):
        with pytest.raises(ValueError, match=f"tome_r: .* needs {name}: .*not {value}; leave {name} out"):
            TomeFormerConfig(tome_r=SPEC, num_layers=2, num_tokens=17, **{name: value})


def tiny(tome_r=SPEC, **kw):
    torch.manual_seed(0)
    cfg = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "max_positions": 32,
           "dropout": 0.0, "num_tokens": 17, "tome_r": tome_r}  # fmt: skip
    model = TomeFormer(TomeFormerConfig(**cfg | kw))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embeddings" not in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


OPTIONS = [{}, {"merge_mean": "size"}, {"proportional_attention": True},
           {"merge_mean": "size", "proportional_attention": True}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_a_row_alone_is_as_in_a_batch(options):
    model, x = tiny(**options).eval(), torch.randn(6, 17, 16)
    model.thresholds.copy_(torch.tensor([0.75, 0.8]))
    tokens, source = model(x, return_source=True)
    assert tokens.shape == (6, 13, 16) and len(source.left.unique()) > 1
    assert torch.equal(source.sizes().sum(1), torch.full((6,), 17.0))
    for i in range(6):
        alone, own = model(x[i : i + 1], return_source=True)
        count = int(source.left[i])
        assert own.left.item() == count and torch.equal(own.slot[0], source.slot[i])
        torch.testing.assert_close(alone[0, :count], tokens[i, :count], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_without_play_it_is_the_fixed_schedule(options, training):
    """least = most = average: whatever the thresholds."""
    same = tiny({"average": 9, "least": 9, "most": 9}, **options).train(training)
    fixed = tiny({"target": 9}, **options).train(training)
    x = torch.randn(4, 17, 16)
    (tokens, source), (expected, whole) = same(x, return_source=True), fixed(x, return_source=True)
    assert torch.equal(source.slot, whole.slot) and source.alive().all()
    torch.testing.assert_close(tokens, expected)


@pytest.mark.parametrize("value, key", [(float("inf"), "most"), (NONE, "most"), (-1.0, "least"), (ALL, "least")])
@torch.no_grad()
def test_the_ends_of_the_thresholds_are_the_limits_schedules(value, key):
    """+inf: nothing merges but what `most` asks for (17 of 17: nothing at all); -1: as much as `least` lets."""
    for spec in (SPEC, {"average": 9, "least": 5, "most": 17}):
        model, x = tiny(spec).eval(), torch.randn(3, 17, 16)
        model.thresholds.fill_(value)
        tokens, source = model(x, return_source=True)
        expected, whole = tiny({"target": spec[key]}).eval()(x, return_source=True)
        count = spec[key]
        assert (source.left == count).all() and torch.equal(source.slot, whole.slot)
        torch.testing.assert_close(tokens[:, :count], expected, rtol=1e-4, atol=1e-5)


def test_training_has_the_average_in_every_batch_and_thresholds_follow():
    model, x = tiny().train(), torch.randn(8, 17, 16)
    assert model.thresholds.tolist() == [UNSET, UNSET] and "thresholds" in model.state_dict()
    _, source = model(x, return_source=True)
    assert source.left.sum() == 8 * 9 and len(source.left.unique()) > 1
    assert source.left.min() >= 6 and source.left.max() <= 13
    first = model.thresholds.clone()
    assert (first.abs() <= 1).all()
    model(torch.randn(8, 17, 16))
    moved = model.thresholds.clone()
    assert not torch.equal(moved, first)
    model(x.new_full((8, 17, 16), float("nan")))  # of what is not finite nothing is learnt
    assert torch.equal(model.thresholds, moved)
    model.eval()(x)
    assert torch.equal(model.thresholds, moved)
    passing = RaggedPass(model.cfg.limits, torch.tensor([0.5, 0.5]), 1, 8, training=True)
    keys = torch.randn(8, 17, 4)
    expected = cut([passing.pairs(keys)], model.cfg.limits.average[1])
    passing.match(keys)
    torch.testing.assert_close(passing.thresholds, torch.tensor([0.9 * 0.5 + 0.1 * expected.item(), 0.5]))


def pictures(count, seed):
    """(N, 17, 16): pictures of a few alike regions or of many different ones."""
    generator = torch.Generator().manual_seed(seed)
    busy = torch.rand(count, 1, 1, generator=generator)
    whole = torch.randn(count, 1, 16, generator=generator)
    return whole + 2 * busy * torch.randn(count, 17, 16, generator=generator)


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_calibrated_pictures_have_the_average_and_unseen_ones_nearly(options):
    model = tiny(**options).eval()
    seen, others = pictures(512, 1), pictures(2000, 2)
    model.calibrate(seen.split(64))
    thresholds = model.thresholds.clone()
    _, source = model(seen, return_source=True)
    assert abs(source.left.float().mean() - 9) < 0.02
    assert abs(model(others, return_source=True)[1].left.float().mean() - 9) < 0.02 * 9
    assert len(source.left.unique()) == 8  # 6 to 13
    model.calibrate(seen.split(100))  # whatever the batches
    torch.testing.assert_close(model.thresholds, thresholds)


@torch.no_grad()
def test_few_of_many_tokens_are_reached_in_the_mean():
    """257 to 12 in six layers, each of which may merge half: {target: 12} leaves no play in four of them."""
    spec = {"average": 12, "least": 6, "most": 28}
    model = tiny(spec, num_layers=6, num_tokens=257, max_positions=257, hidden_size=8).eval()
    generator = torch.Generator().manual_seed(0)
    busy = torch.rand(96, 1, 1, generator=generator)
    x = torch.randn(96, 1, 8, generator=generator) + 2 * busy * torch.randn(96, 257, 8, generator=generator)
    model.calibrate([x])
    left = model(x, return_source=True)[1].left
    assert abs(left.float().mean() - 12) < 0.02 * 12 and len(left.unique()) > 4
