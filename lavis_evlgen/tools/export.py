"""`evlgen export`: a bundle of a run, with the weights of a checkpoint, its config and what it scored."""

from __future__ import annotations

import json
from pathlib import Path

from lavis.common.registry import registry

from lavis_evlgen.models.facts import facts_of
from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.tasks.captioning import decoding_of
from lavis_evlgen.tools.load_trained import run_config
from lavis_evlgen.tools.model_options import model_options
from lavis_evlgen.tools.transformers_files import transformers_files
from lavis_evlgen.weights.bundle import ADAPTER, bundle_config, empty_model, write_bundle
from lavis_evlgen.weights.trainable import check_trainable
from lavis_evlgen.weights.untrusted import USER_ONLY_KEYS


def export_run(cfg: dict, checkpoint: Path, out: str, changes: dict, transformers: bool = False) -> str:
    """Write the bundle `out` of a checkpoint and the run config in it; returns what was written, in words.

    changes: keys of the model section that the bundle should have otherwise. No weights but the checkpoint's are
    read; of the frozen parts, config and tokenizer. transformers: with what lets plain transformers load it, and then
    with those frozen parts that are files of this machine. Raises WeightsError, ConfigError.
    """
    content = checkpoints.read(checkpoint, "--checkpoint")
    # what a person says about code of others counts while its tokenizer is read, and is never written down
    section = cfg["model"] | {key: changes[key] for key in USER_ONLY_KEYS if key in changes}
    model = empty_model(registry.get_model_class(section["arch"]), section)
    check_trainable(model, content["model"], str(checkpoint), [facts_of(model).from_files()])
    dataset = next(iter(cfg["datasets"].values()))
    preprocess = {kind: dataset[kind] for kind in ("vis_processor", "text_processor") if kind in dataset}
    config = bundle_config(model, preprocess, decoding_of(cfg["run"]), changes)
    config["frozen_weights"] = content.get("frozen_weights") or {}  # the model here has no weights to tell them from
    card = _card(checkpoint.parent, cfg["run"], content["step"])
    write_model(model, content["model"], config, out, card, transformers, bool(section.get("trust_remote_code")))
    told = f"its {card['data']['split']} results are in README.md" if card else "no evaluation of that step was found"
    return f"{out}: {len(content['model'])} tensors of {checkpoint.name}, step {content['step']}; {told}"


def write_model(model, weights: dict, config: dict, out, card=None, transformers: bool = False, trust: bool = False):
    """Write the bundle `out`. trust: whether code that frozen parts bring may run. Raises WeightsError, ConfigError."""
    files = transformers_files(model, config, out, trust) if transformers else None
    folder = write_bundle(out, weights, config | (files.config if files else {}), card)
    model.save_adapter(folder / ADAPTER, weights)
    if files:
        files.write(folder)


def _card(folder: Path, run: dict, step: int) -> dict | None:
    """The run card of the evaluation of exactly these weights, of the first test split rather than a valid split."""
    cards = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("result/*.card.json")]
    by_split = {card["data"]["split"]: card for card in cards if card.get("step") == step}
    splits = [*(run.get("test_splits") or []), *(run.get("valid_splits") or [])]
    return next((by_split[split] for split in splits if split in by_split), None)


def main(args) -> int:
    """Write a bundle of a run's checkpoint."""
    cfg, checkpoint = run_config(Path(args.run), args.checkpoint)
    print(export_run(cfg, checkpoint, args.out, model_options(args.options), args.transformers))
    return 0
