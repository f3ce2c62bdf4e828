"""Runs on tar shards: resume at the same sample, mixtures, what is bad counted and limited, mistakes refused early."""

import json
import multiprocessing
import shutil
from collections import Counter

import pytest
import torch

from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets.facts import adapted_sets
from lavis_evlgen.datasets.shards.stream import SHARD_ORDER, START, Bad, StreamPosition, Tally
from lavis_evlgen.runners import shard_progress
from lavis_evlgen.runners.checkpointing import checkpoints as state
from lavis_evlgen.runners.progress import read_json_lines
from lavis_evlgen.runners.shard_progress import ShardProgress
from lavis_evlgen.runners.skipped_samples import SkippedInShards, SkippedSamples, TooManyBadImages
from tests.datasets.shard_tools import HTML, image_shards, sample, write_shard, write_shards
from tests.run_tools import Runs, checkpoint, losses, same_tensors

STEPS, SAVED = 12, 7  # an epoch is 25 samples: both are past it


def on_shards(runs: Runs, lengths=(7, 3, 6, 5), **keys) -> Runs:
    """Train on shards, validate on scenes."""
    shards = write_shards(runs.folder / "shards", lengths)
    scenes = runs.config["datasets"]["scenes"]
    scenes["sizes"] = {"train": 0, "val": 4, "test": 0}
    runs.config["datasets"]["image_shards"] = {
        "shards": shards, "shuffle_window": 3, "vis_processor": scenes["vis_processor"], **keys,
    }  # fmt: skip
    runs.config["run"] |= {"max_iters": STEPS, "iters_per_inner_epoch": STEPS, "batch_size_train": 3, "num_workers": 2}
    return runs


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """An uninterrupted run on a mixture of shards and scenes, with a bad shard and bad samples among them."""
    runs = on_shards(Runs(parts, tmp_path_factory.mktemp("shards")), max_bad_fraction=0.1)
    runs.config["datasets"]["scenes"]["sizes"]["train"] = 9
    runs.config["run"] |= {"train_dataset_ratios": {"scenes": 1, "image_shards": 3}, "accum_grad_iters": 2}
    runs.config["run"]["iters_per_inner_epoch"] = SAVED
    members = {}
    for n in range(4):
        members |= sample(f"{n}", f"the fifth {n}") | sample(f"{n}bad", "x", HTML)
    write_shard(runs.folder / "shards" / "00004.tar", members)
    shards = runs.config["datasets"]["image_shards"]
    shards["shards"] = [shards["shards"], "00004.tar", "missing.tar"]
    shards["folder"] = str(runs.folder / "shards")
    shards["max_bad_fraction"] = 0.2
    runs.train()
    return runs


def named(runs):
    return [json.loads(line) for line in (runs.output() / "bad_shards.jsonl").read_text().splitlines()]


def test_a_resumed_run_goes_on_at_the_same_samples_and_counts(whole, tmp_path):
    runs = whole.copy(tmp_path)
    shutil.copytree(whole.output(), runs.output())  # its files are past the checkpoint, as after a kill
    half = checkpoint(runs.output(), state.PREVIOUS)
    assert half["step"] == SAVED and half["shards"]["ranks"] == 1 and half["shards"]["workers"] == 2
    assert set(half["shards"]["sets"]["image_shards"]["places"]) == {0, 1}
    runs.train(f"run.resume_ckpt_path={runs.output() / state.PREVIOUS}")
    assert losses(runs.output()) == losses(whole.output()) and len(losses(runs.output())) == STEPS
    resumed, expected = checkpoint(runs.output()), checkpoint(whole.output())
    for part in ("model", "optimizer", "rng", "shards"):
        assert same_tensors(resumed[part], expected[part]), part
    assert named(runs) == named(whole) and {row["step"] > SAVED for row in named(runs)} == {True, False}


