"""Whole runs with `tome_r: {elastic}`: budgets of micro-steps, resume, ranks, and evaluations of the weights."""

import json
import shutil
import types

import pytest
from torch.utils.flop_counter import FlopCounterMode

from lavis_evlgen.config.as_trained import as_trained
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.runners.cost import flops_per_image
from lavis_evlgen.runners.step import TrainingStep
from lavis_evlgen.tools.sweeps import runs as sweep_runs
from tests.processes import on_two_ranks
from tests.run_tools import Runs, checkpoint, losses, same_tensors
from tests.runners.test_step import CPU, adamw, batch
from tests.test_cli import evlgen
from tests.tiny import tiny_evlgen

LISTED = [5, 9, 13]


def runs_of(parts, folder, tome_r, **run) -> Runs:
    """Four steps of two micro-steps, with dropout."""
    runs = Runs(parts, folder, **{"iters_per_inner_epoch": 2, "accum_grad_iters": 2, **run})
    runs.config["model"] |= {"tome_r": tome_r, "dropout": 0.1}
    return runs


def budgets_of(runs, monkeypatch, *options) -> list[tuple]:
    """The budgets of a run's forward passes in training, without the counting of FLOPs."""
    found, forward = [], EVLGen.forward

    def noted(self, samples, objective=None):
        found.append(samples.get("budgets"))
        return forward(self, samples, objective)

    with monkeypatch.context() as patch:
        patch.setattr(EVLGen, "forward", noted)
        patch.setattr("lavis_evlgen.runners.trainer.flops_per_image", lambda *_: 1.0)
        runs.train(*options)
    return found


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    """A finished sandwich run, tested at its end."""
    tome_r = {"elastic": LISTED, "draw": "sandwich"}
    runs = runs_of(parts, tmp_path_factory.mktemp("elastic"), tome_r, test_splits=["test"], blind_shuffles=1)
    runs.train()
    return runs


def test_each_micro_step_takes_a_budget_and_a_resumed_run_the_same(parts, tmp_path, monkeypatch):
    runs = runs_of(parts, tmp_path, {"elastic": LISTED})
    whole = budgets_of(runs, monkeypatch)
    assert len(whole) == 8 and {budgets for budgets in whole[:3]} == {(5,), (9,), (13,)} == set(whole[3:6])
    straight, expected = losses(runs.output()), checkpoint(runs.output())
    again = runs.output("again")
    again.mkdir()
    half = shutil.copy(runs.output() / "checkpoint_previous.pth", again)
    resumed = budgets_of(runs, monkeypatch, "run.run_name=again", f"run.resume_ckpt_path={half}")
    assert resumed == whole[4:]
    assert losses(again) == {step: loss for step, loss in straight.items() if step > 2}
    found = checkpoint(again)
    assert all(same_tensors(found[part], expected[part]) for part in ("model", "optimizer", "rng"))
    other = budgets_of(runs, monkeypatch, "run.run_name=other", "run.seed=1", "run.max_iters=12")
    assert other[:8] != whole and len(other) == 24


def test_one_budget_is_a_run_with_a_target(parts, tmp_path):
    one, target = runs_of(parts, tmp_path / "one", {"elastic": [9]}), runs_of(parts, tmp_path / "two", {"target": 9})
    one.train()
    target.train()
    assert losses(one.output()) == losses(target.output()) and len(losses(one.output())) == 4
    assert same_tensors(checkpoint(one.output())["model"], checkpoint(target.output())["model"])


@pytest.mark.parametrize("draw", ["one", "sandwich"])
def test_two_ranks_are_one_with_twice_the_batch(parts, tmp_path, draw):
    one = runs_of(parts, tmp_path / "one", {"elastic": LISTED, "draw": draw}, batch_size_train=4, texts_per_image=2)
    one.config["model"]["dropout"] = 0.0
    one.config["datasets"]["scenes"]["captions_per_image"] = 3
    two = one.copy(tmp_path / "two", batch_size_train=2)
    one.train()
    on_two_ranks(two)
    assert list(losses(two.output()).values()) == pytest.approx(list(losses(one.output()).values()), rel=1e-5, abs=1e-5)
    assert len(losses(two.output())) == 4


