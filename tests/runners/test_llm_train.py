"""Runs whose language model learns: resumed bit-equal, two ranks = one, evaluated and exported as trained."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lavis_evlgen.runners.checkpointing import checkpoints
from tests.processes import on_two_ranks
from tests.run_tools import Runs, checkpoint, losses, same_tensors
from tests.test_cli import evlgen

TRAININGS = pytest.mark.parametrize("llm_train", ["full", {"lora": {"rank": 4, "alpha": 8}}], ids=["full", "lora"])


def runs_with(parts, folder, llm_train, **run) -> Runs:
    runs = Runs(parts, folder, **{"max_iters": 6, "iters_per_inner_epoch": 3, "valid_splits": ["val"], **run})
    runs.config["model"] |= {"llm_train": llm_train, "prompt_attention": "visual", "dropout": 0.2}
    return runs


@TRAININGS
def test_a_resumed_run_is_bit_equal(parts, tmp_path, llm_train):
    runs = runs_with(parts, tmp_path, llm_train)
    runs.train()
    whole = checkpoint(runs.output())
    copy = runs.output("copy")
    copy.mkdir()
    checkpoints.write(copy / "half.pth", checkpoint(runs.output(), "checkpoint_previous.pth"))
    runs.train("run.run_name=copy", f"run.resume_ckpt_path={copy / 'half.pth'}")
    resumed = checkpoint(copy)
    assert losses(copy) == {step: loss for step, loss in losses(runs.output()).items() if step > 3}
    assert all(same_tensors(whole[part], resumed[part]) for part in ("model", "optimizer", "rng"))
    texts = [json.loads((folder / "run.json").read_text())["text_loss"] for folder in (runs.output(), copy)]
    assert texts[0]["now"] == texts[1]["now"] != texts[0]["before"]  # forgetting; a copied folder has no start
    assert texts[1]["before"] is None
    inside = {name for name in whole["model"] if name.startswith("language_model.")}
    assert inside and (llm_train == "full") == (not any("lora_" in name for name in inside))


@TRAININGS
def test_two_ranks_are_one(parts, tmp_path, llm_train):
    one = runs_with(parts, tmp_path / "one", llm_train, batch_size_train=4, valid_splits=[])
    two = runs_with(parts, tmp_path / "two", llm_train, batch_size_train=2, valid_splits=[])
    for runs in (one, two):
        runs.config["model"]["dropout"] = 0.0
    on_two_ranks(two)
    one.train()
    assert losses(two.output()) == pytest.approx(losses(one.output()), abs=1e-5)
    ours, theirs = checkpoint(one.output())["model"], checkpoint(two.output())["model"]
    assert set(ours) == set(theirs)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-4


@TRAININGS
def test_evaluation_and_export_take_what_was_trained(parts, tmp_path, llm_train, capsys):
    runs = runs_with(parts, tmp_path, llm_train)
    runs.train()
    expected = json.loads((runs.output() / "run.json").read_text())["metrics"]
    plain = Runs(parts, tmp_path)  # a config that says nothing of a language model that learns
    weights = f"model.pretrained={runs.output() / 'checkpoint_last.pth'}"
    plain.train(weights, "run.test_splits=[val]", "run.run_name=again", evaluate=True)
    found = json.loads((plain.output("again") / "run.json").read_text())["metrics"]
    assert found["loss_right"] == pytest.approx(expected["loss_right"], abs=1e-6)

    bundle = tmp_path / "bundle"
    last = runs.output() / "checkpoint_last.pth"
    assert evlgen("export", runs.output(), bundle, "--checkpoint", last) == 0
    assert (bundle / "adapter").exists() == (llm_train != "full")
    plain.train(f"model.pretrained={bundle}", "run.test_splits=[val]", "run.run_name=bundle", evaluate=True)
    found = json.loads((plain.output("bundle") / "run.json").read_text())["metrics"]
    assert found["loss_right"] == pytest.approx(expected["loss_right"], abs=1e-6)
    if llm_train != "full":
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(parts["llm_model"]), bundle / "adapter")
        trained = torch.load(last, weights_only=True)["model"]
        name = "model.layers.0.self_attn.q_proj.lora_B"
        assert torch.equal(theirs.state_dict()[f"base_model.model.{name}.default.weight"],
                           trained[f"language_model.llm.{name}.default.weight"])  # fmt: skip


def test_a_run_with_a_frozen_language_model_is_a_start(parts, tmp_path):
    """The next stage: LoRA from the weights of an aligned connector; the first loss is where the other run ended."""
    aligned = Runs(parts, tmp_path / "aligned")
    aligned.train()
    runs = runs_with(parts, tmp_path / "lora", "lora", max_iters=2)
    runs.config["model"] |= {"prompt_attention": "causal", "dropout": 0.0}
    runs.train(f"model.pretrained={aligned.output() / 'checkpoint_last.pth'}")
    assert list(losses(runs.output())) == [1, 2]
    assert any("lora_" in name for name in checkpoint(runs.output())["model"])