def test_what_is_bad_is_counted_by_shard_and_reason(whole):
    totals = checkpoint(whole.output())["shards"]["sets"]["image_shards"]["totals"]
    rows = Counter()
    for row in named(whole):
        rows[row["shard"].rsplit("/")[-1], row["what"]] += row["count"]
    html = "samples: looks like HTML, perhaps an error page saved by a downloader"
    assert set(rows) == {("00004.tar", html), ("missing.tar", "shards: it is not there")}
    assert rows["00004.tar", html] == totals[html] >= 4
    assert rows["missing.tar", "shards: it is not there"] == totals["shards: it is not there"] >= 1
    assert totals["opened"] >= 6 and totals["met"] >= 50


def test_the_card_counts_what_shards_held(whole, tmp_path):
    runs = whole.copy(tmp_path)
    runs.train("run.valid_splits=[val]", "run.max_iters=6", "run.iters_per_inner_epoch=6")
    card = json.loads((runs.output() / "run.json").read_text())
    assert card["unreadable_images"] == {"val": 0, "train": sum(row["count"] for row in named(runs))}


@pytest.fixture(scope="module")
def begun(parts, tmp_path_factory):
    runs = on_shards(Runs(parts, tmp_path_factory.mktemp("begun")))
    runs.train("run.max_iters=2")
    return runs


@pytest.mark.parametrize(
    "option, says",
    [
        ("run.num_workers=1", "was trained by 1 ranks with 2 data workers each, this run has 1 with 1: every worker has"
         " its own position in the shards of image_shards, and it would be lost. Keep the number of ranks and run."
         "num_workers=2, or start a new run from these weights with model.pretrained="),
        ("datasets.image_shards.shards={0}/shards/0000[0-2].tar", "was trained on 4 shards of image_shards, now there "
         "are 3, and its position in them would be lost"),
    ],
)  # fmt: skip
def test_a_resume_that_would_lose_its_place_is_refused(begun, option, says, capsys):
    assert begun.command("run.resume_ckpt_path=auto", option.format(begun.folder)) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_another_shard_order_is_refused(tmp_path):
    """Such as those from before the order had a version."""
    old = shard_progress_of(tmp_path, {"a": image_shards("{0..9}.tar")}, 1)
    state = {key: value for key, value in old.state(1).items() if key != "order"}
    with pytest.raises(ConfigError, match="x.pth was trained when shards were read in another order.* the shards of a"):
        shard_progress_of(tmp_path, {"a": image_shards("{0..9}.tar")}, 1).load(state, "x.pth")


@pytest.mark.parametrize(
    "options, says",
    [
        (["run.num_workers=5"], "datasets.image_shards: 4 shards for 5 data workers (ranks x run.num_workers)"),
        (["datasets.image_shards.shards=/no/{0..9}.tar"], "10 of 10 shards looked at are not there, more than max_bad_"
         "fraction=0.01 allows; the first is /no/0.tar. Check datasets.image_shards.shards and .folder"),
        (["datasets.scenes.sizes.train=9"], "run.train_dataset_ratios is needed: shards do not say how many samples "
         "they hold (image_shards); give every training set its share, e.g. {image_shards: 1, scenes: 1}"),
        (["run.valid_splits=[train]"], "image_shards has no references to score against"),
        (["datasets.image_shards.caption_ky=text"], "unknown key datasets.image_shards.caption_ky; did you mean capt"),
        (["datasets.image_shards.caption_key=text", "run.num_workers=0"], "image_shards: 200 samples or shards in a row"
         " cannot be used, mostly for one reason: its json has no key text"),
        (["datasets.image_shards.shards=a.tar", "datasets.image_shards.shards=b.tar"], "datasets.image_shards.shards is"
         " given 2 times in a row; quote values with braces or stars, or the shell makes several of them"),
    ],
)  # fmt: skip
def test_mistakes_end_a_run_with_one_line(runs, options, says, capsys, monkeypatch):
    from lavis_evlgen.datasets.shards import stream as shard_stream

    monkeypatch.setattr(shard_stream, "MOST_ITEMS", 200)  # of 10,000
    assert on_shards(runs).command(*options) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_too_many_bad_samples_end_a_run_with_one_line(runs, capsys):
    on_shards(runs, max_bad_fraction=0.0)
    write_shard(runs.folder / "shards" / "00001.tar", sample("a") | sample("b", "x", HTML) | sample("c"))
    assert runs.command("run.num_workers=0") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("train.py: image_shards: 1 of ") and "00001.tar:b: looks like HTML" in line
    assert str(runs.output() / "bad_shards.jsonl") in line and [row["count"] for row in named(runs)] == [1]


