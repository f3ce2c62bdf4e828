"""One optimizer step: accumulation, clipping, autocast, and the guard against gradients that are not finite."""

import copy

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lavis_evlgen.config import ConfigError
from lavis_evlgen.runners import step as steps
from lavis_evlgen.runners.optim import adamw
from lavis_evlgen.runners.step import NonFinite, TrainingStep
from tests.run_tools import same_tensors
from tests.tiny import pictures, tiny_evlgen

CPU = torch.device("cpu")


def batch(count=2, seed=0, texts=None):
    return {"image": pictures(count, seed), "text_input": texts or ["a red square"] * count}


def broken(value=float("nan")):
    return {"image": torch.full((2, 3, 28, 28), value), "text_input": ["a red square"] * 2}


def trainer(model=None, patience=20, lr=1e-2, **run):
    model = model or tiny_evlgen()
    return TrainingStep(model, adamw(model, lr, 0.05, 0.999), CPU, OmegaConf.create(run), patience)


def state(step):
    """Parameters and Adam's moments and counters, copied."""
    return copy.deepcopy((dict(step.model.named_parameters()), step.optimizer.state_dict()["state"]))


def halves(whole):
    """The two halves of a batch of 4 as two micro-batches."""
    for at in (0, 2):
        yield {key: value[at : at + 2] for key, value in whole.items()}


def close(step, other, tolerance=1e-5):
    """Whether the parameters agree; key biases are left out, for their gradient is rounding error."""
    pairs = zip(step.model.named_parameters(), other.model.parameters(), strict=True)
    return all((a - b).abs().max() < tolerance for (name, a), b in pairs if not name.endswith("key.bias"))


def gradients(step, batches) -> tuple[dict, dict]:
    """The values of a step, and the gradients that it would be taken with, by name."""
    found, update = {}, step._update

    def look():
        found.update((name, p.grad.clone()) for name, p in step.model.named_parameters() if p.grad is not None)
        return update()

    step._update = look
    return step(batches)[0], found


UNEVEN = ["a dog"] * 2 + ["two cats sleep on a wooden table by a red square and a blue circle"] * 2


@pytest.mark.parametrize("texts", [["a red square"] * 4, UNEVEN], ids=["even", "uneven"])
def test_two_micro_steps_are_one_step_of_both(texts):
    whole = batch(4, texts=texts)
    one, two = trainer(), trainer(accum_grad_iters=2)
    values, expected = gradients(one, iter([dict(whole)]))
    accumulated, found = gradients(two, halves(whole))
    assert accumulated["loss"].item() == pytest.approx(values["loss"].item(), rel=1e-6)
    assert set(found) == set(expected)
    largest = max(g.abs().max() for g in expected.values())
    assert max((found[name] - g).abs().max() for name, g in expected.items()) < 2e-6 * largest
    assert close(one, two) and not close(one, trainer(), 1e-3)  # they did move


def test_micro_steps_may_weigh_alike_whatever_their_tokens():
    """With loss_mean=micro_steps the loss of each is the mean over its own tokens: it shows where counts differ."""
    one, two = trainer(), trainer(accum_grad_iters=2, loss_mean="micro_steps")
    loss = one(iter([batch(4, texts=UNEVEN)]))[0]["loss"].item()
    accumulated = two(halves(batch(4, texts=UNEVEN)))[0]["loss"].item()
    parts = [trainer()(iter([half]))[0]["loss"].item() for half in halves(batch(4, texts=UNEVEN))]
    assert accumulated == pytest.approx(sum(parts) / 2, rel=1e-6) and accumulated != pytest.approx(loss, rel=1e-3)


class Tokens(nn.Module):
    """loss: the mean of w * token over the tokens of a batch, in float64. It says their number, unless `counts` is
    false."""

    def __init__(self, counts: bool = True):
        super().__init__()
        self.w, self.counts = nn.Parameter(torch.ones((), dtype=torch.float64)), counts

    def forward(self, samples):
        tokens = samples["image"]
        count = {"loss_tokens": torch.tensor(len(tokens))} if self.counts else {}
        return {"loss": (self.w * tokens).sum() / max(len(tokens), 1), **count}


@pytest.mark.parametrize("lengths", [[3, 5, 1], [1, 400, 2, 90], [0, 7, 0, 2], [4, 0], [0, 0]])
@pytest.mark.parametrize("counts, mean", [(True, "tokens"), (True, "micro_steps"), (False, "tokens")])
def test_every_token_weighs_alike(lengths, counts, mean):
    tokens = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(1), dtype=torch.float64).split(lengths)
    model, run = Tokens(counts), {"accum_grad_iters": len(lengths), "max_grad_norm": 0, "loss_mean": mean}
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), lr=1.0, fused=True), CPU, run)
    values, found = gradients(step, iter({"image": part} for part in tokens))
    if counts and mean == "tokens":
        expected = torch.cat(tokens).sum().item() / max(sum(lengths), 1)
    else:
        expected = sum(part.sum().item() / max(len(part), 1) for part in tokens) / len(tokens)
    assert values["loss"].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert found["w"].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("mean", ["tokens", "micro_steps"])
def test_loss_scaling_keeps_the_accumulated_gradient_and_sees_what_is_not_finite(mean):
    plain = trainer(accum_grad_iters=2, loss_mean=mean)
    scaled = trainer(accum_grad_iters=2, loss_mean=mean, amp="fp16")
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = gradients(plain, halves(batch(4, texts=UNEVEN)))
    found = gradients(scaled, halves(batch(4, texts=UNEVEN)))
    assert found[0]["loss"].item() == pytest.approx(expected[0]["loss"].item(), rel=1e-2)
    assert found[0]["grad_norm"].item() == pytest.approx(expected[0]["grad_norm"].item(), rel=0.05)
    before = state(scaled)
    for micro_steps in ([broken(), batch()], [batch(), broken()]):
        scale = scaled.scaler.get_scale()
        values = scaled(iter(micro_steps))[0]
        assert not values["grad_norm"].isfinite() and scaled.scaler.get_scale() == scale / 2
    assert same_tensors(state(scaled), before) and scaled.skipped.item() == 2


