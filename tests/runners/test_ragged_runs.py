"""`model.tome_r: {average, least, most}` in whole runs: what is logged and kept, resumed, on ranks; what is refused."""

import json
import shutil

import pytest
import torch

from lavis_evlgen.config import ConfigError
from lavis_evlgen.models.lengths import summary_of
from lavis_evlgen.nn.ragged import UNSET
from tests.processes import on_two_ranks
from tests.run_tools import Runs, checkpoint, log, losses, same_tensors

SPEC = {"average": 9, "least": 6, "most": 13}
THRESHOLDS = "connector.tomeformer.thresholds"


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory) -> Runs:
    """Three steps of four pictures with two captions each, all options on, saved at each step; evaluated at 2 and 3."""
    runs = Runs(
        parts, tmp_path_factory.mktemp("ragged"), max_iters=3, iters_per_inner_epoch=2, batch_size_train=4,
        valid_splits=[], test_splits=["test"], save_every=1, texts_per_image=2,
        sheet_pictures=0,
    )  # fmt: skip
    runs.config["model"] |= {"tome_r": SPEC, "dropout": 0.0, "skip": "pooled", "readout": "group"}
    runs.config["datasets"]["scenes"] |= {"captions_per_image": 2, "sizes": {"train": 12, "val": 4, "test": 12}}
    runs.runner = runs.train()
    return runs


def card(runs: Runs, name: str = "run") -> dict:
    return json.loads((runs.output(name) / "run.json").read_text())["metrics"]


def test_log_and_card_say_how_many_tokens_pictures_have(whole):
    rows = [row for row in log(whole.output()) if "loss" in row]
    for row in rows:  # each window is one step, in which the batch has the average
        assert row["prompt_tokens"] == 9 and 6 <= row["prompt_tokens_p5"] <= 9 <= row["prompt_tokens_p95"] <= 13
        assert "prompt_lengths" not in row and row["flops_per_image"] == rows[0]["flops_per_image"]
    assert any(row["prompt_tokens_p5"] < row["prompt_tokens_p95"] for row in rows)
    result = json.loads((whole.output() / "result" / "test_3.json").read_text())
    expected = summary_of(result["rows"])
    assert len(result["rows"]) == 12 and {key: card(whole)[key] for key in expected} == expected
    assert 6 <= expected["prompt_tokens_p5"] <= expected["prompt_tokens"] <= expected["prompt_tokens_p95"] <= 13


def test_what_is_saved_is_calibrated_and_a_resumed_run_goes_on_bit_for_bit(whole, tmp_path):
    expected = checkpoint(whole.output())["model"]
    assert (expected[THRESHOLDS].abs() <= 1).all() and (expected[THRESHOLDS] != UNSET).all()
    model = whole.runner.model.eval()
    images = [whole.runner.datasets["scenes"]["train"][row]["image"] for row in range(12)]
    with torch.no_grad():
        found = model.visual_prompt(torch.stack(images)).mask.sum(1).float().mean()
    assert 8 < found < 10  # other crops of the pictures that the thresholds were set by
    halves = whole.copy(tmp_path)
    again = halves.output("again")
    again.mkdir(parents=True)
    half = shutil.copy(whole.output() / "checkpoint_previous.pth", again)
    assert checkpoint(again, "checkpoint_previous.pth")["step"] == 2
    halves.train("run.run_name=again", f"run.resume_ckpt_path={half}")
    assert same_tensors(checkpoint(again)["model"], expected)
    assert losses(again) == {3: losses(whole.output())[3]}
    assert card(halves, "again") == card(whole)


def test_two_ranks_are_one_with_twice_the_batch(whole, tmp_path):
    """Losses, thresholds, and the tokens of the pictures that were tested; with stored tokens of the ViT."""
    runs = whole.copy(tmp_path, batch_size_train=2)
    on_two_ranks(runs)
    assert list(losses(runs.output()).values()) == pytest.approx(
        list(losses(whole.output()).values()), rel=1e-5, abs=1e-5
    )
    expected, found = (checkpoint(one.output())["model"][THRESHOLDS] for one in (whole, runs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert card(runs)["prompt_tokens"] == card(whole)["prompt_tokens"]


def test_stored_tokens_of_the_vit(whole, tmp_path):
    runs = whole.copy(tmp_path, max_iters=1)
    runs.config["datasets"]["scenes"]["vis_processor"]["train"] |= {"min_scale": 1.0, "flip": False}
    runs.train("run.run_name=plain")
    runs.train("run.run_name=stored", f"run.cache_features={tmp_path / 'cache'}", "run.cache_precision=fp32")
    plain, stored = (checkpoint(runs.output(name))["model"] for name in ("plain", "stored"))
    torch.testing.assert_close(stored[THRESHOLDS], plain[THRESHOLDS], rtol=1e-5, atol=1e-5)
    assert losses(runs.output("stored")) == pytest.approx(losses(runs.output("plain")), rel=1e-5)
    assert card(runs, "stored")["prompt_tokens"] == card(runs, "plain")["prompt_tokens"]


def test_scst_on_pictures_of_different_length(whole, tmp_path):
    start = f"model.pretrained={whole.output() / 'checkpoint_last.pth'}"
    runs = whole.copy(tmp_path, texts_per_image=1, max_iters=1, max_len=5)
    runs.train(start, "run.task=scst", "run.baseline=leave_one_out", "run.num_samples=2")
    (row,) = [row for row in log(runs.output()) if "loss" in row]
    assert "reward" in row and row["prompt_tokens"] == 9


def test_weights_without_thresholds_are_trained_but_not_evaluated(whole, finished, tmp_path):
    fixed = f"model.pretrained={finished.output() / 'checkpoint_last.pth'}"
    runs = whole.copy(tmp_path, max_iters=1)
    runs.config["model"] |= {"skip": "none", "readout": "none"}
    asked = f"model.tome_r={json.dumps(SPEC).replace(chr(34), '')}"
    with pytest.raises(ConfigError, match="model.tome_r: the weights have no thresholds .* evaluate with the tome_r"):
        runs.train(fixed, asked, evaluate=True)
    runs.train(fixed, "run.run_name=trained")
    assert (checkpoint(runs.output("trained"))["model"][THRESHOLDS] < UNSET).all()


def test_ranks_with_data_sets_of_their_own_are_refused(whole, tmp_path):
    with pytest.raises(ConfigError, match="run.mix_per_rank=true: .*compares the pictures of all ranks"):
        whole.copy(tmp_path).train("run.mix_per_rank=true")