def test_the_mix_of_the_paper(runs):
    """15 : 4 : 1, each set of shards with its own place."""
    on_shards(runs)
    sets = runs.config["datasets"]
    sets["scenes"]["sizes"]["train"] = 9
    for name, lengths in {"laion115m": (5, 4, 6), "ccs14m": (3, 3)}.items():
        shards = write_shards(runs.folder / name, lengths)
        sets[name] = {"folder": shards.rpartition("/")[0], "shards": shards.rpartition("/")[2]}
        sets[name]["vis_processor"] = sets["scenes"]["vis_processor"]
    del sets["image_shards"]
    runs.config["run"]["train_dataset_ratios"] = {"laion115m": 15, "ccs14m": 4, "scenes": 1}
    runs.train("run.batch_size_train=1", "run.iters_per_inner_epoch=8")
    found = checkpoint(runs.output())["shards"]["sets"]
    met = {name: found[name]["totals"]["met"] for name in ("laion115m", "ccs14m")}
    assert met["laion115m"] > met["ccs14m"] > 0 and sum(met.values()) < STEPS
    before = losses(runs.output())
    runs.train(f"run.resume_ckpt_path={runs.output() / state.PREVIOUS}", "run.batch_size_train=1")
    assert losses(runs.output()) == before and checkpoint(runs.output())["shards"]["sets"] == found


def test_evaluation_needs_none_of_the_shards(runs):
    on_shards(runs)
    (runs.folder / "shards" / "00000.tar").unlink()
    runner = runs.train("run.test_splits=[val]", evaluate=True)
    assert (runner.output_dir / "result" / "val_given.json").exists()


# ---- bookkeeping


def tally(position=START, opened=0, met=0, bad=(), stream=0):
    found = {(shard, whole, reason): Bad(shard, whole, reason, f"{shard}: first", n) for shard, whole, reason, n in bad}
    return Tally(stream, position, opened, met, found)


def test_the_limit_counts_shares_of_samples_and_of_shards(tmp_path):
    bad = SkippedInShards(tmp_path, {"a": 0.01})
    bad.add("a", tally(opened=1, met=500, bad=[("x.tar", False, "html", 10)]))
    bad.share(1), bad.check()  # 10 of at least 1000
    bad.add("a", tally(met=100, bad=[("x.tar", False, "html", 1)])), bad.share(2)
    with pytest.raises(TooManyBadImages) as error:
        bad.check()
    assert "a: 11 of 600 samples and 0 of 1 shards met so far cannot be used: samples: html (11)" in str(error.value)
    assert "such as x.tar: first" in str(error.value) and "raise datasets.a.max_bad_fraction" in str(error.value)
    assert len(bad.file.read_text().splitlines()) == 2
    bad.add("a", tally(met=500)), bad.share(3), bad.check()  # 11 of 1100

    bad.add("a", tally(opened=9, bad=[("y.tar", True, "cut short", 1)])), bad.share(4), bad.check()
    bad.add("a", tally(opened=1, bad=[("z.tar", True, "cut short", 1)])), bad.share(5)
    with pytest.raises(TooManyBadImages, match="11 of 1100 samples and 2 of 11 shards"):
        bad.check()


