"""Language models out of a .gguf file, through transformers' own de-quantisation."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
from transformers import modeling_gguf_pytorch_utils

from lavis_evlgen.compat.environment import require

_TEXT, _ARRAY = 8, 9  # of the file format's types of values


@contextmanager
def one_parse() -> Iterator[None]:
    """Within it a GGUF file is parsed once: transformers reads it anew for config, tokenizer and weights.

    Each parse of a 49k-token vocabulary takes seconds of pure Python; so do its values, which transformers converts
    anew each time, and the names of tensors, which it lists anew for each of the model's modules.
    """
    require("gguf", "quickstart")
    require("accelerate", "quickstart")
    import gguf

    reader = _on_plain_arrays(gguf.GGUFReader)
    once = functools.lru_cache(maxsize=1)
    with (
        _replaced(gguf, "GGUFReader", once(lambda path, *args: reader(path, *args))),
        _replaced(gguf, "get_tensor_name_map", once(gguf.get_tensor_name_map)),
        _replaced(modeling_gguf_pytorch_utils, "_gguf_parse_value", _parse_once()),
    ):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


def _on_plain_arrays(reader: type) -> type:
    """A GGUFReader whose file is a plain array: it makes hundreds of thousands of slices, and those of a memmap cost
    many times as much."""

    from gguf import GGUFValueType as Value

    class Reader(reader):
        @property
        def data(self):
            return self._data

        @data.setter
        def data(self, file):
            self._data = np.asarray(file)

        def _get_field_parts(self, start: int, kind: int):
            """Of an array (a vocabulary, its merges, types of tokens) at once, in place of five calls a value."""
            if kind != _ARRAY:
                return super()._get_field_parts(start, kind)
            parts, at = [self._get(start, np.uint32), self._get(start + 4, np.uint64)], start + 12
            of, count = Value(parts[0][0]), int(parts[1][0])
            number = self.gguf_scalar_to_np.get(of)
            if number is not None and count:
                values = self._get(at, number, count)
                parts += list(values.reshape(count, 1))
                return at - start + values.nbytes, parts, list(range(2, len(parts))), [Value(_ARRAY), of]
            if of != _TEXT or not count:
                return super()._get_field_parts(start, kind)
            data, content = self._data, memoryview(self._data)
            order = sys.byteorder if self.byte_order == "I" else {"little": "big", "big": "little"}[sys.byteorder]
            for _ in range(count):
                text = at + 8
                end = text + int.from_bytes(content[at:text], order)
                if max(text, end) > len(data):
                    raise ValueError("a text ends behind the file")
                parts += (data[at:text], data[text:end])
                at = end
            return at - start, parts, list(range(3, len(parts), 2)), [Value(_ARRAY), of]

    return Reader


def _parse_once() -> Callable:
    """transformers' conversion of a value in the file, done once for each and at once for text.

    Values are arrays that belong to the file's one reader, so they stay what they are as long as this is used.
    """
    known, parse = {}, modeling_gguf_pytorch_utils._gguf_parse_value

    def value_of(array, types):
        value = known.get(id(array), known)  # known itself: not there, as None might be
        if value is known:
            text = types[-1] == _TEXT and len(types) == 1 + (types[0] == _ARRAY)
            value = known[id(array)] = bytes(array).decode() if text else parse(array, types)
        return value

    return value_of


def set_special_tokens(tokenizer, file: Path):
    """transformers guesses these for some tokenizers (SmolLM2's EOS comes out as its BOS); the file knows."""
    import gguf

    fields = gguf.GGUFReader(str(file)).fields
    for ours, theirs in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        field = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if field is not None:
            setattr(tokenizer, ours, tokenizer.convert_ids_to_tokens(int(field.parts[-1][0])))
