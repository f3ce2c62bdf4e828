"""Learning rate as a function of the step, and optimizer groups by part of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from lavis.common.registry import registry

from lavis_evlgen.config.keys import Settings, key
from lavis_evlgen.models.facts import facts_of


@registry.register_lr_scheduler("linear_warmup_cosine_step_lr")
class LinearWarmupCosineStepLR:
    """Linear warm-up over `warmup_steps`, then cosine to `min_lr` at `max_steps`; moves at every step.

    LAVIS's own schedules move once an inner epoch. Group learning rates are multiplied by the group's `lr_scale`.
    """

    def __init__(self, optimizer, init_lr, min_lr, max_steps, warmup_steps=0, warmup_start_lr=0.0, **kwargs):
        self.optimizer, self.init_lr, self.min_lr = optimizer, init_lr, min_lr
        self.max_steps, self.warmup_steps, self.warmup_start_lr = max_steps, warmup_steps, warmup_start_lr

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.warmup_start_lr + (self.init_lr - self.warmup_start_lr) * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        return self.min_lr + 0.5 * (self.init_lr - self.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0)))

    def step(self, cur_step: int, cur_epoch: int = 0) -> float:
        """Set the rates for step `cur_step`; returns the unscaled one."""
        rate = self.rate(cur_step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        return rate


@dataclass(kw_only=True)
class OptimSettings(Settings):
    """Keys of the run section about AdamW and its learning rate; training asks for those whose default is None."""

    lr_sched: Literal["linear_warmup_cosine_step_lr"] = key(
        "linear_warmup_cosine_step_lr: linear warm-up, then cosine to min_lr; moves at every step",
        "linear_warmup_cosine_step_lr",
    )
    init_lr: float | None = key("learning rate after warm-up", None, at_least=0.0, at_most=100.0)
    min_lr: float = key("learning rate at the end", 0.0, at_least=0.0, at_most=100.0, not_above="init_lr")
    warmup_lr: float = key("learning rate at step 0", 0.0, at_least=0.0, at_most=100.0)
    warmup_steps: int = key("steps of linear warm-up", 0, at_least=0, at_most=10**9)
    weight_decay: float | None = key("AdamW weight decay of matrices", None, at_least=0.0, at_most=10.0)
    beta2: float = key("AdamW beta2", 0.999, at_least=0.0, at_most=0.999999)


def schedule_of(run: OptimSettings, optimizer, max_steps: int) -> LinearWarmupCosineStepLR:
    """The schedule that a run's settings ask for."""
    return LinearWarmupCosineStepLR(
        optimizer, run.init_lr, run.min_lr, max_steps, warmup_steps=run.warmup_steps, warmup_start_lr=run.warmup_lr
    )


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters by part (models/facts.py) and by decay: matrices decay, the rest not."""
    facts = facts_of(model)
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = facts.part_of(name), parameter.ndim >= 2
        group = groups.setdefault(
            (part, decays),
            {
                "params": [],
                "name": part + ("" if decays else " (no decay)"),
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": float(facts.lr_scale.get(part, 1.0)),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def adamw(model: torch.nn.Module, lr: float, weight_decay: float, beta2: float) -> torch.optim.AdamW:
    """Fused AdamW: besides its speed, it can skip a step on the device (`found_inf`) without a synchronisation."""
    groups = parameter_groups(model, weight_decay)
    if not groups:
        raise ValueError("nothing to train: every parameter of the model is frozen")
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)