def test_flops_are_the_mean_over_what_is_drawn():
    def flops(tome_r):
        model = tiny_evlgen(connector={"tome_r": tome_r})
        step = TrainingStep(model, adamw(model, 1e-2, 0.05, 0.999), CPU, {}, draws=model.token_draws())
        return flops_per_image(step, batch())

    each = [flops({"target": budget}) for budget in LISTED]
    assert flops({"elastic": LISTED}) == pytest.approx(sum(each) / 3) and each[0] < each[1] < each[2]
    model = tiny_evlgen()
    with FlopCounterMode(display=False) as counter:
        model.visual_tokens(batch()["image"])
    vit = counter.get_total_flops() / 2
    wanted = sum(each[2] + small - vit for small in each[:2]) / 2
    assert flops({"elastic": LISTED, "draw": "sandwich"}) == pytest.approx(wanted)


def evaluated(trained, folder, *options, **model) -> tuple[dict, dict]:
    """(card, result) of an evaluation of the run's last weights."""
    runs = trained.copy(folder, evaluate=True)
    runs.config["model"] |= {"pretrained": str(trained.output() / "checkpoint_last.pth"), **model}
    runs.train(*options, evaluate=True)
    card = json.loads((runs.output() / "run.json").read_text())
    return card, card["metrics"]


def test_an_evaluation_takes_any_number_of_tokens(trained, tmp_path, capfd):
    largest = json.loads((trained.output() / "run.json").read_text())
    assert largest["model"]["tokens"] == "17 visual -> 13 in the prompt; trained with 13 and one other of 5, 9 or 13"
    card, metrics = evaluated(trained, tmp_path / "default", tome_r=4)
    assert metrics["loss_right"] == pytest.approx(largest["metrics"]["loss_right"], rel=1e-6)
    seen = {13: metrics["loss_right"]}
    for tokens in (5, 7):  # 7 is none of the budgets
        card, metrics = evaluated(trained, tmp_path / str(tokens), f"model.tokens={tokens}", tome_r=4)
        seen[tokens] = metrics["loss_right"]
        assert card["config"]["model"]["tokens"] == tokens and card["model"]["not_as_trained"] == {}
        assert card["model"]["tokens"].startswith(f"17 visual -> {tokens} in the prompt")
        assert f"model.tokens={tokens}; the weights were trained with 5, 9, 13 tokens" in capfd.readouterr().err
    assert len(set(seen.values())) == 3
    card, metrics = evaluated(trained, tmp_path / "file", tokens=5)
    assert metrics["loss_right"] == seen[5]


def test_of_other_weights_it_is_not_as_trained():
    def changed(trained, tokens):
        return as_trained({"arch": "evlgen", **trained}, {}, {}, {"tokens": tokens}, False).changed

    assert changed({"tome_r": 4}, 5) == {"tokens": {"trained": "tome_r=4", "here": 5}}
    assert changed({"tome_r": {"target": 5}}, 5) == {} == changed({"tome_r": {"elastic": [5], "draw": "one"}}, 6)
    assert changed({"tome_r": 4, "tokens": 5}, 6) == {"tokens": {"trained": 5, "here": 6}}


