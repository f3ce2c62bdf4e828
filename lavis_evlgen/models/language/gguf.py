"""Language models out of a .gguf file, through transformers' own de-quantisation."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lavis_evlgen.compat.environment import require


@contextmanager
def one_parse() -> Iterator[None]:
    """Within it a GGUF file is parsed once: transformers reads it anew for config, tokenizer and weights.

    Each parse of a 49k-token vocabulary takes seconds of pure Python; so do the names of tensors, which transformers
    lists anew for each of the model's modules.
    """
    require("gguf", "quickstart")
    require("accelerate", "quickstart")
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(lambda path, *args: reader(path, *args))
    gguf.get_tensor_name_map = functools.lru_cache(maxsize=1)(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


def set_special_tokens(tokenizer, file: Path):
    """transformers guesses these for some tokenizers (SmolLM2's EOS comes out as its BOS); the file knows."""
    import gguf

    fields = gguf.GGUFReader(str(file)).fields
    for ours, theirs in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        field = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if field is not None:
            setattr(tokenizer, ours, tokenizer.convert_ids_to_tokens(int(field.parts[-1][0])))
