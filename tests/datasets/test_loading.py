"""Data order: the same samples whatever the number of ranks and workers, and wherever a run starts."""

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from lavis_evlgen.datasets import loading
from lavis_evlgen.datasets.loading import MixtureBatches, eval_loader, train_loader
from lavis_evlgen.datasets.seeding import EpochOrder, generators_kept, seed_all

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=3)
seeds = st.integers(0, 2**32)


def batches(count, sizes, ratios, batch_size, seed=0, rank=0, world=1, start=0):
    """The next `count` micro-batches of one rank, as lists of (data set, epoch, row)."""
    return list(
        itertools.islice(MixtureBatches(sizes, ratios, batch_size, seed, rank, world, start), count)
    )


class Rows(Dataset):
    """Row i is (name, i, a number drawn as an augmentation would)."""

    def __init__(self, size, name="a"):
        self.size, self.name = size, name

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        return self.name, row, torch.rand(()).item(), np.random.rand(), random.random()

    def collater(self, samples):
        return [(self.name, *sample) for sample in samples]


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 4), st.integers(1, 4), st.integers(0, 12), seeds)
def test_ranks_together_see_what_one_rank_with_the_whole_batch_sees(sizes, world, batch, start, seed):
    ratios = [k + 1 for k in range(len(sizes))]
    alone = batches(8, sizes, ratios, world * batch, seed, start=start)
    ranks = [batches(8, sizes, ratios, batch, seed, rank, world, start) for rank in range(world)]
    together = [sum((one[m] for one in ranks), []) for m in range(8)]
    assert together == alone


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 4), st.integers(0, 40), seeds, st.integers(0, 2), st.integers(1, 3))
def test_a_start_is_the_same_as_skipping(sizes, batch, start, seed, rank, world):
    ratios = [3.5 / (k + 1) for k in range(len(sizes))]
    rank = min(rank, world - 1)
    whole = batches(start + 10, sizes, ratios, batch, seed, rank, world)
    assert batches(10, sizes, ratios, batch, seed, rank, world, start) == whole[start:]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 50), st.integers(1, 30), seeds)
def test_choices_are_a_function_of_the_micro_step_alone(start, count, seed):
    mixture = MixtureBatches([5, 6, 7], [1, 2, 3], 1, seed, 0, 1)
    whole = mixture.choices(0, start + count).tolist()
    assert mixture.choices(start, count).tolist() == whole[start:]
    assert [int(mixture.choices(m, 1)[0]) for m in range(start + count)] == whole


def test_choices_do_not_repeat_themselves():
    # a counter that moved wrongly would show up as blocks of four draws that come twice
    mixture = MixtureBatches([5, 6], [1, 1], 1, 0, 0, 1)
    draws = np.array([mixture.choices(m, 1)[0] for m in range(400)]).reshape(-1, 4)
    assert len(np.unique(draws, axis=0)) == 16
    lagged = [(draws[lag:] == draws[:-lag]).all(1).mean() for lag in (1, 2, 3)]
    assert max(lagged) < 0.2


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), seeds)
def test_each_epoch_is_a_permutation(size, seed):
    stream = EpochOrder(size, seed)
    seen = [stream[position] for position in range(3 * size)]
    assert [epoch for epoch, _ in seen] == [0] * size + [1] * size + [2] * size
    for epoch in range(3):
        assert sorted(row for e, row in seen if e == epoch) == list(range(size))


def test_epochs_and_seeds_differ_in_order():
    orders = {
        tuple(EpochOrder(30, seed)[p][1] for p in range(epoch * 30, epoch * 30 + 30))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_sets_get_the_share_of_micro_steps_that_the_ratios_say():
    share = np.bincount(MixtureBatches([4, 4, 4], [1, 2, 5], 1, 3, 0, 1).choices(0, 20_000)) / 20_000
    assert share == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.015)