def test_commands_leave_as_many_as_asked(trained, tmp_path, capsys):
    picture = tmp_path / "0.png"
    trained.train("run.run_name=data", "run.max_iters=1").datasets["scenes"]["test"].pil_image(0).save(picture)
    bundle = tmp_path / "bundle"
    assert evlgen("export", trained.output(), bundle) == 0
    assert json.loads((bundle / "config.json").read_text())["model"]["tome_r"]["elastic"] == LISTED
    said = {}
    for folder in (trained.output(), bundle):
        for tokens in (5, 13):
            capsys.readouterr()
            assert evlgen("caption", picture, "--run", folder, "--tokens", tokens) == 0
            said.setdefault(tokens, set()).add(capsys.readouterr().out)
    assert all(len(captions) == 1 for captions in said.values())
    assert evlgen("tokens", picture, "--run", bundle, "--tokens", 6, "--out", tmp_path / "drawn") == 0
    assert (tmp_path / "drawn" / "0_tokens.png").exists()
    assert evlgen("caption", picture, "--run", bundle, "--tokens", 2) == 2
    assert "evlgen caption: tokens: 17 tokens cannot become 2 in 2 layers" in capsys.readouterr().err.splitlines()[-1]


def test_the_doctor_and_the_start_up_table_tell(trained, tmp_path, capsys):
    assert evlgen("doctor", trained.path()) == 0
    words = "17 visual -> 13 in the prompt; trained with 13 and one other of 5, 9 or 13"
    assert f"ok    visual tokens: {words}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, says",
    [
        (["model.tome_r={elastic: []}"], "tome_r.elastic: [] names no number of tokens"),
        (["model.tome_r={elastic: [9, 9]}"], "tome_r.elastic: 9 is listed twice"),
        (["model.tome_r={elastic: [9, 2]}"], "tome_r.elastic: 17 tokens cannot become 2 in 2 layers"),
        (["model.tome_r={elastic: [9, 5], draw: two}"], "model.tome_r.draw: 'two' is not one of one, sandwich"),
        (["model.tome_r={elastic: 9}"], "model.tome_r.elastic=9 is not a list; write [9]"),
        (["model.tokens=2"], "tokens: 17 tokens cannot become 2 in 2 layers"),
        (["model.tokens=0"], "model.tokens=0 must be a whole number of at least 1"),
        (["model.tokens=5", "model.soft_prompt=true"], "tokens: soft_prompt has a vector for each token"),
        (["model.tokens=5", "model.connector=avgpool", "model.num_query_token=5"], "tokens: connector avgpool leaves"),
        (["model.tome_r={elastic: [9, 5], draw: sandwich}", "run.task=scst", "model.pretrained=x.pth"],
         "model.tome_r.draw=sandwich: run.task=scst has a loss of its own; take draw: one"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(runs, capsys, options, says):
    assert runs.command(*options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("train.py: ") and says in line


def test_an_ablation_draws_the_curve_from_one_checkpoint(trained, tmp_path, monkeypatch, capsys):
    """Evaluations alone: nothing is trained, resumed or written beside the weights."""

    def popen(command, **keys):
        options = command[command.index("--options") + 1 :]
        trained.copy(tmp_path).train(*options)
        return types.SimpleNamespace(returncode=0, poll=lambda: 0)

    monkeypatch.setattr(sweep_runs, "subprocess", types.SimpleNamespace(Popen=popen, DEVNULL=None, STDOUT=None))
    weights = trained.output() / "checkpoint_last.pth"
    command = ["ablate", trained.path(), "--sweep", "model.tokens=5,13", "--out", tmp_path / "curve"]
    command += ["--options", "run.evaluate=true", f"model.pretrained={weights}"]
    assert evlgen(*command) == 0
    table = json.loads((tmp_path / "curve" / "ablation.json").read_text())["table"]
    assert [row["values"] for row in table] == [{"model.tokens": "5"}, {"model.tokens": "13"}]
    card = json.loads((trained.output() / "run.json").read_text())
    assert table[1]["loss, right"]["mean"] == pytest.approx(card["metrics"]["loss_right"], rel=1e-6)
    assert table[0]["loss, right"]["mean"] != table[1]["loss, right"]["mean"]
    assert (tmp_path / "curve" / "ablation.png").exists()
    assert not list((tmp_path / "curve" / "runs").glob("*/*.pth"))
    assert evlgen(*command) == 0
    assert "2 of 2 runs have been made before" in capsys.readouterr().out
