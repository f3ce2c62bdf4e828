"""Full attention over the prompt: the mask is its definition, and loss, prefill and cached decoding agree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lavis_evlgen.models.language.model import LanguageModel
from lavis_evlgen.models.language.prompt_attention import PromptAttention, prefix_mask
from tests.tiny import tiny_llama, tiny_opt, tiny_tokenizer

TEXTS = ["a red square", "two cats sleep on a wooden table", "dog"]
PROMPTS = ["a photo of", "", "Question: what color is the square? Short answer:"]
SMALL = {"vocab_size": 330, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip


def tiny_qwen2(**kw):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, **kw)).eval()


def tiny_mistral(**kw):
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, head_dim=16, **kw)).eval()


KINDS_OF_LLM = {"llama": tiny_llama, "opt": tiny_opt, "qwen2": tiny_qwen2, "mistral": tiny_mistral}
LLMS = pytest.mark.parametrize("llm", KINDS_OF_LLM)
BOS = pytest.mark.parametrize("bos", ["before", "after"])
BOTH = pytest.mark.parametrize("kind", ["visual", "prefix"])


def language_model(llm="llama", bos="after", kind="visual", **kw):
    tokenizer = tiny_tokenizer(bos="</s>" if llm == "opt" else "<s>")
    if llm == "qwen2":
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    return LanguageModel(KINDS_OF_LLM[llm](**kw), tokenizer, bos, 64, prompt_attention=kind)


def visual(batch, seed=0, length=5):
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_mask_is_its_definition(data):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    rows = st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch)
    members, real = torch.tensor(data.draw(rows)), torch.tensor(data.draw(rows))
    mask = prefix_mask(members, real, torch.float32).expand(batch, 1, length, length)
    for b in range(batch):
        for i in range(length):
            for j in range(length):
                allowed = i == j or (real[b, j] and (j <= i or (members[b, i] and members[b, j])))
                assert mask[b, 0, i, j] == (0 if allowed else torch.finfo(torch.float32).min)


@LLMS
@BOS
@torch.no_grad()
def test_causal_is_what_it_was(llm, bos):
    """With no visual token more than one, both kinds are causal attention."""
    lm, causal = language_model(llm, bos, "visual"), language_model(llm, bos, "causal")
    one = visual(3, length=1)
    torch.testing.assert_close(lm.loss(one, TEXTS, PROMPTS)[0], causal.loss(one, TEXTS, PROMPTS)[0])
    many = visual(3)
    assert (lm.loss(many, TEXTS, PROMPTS)[0] - causal.loss(many, TEXTS, PROMPTS)[0]).abs().min() > 1e-3


@LLMS
@BOS
@BOTH
@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one(llm, bos, kind):
    """Texts and prompts of different length, and visual prompts of different length by their mask."""
    lm = language_model(llm, bos, kind)
    tokens, mask = visual(3), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0]])
    sums, _ = lm.loss(tokens, TEXTS, PROMPTS, mask)
    for n in range(3):
        alone, _ = lm.loss(tokens[n : n + 1, mask[n].bool()], TEXTS[n : n + 1], PROMPTS[n : n + 1])
        torch.testing.assert_close(sums[n : n + 1], alone, rtol=1e-5, atol=1e-4)


@LLMS
@BOS
@BOTH
@torch.no_grad()
def test_cached_generation_is_the_full_forward_pass(llm, bos, kind):
    """A batch of prompts of different length, padded on the left: each greedy token is the likeliest without cache."""
    lm = language_model(llm, bos, kind)
    tokens = visual(3)
    sampled = lm.sample(tokens, PROMPTS, seeds=[1, 2, 3], greedy=True, num_samples=0, max_new_tokens=6)
    for n, ids in enumerate(sampled):
        known = lm.text.encode(PROMPTS[n])
        for taken in range(len(ids)):  # the full pass over everything so far, no cache
            rows = [known + ids[:taken]]
            embeds, mask, members, _ = lm._assemble(tokens[n : n + 1], None, rows, [len(known)])
            with lm.prompt_attention.within(members):
                logits = lm._head(lm.body(embeds, mask)[:, -1])
            assert logits.argmax().item() == ids[taken]


@LLMS
@BOTH
@torch.no_grad()
def test_beams_of_a_batch_are_beams_of_each_alone(llm, kind):
    lm = language_model(llm, "after", kind)
    tokens = visual(3)
    decoding = {"num_beams": 3, "max_new_tokens": 6, "num_return_sequences": 2}
    together = lm.generate(tokens, PROMPTS, **decoding)
    alone = [text for n in range(3) for text in lm.generate(tokens[n : n + 1], PROMPTS[n : n + 1], **decoding)]
    assert together == alone


@LLMS
@torch.no_grad()
def test_drawn_captions_have_the_log_probabilities_they_were_drawn_with(llm):
    """SCST's two passes agree: what `sample` finds likeliest is what `log_probs` finds likeliest."""
    lm = language_model(llm, "before", "prefix")
    tokens = visual(2)
    greedy = lm.sample(tokens, PROMPTS[:2], seeds=[1, 2], greedy=True, num_samples=0, max_new_tokens=4)
    best, _ = lm.log_probs(tokens, greedy, PROMPTS[:2])
    for n, ids in enumerate(greedy):
        other = [*ids[:-1], (ids[-1] + 1) % 320]
        worse, _ = lm.log_probs(tokens[n : n + 1], [other], PROMPTS[n : n + 1])
        assert worse.item() < best[n].item()


