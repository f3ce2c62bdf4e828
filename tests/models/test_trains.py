"""What a stage trains, chosen by patterns of names; what its checkpoints hold."""

import pytest
import torch

from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.stages import Stage
from lavis_evlgen.models.language.llm_train import Lora
from lavis_evlgen.models.trains import TrainedParts, train_mode
from lavis_evlgen.runners.optim import parameter_groups
from lavis_evlgen.weights.frozen_identity import frozen_identity
from lavis_evlgen.weights.sources import WeightsError
from lavis_evlgen.weights.trainable import frozen_names, load_trainable, trainable_state
from tests.tiny import tiny_evlgen


def stage(*trains) -> Stage:
    return Stage("a", 1, 2, trains or None, None, {})


def test_patterns_choose_names():
    parts = TrainedParts(tiny_evlgen(llm_train=Lora(rank=2)))
    assert parts.names(stage()) == list(parts.parameters)
    assert parts.names(stage("ln_vision.*")) == ["ln_vision.weight", "ln_vision.bias"]
    lora = parts.names(stage("language_model.*"))
    assert lora and all("lora_" in name for name in lora), "the weights beside adapters stay frozen"
    assert parts.names(stage("*.lora_A.*", "*lora_B*")) == lora
    both = parts.names(stage("llm_proj.*", "ln_vision.*", "ln_*"))
    assert both == [name for name in parts.parameters if name.startswith(("ln_vision", "llm_proj"))]


@pytest.mark.parametrize(
    "pattern, words",
    [("llm_project.*", ["stages.a.trains: llm_project.* is the name of no parameter that trains; nearest: llm_proj.*"]),
     ("connector", ["nearest: connector.*", "evlgen doctor CFG --parameters"]),
     ("language_model.lora.*", ["selects nothing that trains", "model.llm_train=lora or full"]),
     ("visual_encoder.*", ["such as visual_encoder.", "visual_encoder is frozen in every stage"]),
     ("language_model.*", ["such as language_model.llm.", "model.llm_train=lora or full"])],
)  # fmt: skip
def test_a_pattern_that_selects_nothing_is_an_error_that_says_what_to_write(pattern, words):
    parts = TrainedParts(tiny_evlgen())
    with pytest.raises(ConfigError) as error:
        parts.names(stage("ln_vision.*", pattern))
    assert all(word in str(error.value) for word in words), error.value


def test_a_pattern_that_misses_an_adapter_names_the_nearest():
    parts = TrainedParts(tiny_evlgen(llm_train=Lora(rank=2)))
    with pytest.raises(ConfigError, match="nearest: .*language_model.llm"):
        parts.names(stage("language_model.lora.*"))


def test_only_what_was_chosen_has_gradients_and_moments():
    model = tiny_evlgen(lr_scale={"connector": 0.5})
    parts = TrainedParts(model)
    parts.train_only(parts.names(stage("connector.*")), parts.kept([[]]))
    groups = {group["name"]: group for group in parameter_groups(model, 0.1)}
    assert set(groups) == {"input_proj", "input_proj (no decay)", "connector", "connector (no decay)"}
    assert groups["connector"]["lr_scale"] == 0.5
    assert {"ln_vision.weight", "llm_proj.bias"} <= frozen_names(model)
    parts.train_only(parts.names(stage()), parts.kept([[]]))
    assert all(p.requires_grad for p in parts.parameters.values())


@pytest.mark.parametrize("llm_train", ["full", Lora(rank=2)], ids=["full", "lora"])
def test_checkpoints_hold_all_that_was_ever_trained(llm_train):
    model = tiny_evlgen(llm="opt", llm_train=llm_train)  # its head is its embedding table
    parts, whole = TrainedParts(model), set(trainable_state(model))
    language = {name for name in whole if name.startswith("language_model.")}
    plan = [parts.names(stage(*trains)) for trains in (["connector.*"], ["language_model.*"], ["ln_vision.*"])]
    for n, expected in enumerate((whole - language, whole, whole)):
        parts.train_only(plan[n], parts.kept(plan[: n + 1]))
        assert set(trainable_state(model)) == expected
        assert ("language_model" in frozen_identity(model)) == (n == 0 or llm_train != "full")
        values = frozen_identity(model).get("language_model", {}).get("values", {})
        assert not any("lora" in name for name in values)
        load_trainable(model, trainable_state(model), "there")
    state = trainable_state(model)
    del state[min(language)]
    with pytest.raises(WeightsError, match="1 trainable tensors are missing"):
        load_trainable(model, state, "there")


def test_a_language_model_that_came_trained_is_kept_from_the_start():
    model = tiny_evlgen(llm_train="full")
    whole = set(trainable_state(model))
    parts = TrainedParts(model, starts_trained=True)
    names = parts.names(stage("connector.*"))
    parts.train_only(names, parts.kept([names]))
    assert set(trainable_state(model)) == whole


def test_what_a_stage_has_frozen_is_in_eval_mode():
    model = tiny_evlgen(llm_train="full")
    parts = TrainedParts(model)
    names = parts.names(stage("llm_proj.*"))
    parts.train_only(names, parts.kept([names]))
    train_mode(model)
    assert not any(module.training for module in (*model.connector.modules(), model.ln_vision))
    assert model.training and model.llm_proj.training and model.language_model.training
    assert not model.language_model.llm.training
    parts.train_only(parts.names(stage()), parts.kept([[]]))
    train_mode(model)
    assert model.connector.training and not model.visual_encoder.training


def test_a_model_without_stages_is_in_train_mode_as_ever():
    model, other = tiny_evlgen(), tiny_evlgen()
    train_mode(model)
    other.train()
    assert [m.training for m in model.modules()] == [m.training for m in other.modules()]


def test_unchosen_parameters_get_no_gradient():
    model = tiny_evlgen(llm_train=Lora(rank=2))
    parts = TrainedParts(model)
    names = parts.names(stage("language_model.*"))
    parts.train_only(names, parts.kept([names]))
    image = torch.randn(2, 3, 28, 28)
    model({"image": image, "text_input": ["a red square", "a dog"]})["loss"].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(names)
