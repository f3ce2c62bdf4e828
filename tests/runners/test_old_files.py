"""A run folder and a bundle of an earlier version, kept in tests/files/release_0_1, still load, go on and score alike.

They were written by commit c55b6dc on tiny random parts (tests/run_tools.py), 8 steps, saved at steps 6 and 8.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lavis_evlgen import cli
from lavis_evlgen.datasets import ScenesDataset
from lavis_evlgen.models.evlgen import EVLGen
from tests.run_tools import Runs, checkpoint, losses

FILES = Path(__file__).resolve().parents[1] / "files" / "release_0_1"
PARTS = {key: str(FILES / "parts" / key) for key in ("vit_model", "connector_init", "llm_model")}


@pytest.fixture
def old(tmp_path) -> Runs:
    """The old run, its folder copied to where a run of today would look for it."""
    runs = Runs(PARTS, tmp_path, max_iters=8, iters_per_inner_epoch=6, valid_splits=["val"], test_splits=["test"],
                accum_grad_iters=2)  # fmt: skip
    shutil.copytree(FILES / "run", runs.output())
    return runs


def test_a_run_goes_on_from_an_old_checkpoint_as_the_old_version_did(old):
    """It accumulates, and its checkpoint does not say how losses are averaged: as they were then."""
    expected = losses(FILES / "run")
    old.train(f"run.resume_ckpt_path={old.output() / 'checkpoint_step6.pth'}")
    found = losses(old.output())
    assert list(found) == list(expected) == list(range(1, 9))
    assert found == pytest.approx(expected, abs=1e-5)
    assert checkpoint(old.output())["loss_mean"] == "micro_steps"  # and so a resume of this one


def test_an_old_checkpoint_scores_what_its_run_card_says(old):
    weights = old.output() / "checkpoint_last.pth"
    old.train(f"model.pretrained={weights}", "run.test_splits=[val]", "run.run_name=again", evaluate=True)
    found = json.loads((old.output("again") / "run.json").read_text())["metrics"]
    expected = json.loads((FILES / "run/result/val_8.card.json").read_text())["metrics"]
    assert found["loss_right"] == pytest.approx(expected["loss_right"], abs=1e-5)
    assert found["loss_shuffled"] == pytest.approx(expected["loss_shuffled"], abs=1e-5)


def test_an_old_bundle_has_the_weights_of_its_checkpoint_and_captions(tmp_path, capsys):
    bundle = tmp_path / "bundle"
    shutil.copytree(FILES / "bundle", bundle)
    config = json.loads((bundle / "config.json").read_text())
    config["model"] |= {key: PARTS[key] for key in ("vit_model", "llm_model")}
    (bundle / "config.json").write_text(json.dumps(config))
    model = EVLGen.from_pretrained(bundle)
    trained = torch.load(FILES / "run/checkpoint_last.pth", weights_only=True)["model"]
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in trained.items()) and len(trained) == 42

    picture = tmp_path / "scene.png"
    ScenesDataset("test", 1, image_size=56).pil_image(0).save(picture)
    with pytest.raises(SystemExit) as end:
        cli.main(["caption", str(picture), "--run", str(bundle)])
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f"{picture}\t")
