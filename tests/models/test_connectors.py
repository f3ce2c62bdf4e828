"""Every connector inside EVLGen: built from one config key, trained in whole runs, nothing left without gradient."""

import argparse
import json

import pytest
import torch
from omegaconf import OmegaConf

from lavis_evlgen import launch
from lavis_evlgen.config import EvlgenConfig
from lavis_evlgen.config.keys import keys_of
from lavis_evlgen.models.connectors import CONNECTORS, READS, build_connector
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.runners.progress import part_rows
from lavis_evlgen.tools.doctor.checks import check_weights
from lavis_evlgen.weights.sources import WeightsError
from lavis_evlgen.weights.trainable import trainable_state
from tests.run_tools import Runs, losses
from tests.tiny import pictures, tiny_vision

TOKENS = {"tomeformer": 9, "qformer": 32, "avgpool": 5, "linear": 17}


def config(parts, connector: str, **changes):
    keys = {
        "image_size": 28, "vit_precision": "fp32", "num_layers": 2, "tome_r": {"target": 9}, "dropout": 0.0,
        "llm_precision": "fp32", "connector": connector, "prompt_scale": 1,
    }  # fmt: skip
    queries = {"num_query_token": 5} if connector == "avgpool" else {}
    return OmegaConf.create(parts | keys | queries | changes)


@pytest.mark.parametrize("name", CONNECTORS)
def test_one_key_changes_the_connector(parts, name):
    """Trained once, no trainable parameter is without gradient: DistributedDataParallel would wait for it."""
    model = EVLGen.from_config(config(parts, name)).train()
    samples = {"image": pictures(2), "text_input": ["a red square", "a dog"]}
    prompt = model.visual_prompt(samples["image"])
    assert prompt.tokens.shape == (2, TOKENS[name], 32) and model.connector.num_output_tokens == TOKENS[name]
    model(samples)["loss"].backward()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trainable.items() if p.grad is None] == []
    assert {model.part_of(n) for n in trainable} <= set(model.PARTS)
    assert len(model.eval().generate(samples, num_beams=2, max_length=4)) == 2


def test_a_run_with_the_qformer(parts, tmp_path):
    """Train, validate, resume; evaluate.py finds the same scores from the checkpoint."""
    runs = Runs(parts, tmp_path, max_iters=2, iters_per_inner_epoch=2, valid_splits=["val"], sheet_pictures=0)
    runs.config["model"] |= {"connector": "qformer", "num_query_token": 6}
    runs.train()
    before = dict(losses(runs.output()))
    runs.train("run.resume_ckpt_path=auto", "run.max_iters=3", "run.test_splits=[test]", "run.valid_splits=[]")
    after = losses(runs.output())
    assert set(after) == {1, 2, 3} and all(after[step] == loss for step, loss in before.items())
    best = f"model.pretrained={runs.output() / 'checkpoint_best.pth'}"
    runs.train(best, "run.run_name=again", "run.test_splits=[val]", evaluate=True)
    scores = [json.loads((runs.output(run) / "result" / file).read_text())
              for run, file in (("run", "val_2.json"), ("again", "val_given.json"))]  # fmt: skip
    assert scores[0]["loss_right"] == scores[1]["loss_right"] and scores[0]["rows"] == scores[1]["rows"]


def test_the_start_up_table_counts_the_connector(parts, tmp_path, caplog):
    runs = Runs(parts, tmp_path)
    runs.config["model"] |= {"connector": "qformer", "num_query_token": 7}
    with caplog.at_level("INFO"):
        model = launch.build(EvlgenConfig(argparse.Namespace(cfg_path=str(runs.path()), options=[])))[2]
    assert "connector qformer does not read tome_r" in caplog.text
    rows = {row[0]: row for row in part_rows(model)}
    assert rows["connector"][2] == sum(p.numel() for p in model.connector.parameters()) > 0
    assert set(rows) == {"visual_encoder", "connector", "language_model", "ln_vision", "llm_proj"}


def test_keys_that_a_connector_reads_are_keys_of_the_config():
    assert set(READS) == set(CONNECTORS)
    assert set(keys_of(*READS.values())) <= set(keys_of(EVLGen))


def test_keys_that_are_not_read_are_named(caplog):
    with caplog.at_level("INFO"):
        build_connector(tiny_vision(), {"connector": "linear", "tome_r": 19, "num_layers": 2, "dropout": None})
    assert "connector linear does not read num_layers, tome_r" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        build_connector(tiny_vision(), {"connector": "avgpool", "num_query_token": 5})
    assert not caplog.text


@pytest.mark.parametrize("name, looks", [("qformer", True), ("avgpool", False), ("linear", False)])
def test_the_doctor_looks_for_weights_that_are_read(parts, name, looks):
    cfg = config(parts, name, connector_init="./absent.pth")
    failed = [finding.what for finding in check_weights(cfg) if not finding.ok]
    assert failed == (["weights connector_init"] if looks else [])


def test_the_doctor_knows_the_connectors(parts):
    findings = [finding for finding in check_weights(config(parts, "perceiver")) if not finding.ok]
    assert "'perceiver' is not one of tomeformer, qformer" in findings[0].seen


def test_a_qformer_checkpoint_needs_its_queries(parts, tmp_path):
    trained = EVLGen.from_config(config(parts, "qformer"))
    torch.save({"model": trainable_state(trained)}, tmp_path / "checkpoint.pth")
    with pytest.raises(WeightsError, match=r"connector.query_tokens is \(1, 32, 16\) there, \(1, 9, 16\) here"):
        EVLGen.from_config(config(parts, "qformer", num_query_token=9, pretrained=str(tmp_path / "checkpoint.pth")))
