"""Evaluating on two ranks gives the card of one: captions, SCST's, answers and clips, with rows that do not split."""

import json
from pathlib import Path

import pytest

from tests.processes import on_two_ranks
from tests.run_tools import Runs
from tests.tiny import IMAGE_SIZE


def clips_config(config: dict) -> dict:
    stages = {
        stage: {"name": f"evlgen_video_{stage}", "num_frames": 3, "image_size": IMAGE_SIZE, "mean": "half"}
        for stage in ("train", "eval")
    }
    sizes = {"train": 8, "test": 6}
    config["model"] |= {"arch": "evlgen_video", "num_frames": 3, "frame_pooling": "concat", "temporal": False}
    return {**config, "datasets": {"moving_scenes": {"sizes": sizes, "image_size": 56, "vis_processor": stages}}}


def questions_config(config: dict, folder: Path) -> dict:
    from PIL import Image

    rows = []
    for n in range(4):
        Image.new("RGB", (60, 60), (60 * n, 20, 20)).save(folder / f"{n}.png")
        rows += [{"image": f"{n}.png", "question": f"what is {w}?", "answer": ["red", "blue"][n % 2]} for w in "abc"]
    rows = rows[:-1]  # 11 on two ranks
    (folder / "q.json").write_text(json.dumps(rows))
    stages = config["datasets"]["scenes"]["vis_processor"]
    data = {"images": str(folder), "questions": str(folder / "q.json"), "split": {"test": 4}, "vis_processor": stages}
    config["run"] |= {"task": "evlgen_vqa", "max_len": 4, "blind_share": 0.7}
    for key in ("metrics", "tokenizer", "blind_shuffles"):
        config["run"].pop(key, None)
    return {**config, "datasets": {"image_questions": data}}


@pytest.fixture(scope="module")
def evaluations(parts, tmp_path_factory) -> dict[str, Runs]:
    """By name: an evaluation of trained weights, on data that two ranks cannot share evenly."""
    root = tmp_path_factory.mktemp("two")
    found = {}
    runs = Runs(parts, root / "captions", blind_shuffles=1, max_iters=2, iters_per_inner_epoch=2)
    runs.train()
    weights = runs.output() / "checkpoint_last.pth"
    for name in ("captions", "scst", "questions", "clips"):
        found[name] = runs.copy(root / name, evaluate=True, test_splits=["test"])
        found[name].config["model"] |= {"pretrained": str(weights)}
    found["captions"].config["run"] |= {"keep_every": 1}
    scst = Runs(
        parts, root / "rewarded", task="scst", baseline="leave_one_out", num_samples=2, max_iters=1, blind_shuffles=1,
        iters_per_inner_epoch=1, init_lr=1e-4,
    )  # fmt: skip
    scst.config["model"] |= {"pretrained": str(weights)}
    scst.train()
    found["scst"].config["model"] |= {"pretrained": str(scst.output() / "checkpoint_last.pth")}
    found["scst"].config["run"] |= {"task": "scst"}
    (root / "asked").mkdir()
    found["questions"].config = questions_config(found["questions"].config, root / "asked")
    video = runs.copy(root / "video")
    video.config = clips_config(video.config)
    video.train()
    found["clips"].config = clips_config(found["clips"].config)
    found["clips"].config["model"] |= {"pretrained": str(video.output() / "checkpoint_last.pth")}
    return found


def card_and_rows(runs: Runs) -> dict:
    return {
        "card": json.loads((runs.output() / "run.json").read_text()),
        "rows": json.loads((runs.output() / "result" / "test_given.json").read_text())["rows"],
    }


def numbers(value, prefix="") -> dict[str, float]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in numbers(item, f"{prefix}{key}.").items()}
    return {prefix: value} if isinstance(value, int | float) else {}


@pytest.mark.parametrize("name", ["captions", "scst", "questions", "clips"])
def test_two_ranks_give_the_card_of_one(evaluations, name, tmp_path):
    alone, ranks = (evaluations[name].copy(tmp_path / folder) for folder in ("alone", "ranks"))
    alone.train(evaluate=True)
    on_two_ranks(ranks, script="evaluate.py")
    one, two = (card_and_rows(runs) for runs in (alone, ranks))
    assert two["card"]["data"] == one["card"]["data"] and two["card"]["model"] == one["card"]["model"]
    expected = numbers(one["card"]["metrics"])
    assert numbers(two["card"]["metrics"]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert "loss_shuffled." in expected and (name == "questions" or "metrics.CIDEr." in expected)
    one, two = (sorted(found["rows"], key=lambda row: int(row["instance_id"])) for found in (one, two))
    assert len(one) == len(two) and len(one) % 2 == (name in ("captions", "scst", "questions"))
    for a, b in zip(one, two, strict=True):
        assert numbers(b) == pytest.approx(numbers(a), rel=1e-4, abs=1e-5)
        assert {k: v for k, v in a.items() if isinstance(v, str)} == {k: v for k, v in b.items() if isinstance(v, str)}
