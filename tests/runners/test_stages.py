"""Runs with stages: one model, trained in one stage after another; what each keeps, and how they go on."""

import copy
import json
import shutil
import signal
from collections import Counter

import pytest
import torch

from lavis_evlgen.config import ConfigError
from lavis_evlgen.runners.stage_ledger import StageLedger
from lavis_evlgen.runners.stages import seed_of
from lavis_evlgen.runners.trainer import Trainer
from tests.datasets.shard_tools import write_shards
from tests.processes import on_two_ranks, run
from tests.run_tools import Runs, checkpoint, log, losses, same_tensors

ALIGN = {"name": "align", "trains": ["ln_vision.*", "connector.*", "llm_proj.*"]}
LANGUAGE = {"name": "language", "trains": ["llm_proj.*", "language_model.*"], "run": {"init_lr": 1e-3, "max_iters": 3}}
REFROZEN = {"name": "last", "trains": ["connector.*"], "run": {"valid_splits": ["val"], "max_iters": 3}}
PARTS = ("model", "optimizer", "rng", "best", "step", "unevaluated")


def staged(parts, folder, *stages, llm_train="full", **run) -> Runs:
    """Two steps a stage unless it says otherwise; dropout, so that what draws shows."""
    runs = Runs(parts, folder, **{"max_iters": 2, "iters_per_inner_epoch": 2, "sheet_pictures": 0, **run})
    runs.config["model"] |= {"dropout": 0.2, "llm_train": llm_train}
    runs.config["stages"] = copy.deepcopy(list(stages))
    return runs


# moments at which a kill leaves something of its own: after (or before) the n-th call of a method
MOMENTS = {
    "in the first stage": (Trainer, "_save", 1, "after"),
    "the first stage has ended, and the ledger does not know": (StageLedger, "end", 1, "before"),
    "between the first and the second": (StageLedger, "end", 1, "after"),
    "the second stage has begun and saved nothing": (StageLedger, "start", 2, "after"),
    "in the second stage": (Trainer, "_save", 3, "after"),
    "between the second and the third": (StageLedger, "end", 2, "after"),
    "in an evaluation of the third": (Trainer, "_save", 7, "after"),
}


def photographed(runs: Runs, patch):
    """Train, and copy the run's folder at each moment: what a process that is killed there leaves behind."""
    calls = Counter()

    def watched(owner, name, original):
        def call(*args, **kwargs):
            calls[owner, name] += 1
            number = calls[owner, name]
            copy_if(owner, name, number, "before")
            result = original(*args, **kwargs)
            copy_if(owner, name, number, "after")
            return result

        return call

    def copy_if(*here):
        for moment, when in MOMENTS.items():
            if when == here:
                lock = shutil.ignore_patterns("run.lock")  # its process still lives
                shutil.copytree(runs.output(), runs.folder / "killed" / moment, ignore=lock)

    for owner, name in {(owner, name) for owner, name, *_ in MOMENTS.values()}:
        patch.setattr(owner, name, watched(owner, name, vars(owner)[name]))
    runs.runner = runs.train()


@pytest.fixture(scope="module")
def three(parts, tmp_path_factory) -> Runs:
    """Align, train the language model too, then the connector alone; nobody writes to its folder."""
    runs = staged(parts, tmp_path_factory.mktemp("three"), ALIGN, LANGUAGE, REFROZEN, save_every=1)
    with pytest.MonkeyPatch.context() as patch:
        photographed(runs, patch)
    return runs


def rows(runs: Runs) -> list[dict]:
    return json.loads((runs.output() / "stages.json").read_text())["stages"]


def assert_same(runs: Runs, expected: Runs):
    """Every stage ended as it did there, bit for bit."""
    for row in rows(expected):
        ours, theirs = (one.output() / row["folder"] for one in (runs, expected))
        assert losses(ours) == losses(theirs)
        a, b = checkpoint(ours), checkpoint(theirs)
        assert all(same_tensors(a[part], b[part]) for part in PARTS), row["name"]


def test_one_empty_stage_is_a_run_without_stages(parts, tmp_path):
    plain = staged(parts, tmp_path / "plain", valid_splits=["val"])
    del plain.config["stages"]
    plain.train()
    one = staged(parts, tmp_path / "one", {}, valid_splits=["val"])
    one.train()
    folder = one.output() / "1_stage1"
    timed = ("images_per_s", "data_wait", "seconds_per_step", "peak_memory_gb")
    logs = [[{k: v for k, v in row.items() if k not in timed} for row in log(f)] for f in (folder, plain.output())]
    assert logs[0] == logs[1] and len(losses(folder)) == 2
    a, b = checkpoint(folder), checkpoint(plain.output())
    assert all(same_tensors(a[part], b[part]) for part in PARTS)
    assert a["config"]["run"]["seed"] == b["config"]["run"]["seed"]


