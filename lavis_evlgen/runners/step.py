"""One optimizer step: micro-batches, scaling, clipping, the non-finite guard. Nothing here waits for the GPU."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lavis_evlgen import distributed
from lavis_evlgen.config.keys import Settings, key
from lavis_evlgen.datasets.seeding import EpochOrder, mix
from lavis_evlgen.errors import UserError
from lavis_evlgen.models.precision import auto_precision, autocast_type
from lavis_evlgen.weights.integrity import all_finite


@dataclass(kw_only=True)
class StepSettings(Settings):
    """Keys of the run section that one optimizer step reads."""

    amp: Literal[False, "bf16", "fp16", True, "auto", "fp32"] = key(
        "autocast: false, bf16, fp16 (true means fp16, as in LAVIS), auto (bf16 where there is hardware for it)", False
    )
    accum_grad_iters: int = key("micro-steps per optimizer step", 1, at_least=1, at_most=10**6)
    loss_mean: Literal["tokens", "micro_steps"] | None = key(
        "how accumulated losses are averaged: tokens (left out: over the tokens of all micro-steps and ranks), or "
        "micro_steps (each is a mean of its own, and they weigh alike); a resumed run goes on as it was trained", None,
    )  # fmt: skip
    max_grad_norm: float = key("clip the gradient to this norm; 0: no clipping", 1.0, at_least=0.0, at_most=1e9)


def amp_of(run):
    """What `run.amp` asks for on this machine: a key of AMP. run: a run section, or its settings."""
    amp = run.amp if isinstance(run, StepSettings) else StepSettings.read(run, "run.").amp
    return auto_precision() if amp == "auto" else amp


_BUDGETS = 5  # what is drawn from the seed here
PATIENCE_AT_END = 5  # skipped steps in a row that are too many where no more steps follow


class NonFinite(UserError, RuntimeError):
    """Training has diverged."""


ADVICE = "lower run.init_lr, set run.max_grad_norm, or use run.amp=bf16 in place of fp16"


class TrainingStep:
    """Call with an iterator of batches: accumulates, clips, steps; returns (values, seconds waited, bad images).

    The loss is the mean over the supervised tokens of all micro-steps and ranks: W ranks with A micro-steps of batch B
    compute what one rank with batch W x A x B does. With `run.loss_mean: micro_steps` it is the mean over the tokens
    of a micro-step on all ranks, then over micro-steps; so it is of a loss that counts no tokens. A step whose
    gradient is not finite is skipped on the device and counted; `check_finite` raises after `patience` of them in a
    row. `objective` is of a task with a loss of its own: in micro-step m the model is called with objective(m)
    (tasks/base.py). draws: of a model with an elastic number of tokens (ModelFacts.token_draws), of which micro-step m
    takes one: a function of (seed, m), the same on all ranks; of any len(draws) micro-steps from a multiple of that
    number on, each takes another.
    """

    def __init__(
        self, model, optimizer, device: torch.device, run, patience: int = 20, objective=None, draws=(), seed: int = 0
    ):
        self.model, self.optimizer, self.device, self.patience = model, optimizer, device, patience
        self.objective, self.draws = objective, draws
        self.order = EpochOrder(len(draws), mix(seed, _BUDGETS)) if draws else None
        settings = run if isinstance(run, StepSettings) else StepSettings.read(run, "run.")
        self.accum, self.max_norm = settings.accum_grad_iters, settings.max_grad_norm
        self.asked_mean, self.loss_mean = settings.loss_mean, settings.loss_mean or "tokens"
        self.dtype = autocast_type(amp_of(settings))
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.skipped = torch.zeros((), device=device)  # steps left out so far
        self.in_a_row = torch.zeros((), device=device)
        self.last_loss = None  # () on the device, of the step before

    def scaler_state(self) -> dict | None:
        return self.scaler.state_dict() if self.scaler.is_enabled() else None

    def load_state(self, saved: dict):
        """Go on with the loss scale, the counts of skipped steps and, where the config asks for none, the mean of the
        loss of a checkpoint; those that name none took the mean over micro-steps."""
        if self.asked_mean is None:
            self.loss_mean = saved.get("loss_mean", "micro_steps")
            if self.loss_mean != "tokens" and self.accum > 1:
                logging.info(
                    "the checkpoint was trained with run.loss_mean=%s, and training goes on with it; "
                    "run.loss_mean=tokens changes it", self.loss_mean,
                )  # fmt: skip
        self.skipped += saved.get("skipped_steps", 0)
        self.in_a_row += saved.get("skipped_in_a_row", 0)
        if saved.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def prepared(self, batch: dict) -> dict:
        """The batch with its images on the device."""
        return {**batch, "image": batch["image"].to(self.device, non_blocking=True)}

    def forward(self, model, batch: dict, micro_step: int = 0) -> dict[str, Tensor]:
        """What `model` says of a batch in micro-step number `micro_step` of the run, under autocast."""
        batch, objective = self.prepared(batch), None if self.objective is None else self.objective(micro_step)
        if self.draws:
            batch["budgets"] = self.draws[self.order[micro_step][1]]
        with self.autocast():
            # models of LAVIS's own know no objective
            return model(batch) if objective is None else model(batch, objective=objective)

    def __call__(self, batches, step: int = 0) -> tuple[dict[str, Tensor], float, list[dict]]:
        waited, bad, values, counts, texts = 0.0, [], {}, [], 0
        for micro in range(self.accum):
            started = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - started
            bad += batch.get("bad", [])
            texts += sum(batch.get("texts_per_image", ()))
            last = micro == self.accum - 1
            hold = contextlib.nullcontext() if last or not distributed.initialized() else self.model.no_sync()
            with hold:
                out = self.forward(self.model, batch, step * self.accum + micro)
                loss, factor = self._part_of_step(out, counts, last)
                if factor is not None:  # for what the micro-steps before this one have left
                    values["loss"] = values["loss"] * factor
                    torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], factor)
                self.scaler.scale(loss).backward()
            values["loss"] = values.get("loss", 0) + loss.detach()
            for name, value in _shown(out).items():
                values[name] = values.get(name, 0) + value / self.accum
        self.last_loss = values["loss"]
        values["grad_norm"] = self._update()
        values["skipped_steps"] = self.skipped.clone()
        if texts:  # several of a picture; of all ranks, of which a log line takes the mean
            values["texts_per_step"] = torch.full((), float(texts * distributed.world_size()), device=self.device)
        return values, waited, bad

    def _part_of_step(self, out: dict, counts: list[Tensor], last: bool) -> tuple[Tensor, Tensor | None]:
        """A micro-step's loss as its part of the step's loss, and what the parts before it are to be multiplied by.

        counts: tokens of the micro-steps before it; this one's are added. The number of tokens of the whole step is
        known in front of the last backward pass, so the parts until then are of a reference in its place. Ranks talk
        once; DDP averages gradients over ranks, and `ranks` makes that mean the mean over all tokens.
        """
        loss, tokens, ranks = out["loss"], out.get("loss_tokens"), distributed.world_size()
        if tokens is None:
            return loss / self.accum, None
        if self.loss_mean == "micro_steps" or self.accum == 1:
            if distributed.initialized():
                loss = loss * tokens * ranks / distributed.sum_over_ranks(tokens.detach().clone())
            return loss / self.accum, None
        before = self._reference(counts) if counts else None
        counts.append(tokens.detach().to(loss.dtype))
        if last:
            total = distributed.sum_over_ranks(torch.stack(counts).sum()).clamp_min(1)
            return loss * tokens * ranks / total, before * ranks / total
        now = self._reference(counts)
        grows = before is not None and self.scaler.is_enabled()
        return loss * tokens / now, before / now if grows else None

    def _reference(self, counts: list[Tensor]) -> Tensor:
        """What stands for the tokens of a step whose micro-steps so far have these counts: the first's times their
        number; with a gradient scaler the largest's, so that a part is never far larger than it will be in the end."""
        known = torch.stack(counts).max() if self.scaler.is_enabled() else counts[0]
        return known.clamp_min(1) * self.accum

    def _update(self) -> Tensor:
        """Clip and step; returns the gradient's norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        limit = self.max_norm if self.max_norm > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        broken = (~torch.isfinite(norm)).float()
        if not self.scaler.is_enabled():
            # fused AdamW leaves everything as it is where found_inf is 1, without asking the CPU
            self.optimizer.found_inf = broken
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += broken
        self.in_a_row = (self.in_a_row + 1) * broken
        return norm

    def check_finite(self, step: int):
        """Called when a log line is due; raises NonFinite after `patience` skipped steps in a row."""
        if self.in_a_row.item() >= self.patience:
            raise NonFinite(
                f"the gradient was not finite in {int(self.in_a_row.item())} steps in a row up to step {step}: {ADVICE}"
            )

    def diverged_at_end(self) -> str | None:
        """Called after the last step: why this rank says that training has diverged, in words, or None."""
        in_a_row = int(self.in_a_row.item())
        if in_a_row >= min(self.patience, PATIENCE_AT_END):
            return f"the gradient was not finite in the last {in_a_row} steps"
        if self.last_loss is not None and not torch.isfinite(self.last_loss).item():
            return "the loss of the last step is not finite"
        return None

    def finite(self) -> bool:
        """Whether all weights and moments on this rank are finite; waits for the device."""
        moments = (value for of_one in self.optimizer.state.values() for value in of_one.values())
        return bool(all_finite([*self.parameters, *moments]).item())


def _shown(out: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is logged of a micro-step beside its loss."""
    shown = {key: out[key] for key in ("across_picture_share", "prompt_lengths") if key in out}
    # the terms of a loss that has several, as BLIP-2's first stage
    terms = (key for key in out if key.startswith("loss_") and key != "loss_tokens")
    return shown | {key: out[key].detach() for key in terms} | out.get("shown", {})
