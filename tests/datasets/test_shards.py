"""Streams over shards: every sample once an epoch, positions, bad samples, mixtures, builders."""

import itertools
from collections import Counter

import pytest
import torch
from omegaconf import OmegaConf

from lavis_evlgen.datasets import DataError, ImageShardsBuilder
from lavis_evlgen.datasets.loading import FromShards, train_loader
from lavis_evlgen.datasets.shards.dataset import Ccs14mBuilder, Laion115mBuilder
from lavis_evlgen.datasets.shards.stream import ShardStream
from tests.datasets.shard_tools import HTML, image_shards, jpeg, pixel_bomb, sample, write_shard, write_shards
from tests.datasets.test_loading import Rows

LENGTHS = (7, 3, 5, 9, 4, 6, 8)


@pytest.fixture(scope="module")
def seven(tmp_path_factory) -> str:
    """Seven shards of different lengths."""
    return write_shards(tmp_path_factory.mktemp("seven"), LENGTHS)


def everything(shards):
    return {f"{s}:{n}" for s, length in enumerate(shards) for n in range(length)}


@pytest.mark.parametrize("streams", [1, 2, 3, 7])
@pytest.mark.parametrize("window", [1, 4, 100])
def test_an_epoch_over_all_streams_is_every_sample_once(seven, streams, window):
    dataset = image_shards(seven, shuffle_window=window)
    ids = []
    for number in range(streams):
        stream = ShardStream(dataset, 5, number, streams)
        shards = [stream.shard(i) for i in range(7)]
        due = sum(LENGTHS[index] for epoch, index in shards if epoch == 0)
        ids += [s["instance_id"] for s in stream.take(due)[0]]
    assert sorted(ids) == sorted(everything(LENGTHS))


def test_epochs_seeds_and_windows_give_other_orders(seven):
    def ids(seed, window, count=84):
        found = ShardStream(image_shards(seven, shuffle_window=window), seed, 0, 1).take(count)[0]
        return [s["instance_id"] for s in found]

    whole = ids(1, 4)
    assert whole == ids(1, 4) and sorted(whole[:42]) == sorted(whole[42:]) and whole[:42] != whole[42:]
    assert len({tuple(ids(seed, window, 42)) for seed, window in ((1, 4), (2, 4), (1, 1), (1, 3))}) == 4
    longest = [[i for i in part if i[0] == "3"] for part in (whole[:42], whole[42:])]
    assert sorted(longest[0]) == sorted(longest[1]) and longest[0] != longest[1]  # within a shard, too
    in_order = ids(1, 1, 42)
    for shard in "0123456":
        assert [int(i[2:]) for i in in_order if i[0] == shard] == list(range(LENGTHS[int(shard)]))


def test_augmentation_depends_on_sample_and_epoch_alone(seven):
    def drawn(streams, count):
        parts = [ShardStream(image_shards(seven), 3, n, streams).take(count)[0] for n in range(streams)]
        return [(s["instance_id"], s["image"].sum().item()) for part in parts for s in part]

    one = drawn(1, 84)
    assert set(drawn(7, 3)) < set(one[:42]) and len({value for _, value in one}) == 84


@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_stream_goes_on_from_any_position_and_opens_no_shard_that_is_done(seven, window, monkeypatch):
    from lavis_evlgen.datasets.shards import stream as shard_stream

    dataset, opened = image_shards(seven, shuffle_window=window), []

    def reading(path, start, extensions, read=shard_stream.read_shard):
        opened.append((path, start))
        return read(path, start, extensions)

    monkeypatch.setattr(shard_stream, "read_shard", reading)
    whole, positions, stream = [], [], ShardStream(dataset, 1, 1, 2)
    for _ in range(30):
        samples, tally = stream.take(2)
        whole += [(s["instance_id"], s["image"].sum().item()) for s in samples]
        positions.append(tally.position)
    for done, position in enumerate(positions[:25], start=1):
        opened.clear()
        again = ShardStream(dataset, 1, 1, 2, position)
        found = [(s["instance_id"], s["image"].sum().item()) for s in again.take(6)[0]]
        assert found == whole[2 * done : 2 * done + 6]
        block = position.items // window * window
        assert opened[0] == (dataset.shards[again.shard(position.shards)[1]], block) and len(opened) <= 4


