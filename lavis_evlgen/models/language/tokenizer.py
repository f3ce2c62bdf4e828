"""What differs between language models is tokenizer facts, and they are all in this table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lavis_evlgen.nn.losses import IGNORE


@dataclass(frozen=True)
class TokenizerFacts:
    """bos: token put in front of text (None: none); end: text that ends a caption (None: the EOS token).

    label_bos: whether the released code trains on the BOS between visual prompt and text, where no prompt follows.
    """

    bos: str | None
    end: str | None
    pad: str | None
    label_bos: bool = False


# by the `model_type` of the Hugging Face config; None = what the tokenizer itself says
FACTS = {
    # released EVLGen and BLIP-2: id 50118 ends, and only a prompt hides the BOS from the loss
    "opt": TokenizerFacts(bos="</s>", end="\n", pad="<pad>", label_bos=True),
    "llama": TokenizerFacts(bos="bos_token", end=None, pad="[PAD]"),
    "mistral": TokenizerFacts(bos="bos_token", end=None, pad="[PAD]"),
    "qwen2": TokenizerFacts(bos=None, end="<|endoftext|>", pad="<|endoftext|>"),
    "qwen3": TokenizerFacts(bos=None, end="<|endoftext|>", pad="<|endoftext|>"),
}
DEFAULT = TokenizerFacts(bos="bos_token", end=None, pad=None)


class TextEncoder:
    """Turns prompts and captions into id lists; owns BOS, end-of-caption and padding ids, nothing else.

    bos_token: the token to put in front of text in place of the table's; None: the table's. Raises ValueError for
    a token that the tokenizer does not have.
    """

    def __init__(self, tokenizer, model_type: str, vocab_size: int, bos_token: str | None = None):
        facts = FACTS.get(model_type, DEFAULT)
        self.tokenizer = tokenizer
        self.bos_id = self._bos(facts) if bos_token is None else self._given_bos(bos_token)
        self.label_bos = facts.label_bos and self.bos_id is not None
        self.end_id = self._single(facts.end) if facts.end else tokenizer.eos_token_id
        if self.end_id is None:
            raise ValueError(f"the tokenizer of {model_type} has no EOS token: add it to FACTS in {__name__}")
        # Padding is masked everywhere, so any id of the embedding table serves: no table is resized.
        pad = tokenizer.convert_tokens_to_ids(facts.pad) if facts.pad else tokenizer.pad_token_id
        unknown = pad is None or pad >= vocab_size or pad == tokenizer.unk_token_id
        self.pad_id = self.end_id if unknown else pad

    def _bos(self, facts) -> int | None:
        if facts.bos == "bos_token":
            return self.tokenizer.bos_token_id
        return None if facts.bos is None else self.tokenizer.convert_tokens_to_ids(facts.bos)

    def _given_bos(self, token: str) -> int:
        found = self.tokenizer.get_vocab().get(token) if isinstance(token, str) else None
        if found is None:
            raise ValueError(
                f"bos_token: {token!r} is no token of this tokenizer; leave it empty for the tokenizer's own "
                f"({self.tokenizer.bos_token!r})"
            )
        return found

    def _single(self, text: str) -> int:
        ids = self.encode(text)
        if len(ids) != 1:
            raise ValueError(f"end-of-caption text {text!r} is {len(ids)} tokens for this tokenizer, not one")
        return ids[0]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def caption(self, prompt: str, caption: str, max_txt_len: int) -> tuple[list[int], list[int]]:
        """Ids and labels of `prompt caption <end>`, cut at max_txt_len ids; the prompt is unlabelled.

        A caption that is cut loses its end token, so that the model is not taught to stop in mid-sentence.
        """
        if prompt and not caption.startswith(prompt):  # LAVIS's text processors may have put it there
            caption = prompt.rstrip() + " " + caption
        ids = self.encode(caption) + [self.end_id]
        own, n_prompt = self.encode(prompt.rstrip()), 0
        while n_prompt < min(len(own), len(ids)) and own[n_prompt] == ids[n_prompt]:
            n_prompt += 1
        labels = [IGNORE] * n_prompt + ids[n_prompt:]
        return ids[:max_txt_len], labels[:max_txt_len]

    def decode(self, rows: Tensor | list[list[int]]) -> list[str]:
        """Generated ids, N rows -> text before the first end token of each, stripped."""
        texts = []
        for row in rows if isinstance(rows, list) else rows.tolist():
            row = row[: row.index(self.end_id)] if self.end_id in row else row
            texts.append(self.tokenizer.decode(row, skip_special_tokens=True).strip())
        return texts


def pad_rows(rows: list[list[int]], value: int, side: str, device=None) -> Tensor:
    """Lists of ids -> (N, longest) long tensor, padded on `side` (left | right)."""
    width = max(map(len, rows), default=0)
    fill = [[value] * (width - len(row)) for row in rows]
    padded = [f + r if side == "left" else r + f for r, f in zip(rows, fill, strict=True)]
    return torch.tensor(padded, dtype=torch.long, device=device).view(len(rows), width)
