"""`evlgen export --transformers`: what a bundle needs beside its own files to load in plain transformers.

config.json gets transformers' keys beside ours, so that one folder is both. The code that is copied, and what it does
not do, is in weights/hub/.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.keys import keys_of
from lavis_evlgen.models.connectors import build_connector
from lavis_evlgen.models.connectors.pooling import grid
from lavis_evlgen.models.evlgen import EvlgenSettings
from lavis_evlgen.models.language.chat import PLAIN
from lavis_evlgen.models.language.loading import load_language_model
from lavis_evlgen.models.language.tokenizer import TextEncoder
from lavis_evlgen.models.vision.encoder import LAVIS_VITS, hugging_face_model
from lavis_evlgen.processors.images import EvlgenImageEvalProcessor
from lavis_evlgen.weights import hub
from lavis_evlgen.weights.bundle import local_sources
from lavis_evlgen.weights.kept_sizes import KeptTokens
from lavis_evlgen.weights.sources import resolve

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "auto": "auto"}
CLASSES = {
    "AutoConfig": "configuration_evlgen.EvlgenConfig",
    "AutoModelForImageTextToText": "modeling_evlgen.EvlgenForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_evlgen.EvlgenForConditionalGeneration",
}
OF_TOMEFORMER = ("hidden_size", "num_heads", "intermediate_size", "max_positions", "layer_norm_eps", "folds",
                 "schedule", "merge_mean", "partition", "proportional_attention", "skip", "readout")  # fmt: skip
# keys of the model section that the copied code follows, or that only training reads; others must have their defaults
FOLLOWED = {
    "arch", "model_type", "image_size", "vit_model", "vit_path", "vit_layer", "vit_precision", "llm_model", "opt_model",
    "llm_precision", "llm_train", "prompt", "bos", "bos_token", "chat_template", "soft_prompt", "connector",
    "connector_sizes", "num_layers", "num_query_token", "tome_r", "tokens", "merge_mean", "partition",
    "proportional_attention", "merge_at", "readout", "skip",
    "load_pretrained", "load_finetuned", "pretrained", "finetuned", "connector_init", "dropout", "max_txt_len",
    "label_bos", "llm_adapter", "prompt_scale", "lr_scale",
}  # fmt: skip
SUPPORTED = ("supported: arch evlgen (pictures); connector tomeformer (without tome_r {average, least, most} and "
             "condition), avgpool or linear; a Hugging Face vit_model or a DINOv2 .onnx; prompt_attention causal; the "
             "image processor evlgen_image_eval; no trust_remote_code")  # fmt: skip


@dataclass
class TransformersFiles:
    """`config`: keys for a bundle's config.json; `write`: the other files. Made by `transformers_files`."""

    config: dict
    processor: dict
    image_processor: dict
    generation: dict
    tokenizer: object
    copied: dict[str, str]  # model keys of the frozen parts that are written into the folder, and their sources
    precision: str

    def write(self, folder: Path):
        """Code, processors, generation settings and tokenizer, and the frozen parts that have no public name."""
        for file in hub.CODE:
            shutil.copyfile(hub.FOLDER / file, folder / file)
        if "vit_model" in self.copied:
            vit = hugging_face_model(resolve(self.copied["vit_model"], "vit_model"))
            vit.save_pretrained(folder / hub.VISION_MODEL, safe_serialization=True)
        if "llm_model" in self.copied:
            precision = "fp32" if self.precision == "auto" else self.precision
            llm, _ = load_language_model(self.copied["llm_model"], precision)
            llm.save_pretrained(folder / hub.LANGUAGE_MODEL, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)
        if self.copied.get("llm_model", "").endswith(".gguf"):  # transformers takes it for the vocabulary's file
            (folder / "tokenizer.model").unlink(missing_ok=True)
        contents = {hub.PROCESSOR: self.processor, hub.IMAGE_PROCESSOR: self.image_processor,
                    hub.GENERATION: self.generation}  # fmt: skip
        for file, content in contents.items():
            (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def transformers_files(model: nn.Module, content: dict, out: str, trust_remote_code: bool = False) -> TransformersFiles:
    """Of a bundle's config.json `content`, whose trained parts have `model`'s shapes (on the meta device will do).

    Raises ConfigError for a model that the copied code does not run. out: the bundle's folder.
    """
    settings, section = EvlgenSettings.read(content["model"]), content["model"]
    _check(section, settings, content, trust_remote_code)
    with torch.device("meta"):
        connector = build_connector(model.visual_encoder, section)
    tokenizer, decoding = _tokenizer(model), content["decoding"]
    llm, rows = model.language_model.llm, model.language_model.embed[0].num_embeddings
    text = TextEncoder(tokenizer, llm.config.model_type, rows, settings.bos_token)
    image = max(rows, len(tokenizer))  # no row of the embeddings, no token
    bos = [] if text.bos_id is None else [text.bos_id]
    if settings.chat_template == "plain":
        tokenizer.chat_template = PLAIN.replace("{{ bos_token }}", tokenizer.decode(bos))
    names, copied = _sources(section, Path(out))
    start = [*bos, image] if settings.bos == "before" else [image, *bos]
    config = {
        "model_type": "evlgen", "architectures": ["EvlgenForConditionalGeneration"], "auto_map": CLASSES,
        "vision_model": names["vit_model"], "vision_layer": settings.vit_layer,
        "vision_dtype": DTYPES[settings.vit_precision], "vision_width": model.visual_encoder.width,
        "image_size": settings.image_size, "protected_tokens": model.visual_encoder.protected,
        "connector": _connector(settings.connector or "tomeformer", connector, model.visual_encoder),
        "soft_prompt_tokens": 0 if model.soft_prompt is None else len(model.soft_prompt),
        "language_model": names["llm_model"], "language_width": model.language_model.width,
        # what trains is float32, whatever the frozen weights are
        "language_dtype": "float32" if settings.llm_train == "full" else DTYPES[settings.llm_precision],
        "image_token_id": image, "prompt_ids": start + text.encode((settings.prompt or "").rstrip()),
    }  # fmt: skip
    processor = {
        "processor_class": "EvlgenProcessor", "auto_map": {"AutoProcessor": "processing_evlgen.EvlgenProcessor"},
        "bos": settings.bos, "bos_token_id": text.bos_id, "end_token_id": text.end_id, "image_token_id": image,
        "prompt": settings.prompt or "",
    }  # fmt: skip
    generation = {
        "do_sample": False, "num_beams": decoding["num_beams"], "max_new_tokens": decoding["max_length"],
        "min_new_tokens": decoding["min_length"], "length_penalty": decoding["length_penalty"],
        "repetition_penalty": decoding["repetition_penalty"], "eos_token_id": text.end_id, "pad_token_id": text.pad_id,
    }  # fmt: skip
    images = _image_processor(content["preprocess"]["vis_processor"]["eval"])
    return TransformersFiles(config, processor, images, generation, tokenizer, copied, settings.llm_precision)


def _check(section: dict, settings: EvlgenSettings, content: dict, trust_remote_code: bool):
    """Raises ConfigError that names the first setting which is not supported."""
    tome_r = settings.tome_r
    image = ((content.get("preprocess") or {}).get("vis_processor") or {}).get("eval") or {}
    connector = settings.connector or "tomeformer"
    reasons = (
        (section["arch"] != "evlgen", f"model.arch={section['arch']}"),
        (connector not in ("tomeformer", "avgpool", "linear"), f"model.connector={connector}"),
        (isinstance(tome_r, dict) and tome_r.get("average") is not None, "model.tome_r {average, least, most}"),
        (settings.vit_model in LAVIS_VITS, f"model.vit_model={settings.vit_model}, which is a class of LAVIS,"),
        (image.get("name") != EvlgenImageEvalProcessor.NAME, f"vis_processor.eval.name={image.get('name')}"),
        (trust_remote_code, "model.trust_remote_code=true, for code that a frozen model brings,"),
        *((section.get(name) not in (None, key.default), f"model.{name}={section.get(name)}")
          for name, key in keys_of(EvlgenSettings).items() if name not in FOLLOWED),
    )  # fmt: skip
    for refused, what in reasons:
        if refused:
            raise ConfigError(f"export --transformers: {what} is not supported; export it without --transformers. "
                              f"{SUPPORTED[0].upper()}{SUPPORTED[1:]}")  # fmt: skip


def _tokenizer(model: nn.Module):
    """The tokenizer itself, where special tokens alone were known (weights/kept_sizes.py). Raises WeightsError."""
    tokenizer = model.language_model.text.tokenizer
    return tokenizer.real if isinstance(tokenizer, KeptTokens) else tokenizer


def _connector(kind: str, connector: nn.Module, vision: nn.Module) -> dict:
    """Sizes of a connector for config.json."""
    if kind == "tomeformer":
        return {"kind": kind, **{name: getattr(connector.tomeformer.cfg, name) for name in OF_TOMEFORMER}}
    if kind == "linear":
        return {"kind": kind}
    first = vision.protected
    side = round((vision.num_tokens - first) ** 0.5)
    rows, columns = grid(connector.num_output_tokens - first, side, first)
    return {"kind": kind, "rows": rows, "columns": columns}


def _sources(section: dict, out: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Of vit_model and llm_model: how config.json names them, and where those come from that are copied.

    A hub id is named, and so is a model folder beside the bundle; any other path of this machine is copied.
    """
    keys = {"vit_model": hub.VISION_MODEL, "llm_model": hub.LANGUAGE_MODEL}
    names, copied = {}, {}
    for key, folder in keys.items():
        source = str(section[key])
        path = Path(source).expanduser().resolve()
        if not (source.startswith("package:") or key in local_sources(section)):
            names[key] = source
        elif path.parent == out.expanduser().resolve().parent and (path / "config.json").exists():
            names[key] = f"../{path.name}"
        else:
            names[key], copied[key] = f"./{folder}", source
    return names, copied


def _image_processor(section: dict) -> dict:
    """preprocessor_config.json for the section of evlgen_image_eval."""
    processor = EvlgenImageEvalProcessor.from_config(section)
    size, (mean, std) = processor.settings.image_size, processor.statistics.tolist()
    return {
        "image_processor_type": "EvlgenImageProcessor", "processor_class": "EvlgenProcessor",
        "auto_map": {"AutoImageProcessor": "processing_evlgen.EvlgenImageProcessor"},
        "size": {"height": size, "width": size}, "image_mean": mean, "image_std": std,
    }  # fmt: skip