def test_seeded_draws_are_alike_and_leave_no_trace():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def start():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    start()
    undisturbed = draw()
    start()
    found = []
    with generators_kept():
        for seed in (7, 7, 8):
            seed_all(seed)
            found.append(draw())
    assert found[0] == found[1] != found[2]
    assert draw() == undisturbed
    start()
    with pytest.raises(KeyError), generators_kept():
        seed_all(7)
        raise KeyError
    assert draw() == undisturbed


def take(count, workers, start=0, rank=0, world=1, ratios=(1, 2)):
    sets = [Rows(5, "a"), Rows(7, "b")]
    loader = train_loader(sets, list(ratios), 3, 11, rank, world, start, workers, False)
    return list(itertools.islice(loader, count))


def test_order_and_augmentation_do_not_depend_on_workers_or_start():
    plain = take(12, workers=0)
    assert take(12, workers=2) == plain
    assert take(8, workers=0, start=4) == plain[4:]
    assert len({sample[3] for batch in plain for sample in batch}) == 36  # every epoch draws anew


def test_every_batch_is_collated_by_the_set_it_comes_from():
    batches = take(12, workers=0)
    assert {sample[0] for batch in batches for sample in batch} == {"a", "b"}
    for batch in batches:
        for collated_by, name, *_ in batch:
            assert collated_by == name


def test_loaders_draw_nothing_from_the_generator_of_dropout():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take(2, workers=0)
    list(eval_loader(range(3), 2, 0, 1, 0, False))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_ratios_sets_are_mixed_by_size(monkeypatch):
    seen = {}
    monkeypatch.setattr(loading, "MixtureBatches", lambda sizes, ratios, *rest: seen.update(r=ratios) or [])
    train_loader([Rows(5), Rows(15)], None, 1, 0, 0, 1, 0, 0, False)
    assert seen["r"] == [5, 15]


@pytest.mark.parametrize("size, world, batch", [(10, 1, 3), (10, 3, 2), (2, 4, 2), (7, 2, 7)])
def test_evaluation_covers_every_row_once_over_ranks(size, world, batch):
    rows = [
        sample[2]
        for rank in range(world)
        for collated in eval_loader(Rows(size), batch, rank, world, 0, False)
        for sample in collated
    ]
    assert sorted(rows) == list(range(size))


STOPPED_MIDWAY = """
from lavis_evlgen.datasets.loading import train_loader
from tests.datasets.test_loading import Rows
batches = iter(train_loader([Rows(50, "a")], None, 4, 0, 0, 1, 0, 1, False))
next(batches)
raise SystemExit(7)  # `batches` is alive: its worker must not keep the process
"""


def test_a_worker_does_not_outlive_a_main_process_that_fails():
    done = subprocess.run([sys.executable, "-c", STOPPED_MIDWAY], timeout=180, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 7 and "Traceback" not in done.stderr


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 4), st.integers(1, 4), st.integers(0, 12), seeds)
def test_ranks_that_draw_their_own_sets_see_what_one_rank_sees_in_as_many_micro_steps(sizes, world, batch, start, seed):
    ratios = [k + 1 for k in range(len(sizes))]

    def mixture(rank, world, start):
        return MixtureBatches(sizes, ratios, batch, seed, rank, world, start, per_rank=True)

    alone = list(itertools.islice(MixtureBatches(sizes, ratios, batch, seed, 0, 1, start * world), 6 * world))
    ranks = [list(itertools.islice(mixture(rank, world, start), 6)) for rank in range(world)]
    assert [one[m] for m in range(6) for one in ranks] == alone


def test_ranks_draw_different_sets_only_where_asked():
    def drawn(per_rank):
        both = [MixtureBatches([50, 50], [1, 1], 1, 3, rank, 2, per_rank=per_rank) for rank in range(2)]
        sets = [[batch[0][0] for batch in itertools.islice(one, 200)] for one in both]
        return sum(a != b for a, b in zip(*sets, strict=True)) / 200

    assert drawn(False) == 0 and 0.4 < drawn(True) < 0.6
