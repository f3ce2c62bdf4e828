"""Sizes of the public models that our configs name, so that a model can be counted without a network.

Used under `torch.device("meta")` alone, where a model has shapes and no weights, and only for what is neither a folder
here nor in the hub's cache. A tokenizer is not kept: of one, counting asks for special tokens, and those are known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import BatchEncoding

from lavis_evlgen.weights.sources import WeightsError, on_meta

SIZES = Path(__file__).resolve().parent.parent / "configs" / "sizes"  # folders with a config.json
KEPT = {
    "bert-base-uncased": "bert-base-uncased",
    "google-bert/bert-base-uncased": "bert-base-uncased",
    "facebook/opt-2.7b": "opt-2.7b",
    "facebook/opt-6.7b": "opt-6.7b",
    "lmsys/vicuna-7b-v1.1": "vicuna-7b",
    "lmsys/vicuna-7b-v1.3": "vicuna-7b",
    "lmsys/vicuna-13b-v1.1": "vicuna-13b",
    "lmsys/vicuna-13b-v1.3": "vicuna-13b",
    "Qwen/Qwen2.5-1.5B": "qwen2.5-1.5b",
    "Qwen/Qwen2.5-1.5B-Instruct": "qwen2.5-1.5b",
    "google/siglip-base-patch16-224": "siglip-base-patch16-224",
}
# by model_type: (BOS, EOS, padding, unknown), and ids of texts that are one token
_TOKENS = {
    "opt": (("</s>", "</s>", "<pad>", "</s>"), {"</s>": 2, "<pad>": 1, "\n": 50118}),
    "llama": (("<s>", "</s>", None, "<unk>"), {"<s>": 1, "</s>": 2, "<unk>": 0}),
    "qwen2": ((None, "<|im_end|>", "<|endoftext|>", None), {"<|im_end|>": 151645, "<|endoftext|>": 151643}),
}


def sizes_of(source: str, file: str = "config.json") -> str:
    """The folder whose config.json says the sizes of `source`: the kept one, or `source` itself where it is a folder,
    where the hub's cache has its `file`, where nothing is kept of it, and wherever weights are wanted."""
    kept = KEPT.get(str(source))
    if not on_meta() or kept is None or Path(source).exists():
        return source
    if isinstance(try_to_load_from_cache(source, file), str):
        return source
    _tell(source)
    return str(SIZES / kept)


def is_kept(folder: str) -> bool:
    """Whether `sizes_of` answered with a folder of its own."""
    return Path(folder).parent == SIZES


@cache
def _tell(source: str):
    logging.warning("%s is not here: its sizes are those that this package knows", source)


class KeptTokens:
    """The special tokens of a language model's tokenizer; for anything else the tokenizer itself is loaded.

    load: () -> the tokenizer. Raises WeightsError where that is asked for and cannot be had.
    """

    def __init__(self, source: str, model_type: str, load: Callable):
        names, self._ids = _TOKENS[model_type]
        self._source, self._load = source, load
        self.bos_token, self.eos_token, self.pad_token, self.unk_token = names
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.unk_token_id = map(self._ids.get, names)

    @cached_property
    def real(self):
        """The tokenizer. Raises WeightsError."""
        try:
            return self._load()
        except WeightsError as error:
            raise WeightsError(
                f"the tokenizer of {self._source} is not here, and without it a text prompt or a conversation cannot "
                f"be counted: {error}"
            ) from error

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self._ids.get(token, self.unk_token_id)

    def get_vocab(self) -> dict[str, int]:
        """The special tokens, which a BOS is one of."""
        return dict(self._ids)

    def __call__(self, text: str, **options):
        if text in self._ids:
            return BatchEncoding({"input_ids": [self._ids[text]]})
        return self.real(text, **options)

    def __getattr__(self, name: str):
        if name.startswith("_"):  # of Python's own, as when it is copied
            raise AttributeError(name)
        return getattr(self.real, name)