GOOD, HTML_SAYS = jpeg(), "looks like HTML, perhaps an error page saved by a downloader"
# kind: (members of a sample of that key, the reason it is counted under)
BAD = {
    "html": (lambda key: sample(key, "x", HTML), HTML_SAYS),
    "cut": (lambda key: sample(key, "x", jpeg(size=100)[:-300]), "broken or truncated"),
    "bomb": (lambda key: sample(key, "x", pixel_bomb()), "too many pixels to open safely"),
    "empty": (lambda key: sample(key, "x", b""), "the file is empty"),
    "nokey": (lambda key: {f"{key}.jpg": GOOD, f"{key}.json": b'{"text": "x"}'}, "its json has no key caption"),
    "nojson": (lambda key: {f"{key}.jpg": GOOD, f"{key}.json": b"{'caption': 'x'}"}, "its json cannot be parsed"),
    "list": (lambda key: {f"{key}.jpg": GOOD, f"{key}.json": b'["x"]'}, "its json has no key caption"),
    "nowords": (lambda key: sample(key, " - "), "its caption has no words"),
    "latin1": (lambda key: {f"{key}.jpg": GOOD, f"{key}.txt": b"caf\xe9"}, "its txt is not UTF-8"),
    "lonely": (lambda key: {f"{key}.jpg": GOOD}, "an image without a caption"),
    "blind": (lambda key: {f"{key}.json": b'{"caption": "x"}'}, "a caption without an image"),
}


def bad_shards(folder) -> tuple[str, dict, list[str]]:
    """Six shards: three with bad samples of all kinds between good ones, one of HTML, one cut short, one missing.

    (brace list, what is to be counted in an epoch by (shard, whole, reason), texts of the good samples)
    """
    expected, good = Counter(), []
    for s in range(3):
        members = {}
        for kind, (make, reason) in BAD.items():
            good.append(f"good {s} {kind}")
            members |= sample(f"{kind}good", good[-1], GOOD)
            for n in range(s + 1):
                members |= make(f"{kind}{n}")
                expected[f"{s}.tar", False, reason] += 1
        write_shard(folder / f"{s}.tar", members)
    (folder / "3.tar").write_bytes(HTML)
    write_shards(folder / "more", (4,))
    whole = (folder / "more" / "00000.tar").read_bytes()
    (folder / "4.tar").write_bytes(whole[: whole.index(b"000002.json")])
    good += ["shard 0 number 0", "shard 0 number 1"]
    expected["3.tar", True, "it is not a tar file"] = expected["5.tar", True, "it is not there"] = 1
    expected["4.tar", True, "it is cut short"] = expected["4.tar", False, "an image without a caption"] = 1
    return f"{folder}/{{0..5}}.tar", expected, good


def one_epoch(dataset, seed, number, streams):
    """(texts of the samples, what was bad) of one stream in epoch 0."""
    stream, texts, bad = ShardStream(dataset, seed, number, streams), [], Counter()
    while True:
        samples, tally = stream.take(1)
        for entry in tally.bad.values():  # what follows the last good sample is met with the one after it
            bad[entry.shard.rsplit("/")[-1], entry.whole, entry.reason] += entry.count
        if stream.shard(tally.position.shards)[0]:
            return texts, bad
        texts.append(samples[0]["text_input"])


