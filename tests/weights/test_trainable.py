"""Checkpoints: what trains and no more, strict loading with one clear message, and no pickled code."""

import os

import pytest
import torch
from safetensors.torch import save_file

from lavis_evlgen.weights.sources import WeightsError, read_state_dict
from lavis_evlgen.weights.trainable import frozen_names, load_trainable, trainable_state
from tests.tiny import pictures, tiny_evlgen, tiny_llama

PARTS = ("ln_vision.", "connector.", "llm_proj.")


@pytest.fixture(scope="module")
def trained():
    return tiny_evlgen("opt", seed=1).eval()


def other():
    """The same architecture and the same frozen parts with another start of what trains."""
    model = tiny_evlgen("opt", seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    return model


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_checkpoint_holds_exactly_what_trains(kind):
    model = tiny_evlgen(kind)  # OPT's head is tied to its embeddings: two names, one frozen tensor
    state = trainable_state(model)
    assert all(k.startswith(PARTS) for k in state), sorted(k for k in state if not k.startswith(PARTS))
    assert set(state) == {k for k, p in model.named_parameters() if p.requires_grad}


def test_buffers_of_trainable_modules_are_kept_and_those_of_frozen_ones_not():
    body = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3))
    body[0].requires_grad_(False)
    assert {"0.weight", "0.running_mean", "0.num_batches_tracked"} <= frozen_names(body)
    assert {"1.weight", "1.running_mean"} <= set(trainable_state(body))


def test_a_tied_head_is_frozen_under_both_names():
    llm = tiny_llama(tie_word_embeddings=True).requires_grad_(False)
    assert trainable_state(llm) == {}


@pytest.mark.parametrize("wrapped", [False, True])
def test_round_trip(trained, wrapped, tmp_path):
    path, state = tmp_path / "checkpoint_1.pth", trainable_state(trained)
    torch.save({"model": state, "epoch": 3} if wrapped else state, path)
    model = other()
    assert not torch.equal(model.visual_prompt(pictures(2)).tokens, trained.visual_prompt(pictures(2)).tokens)
    model.load_checkpoint(str(path))
    assert torch.equal(model.visual_prompt(pictures(2)).tokens, trained.visual_prompt(pictures(2)).tokens)


def test_safetensors_and_whole_checkpoints_load(trained, tmp_path):
    whole = {k: v.clone() for k, v in trained.state_dict().items()}  # older ones carry frozen weights
    save_file(whole, tmp_path / "all.safetensors")
    model = other()
    model.load_checkpoint(str(tmp_path / "all.safetensors"))
    assert all(torch.equal(v, whole[k]) for k, v in model.state_dict().items())


def test_everything_that_differs_is_in_one_message(trained):
    state = trainable_state(trained)
    del state["llm_proj.bias"]
    state["qformer.weight"] = torch.zeros(1)
    state["ln_vision.weight"] = torch.zeros(7)
    model = other()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_trainable(model, state, "x.pth")
    message = str(error.value)
    for part in (
        "checkpoint x.pth is of another architecture",
        "1 trainable tensors are missing, first llm_proj.bias",
        "1 tensors have no place in this model, first qformer.weight",
        r"1 tensors differ in shape: ln_vision.weight is (7,) there, (24,) here",
        "Use the config that it was trained with",
    ):
        assert part in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # nothing was half loaded


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path, trap = tmp_path / "checkpoint.pth", tmp_path / "trap"
    torch.save({"model": {"ln_vision.weight": Malicious(trap)}}, path)
    with pytest.raises(WeightsError, match="checkpoint: .* a pickle that would run code"):
        other().load_checkpoint(str(path))
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_broken_and_absent_files(suffix, tmp_path):
    path = tmp_path / f"broken{suffix}"
    with pytest.raises(WeightsError, match=r"checkpoint .*broken\S+ does not exist"):
        other().load_checkpoint(str(path))
    path.write_bytes(b"not tensors at all" * 20)
    with pytest.raises(WeightsError, match="checkpoint: .*broken.* is not a file of plain tensors"):
        other().load_checkpoint(str(path))


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(WeightsError, match="tensor.pth is not a file of plain tensors"):
        other().load_checkpoint(str(tmp_path / "tensor.pth"))


def test_a_folder_without_weights_names_the_key(tmp_path):
    with pytest.raises(WeightsError, match="connector_init: .* holds neither model.safetensors nor"):
        read_state_dict(str(tmp_path), "connector_init")
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert read_state_dict(str(tmp_path), "connector_init")["a"].tolist() == [1, 1]