def test_what_does_not_train_stays_bit_equal(three, parts, tmp_path):
    first, second, third = (checkpoint(three.output() / row["folder"])["model"] for row in rows(three))
    language = {name for name in second if name.startswith("language_model.")}
    assert language and not language & set(first), "a language model that no stage has trained is not saved"
    assert set(second) == set(third) == set(first) | language
    assert {name for name in first if not torch.equal(first[name], second[name])} == {
        name for name in first if name.startswith("llm_proj.")
    }
    moved = {name for name in third if not torch.equal(second[name], third[name])}
    assert moved and all(name.startswith("connector.") for name in moved)
    start = dict(three.runner.model.named_parameters())  # of the last stage, which leaves the ViT as it was
    assert all(not p.requires_grad for name, p in start.items() if not name.startswith("connector."))


def test_the_trained_language_model_differs_from_its_file(three, parts):
    from transformers import AutoModelForCausalLM

    file = AutoModelForCausalLM.from_pretrained(parts["llm_model"]).state_dict()
    third = checkpoint(three.output() / "3_last")["model"]
    assert not torch.equal(third["language_model.llm.lm_head.weight"], file["lm_head.weight"])


def test_the_ledger_says_what_was_done(three):
    found = rows(three)
    assert [row["state"] for row in found] == ["done"] * 3
    assert [row["folder"] for row in found] == ["1_align", "2_language", "3_last"]
    assert [row["start"] for row in found] == [None, "1_align/checkpoint_last.pth", "2_language/checkpoint_last.pth"]
    assert [row["steps"] for row in found] == [2, 3, 3]
    assert found[2]["scores"]["split"] == "val" and found[2]["scores"]["loss_right"] > 0
    assert found[2]["scores"]["text_loss"] > 0  # of a language model that learns in one of the stages
    assert found[0]["scores"] is None
    for row in found:
        by_step = losses(three.output() / row["folder"])
        assert row["loss"] == {"first": by_step[1], "last": by_step[row["steps"]]}


def test_each_stage_has_a_seed_of_its_own(three):
    seeds = [checkpoint(three.output() / row["folder"])["config"]["run"]["seed"] for row in rows(three)]
    assert seeds == [seed_of(42, number) for number in (1, 2, 3)]
    assert seeds[0] == 42 and len(set(seeds)) == 3 and max(seeds) <= 4 * 10**9


def test_the_config_of_a_stage_is_a_run_of_its_own(three, parts, tmp_path):
    """A stage is what train.py does with its run and data sets, model.pretrained being the stage before."""
    config = checkpoint(three.output() / "2_language")["config"]
    assert config["stage"] == {"name": "language", "number": 2, "of": 3, "trains": LANGUAGE["trains"]}
    assert config["model"]["pretrained"] == str(three.output() / "1_align" / "checkpoint_last.pth")
    assert config["run"]["max_iters"] == 3 and config["run"]["init_lr"] == 1e-3


def killed(three: Runs, folder, moment: str) -> Runs:
    """The same run, killed at that moment."""
    runs = three.copy(folder)
    shutil.copytree(three.folder / "killed" / moment, runs.output())
    return runs


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_goes_on_bit_for_bit(three, tmp_path, moment):
    runs = killed(three, tmp_path, moment)
    done = [row["folder"] for row in rows(runs) if row["state"] == "done"]
    before = {f: f.stat().st_mtime_ns for name in done for f in (runs.output() / name).rglob("*") if f.is_file()}
    runs.train("run.resume_ckpt_path=auto")
    assert_same(runs, three)
    assert [row["state"] for row in rows(runs)] == ["done"] * 3
    assert {f: f.stat().st_mtime_ns for f in before} == before, "a finished stage is not repeated"


