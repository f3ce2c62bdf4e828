"""Names of shards: brace lists, globs, folders, lists."""

import pytest

from lavis_evlgen.datasets import DataError
from lavis_evlgen.datasets.seeding import shuffled
from lavis_evlgen.datasets.shards.names import shard_names


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("a.tar", ["a.tar"]),
        ("/d/{0..2}.tar", ["/d/0.tar", "/d/1.tar", "/d/2.tar"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{a,b}/{1..2}.tar", ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]),
        ("x{,y}z", ["xz", "xyz"]),
        ("{3..1}.tar", ["3.tar", "2.tar", "1.tar"]),
        ("{{1..3},x}.tar", ["1.tar", "2.tar", "3.tar", "x.tar"]),
    ],
)
def test_braces_are_what_a_shell_makes_of_them(pattern, names):
    assert shard_names(pattern) == names


@pytest.mark.parametrize(
    "pattern, says",
    [
        ("{1..3.tar", "braces that are not closed"),
        ("https://host/{0..9}.tar", "not from the network"),
        ("pipe:cat x.tar", "not from the network"),
        ("{0..9}.tar.gz", "is compressed"),
        ("none/*.tar", "no file matches none/*.tar (relative names start at"),
        ("", "not the name of a shard"),
    ],
)
def test_patterns_that_cannot_be(pattern, says):
    with pytest.raises(DataError) as error:
        shard_names([pattern], config_path="datasets.x.shards")
    assert says in str(error.value) and str(error.value).startswith("datasets.x.shards")


def test_globs_folders_and_lists(tmp_path):
    for name in ("b/2.tar", "b/1.tar", "a/7.tar", "a/7.txt", "c.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    both = shard_names([f"{tmp_path}/b", f"{tmp_path}/a/*.tar", "c.tar", "{x,y}.tar"], str(tmp_path))
    short = [name.removeprefix(f"{tmp_path}/") for name in both]
    assert short == ["b/1.tar", "b/2.tar", "a/7.tar", "c.tar", "x.tar", "y.tar"]
    assert shard_names(f"{tmp_path}/{{a,b}}/*.tar") == [f"{tmp_path}/{n}.tar" for n in ("a/7", "b/1", "b/2")]


def test_shuffled_is_a_function_of_the_seed():
    items = [str(n) for n in range(20)]
    orders = [list(shuffled(items, seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == sorted(items) != orders[2]
