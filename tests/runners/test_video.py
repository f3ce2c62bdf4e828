"""EVLGen-Video on drawn clips as train.py runs it: validation with the order of events, and a resume bit for bit."""

import json

import pytest

from lavis_evlgen.evaluation import order_accuracy
from tests.run_tools import Runs, checkpoint, log, losses, same_tensors


@pytest.fixture(scope="module")
def video(parts, tmp_path_factory) -> Runs:
    """Four steps with all that draws: dropout, random partition; validated and saved after two and four."""
    runs = Runs(
        parts, tmp_path_factory.mktemp("video"), max_iters=4, iters_per_inner_epoch=2, valid_splits=["val"],
        test_splits=["test"], sheet_pictures=2,
    )  # fmt: skip
    runs.config["model"] |= {"arch": "evlgen_video", "num_frames": 3, "temporal_positions": True, "residual": "convex"}
    runs.config["model"] |= {"dropout": 0.2, "partition": "random"}
    runs.config["datasets"] = {"moving_scenes": {"sizes": {"train": 14, "val": 6, "test": 4}, "image_size": 56}}
    runs.train()
    return runs


@pytest.mark.parametrize("split, step, clips", [("val", 2, 6), ("val", 4, 6), ("test", None, 4)])
def test_results_and_card_say_how_often_the_order_was_right(video, split, step, clips):
    file = next((video.output() / "result").glob(f"{split}_{step or '?'}.json"))
    result = json.loads(file.read_text())
    said, true = ({row["image_id"]: row[key] for row in result["rows"]} for key in ("caption", "references"))
    expected = order_accuracy(said, true)
    assert expected["order_asked"] == clips and expected.items() <= result.items()
    card = json.loads(file.with_suffix(".card.json").read_text())
    assert expected.items() <= card["metrics"].items() and card["data"]["name"] == "moving_scenes"


def test_the_log_keeps_it_beside_the_losses(video):
    validated = [row for row in log(video.output()) if "val_loss_right" in row]
    assert [row["step"] for row in validated] == [2, 4] and all(0 <= row["order_accuracy"] <= 1 for row in validated)
    for name in ("captions.png", "loss.png"):
        assert (video.output() / name).stat().st_size > 1000


def test_temporal_modules_and_positions_train(video):
    model = checkpoint(video.output())["model"]
    for block in range(3):
        assert model[f"visual_encoder.temporal.{block}.alpha"].abs() > 0
        assert model[f"visual_encoder.temporal.{block}.positions"].abs().sum() > 0


def test_a_resume_is_bit_equal(video):
    copy = video.output("copy")
    copy.mkdir()
    middle = video.output() / "checkpoint_previous.pth"
    assert checkpoint(video.output(), middle.name)["step"] == 2
    (copy / middle.name).write_bytes(middle.read_bytes())
    video.train("run.run_name=copy", f"run.resume_ckpt_path={copy / middle.name}", "run.test_splits=[]")
    whole, resumed = losses(video.output()), losses(copy)
    assert len(set(whole.values())) == 4 and resumed == {step: whole[step] for step in (3, 4)}
    last, expected = checkpoint(copy), checkpoint(video.output())
    for part in ("model", "optimizer", "rng", "step"):
        assert same_tensors(last[part], expected[part]), part
