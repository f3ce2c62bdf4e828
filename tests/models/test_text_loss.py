"""The loss on text that nobody trains on, against transformers' own loss, window by window."""

import hashlib

import pytest
import torch

from lavis_evlgen.models.language.text_loss import WINDOW, held_out_text, text_loss
from tests.tiny import tiny_evlgen, tiny_llama, tiny_tokenizer

TEXT = held_out_text()[:2000]


@pytest.mark.parametrize("bos", ["<s>", None])
def test_it_is_transformers_own_loss(bos):
    tokenizer, llm = tiny_tokenizer(bos=bos), tiny_llama().eval()
    found = text_loss(llm, tokenizer, TEXT)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) > WINDOW  # more than one window
    nats, tokens = 0.0, 0
    for start in range(0, len(ids), WINDOW):
        window = ([] if bos is None else [tokenizer.bos_token_id]) + ids[start : start + WINDOW]
        batch = torch.tensor([window])
        nats += llm(input_ids=batch, labels=batch).loss.item() * (len(window) - 1)
        tokens += len(window) - 1
    assert found["tokens"] == tokens
    assert found["nats_per_token"] == pytest.approx(nats / tokens, abs=1e-5)
    assert found["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()


def test_a_frozen_language_model_forgets_nothing_and_is_not_asked():
    assert tiny_evlgen().text_loss() is None
    learns = tiny_evlgen(llm_train="full").eval()
    before = learns.text_loss()
    with torch.no_grad():
        for parameter in learns.language_model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert learns.text_loss()["nats_per_token"] != before["nats_per_token"]
