"""Tokenizer facts: BOS, the token that ends a caption, padding, prompts and truncation."""

import pytest
import torch

from lavis_evlgen.models.language.tokenizer import TextEncoder, pad_rows
from tests.tiny import tiny_tokenizer

NEWLINE = "\u010a"  # how byte-level tokenizers write "\n"


@pytest.fixture(scope="module")
def opt():
    return TextEncoder(tiny_tokenizer(bos="</s>"), "opt", 320)


@pytest.fixture(scope="module")
def llama():
    return TextEncoder(tiny_tokenizer(), "llama", 320)


def test_opt_starts_with_its_eos_and_ends_with_a_newline(opt):
    tokenizer = opt.tokenizer
    assert opt.bos_id == tokenizer.convert_tokens_to_ids("</s>")
    assert opt.end_id == tokenizer.convert_tokens_to_ids(NEWLINE) != opt.bos_id
    assert opt.pad_id == tokenizer.convert_tokens_to_ids("<pad>")
    ids, labels = opt.caption("", "a dog", 32)
    assert ids == labels == tokenizer.encode("a dog\n", add_special_tokens=False)


def test_llama_starts_with_bos_and_ends_with_eos(llama):
    assert (llama.bos_id, llama.end_id) == (0, 2)
    assert llama.pad_id == llama.end_id  # no [PAD] in this vocabulary: any id serves, padding is masked


def test_an_unknown_family_believes_its_tokenizer():
    text = TextEncoder(tiny_tokenizer(bos=None), "another", 320)
    assert (text.bos_id, text.end_id, text.pad_id) == (None, 2, 1)


def test_padding_outside_the_embedding_table_is_not_used():
    assert TextEncoder(tiny_tokenizer(), "another", 1).pad_id == 2


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ValueError, match="tokenizer of another has no EOS token"):
        TextEncoder(tiny_tokenizer(eos=None), "another", 320)


def test_an_end_of_several_tokens_is_refused():
    with pytest.raises(ValueError, match="'<|endoftext|>' is .* tokens"):
        TextEncoder(tiny_tokenizer(), "qwen2", 320)


@pytest.mark.parametrize("prompt", ["a photo of", "a photo of "])
def test_the_prompt_is_unlabelled(opt, prompt):
    ids, labels = opt.caption(prompt, "two cats", 32)
    n = len(opt.encode("a photo of"))
    assert opt.tokenizer.decode(ids) == "a photo of two cats\n"
    assert labels == [-100] * n + ids[n:]
    assert n < len(ids)


def test_a_prompt_that_the_processor_put_there_is_not_doubled(opt):
    assert opt.caption("a photo of ", "a photo of two cats", 32) == opt.caption("a photo of", "two cats", 32)


def test_truncation_drops_the_end_token(opt):
    whole, _ = opt.caption("", "two cats sleep on a wooden table", 100)
    assert whole[-1] == opt.end_id
    ids, labels = opt.caption("", "two cats sleep on a wooden table", len(whole) - 1)
    assert ids == labels == whole[:-1] and opt.end_id not in ids
    assert opt.caption("", "two cats sleep on a wooden table", len(whole))[0] == whole
    assert len(opt.caption("a photo of", "two cats", 2)[1]) == 2


def test_decoding_stops_at_the_end_and_skips_special_tokens(opt):
    tail = [opt.end_id] + opt.encode("never seen")
    rows = [opt.encode(" a dog") + tail, [2] + opt.encode("two cats") + tail]
    assert opt.decode(pad_rows(rows, opt.pad_id, "right")) == ["a dog", "two cats"]
    assert opt.decode(torch.tensor([opt.encode("a dog")])) == ["a dog"]


def test_padding_of_rows():
    rows = [[1, 2, 3], [], [4]]
    assert pad_rows(rows, 0, "left").tolist() == [[1, 2, 3], [0, 0, 0], [0, 0, 4]]
    assert pad_rows(rows, 9, "right").tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]]
    assert pad_rows([[], []], 0, "left").shape == (2, 0)
    assert pad_rows([[], []], 0, "left").dtype == torch.long