def test_with_loss_scaling_a_short_first_micro_step_does_not_enlarge_the_others():
    """The largest number that goes backwards is the loss's own share, in whatever order micro-steps come."""
    step = trainer(accum_grad_iters=4, amp="fp16")
    step.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for lengths in ([2, 400, 400, 400], [400, 400, 400, 2], [1, 10, 100, 1000]):
        counts, parts = [], []
        for n, length in enumerate(lengths):
            out = {"loss": torch.ones(()), "loss_tokens": torch.tensor(float(length))}
            loss, factor = step._part_of_step(out, counts, last=n == len(lengths) - 1)
            parts = [part * (1.0 if factor is None else factor) for part in parts] + [loss]
            assert loss <= 1.0  # of a mean over micro-steps of ones; with the first's tokens alone it was 50
        assert [part.item() for part in parts] == pytest.approx([length / sum(lengths) for length in lengths])


@pytest.mark.parametrize(
    "asked, saved, mean",
    [
        (None, {}, "micro_steps"), (None, {"loss_mean": "micro_steps"}, "micro_steps"),
        (None, {"loss_mean": "tokens"}, "tokens"), ("tokens", {}, "tokens"),
        ("micro_steps", {"loss_mean": "tokens"}, "micro_steps"),
    ],
)  # fmt: skip
def test_a_resumed_run_keeps_its_mean_unless_the_config_names_one(asked, saved, mean, caplog):
    step = trainer(accum_grad_iters=2, loss_mean=asked)
    assert step.loss_mean == asked or (asked is None and step.loss_mean == "tokens")
    with caplog.at_level("INFO"):
        step.load_state(saved)
    assert step.loss_mean == mean
    assert ("run.loss_mean=tokens changes it" in caplog.text) == (asked is None and mean == "micro_steps")


def test_waiting_and_bad_images_come_back_with_the_values():
    step = trainer(accum_grad_iters=2)
    bad = [{"image": "x.png", "reason": "empty"}]
    values, waited, found = step(iter([batch() | {"bad": bad}, batch()]))
    assert found == bad and waited >= 0
    assert set(values) == {"loss", "across_picture_share", "grad_norm", "skipped_steps"}


class Plain(nn.Module):
    """loss = w * sum(image): its gradient is the sum of the pixels."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def forward(self, samples):
        return {"loss": (self.w * samples["image"]).sum()}


@pytest.mark.parametrize("limit, expected", [(1.0, 1.0), (100.0, 50.0), (0, 50.0)])
def test_clipping_limits_the_norm_and_zero_does_not(limit, expected):
    model = Plain()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)  # its step is the gradient itself
    step = TrainingStep(model, sgd, CPU, OmegaConf.create({"max_grad_norm": limit}))
    values, _, _ = step(iter([{"image": torch.tensor([30.0, 40.0, 0.0])}]))
    assert values["grad_norm"].item() == pytest.approx(50.0)  # before clipping
    assert model.w.norm().item() == pytest.approx(expected, rel=1e-4)


def test_clipping_is_on_when_nothing_is_said():
    assert trainer().max_norm == 1.0 and trainer(max_grad_norm=0).max_norm == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_no_trace(value):
    step = trainer()
    step(iter([batch(seed=1)]))
    before = state(step)
    values = step(iter([broken(value)]))[0]
    assert same_tensors(state(step), before)
    assert values["skipped_steps"].item() == 1 and not values["grad_norm"].isfinite()

    step(iter([batch(seed=2)]))
    other = trainer()
    other(iter([batch(seed=1)])), other(iter([batch(seed=2)]))
    assert same_tensors(state(step), state(other))  # as if the broken batch had not been
    assert step.skipped.item() == 1 and step.in_a_row.item() == 0


def test_one_broken_micro_step_takes_its_whole_step_with_it():
    step = trainer(accum_grad_iters=2)
    step(iter([batch(), batch()]))
    before = state(step)
    step(iter([batch(), broken()]))
    assert same_tensors(state(step), before)


def test_patience_is_of_steps_in_a_row():
    step = trainer(patience=2)
    step(iter([broken()])), step(iter([batch()])), step(iter([broken()]))
    step.check_finite(3)
    step(iter([broken()]))
    with pytest.raises(NonFinite, match="2 steps in a row up to step 4.*init_lr"):
        step.check_finite(4)


@pytest.mark.parametrize("amp, dtype", [("bf16", torch.bfloat16), (False, None), ("fp32", None)])
def test_autocast_on_the_cpu(amp, dtype):
    step, seen = trainer(amp=amp), []
    step.model.llm_proj.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    losses = [step(iter([batch(4)]))[0]["loss"] for _ in range(8)]
    assert seen[0] == (dtype or torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in step.model.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("machine, dtype", [("bf16", torch.bfloat16), ("fp32", None)])
def test_automatic_autocast_follows_the_machine(monkeypatch, machine, dtype):
    monkeypatch.setattr(steps, "auto_precision", lambda: machine)
    assert trainer(amp="auto").dtype == dtype


def test_an_unknown_autocast_is_refused():
    with pytest.raises(ConfigError, match="run.amp: 'fp8'"):
        trainer(amp="fp8")
