"""The learning rate of every step, and the optimizer's groups."""

import pytest
import torch
from torch import nn

from lavis_evlgen.runners.optim import LinearWarmupCosineStepLR, adamw, parameter_groups
from tests.tiny import tiny_evlgen

SCALES = {"ln_vision": 0.3, "input_proj": 0.5, "connector": 0.1, "llm_proj": 1.0}


def schedule(model=None, **keys):
    optimizer = adamw(model or nn.Linear(2, 2), 1.0, 0.05, 0.98)
    defaults = {"init_lr": 1.0, "min_lr": 0.1, "max_steps": 110, "warmup_steps": 10, "warmup_start_lr": 0.2}
    return LinearWarmupCosineStepLR(optimizer, **defaults | keys)


def test_warm_up_is_linear_then_a_cosine_ends_at_the_least():
    rate = schedule().rate
    assert [rate(step) for step in (0, 5, 10)] == pytest.approx([0.2, 0.6, 1.0])
    assert rate(60) == pytest.approx((1.0 + 0.1) / 2)
    assert rate(35) == pytest.approx(0.1 + 0.45 * (1 + 2**-0.5))
    assert rate(110) == pytest.approx(0.1) and rate(500) == pytest.approx(0.1)
    rates = [rate(step) for step in range(111)]
    assert all(a < b for a, b in zip(rates[:10], rates[1:11], strict=True))
    assert all(a > b for a, b in zip(rates[10:-1], rates[11:], strict=True))


def test_without_warm_up_it_starts_at_the_top():
    assert schedule(warmup_steps=0).rate(0) == 1.0
    assert schedule(warmup_steps=10, max_steps=10).rate(10) == pytest.approx(1.0)  # nothing is left to decay


def test_every_group_gets_its_scaled_rate():
    model = tiny_evlgen(lr_scale=SCALES)
    lr = schedule(model)
    assert lr.step(cur_step=5) == pytest.approx(0.6)
    rates = {group["name"]: group["lr"] for group in lr.optimizer.param_groups}
    for part, scale in SCALES.items():
        assert rates[f"{part} (no decay)"] == pytest.approx(0.6 * scale)
        if part != "ln_vision":
            assert rates[part] == pytest.approx(0.6 * scale)


def test_groups_hold_every_trainable_parameter_once_and_decay_matrices_only():
    model = tiny_evlgen(lr_scale=SCALES)
    groups = parameter_groups(model, 0.05)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for group in groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"]), group["name"]


def test_a_model_of_frozen_weights_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        adamw(nn.Linear(2, 2).requires_grad_(False), 1.0, 0.0, 0.999)


def test_a_model_that_knows_no_parts_trains_at_one_rate():
    groups = parameter_groups(nn.Linear(2, 2), 0.1)
    assert {group["lr_scale"] for group in groups} == {1.0}
    assert torch.optim.AdamW(groups).param_groups[0]["weight_decay"] == 0.1
