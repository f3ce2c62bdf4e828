"""What a language model still knows of language: its loss on plain text that no run here trains on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from lavis_evlgen.models.compile import eager

HELD_OUT_TEXT = Path(__file__).resolve().parents[2] / "configs" / "held_out_text.txt"
WINDOW = 256  # tokens that are read at once, each window from its own start


def held_out_text() -> str:
    """Seven paragraphs written for this package: prose, instructions, dialogue, explanations; about 620 words."""
    return HELD_OUT_TEXT.read_text(encoding="utf-8")


@torch.no_grad()
@eager()
def text_loss(llm: nn.Module, tokenizer, text: str) -> dict[str, float | int | str]:
    """Cross-entropy of `text` in nats a token under a causal language model, without any visual prompt.

    The text is read in windows of 256 tokens, each behind the tokenizer's BOS where it has one; the first token of a
    window without a BOS is not predicted. Returns nats_per_token, tokens (predicted ones) and the text's sha256.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    device, sums, count = llm.get_input_embeddings().weight.device, 0.0, 0
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for start in range(0, len(ids), WINDOW):
        window = torch.tensor([bos + ids[start : start + WINDOW]], device=device)  # (1, T)
        if window.shape[1] < 2:
            continue
        logits = llm(input_ids=window).logits.float()  # (1, T, V)
        sums += nn.functional.cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"nats_per_token": sums / count, "tokens": count, "sha256": digest}