@LLMS
def test_only_the_prompt_is_bidirectional(llm):
    """d hidden / d input is zero where attention may not reach, and not zero where it may."""
    lm = language_model(llm, "after", "prefix")
    ids = lm.text.encode(PROMPTS[0])
    embeds, mask, members, _ = lm._assemble(visual(1), None, [ids + lm.text.encode(TEXTS[0])], [len(ids)])
    embeds = embeds.detach().requires_grad_()
    with lm.prompt_attention.within(members):
        hidden = lm.body(embeds, mask)
    n = embeds.shape[1]
    reach = torch.stack([
        torch.autograd.grad(hidden[0, i].square().sum(), embeds, retain_graph=True)[0][0].abs().sum(-1) > 0
        for i in range(n)
    ])  # fmt: skip
    inside = members[0]
    bos = [False] * (lm.text.bos_id is not None)
    assert inside.tolist() == [True] * 5 + bos + [True] * len(ids) + [False] * (n - 5 - len(bos) - len(ids))
    positions = torch.arange(n)
    one_layer = (positions <= positions.unsqueeze(1)) | (inside.unsqueeze(1) & inside)
    assert torch.equal(reach, one_layer.float() @ one_layer.float() > 0)  # two layers


def test_padding_has_finite_gradients():
    lm = language_model("llama", "after", "prefix")
    tokens = visual(3).requires_grad_()
    sums, _ = lm.loss(tokens, TEXTS, PROMPTS, torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 1, 1, 1, 0]]))
    sums.sum().backward()
    assert tokens.grad.isfinite().all() and tokens.grad[1, 0].abs().sum() == 0


def test_a_language_model_that_would_ignore_it_is_refused():
    torch.manual_seed(0)
    neo = GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=320, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
    )).eval()  # fmt: skip
    with pytest.raises(ValueError, match="visual .* GPTNeoForCausalLM: .*; set prompt_attention=causal"):
        PromptAttention(neo, "visual")
    bloom = BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=2)).eval()
    with pytest.raises(ValueError, match="BloomForCausalLM"):
        PromptAttention(bloom, "prefix")
    with pytest.raises(ValueError, match="'full' is not one of causal, visual, prefix"):
        PromptAttention(tiny_llama(), "full")


@torch.no_grad()
def test_a_window_shorter_than_the_sequence_is_refused():
    lm = language_model("mistral", "after", "visual", sliding_window=8)
    with pytest.raises(ValueError, match="last 8 tokens only"):
        lm.loss(visual(1), TEXTS[1:2], [""])
