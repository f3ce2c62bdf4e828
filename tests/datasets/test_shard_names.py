"""Names of shards: brace lists, globs, folders, lists; lists of any length in constant memory."""

import time
import tracemalloc
from collections import Counter

import pytest

from lavis_evlgen.datasets import DataError
from lavis_evlgen.datasets.seeding import permuted, shuffled
from lavis_evlgen.datasets.shards.names import BraceNames, ShardNames
from lavis_evlgen.datasets.shards.stream import Place, ShardStream
from tests.datasets.shard_tools import image_shards


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("a.tar", ["a.tar"]),
        ("/d/{0..2}.tar", ["/d/0.tar", "/d/1.tar", "/d/2.tar"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{a,b}/{1..2}.tar", ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]),
        ("x{,y}z", ["xz", "xyz"]),
    ],
)
def test_braces_are_what_a_shell_makes_of_them(pattern, names):
    found = BraceNames(pattern)
    assert list(found) == names and len(found) == len(names) and found[-1] == names[-1]


@pytest.mark.parametrize(
    "pattern, says",
    [
        ("{3..1}.tar", "the range {3..1} runs backwards"),
        ("{a..c}.tar", "{a..c} is neither a range"),
        ("{1..3.tar", "braces that are not closed"),
        ("{{1..3},x}.tar", "inside of others"),
        ("https://host/{0..9}.tar", "not from the network"),
        ("pipe:cat x.tar", "not from the network"),
        ("{0..9}.tar.gz", "is compressed"),
        ("none/*.tar", "no file matches none/*.tar (relative names start at"),
        ("", "not the name of a shard"),
    ],
)
def test_patterns_that_cannot_be(pattern, says):
    with pytest.raises(DataError) as error:
        ShardNames([pattern], place="datasets.x.shards")
    assert says in str(error.value) and str(error.value).startswith("datasets.x.shards")


def test_globs_folders_and_lists(tmp_path):
    for name in ("b/2.tar", "b/1.tar", "a/7.tar", "a/7.txt", "c.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    both = ShardNames([f"{tmp_path}/b", f"{tmp_path}/a/*.tar", "c.tar", "{x,y}.tar"], str(tmp_path))
    short = [name.removeprefix(f"{tmp_path}/") for name in both]
    assert short == ["b/1.tar", "b/2.tar", "a/7.tar", "c.tar", "x.tar", "y.tar"]
    assert [both[n] for n in (5, 0, -1)] == [f"{tmp_path}/{name}" for name in ("y.tar", "b/1.tar", "y.tar")]
    with pytest.raises(IndexError):
        both[6]
    assert list(ShardNames(f"{tmp_path}/{{a,b}}/*.tar")) == [f"{tmp_path}/{n}.tar" for n in ("a/7", "b/1", "b/2")]


@pytest.mark.parametrize("pattern, count", [("/no/{00000..10488}.tar", 10_489), ("/no/{0..9999999}.tar", 10**7)])
def test_a_list_of_any_length_opens_in_constant_memory_and_time(pattern, count):
    image_shards("/no/{0..1}.tar")  # what is loaded once
    tracemalloc.start()
    started = time.process_time()
    dataset = image_shards(pattern)
    stream = ShardStream(dataset, 1, 3, 16, Place(400, 7))
    epoch, shard = stream.shard(0)
    name, looked_at = dataset.shards[shard], len(list(dataset.looked_at()))
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset.shards) == count and epoch == 0 and name.endswith(".tar") and looked_at == 256
    assert peak < 100_000 and seconds < 0.5


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000])
def test_permutations_are_permutations(size):
    for key in range(4):
        assert sorted(permuted(n, size, key) for n in range(size)) == list(range(size))
    with pytest.raises(IndexError):
        permuted(size, size, 0)


def test_every_order_is_as_likely_as_any_other():
    orders = Counter(tuple(permuted(n, 3, key) for n in range(3)) for key in range(3000))
    assert len(orders) == 6 and all(400 < count < 600 for count in orders.values())  # 500 each, sd 20
    first = Counter(permuted(0, 10, key) for key in range(3000))
    assert len(first) == 10 and all(220 < count < 380 for count in first.values())  # 300 each, sd 16


def test_shuffled_is_a_function_of_the_seed():
    items = [str(n) for n in range(20)]
    orders = [list(shuffled(items, seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == sorted(items) != orders[2]