def seed_for(dataset, streams, good_start):
    """A seed with which the first shard of every stream's epoch 1 begins with a good sample."""
    for seed in itertools.count():
        firsts = [ShardStream(dataset, seed, n, streams).shard(len(dataset.shards) // streams) for n in range(streams)]
        if all(epoch == 1 and index in good_start for epoch, index in firsts):
            return seed


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_bad_members_are_counted_exactly_and_cost_no_good_sample(tmp_path, streams):
    shards, expected, good = bad_shards(tmp_path)
    dataset = image_shards(shards, shuffle_window=1)
    seed = seed_for(dataset, streams, {0, 1, 2, 4})
    parts = [one_epoch(dataset, seed, number, streams) for number in range(streams)]
    assert sorted(text for texts, _ in parts for text in texts) == sorted(good)
    assert sum((bad for _, bad in parts), Counter()) == expected


def test_shuffled_among_bad_members_no_good_sample_is_lost_or_repeated(tmp_path):
    shards, _, good = bad_shards(tmp_path)
    dataset = image_shards(shards, shuffle_window=5)
    stream = ShardStream(dataset, 1, 0, 1)
    batches = [stream.take(5) for _ in range(21)]
    texts = [s["text_input"] for samples, _ in batches for s in samples]
    assert sorted(texts[:35]) == sorted(texts[35:70]) == sorted(texts[70:]) == sorted(good) and len(good) == 35
    for done in range(1, 21):  # and counts go on exactly from any position
        again = ShardStream(dataset, 1, 0, 1, batches[done - 1][1].position)
        for samples, tally in batches[done : done + 2]:
            found, recount = again.take(5)
            assert [s["text_input"] for s in found] == [s["text_input"] for s in samples] and recount == tally
    met = sum(tally.met for _, tally in batches)
    assert sum(tally.opened for _, tally in batches) in range(16, 20) and met > 3 * 35


@pytest.mark.parametrize(
    "members, keys, says",
    [
        (sample("a", "x", HTML), {}, "looks like HTML"),
        (sample("a"), {"caption_key": "text"}, "{folder}/x.tar:a: its json has no key text (it has caption)"),
        ({"README": b"x"}, {}, "it holds no sample"),
    ],
)  # fmt: skip
def test_shards_without_anything_usable_end_the_search(tmp_path, members, keys, says):
    write_shard(tmp_path / "x.tar", members)
    dataset = image_shards(f"{tmp_path}/x.tar", **keys)
    with pytest.raises(DataError) as error:
        ShardStream(dataset, 0, 0, 1).take(1)
    assert says.format(folder=tmp_path) in str(error.value)
    assert "shards: 65 samples or shards in a row cannot be used" in str(error.value)


def test_captions_of_json_txt_and_lists(tmp_path):
    members = {
        **sample("a", ["one", "two", "three"], GOOD), "b.png": GOOD, "b.txt": "\ufeffof the txt\n".encode(),
        **sample("c", "of the json", GOOD), "c.txt": b"not this one",
    }  # fmt: skip
    write_shard(tmp_path / "x.tar", members)
    stream = ShardStream(image_shards(f"{tmp_path}/x.tar"), 0, 0, 1)
    texts = {}
    for found in stream.take(90)[0]:
        texts.setdefault(found["image_id"].rsplit(":")[-1], Counter())[found["text_input"]] += 1
    assert texts["b"] == {"of the txt": 30} and texts["c"] == {"of the json": 30}
    assert set(texts["a"]) == {"one", "two", "three"} and min(texts["a"].values()) >= 4


# ---- through a loader, on several ranks and workers


def batches(sets, count, *, ratios=None, start=0, rank=0, world=1, workers=0, positions=None, batch=2):
    """[(data set, samples, tally or None)] of a loader."""
    loader = iter(train_loader(sets, ratios, batch, 11, rank, world, start, workers, False, positions))
    found = []
    for content in itertools.islice(loader, count):
        if isinstance(content, list):
            found.append((None, content, None))
        else:
            k, tally = content["shards"]
            values = content["image"].flatten(1).sum(1).tolist()
            found.append((k, list(zip(content["instance_id"], values, strict=True)), tally))
    return found


def stop_and_go_on(sets, at, count, **keys):
    """The batches of a run that is killed after `at` of them, and goes on: its workers had read ahead."""
    workers, first = max(1, keys.get("workers", 0)), batches(sets, at, **keys)
    positions = {(k, tally.stream % workers): tally.position for k, _, tally in first if tally}
    return first + batches(sets, count - at, start=at, positions=positions, **keys)


def test_killed_and_resumed_on_two_ranks_with_two_workers_goes_on_at_the_same_sample(seven):
    sets, ids = [image_shards(seven, shuffle_window=3)], {}
    for rank in range(2):
        keys = {"rank": rank, "world": 2, "workers": 2}
        whole = batches(sets, 24, **keys)
        assert stop_and_go_on(sets, 7, 24, **keys) == whole  # 7: the workers' streams stand at different counts
        assert [tally.stream for _, _, tally in whole] == [2 * rank + m % 2 for m in range(24)]
        ids[rank] = [sample for _, samples, _ in whole for sample in samples]
    assert len({value for part in ids.values() for _, value in part}) == 96


def test_no_sample_is_lost_or_repeated_between_ranks_and_workers(tmp_path):
    """Four equal shards, so that all four streams end an epoch together."""
    sets = [image_shards(write_shards(tmp_path, (6, 6, 6, 6)))]
    found = [stop_and_go_on(sets, 3, 6, rank=rank, world=2, workers=2) for rank in range(2)]
    ids = [name for part in found for _, samples, _ in part for name, _ in samples]
    assert sorted(ids) == sorted(everything((6, 6, 6, 6)))


def test_a_worker_that_is_asked_for_the_stream_of_another_refuses(seven):
    mixture = train_loader([image_shards(seven)], None, 2, 11, 0, 1, 0, 2, False).dataset
    mixture[FromShards(0, 1, 2)], mixture[FromShards(0, 1, 2)]
    with pytest.raises(RuntimeError, match="a data worker reads stream 1, but was asked for stream 0"):
        mixture[FromShards(0, 0, 2)]


def test_the_number_of_workers_none_and_one_is_the_same(seven):
    assert batches([image_shards(seven)], 9, workers=0) == batches([image_shards(seven)], 9, workers=1)


def test_two_shard_sets_and_a_map_style_set_in_one_mix(seven, tmp_path):
    ratios = [15, 4, 1]  # the paper's
    sets = [image_shards(seven), image_shards(write_shards(tmp_path, (3, 2)), "other"), Rows(5)]
    whole = batches(sets, 70, ratios=ratios, workers=2, batch=1)
    shares = Counter(k for k, _, _ in whole)
    assert shares[0] > 40 > shares[1] > shares[None] > 0
    map_style = batches([Rows(40), Rows(40), Rows(5)], 70, ratios=ratios, batch=1)
    for (k, content, _), (_, alone, _) in zip(whole, map_style, strict=True):
        assert k is not None or content == alone  # which set a micro-step draws is a function of (seed, m)
    assert stop_and_go_on(sets, 33, 50, ratios=ratios, workers=2, batch=1) == whole[:50]


def test_two_sets_of_the_same_shards_have_orders_of_their_own(seven):
    found = batches([image_shards(seven), image_shards(seven)], 40, ratios=[1, 1])
    orders = [[name for k, samples, _ in found if k == which for name, _ in samples][:20] for which in (0, 1)]
    assert len(orders[1]) == 20 and orders[0] != orders[1]


# ---- builders


def build(builder=ImageShardsBuilder, **keys):
    config = OmegaConf.load(builder.default_config_path()).datasets[builder.NAME]
    return builder(OmegaConf.merge(config, keys)).build_datasets()


def test_the_builder_makes_a_training_set(seven):
    train = build(shards=seven, shuffle_window=2, caption_key="caption")["train"]
    samples, tally = ShardStream(train, 0, 0, 1).take(3)
    batch = train.collater(samples)
    assert batch["image"].shape == (3, 3, 224, 224) and batch["image"].dtype == torch.float32
    assert all(text.startswith("shard ") for text in batch["text_input"]) and tally.met == 3 == len(batch["image_id"])
    folder, _, pattern = seven.rpartition("/")
    assert list(build(shards=[pattern], folder=folder)["train"].shards) == list(train.shards)


@pytest.mark.parametrize("builder, count, last", [(Laion115mBuilder, 10_489, "10488"), (Ccs14mBuilder, 1256, "01255")])
def test_the_shard_lists_of_the_paper(builder, count, last):
    train = build(builder, folder="/data/x")["train"]
    assert len(train.shards) == count and train.shards[-1] == f"/data/x/{last}.tar" and train.name == builder.NAME
    with pytest.raises(DataError, match=rf"datasets.{builder.NAME}.folder is not given; set it to the folder of the"):
        build(builder)


@pytest.mark.parametrize(
    "keys, says",
    [
        ({}, "datasets.image_shards.shards is not given"),
        ({"shards": "/no/*.tar"}, "datasets.image_shards.shards: no file matches /no/*.tar"),
        ({"shards": "/x.tar", "shuffle_window": 0}, "shuffle_window=0 must be a whole number of at least 1"),
        ({"shards": "/x.tar", "max_bad_fraction": 2}, "max_bad_fraction=2 must be a number of at least 0"),
    ],
)
def test_configs_that_cannot_be(keys, says):
    with pytest.raises(DataError) as error:
        build(**keys)
    assert says in str(error.value)
