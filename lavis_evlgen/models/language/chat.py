"""Conversations about a picture as token ids: a chat template renders them, the assistant's words are the labels.

    front:  <|im_start|>user                  (in front of the visual prompt)
    behind: What is it?<|im_end|>  <|im_start|>assistant  A dog.<|im_end|>
                                                          ^^^^^^^^^^^^^^^^ labels: words and end-of-turn token
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import TemplateError

from lavis_evlgen.datasets.annotations.conversations import IMAGE
from lavis_evlgen.nn.losses import IGNORE

TEMPLATES = ("plain",)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)

# what the code of a template may raise
_OF_TEMPLATES = (TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError,
                 ValueError)  # fmt: skip

Message = dict[str, str]  # {"role": system | user | assistant, "content": ...}, as Hugging Face's templates take them


class Labelled(NamedTuple):
    """Token ids and, for each, its label: itself where it is learnt, else IGNORE."""

    ids: list[int]
    labels: list[int]


class ChatEncoder:
    """Conversations, whose one IMAGE is in a user's message and whose last message is the assistant's, as ids.

    template: None for the tokenizer's own, or plain: `USER: ... ASSISTANT: ...</s>`, as LLaVA's first models were
    trained with. bos_token: the BOS of plain; the tokenizer's own template brings its BOS. Raises ValueError.
    """

    def __init__(self, tokenizer, template: str | None = None, bos_token: str | None = None):
        if template not in (None, *TEMPLATES):
            raise ValueError(f"chat_template: {template!r} is not plain; leave it empty for the tokenizer's own")
        if template is None and not tokenizer.chat_template:
            raise ValueError(
                "this language model's tokenizer has no chat template to render conversations with: set "
                "model.chat_template=plain (USER: ... ASSISTANT: ...), or use an instruction-tuned language model"
            )
        if not tokenizer.is_fast:
            raise ValueError("conversations need a fast tokenizer (tokenizer.json), which says where its tokens stand")
        self.tokenizer = tokenizer
        self.options = {} if template is None else {"chat_template": PLAIN, "bos_token": bos_token or ""}
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        ends = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, ends)) or r"(?!)")

    def encode(self, messages: Sequence[Message]) -> tuple[Labelled, Labelled]:
        """What stands in front of and behind the visual prompt. Raises ValueError."""
        text, spans = self._render(messages)
        at = text.find(IMAGE)
        if at < 0 or text.count(IMAGE) > 1:
            raise ValueError(f"a rendered conversation must say {IMAGE} once, and this one does not: {text!r}")
        behind = at + len(IMAGE)
        return self._encode(text[:at], spans), self._encode(text[behind:], [(a - behind, b - behind) for a, b in spans])

    def cut(self, messages: Sequence[Message], most: int) -> list[Message] | None:
        """The first exchanges (up to an assistant's message) that are at most `most` ids; None where there are none
        with the picture, and where somebody says a special token: it would end or begin a turn."""
        if any(self._special.search(message["content"].replace(IMAGE, "")) for message in messages):
            return None
        if self._length(messages) <= most:
            return list(messages)
        first = next(n for n, message in enumerate(messages) if IMAGE in message["content"])
        ends = [n + 1 for n, message in enumerate(messages) if n > first and message["role"] == "assistant"]
        fitting = bisect_right(ends, most, key=lambda end: self._length(messages[:end]))
        return list(messages[: ends[fitting - 1]]) if fitting else None

    def _length(self, messages: Sequence[Message]) -> int:
        return sum(len(part.ids) for part in self.encode(messages))

    def _encode(self, text: str, spans: list[tuple[int, int]]) -> Labelled:
        """Ids of the text; those that reach into a span (from, to: letters) are labelled."""
        if not text:
            return Labelled([], [])
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learnt = [any(a < end and b > start for start, end in spans) for a, b in found["offset_mapping"]]
        ids = found["input_ids"]
        return Labelled(ids, [token if own else IGNORE for token, own in zip(ids, learnt, strict=True)])

    def _render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where the assistant's words with their end tokens stand in it.

        A second rendering, of marks in the place of the words, says what the template puts between them.
        """
        marks = [f"\x02{number}\x03" for number in range(len(messages))]
        text = self._apply(messages)
        marked = self._apply([{**own, "content": mark} for own, mark in zip(messages, marks, strict=True)])
        between = re.split("\x02\\d+\x03", marked)
        words = [message["content"] for message in messages]
        pieces = [piece for pair in zip(between, words, strict=False) for piece in pair] + between[-1:]
        if re.findall("\x02\\d+\x03", marked) != marks or "".join(pieces) != text:
            raise ValueError(
                "the tokenizer's chat template does not put every message into the text as it stands, so which words "
                "are the assistant's cannot be told; set model.chat_template=plain"
            )
        end = self._special.search(between[-1])
        spans, at = [], 0
        for message, before, after in zip(messages, between, between[1:], strict=False):
            start = at + len(before)
            at = start + len(message["content"])
            if message["role"] == "assistant":
                stops = -1 if end is None else after.find(end[0])
                if stops < 0:
                    raise ValueError(
                        "the tokenizer's chat template puts no end token behind the assistant's words, so the model "
                        "would never learn to stop; set model.chat_template=plain"
                    )
                # a space in front, which most tokenizers join to the word, is learnt with it
                spans.append((start - before.endswith(" "), at + stops + len(end[0])))
        return text, spans

    def _apply(self, messages: Sequence[Message]) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **self.options)
        except _OF_TEMPLATES as error:  # some take no system message, or want the roles in turn
            raise ValueError(f"the chat template refuses a conversation ({error}); see model.chat_template") from None
