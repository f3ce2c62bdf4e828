"""Paired differences between runs, from hand-made run folders, against formulas and a slow loop."""

import json

import numpy as np
import pytest

from lavis_evlgen.cli import main
from lavis_evlgen.config import ConfigError
from lavis_evlgen.tools.compare import read_runs
from lavis_evlgen.tools.paired import Arm, arms_of, difference, rows_of

PICTURES = 60


def run_of(path, losses, seed=42, tokens=None, metrics=None, **model):
    """A run folder whose test split has one text a picture, of these nats."""
    (path / "result").mkdir(parents=True)
    card = {
        "metrics": metrics or {}, "data": {"split": "test", "fingerprint": "abc"}, "step": 10,
        "config": {"model": model, "run": {"seed": seed, "output_dir": str(path)}},
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(card))
    (path / "log.jsonl").write_text("")
    tokens = [10.0] * len(losses) if tokens is None else tokens
    rows = [
        {"image_id": f"{n}.jpg", "loss": float(loss), "tokens": float(count)}
        for n, (loss, count) in enumerate(zip(losses, tokens, strict=True))
    ]
    (path / "result" / "test_10.json").write_text(json.dumps({"rows": rows}))
    return path


@pytest.fixture
def hard():
    """Nats of pictures, of which some are far harder than others."""
    return np.random.default_rng(1).normal(30, 10, PICTURES)


def test_a_small_difference_on_every_picture_is_seen(tmp_path, hard):
    better = hard - 1 + np.random.default_rng(2).normal(0, 0.5, PICTURES)
    first, other = arms_of(read_runs([run_of(tmp_path / "a", hard), run_of(tmp_path / "b", better, skip="pooled")]))
    found = difference(first, other)
    assert found.mean == pytest.approx((better - hard).sum() / (10 * PICTURES))
    # by the normal approximation of a mean of differences; unpaired, it would be 25 times as wide
    error = 1.96 * np.std(better - hard) / np.sqrt(PICTURES) / 10
    assert (found.most - found.least) / 2 == pytest.approx(error, rel=0.05)
    assert found.most < 0


def test_two_runs_alike_have_an_interval_over_zero(tmp_path, hard):
    noise = np.random.default_rng(3).normal(0, 0.5, PICTURES)
    folders = [run_of(tmp_path / "a", hard), run_of(tmp_path / "b", hard + noise, num_layers=2)]
    first, other = arms_of(read_runs(folders))
    found = difference(first, other)
    assert found.least < 0 < found.most


def test_it_is_the_slow_loops(hard):
    draw = np.random.default_rng(4)
    tokens = draw.integers(5, 20, PICTURES).astype(float)
    arms = [Arm(name, seeds, hard + draw.normal(0, 1, (len(seeds), PICTURES)), tokens)
            for name, seeds in (("a", [1, 2, 3]), ("b", [1, 2]))]  # fmt: skip
    slow, draws = [], np.random.default_rng(0)
    for _ in range(200):
        pictures = draws.integers(PICTURES, size=PICTURES)
        of_a = draws.integers(3, size=3)
        of_b = draws.integers(2, size=2)
        nats = {name: np.mean([[arm.losses[s, p] for p in pictures] for s in seeds], axis=0).sum()
                for name, arm, seeds in (("a", arms[0], of_a), ("b", arms[1], of_b))}  # fmt: skip
        slow.append((nats["b"] - nats["a"]) / sum(tokens[p] for p in pictures))
    found = difference(*arms, resamples=200)
    assert [found.least, found.most] == pytest.approx(list(np.percentile(slow, [2.5, 97.5])))


def test_runs_that_differ_in_seeds_are_one_arm(tmp_path, hard, capsys):
    folders = [run_of(tmp_path / f"{arm}{seed}", hard + seed - gain, seed=seed, arm=arm)
               for arm, gain in (("a", 0), ("b", 2)) for seed in (1, 2)]  # fmt: skip
    rows = rows_of(arms_of(read_runs(folders)))
    assert [row[:3] for row in rows] == [("a1", "1, 2", "60"), ("b1", "1, 2", "60")]
    assert rows[1][4] == "-0.200"  # whatever the seeds: they are drawn alike
    assert rows[1][5] == "-0.200 to -0.200"
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--paired", *map(str, folders)])
    shown = capsys.readouterr().out
    assert "-0.200" in shown and "over pictures and seeds" in shown


def test_stages_that_start_in_their_own_runs_are_one_arm(tmp_path, hard):
    paths = {seed: tmp_path / f"seed{seed}/2_language" for seed in (1, 2)}
    folders = [run_of(path, hard, seed=seed, pretrained=f"{path}/1_align.pth") for seed, path in paths.items()]
    arms = arms_of(read_runs([*folders, run_of(tmp_path / "other", hard, x=1)]))
    assert [arm.seeds for arm in arms] == [[1, 2], [42]]


def test_pictures_that_one_run_could_not_read_are_counted(tmp_path, hard, capsys):
    first, other = arms_of(read_runs([run_of(tmp_path / "a", hard), run_of(tmp_path / "b", hard[:-2], x=1)]))
    assert len(first.tokens) == len(other.tokens) == PICTURES - 2
    assert "2 pictures are not in all runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, words",
    [({}, "differ in nothing but seeds"), ({"tokens": [9.0] * PICTURES, "x": 1}, "tokenizers differ"),
     ({"metrics": {"loss_texts_per_image": 5}, "x": 1}, "how many references")],
)  # fmt: skip
def test_what_does_not_compare_is_refused(tmp_path, hard, change, words):
    runs = read_runs([run_of(tmp_path / "a", hard), run_of(tmp_path / "b", hard, seed=1, **change)])
    with pytest.raises(ConfigError, match=words):
        arms_of(runs)


def test_a_run_without_losses(tmp_path, hard):
    folders = [run_of(tmp_path / "a", hard), run_of(tmp_path / "b", hard, x=1)]
    (tmp_path / "b/result/test_10.json").write_text('{"rows": [{"image_id": 1}]}')
    with pytest.raises(ConfigError, match="no row of .*test_10.json has a loss"):
        arms_of(read_runs(folders))
    (tmp_path / "b/result/test_10.json").unlink()
    with pytest.raises(ConfigError, match="test_10.json has no losses of pictures"):
        arms_of(read_runs(folders))