def test_the_log_speaks_when_the_count_has_doubled(tmp_path, caplog):
    bad = SkippedInShards(tmp_path, {"a": 1.0})
    for step in range(1, 101):
        bad.add("a", tally(met=10, bad=[("x.tar", False, "html", 1)])), bad.share(step)
    assert [r.getMessage().split()[1] for r in caplog.records] == ["1", "2", "4", "8", "16", "32", "64"]
    assert bad.count == 100 and sum(json.loads(line)["count"] for line in bad.file.read_text().splitlines()) == 100


def shard_progress_of(folder, data, workers):
    return ShardProgress(data, workers, SkippedSamples(folder, adapted_sets({"train": data})["train"]).shards)


def test_only_what_training_took_moves_the_place(tmp_path, monkeypatch):
    """Batches that are still in the loader do not count; of ranks, each keeps its own."""
    data = {"scenes": [1, 2], "a": image_shards("{0..9}.tar"), "b": image_shards("{0..5}.tar")}
    monkeypatch.setattr(shard_progress.distributed, "rank", lambda: 1)
    monkeypatch.setattr(shard_progress.distributed, "world_size", lambda: 2)
    seen = [{"shards": (1, tally(StreamPosition(m, m), stream=2 + m % 2))} for m in range(5)] + [{"image": "of scenes"}]
    progress, loader = shard_progress_of(tmp_path, data, 2), iter(seen)
    followed = progress.follow(loader)
    taken = [next(followed) for _ in range(3)]
    assert taken == [{}] * 3 and progress.positions == {(1, 0): StreamPosition(2, 2), (1, 1): StreamPosition(1, 1)}
    state = progress.state(3)
    assert state["sets"]["a"] == {"shards": 10, "places": {2: [2, 2], 3: [1, 1]}, "totals": {"opened": 0, "met": 0}}
    again = shard_progress_of(tmp_path, data, 2)
    again.load(state, "x.pth")
    assert again.positions == progress.positions
    assert list(followed)[-1] == {"image": "of scenes"}


def one_of_two_ranks(rank, folder, answers):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    progress = shard_progress_of(folder, {"a": image_shards("{0..9}.tar")}, 2)
    bad = [("x.tar", False, "html", 1)]
    batches = [{"shards": (0, tally(StreamPosition(5 * rank, m), 1, 2, bad, 2 * rank + m % 2))}
               for m in range(1, 5 + rank)]
    list(progress.follow(batches))
    answers.put((progress.state(7), progress.skipped.count))


def test_a_checkpoint_holds_the_places_and_counts_of_all_ranks(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    ranks = [context.Process(target=one_of_two_ranks, args=(rank, tmp_path, answers), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    (state, count), other = (answers.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.kill()
    assert other == (state, count) and count == 9
    assert state == {
        "ranks": 2, "workers": 2, "order": SHARD_ORDER, "sets": {"a": {
            "shards": 10, "places": {0: [0, 4], 1: [0, 3], 2: [5, 4], 3: [5, 5]},
            "totals": {"opened": 9, "met": 18, "samples: html": 9},
        }},
    }  # fmt: skip
    rows = read_json_lines(tmp_path / "bad_shards.jsonl")
    assert [(row["step"], row["shard"], row["count"]) for row in rows] == [(7, "x.tar", 9)]


def test_a_set_that_is_new_in_the_mix_begins_at_its_beginning(tmp_path, caplog):
    old = shard_progress_of(tmp_path, {"a": image_shards("{0..9}.tar")}, 1)
    old.positions[0, 0] = StreamPosition(3, 4)
    new = shard_progress_of(tmp_path, {"b": image_shards("{0..5}.tar"), "a": image_shards("{0..9}.tar")}, 1)
    new.load(old.state(1), "x.pth")
    assert new.positions == {(1, 0): StreamPosition(3, 4)} and "x.pth holds no position in b" in caplog.text
    nothing = shard_progress_of(tmp_path, {"a": [1, 2]}, 4)
    nothing.load(old.state(1), "x.pth")
    assert nothing.state(2) is None and not nothing.positions