def test_signals_go_on_bit_for_bit(three, tmp_path):
    runs = three.copy(tmp_path)
    with run(runs, "run.resume_ckpt_path=auto") as process:
        process.wait_for(lambda: losses(runs.output() / "1_align"))
        process.send(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM, process.words
    assert rows(runs)[0]["state"] != "waiting" and rows(runs)[2]["state"] == "waiting"
    assert not list(runs.output().rglob("run.lock"))
    with run(runs, "run.resume_ckpt_path=auto") as process:
        process.wait_for(lambda: losses(runs.output() / "2_language"))
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert rows(runs)[0]["state"] == "done" and rows(runs)[2]["state"] == "waiting"
    runs.train("run.resume_ckpt_path=auto")
    assert_same(runs, three)


def test_a_run_that_is_done_stays_done(three):
    before = (three.output() / "stages.json").read_bytes()
    runner = three.train("run.resume_ckpt_path=auto")
    assert runner.trainer is None and (three.output() / "stages.json").read_bytes() == before


def test_without_its_ledger_a_run_goes_on_from_the_folders_of_its_stages(three, tmp_path):
    runs = three.copy(tmp_path)
    shutil.copytree(three.output(), runs.output())
    (runs.output() / "stages.json").unlink()
    runs.train("run.resume_ckpt_path=auto")
    assert_same(runs, three)
    assert [row["state"] for row in rows(runs)] == ["done"] * 3


def test_a_changed_config_is_refused_by_name(three):
    words = "stages.language: run.max_iters: 3 -> 4. Resume with the config"
    with pytest.raises(ConfigError, match=words):
        three.train("run.resume_ckpt_path=auto", "stages.language.run.max_iters=4")
    with pytest.raises(ConfigError, match="holds the stages.json of another run"):
        three.train()
    with pytest.raises(ConfigError, match="goes on by run.resume_ckpt_path=auto"):
        three.train(f"run.resume_ckpt_path={three.output()}/1_align/checkpoint_last.pth")


def test_best_weights_are_tested_and_the_last_are_passed_on(parts, tmp_path):
    """The test of a stage leaves its best weights in the model."""
    scored = {"valid_splits": ["val"], "test_splits": ["test"], "iters_per_inner_epoch": 1}
    runs = staged(parts, tmp_path, {"run": scored}, {"trains": ["connector.*"]}, llm_train=None)
    runs.train()
    folders = [runs.output() / row["folder"] for row in rows(runs)]
    before, after = (checkpoint(folder)["model"] for folder in folders)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if not name.startswith("connector.")} <= same < set(before)


def test_frozen_parts_are_loaded_once(parts, tmp_path, monkeypatch):
    from lavis_evlgen.models import evlgen

    built = []
    monkeypatch.setattr(evlgen, "load_language_model", lambda *a, load=evlgen.load_language_model: built.append(a) or
                        load(*a))  # fmt: skip
    staged(parts, tmp_path, ALIGN, {"trains": ["connector.*"]}, llm_train=None, max_iters=1).train()
    assert len(built) == 1


def test_a_frozen_connector_draws_no_dropout(parts, tmp_path, capsys):
    runs = staged(parts, tmp_path, {"trains": ["llm_proj.*"]}, llm_train=None, max_iters=1)
    model = runs.train().model
    words = capsys.readouterr().err
    assert "stage 1/1 stage1: step 1/1  loss" in words and "1 of 1: stage1, trains llm_proj.*" in words
    assert "  1_stage1" in words.rpartition("starts from")[2], "the last words are a table of all stages"
    assert not model.connector.training and not any(m.training for m in model.connector.modules())
    assert model.llm_proj.training and not model.ln_vision.training


def test_shards_and_a_mix_in_a_later_stage_go_on_bit_for_bit(parts, tmp_path, monkeypatch):
    runs = staged(parts, tmp_path, {"datasets": ["scenes"], "run": {"max_iters": 1}}, {
        "name": "mix", "run": {"max_iters": 6, "iters_per_inner_epoch": 6, "save_every": 2,
                               "train_dataset_ratios": {"scenes": 1, "image_shards": 2}},
    }, llm_train=None, num_workers=1)  # fmt: skip
    scenes = runs.config["datasets"]["scenes"]
    runs.config["datasets"]["image_shards"] = {
        "shards": write_shards(tmp_path / "shards", (5, 4)), "shuffle_window": 3,
        "vis_processor": scenes["vis_processor"],
    }  # fmt: skip
    again = runs.copy(tmp_path / "again")
    monkeypatch.setattr(Trainer, "_save", copies_at(4, Trainer._save, runs, again))
    runs.train()
    monkeypatch.undo()
    assert checkpoint(again.output() / "2_mix")["step"] == 4
    again.train("run.resume_ckpt_path=auto")
    assert_same(again, runs)


def copies_at(step: int, save, runs: Runs, again: Runs):
    """Trainer._save that copies the run's folder when the second stage has saved this step."""

    def call(self, done, *args, **kwargs):
        save(self, done, *args, **kwargs)
        if self.stage.number == 2 and done == step:
            shutil.copytree(runs.output(), again.output(), ignore=shutil.ignore_patterns("run.lock"))

    return call


def test_two_ranks_are_one(parts, tmp_path):
    stages = [ALIGN, LANGUAGE, {"name": "last", "trains": ["connector.*"]}]
    one = staged(parts, tmp_path / "one", *stages, batch_size_train=4)
    two = staged(parts, tmp_path / "two", *stages, batch_size_train=2)
    for runs in (one, two):
        runs.config["model"]["dropout"] = 0.0
    on_two_ranks(two)
    one.train()
    for row in rows(one):
        ours, theirs = (runs.output() / row["folder"] for runs in (one, two))
        assert losses(theirs) == pytest.approx(losses(ours), abs=1e-5)
        a, b = checkpoint(ours)["model"], checkpoint(theirs)["model"]
        assert set(a) == set(b) and max((a[name] - b[name]).abs().max().item() for name in a) < 1e-4
    assert [row["state"] for row in rows(two)] == ["done"] * 3
