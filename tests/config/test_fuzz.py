"""Every key of every class with values that it cannot take: one line that names the key, never a trace."""

import copy
import logging
import math
from dataclasses import MISSING
from typing import Any

import pytest
from omegaconf import OmegaConf

from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.keys import keys_of
from lavis_evlgen.config.run_config import PROCESSORS, registry
from lavis_evlgen.config.values import taken
from tests.config.test_run_config import load
from tests.run_tools import ROOT

HUGE = 10**400
VALUES = [
    math.nan, math.inf, -1, 1e30, HUGE, "", "text", True, None, [], [{"a": 1}], {}, {"a": [1]}, "${run.seed}",
    "${nope}",
]  # fmt: skip
# configs that between them use each of our classes
CONFIGS = (
    "evlgen/quickstart", "evlgen_video/msrvtt_scst", "evlgen/easy_vqa_quickstart", "blip2/mini_stage1",
    "evlgen/eval/vqav2", "evlgen/ccs", "evlgen_video/moving_scenes",
)  # fmt: skip


def places_of(config):
    """(section, key) of every key that the classes of a config say they read; a section is its dotted place."""
    run, model = config.run, config.model
    for cls in (registry.get_runner_class(run.runner), registry.get_task_class(run.task)):
        yield from (("run", key) for key in keys_of(cls))
    yield from (("model", key) for key in keys_of(registry.get_model_class(model.arch)))
    for name, section in config.datasets.items():
        yield from ((f"datasets.{name}", key) for key in (*keys_of(registry.get_builder_class(name)), "type"))
        for kind in PROCESSORS:
            for stage, processor in section[kind].items():
                found = registry.get_processor_class(processor.name)
                keys = (*(keys_of(found) or processor), "name")
                yield from ((f"datasets.{name}.{kind}.{stage}", key) for key in keys)


def outcome(cfg, section: str, key: str, value) -> str:
    """accepted, or refused by name; everything else is an error of the test."""
    parent, _, last = section.rpartition(".")
    node = OmegaConf.select(cfg.config, section)
    saved = copy.deepcopy(node)
    try:
        node[key] = value
        cfg.check()
    except ConfigError as error:
        words = str(error)
        assert f"{section}.{key}" in words and str(cfg.path) in words and "\n" not in words, words
        assert len(words) < 2000, "a message is one line that can be read"
        return "refused"
    finally:
        (OmegaConf.select(cfg.config, parent) if parent else cfg.config)[last] = saved
    return "accepted"


@pytest.fixture(scope="module")
def outcomes():
    """{(place, repr of the value): outcome}: every key of every kind of class once."""
    logging.disable(logging.WARNING)
    found, seen = {}, set()
    for name in CONFIGS:
        cfg = load(ROOT / f"projects/{name}.yaml")
        for section, key in list(places_of(cfg.config)):
            if (kind := (section.split(".")[0], section.count("."), key)) in seen:
                continue
            seen.add(kind)
            for value in VALUES:
                found[f"{section}.{key}", repr(value)] = outcome(cfg, section, key, value)
    logging.disable(logging.NOTSET)
    return found


def accepted(outcomes, value) -> set[str]:
    return {place for (place, shown), end in outcomes.items() if shown == repr(value) and end == "accepted"}


def test_no_value_ends_in_anything_but_yes_or_one_line(outcomes):
    assert len(outcomes) > 1500


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30, HUGE, "${nope}"], ids=lambda value: repr(value)[:9])
def test_what_no_key_takes(outcomes, value):
    assert accepted(outcomes, value) == set()


def test_what_few_keys_take(outcomes):
    def keys(value):
        return {place.rpartition(".")[2] for place in accepted(outcomes, value)}

    assert keys(-1) == {"length_penalty", "vit_layer"}
    assert keys(True) <= {
        "amp", "compile", "deterministic", "distributed", "end_mark", "evaluate", "flip", "freeze_vit", "label_bos",
        "lemmatize", "llm_grad_checkpoint", "load_finetuned", "load_pretrained", "lower", "mix_per_rank",
        "proportional_attention", "shrink_on_load", "soft_prompt", "temporal", "temporal_positions", "tensorboard",
        "trust_remote_code", "use_grad_checkpoint",
    }  # fmt: skip
    assert keys([]) == {"captions", "compile", "mean", "metrics", "references", "shards", "std", "test_splits",
                        "tome_r", "track", "train_splits", "valid_splits"}  # fmt: skip
    assert keys({}) == {"annotations", "columns", "connector_sizes", "kinds", "llm_train", "lr_scale", "pictures",
                        "sizes", "split", "text_processor", "tome_r", "vis_processor"}  # fmt: skip
    assert keys([{"a": 1}]) == keys({"a": [1]}) == set()
    assert keys("text") == keys("") <= {
        "agg_metric", "bos_token", "cache_features", "caption_key", "captions", "connector_init", "data_type",
        "device", "dist_url", "finetuned", "folder", "image_name", "images", "llm_adapter", "llm_model", "metric",
        "opt_model", "output_dir", "pretrained", "prompt", "questions", "references", "resume_ckpt_path", "run_name",
        "save_every", "shards", "tokenizer", "videos", "vit_model", "vit_path",
    }  # fmt: skip


def test_every_key_of_ours_says_what_it_takes():
    """A key that takes anything would end in a trace later; a default that it does not take, too."""
    for mapping in ("runner", "task", "model", "builder", "processor"):
        for name, cls in registry.mapping[f"{mapping}_name_mapping"].items():
            for key in keys_of(cls).values():
                assert key.kind is not Any and key.meaning, f"{name}: {key.name}"
                if key.default is not MISSING and key.default is not None:
                    taken(f"{name}: {key.name}", key.default, key.kind, key.limits)
