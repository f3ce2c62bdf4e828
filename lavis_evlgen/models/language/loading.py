"""A language model and its tokenizer from a hub id, a folder or a .gguf file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lavis_evlgen.models.language import gguf
from lavis_evlgen.models.precision import DTYPES
from lavis_evlgen.weights.kept_sizes import KeptTokens, is_kept, sizes_of
from lavis_evlgen.weights.sources import (
    check_files_floating,
    check_floating,
    load_from_hub,
    on_meta,
    refuse_kernels,
    resolve,
)


def load_language_model(source: str, precision: str, trust_remote_code: bool = False):
    """(model, tokenizer) from a hub id, a folder, or a .gguf file (de-quantised).

    Under `torch.device("meta")` the model has its shapes and no weights; config and tokenizer are read, or known
    (weights/kept_sizes.py). trust_remote_code: run code that the folder or repository brings. Raises WeightsError.
    """
    path = resolve(source, "llm_model")
    folder, file = folder_and_file(path)
    kwargs = {"trust_remote_code": trust_remote_code, **file}
    if not file:
        return _from_pretrained(path, precision, **kwargs)
    with gguf.one_parse():
        model, tokenizer = _from_pretrained(folder, precision, **kwargs)
        gguf.set_special_tokens(tokenizer, Path(path))
    return model, tokenizer


def folder_and_file(path: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes of a path: a folder or hub id, and for a .gguf file its name in the folder."""
    if not path.endswith(".gguf"):
        return path, {}
    return str(Path(path).parent), {"gguf_file": Path(path).name}


def _from_pretrained(path: str, precision: str, **kwargs):
    if "gguf_file" not in kwargs:  # the config first: it tells of code in the folder, whatever the tokenizer is
        config = load_from_hub(AutoConfig.from_pretrained, sizes_of(path), "llm_model", **kwargs)
        if not kwargs["trust_remote_code"]:
            refuse_kernels(config, path, "llm_model")

    def load_tokenizer():
        return load_from_hub(AutoTokenizer.from_pretrained, path, "llm_model", **kwargs)

    kept = is_kept(sizes_of(path, "tokenizer_config.json"))
    tokenizer = KeptTokens(path, config.model_type, load_tokenizer) if kept else load_tokenizer()
    dtype = DTYPES[precision]
    if on_meta():
        model = empty_language_model(path, **kwargs)
    else:
        check_files_floating(path, "llm_model")
        model = load_from_hub(
            AutoModelForCausalLM.from_pretrained, path, "llm_model", torch_dtype=dtype, **kwargs
        )
        weights = dict(model.named_parameters())
        check_floating(weights, dict.fromkeys(weights, torch.empty(0)), f"llm_model: {path}")
    return model.to(dtype), tokenizer


def empty_language_model(path: str, trust_remote_code: bool, **file) -> nn.Module:
    """The model of a folder or hub id (with `file`: folder_and_file) on torch's default device, untrained."""
    config = load_from_hub(
        AutoConfig.from_pretrained, sizes_of(path), "llm_model", trust_remote_code=trust_remote_code, **file
    )

    def build(path):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

    return load_from_hub(build, path, "llm_model")
