"""Texts of a picture that share its visual prompt: the loss and all gradients are those of each text alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from lavis_evlgen.models.activation_checkpointing import recompute
from lavis_evlgen.models.compile import stack_of
from lavis_evlgen.models.language import sequences
from lavis_evlgen.models.language.llm_train import Lora
from lavis_evlgen.models.language.model import LanguageModel
from lavis_evlgen.models.language.packing import TextRows, checked_counts
from lavis_evlgen.models.language.prompt_attention import prefix_mask
from tests.models.test_prompt_attention import BOS, LLMS, language_model, visual
from tests.tiny import pictures, tiny_evlgen, tiny_opt, tiny_tokenizer

COUNTS = [1, 3, 2]
TEXTS = ["a red square", "two cats sleep on a wooden table", "dog", "a dog", "grass", "a blue circle and a dog"]
PROMPTS = ["a photo of", "", "Question: what color is the square? Short answer:", "", "a photo of", ""]
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 0]])


def alone(lm, tokens, texts, prompts, counts, mask=None):
    """Each text in a call of its own: sums (N,), tokens (N,)."""
    pictures = [picture for picture, count in enumerate(counts) for _ in range(count)]
    found = []
    for picture, text, prompt in zip(pictures, texts, prompts, strict=True):
        own = tokens[picture : picture + 1]
        if mask is not None:
            own = own[:, mask[picture].bool()]
        found.append(lm.loss(own, [text], [prompt]))
    return tuple(torch.cat(each) for each in zip(*found, strict=True))


def gradients(sums, *of):
    return torch.autograd.grad((sums * torch.arange(1, len(sums) + 1)).sum(), of)


@LLMS
@BOS
@pytest.mark.parametrize("kind", ["causal", "visual", "prefix"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "ragged"])
def test_a_packed_row_is_its_texts_one_by_one(llm, bos, kind, mask):
    """Prompts differ between texts, counts between pictures, and visual prompts in length."""
    lm, tokens = language_model(llm, bos, kind), visual(3).requires_grad_()
    expected, count = alone(lm, tokens, TEXTS, PROMPTS, COUNTS, mask)
    found, tokens_of = lm.loss(tokens, TEXTS, PROMPTS, mask, COUNTS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert tokens_of.tolist() == count.tolist()
    torch.testing.assert_close(gradients(found, tokens), gradients(expected, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bos", ["after", "before"])
@pytest.mark.parametrize("training", ["full", Lora(rank=2)], ids=["full", "lora"])
def test_weights_of_the_language_model_get_the_same_gradients(bos, training):
    tokenizer = tiny_tokenizer(bos="</s>")
    lm, tokens = LanguageModel(tiny_opt(), tokenizer, bos, 64, llm_train=training), visual(3)
    weights = dict(lm.named_parameters())
    for name, weight in weights.items():
        if ".lora_B." in name:  # 0 at first: no gradient would reach the other half
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    trained = [weight for weight in weights.values() if weight.requires_grad]
    recompute(stack_of(lm))  # gradient checkpointing keeps mask and positions
    found, _ = lm.loss(tokens, TEXTS, PROMPTS, None, COUNTS)
    expected, _ = alone(lm, tokens, TEXTS, PROMPTS, COUNTS)
    pairs = list(zip(gradients(found, *trained), gradients(expected, *trained), strict=True))
    assert len(pairs) > 5 and sum(other.abs().max() > 1e-3 for _, other in pairs) > 0.8 * len(pairs)
    for ours, other in pairs:
        assert (ours - other).abs().max() < 1e-5 * max(1.0, other.abs().max().item())


LMS = {llm: language_model(llm, "after" if llm == "opt" else "before", "visual") for llm in ("llama", "opt", "qwen2")}


@settings(max_examples=40, deadline=None)
@given(st.data())
@torch.no_grad()
def test_any_counts_and_lengths(data):
    lm = LMS[data.draw(st.sampled_from(sorted(LMS)))]
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    size = {"min_size": sum(counts), "max_size": sum(counts)}
    texts = data.draw(st.lists(st.sampled_from([*TEXTS, "", "word " * 40]), **size))  # the last is cut
    prompts = data.draw(st.lists(st.sampled_from(PROMPTS), **size))
    tokens = visual(len(counts), length=data.draw(st.integers(1, 4)))
    expected, count = alone(lm, tokens, texts, prompts, counts)
    found, tokens_of = lm.loss(tokens, texts, prompts, None, counts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert tokens_of.tolist() == count.tolist()


@LLMS
@torch.no_grad()
def test_a_text_does_not_see_another(llm):
    """The other texts' losses stay as they are, bit for bit, when one is exchanged for another of its length."""
    lm, tokens = language_model(llm), visual(2)
    texts, counts = ["a red square", "a dog", "a blue circle", "dog on grass"], [3, 1]
    before, _ = lm.loss(tokens, texts, [""] * 4, None, counts)
    same_length = next(
        word for word in ("grass dog", "cats sleep", "red dog", "a cat", "table", "zz")
        if len(lm.text.encode(word)) == len(lm.text.encode(texts[1]))
    )  # fmt: skip
    after, _ = lm.loss(tokens, [texts[0], same_length, *texts[2:]], [""] * 4, None, counts)
    assert after[1] != before[1] and torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    longer, _ = lm.loss(tokens, [texts[0], "two cats sleep on a wooden table", *texts[2:]], [""] * 4, None, counts)
    torch.testing.assert_close(longer[[0, 2, 3]], before[[0, 2, 3]], rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_mask_of_segments_is_its_definition(data):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))

    def table(values):
        return torch.tensor(data.draw(st.lists(st.lists(values, min_size=length, max_size=length),
                                               min_size=batch, max_size=batch)))  # fmt: skip

    members, real, segments = table(st.booleans()), table(st.booleans()), table(st.integers(0, 2))
    mask = prefix_mask(members, real, torch.float32, segments)
    assert mask.shape == (batch, 1, length, length)
    for b in range(batch):
        for i in range(length):
            for j in range(length):
                before = j <= i or (members[b, i] and members[b, j])
                shared = segments[b, j] == 0 or segments[b, i] == segments[b, j]
                allowed = i == j or (real[b, j] and before and shared)
                assert mask[b, 0, i, j] == (0 if allowed else torch.finfo(torch.float32).min)


def test_one_text_each_is_what_it_was():
    """Bit for bit, and without a hook: attention stays fused."""
    lm, tokens = language_model("llama", "after", "causal"), visual(3)
    for ours, other in zip(lm.loss(tokens, TEXTS[:3], PROMPTS[:3], MASK, [1, 1, 1]),
                           lm.loss(tokens, TEXTS[:3], PROMPTS[:3], MASK), strict=True):  # fmt: skip
        assert torch.equal(ours, other)
    assert not lm.llm.get_decoder()._forward_pre_hooks
    with torch.autocast("cpu", torch.bfloat16):  # as in a training step
        lm.check_packing()
    lm.check_packing()
    assert len(lm.llm.get_decoder()._forward_pre_hooks) == 1
    assert torch.equal(ours, lm.loss(tokens, TEXTS[:3], PROMPTS[:3], MASK)[1])


@pytest.mark.parametrize("counts", [[1, 3, 3], [6], [0, 3, 3], [1, 1, 1]])
def test_counts_of_other_texts_are_refused(counts):
    with pytest.raises(ValueError, match="texts_per_image: .* for 3 pictures and 6 texts"):
        language_model().loss(visual(3), TEXTS, PROMPTS, None, counts)
    assert checked_counts([1, 1], 2, 2) is checked_counts(None, 2, 5) is None


def test_a_prompt_without_room_is_refused_as_before():
    lm = language_model()
    with pytest.raises(ValueError, match="max_txt_len=64 has room"):
        lm.loss(visual(1), TEXTS[:2], ["", "word " * 60], None, [2])


def test_a_language_model_that_would_let_texts_see_each_other_is_refused():
    torch.manual_seed(0)
    neo = GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=330, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
    )).eval()  # fmt: skip
    bloom = BloomForCausalLM(BloomConfig(vocab_size=330, hidden_size=32, n_layer=2, n_head=2)).eval()
    for llm in (neo, bloom):
        lm = LanguageModel(llm, tiny_tokenizer())
        assert not lm.packs()
        words = f"cannot share its visual prompt in {type(llm).__name__}: .*texts_per_image=1"
        with pytest.raises(ValueError, match=words):
            lm.loss(visual(1), TEXTS[:2], ["", ""], None, [2])
        assert lm.loss(visual(1), TEXTS[:1], [""], None, [1])[0].isfinite().all()


@torch.no_grad()
def test_a_window_counts_a_text_alone():
    """A mask of ours stands in the place of the window's, and a text behind the front fits into it."""
    lm = language_model("mistral", "after", "causal", sliding_window=20)
    tokens, texts = visual(1), ["a red square", "a dog", "a blue circle", "dog"]
    found, _ = lm.loss(tokens, texts, [""] * 4, None, [4])
    torch.testing.assert_close(found, alone(lm, tokens, texts, [""] * 4, [4])[0], rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="texts_per_image: .* last 20 tokens only.* texts_per_image=1"):
        lm.loss(tokens, ["a dog", "word " * 10], ["", ""], None, [2])


def test_training_pads_rows_for_a_compiler(monkeypatch):
    lm, tokens, widths = language_model("llama", "after", "causal").train(), visual(3), []
    plain, _ = lm.loss(tokens, TEXTS, PROMPTS, None, COUNTS)
    lm.length_multiple = 8
    body = sequences.Sequences.body
    monkeypatch.setattr(sequences.Sequences, "body", lambda self, embeds, mask=None: (
        widths.append(embeds.shape[1]), body(self, embeds, mask))[1])  # fmt: skip
    padded, _ = lm.loss(tokens, TEXTS, PROMPTS, None, COUNTS)
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-4)
    assert len(widths) == 1 and widths[0] % (8 * sequences.PACKED) == 0


@torch.no_grad()
def test_half_precision_packs():
    lm = language_model("llama", "after", "visual")
    lm.llm.bfloat16()
    found, _ = lm.loss(visual(3), TEXTS, PROMPTS, None, COUNTS)
    expected, _ = alone(lm, visual(3), TEXTS, PROMPTS, COUNTS)
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.3)


@torch.no_grad()
def test_a_copy_has_a_hook_of_its_own():
    lm, tokens = language_model("opt", "after", "causal"), visual(3)
    expected, _ = lm.loss(tokens, TEXTS, PROMPTS, None, COUNTS)
    twin = copy.deepcopy(lm)
    twin.llm.get_input_embeddings().weight.mul_(1.5)
    assert not torch.equal(twin.loss(tokens, TEXTS, PROMPTS, None, COUNTS)[0], expected)
    assert torch.equal(lm.loss(tokens, TEXTS, PROMPTS, None, COUNTS)[0], expected)


def test_rows_of_texts():
    rows = TextRows([[5, 6], [7], [8, 9, 10]], [2, 1])
    front = torch.tensor([[1, 1], [1, 0]])
    segments, positions = rows.segments_and_positions(front)
    assert rows.ids == [[5, 6, 7], [8, 9, 10]]
    assert segments.tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 1]]
    assert positions.tolist() == [[0, 1, 2, 3, 2], [0, 0, 1, 2, 3]]
    hidden = torch.arange(10.0).view(2, 5, 1)
    found, labels = rows.of_each_text(hidden, front, [[5, 6], [7], [8, 9, 10]])
    assert found[..., 0].tolist() == [[1, 2, 3, 0], [1, 4, 0, 0], [5, 7, 8, 9]]
    assert labels.tolist() == [[-100, 5, 6, -100], [-100, 7, -100, -100], [-100, 8, 9, 10]]


def test_a_model_trains_on_pictures_with_several_texts():
    """The loss and every gradient are those of a batch in which the picture stands once for each text."""
    model, samples = tiny_evlgen("opt"), {"text_input": TEXTS, "prompt": PROMPTS}
    images = pictures(3)
    each = images.repeat_interleave(torch.tensor(COUNTS), 0)
    for prompts in ({}, {"prompt": "a photo of"}, {"prompt": PROMPTS[:1] + [""] * 5}):
        texts = {"text_input": TEXTS, **prompts}
        found = model({"image": images, "texts_per_image": COUNTS, **texts})
        found["loss"].backward()
        ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        expected = model({"image": each, **texts})
        expected["loss"].backward()
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-5)
        assert found["loss_tokens"] == expected["loss_tokens"]
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-5)
        model.zero_grad()
    with pytest.raises(ValueError, match="2 prompts for 6 pictures or texts"):
        model({"image": images, "texts_per_image": COUNTS, **samples, "prompt": ["", ""]})
    model.check_packing()


def test_conversations_of_a_picture_have_a_row_each():
    model = tiny_evlgen(max_txt_len=64)
    lm = model.language_model
    lm.chat_template = "plain"

    def conversation(question, answer):
        return [{"role": "user", "content": f"<image> {question}"}, {"role": "assistant", "content": answer}]

    said = [conversation(*pair) for pair in (("what?", "a dog"), ("which color?", "red"), ("where?", "on the grass"))]
    tokens, mask = visual(2), MASK[:2]
    found = lm.conversation_loss(tokens, said, mask, [2, 1])
    repeats = torch.tensor([2, 1])
    expected = lm.conversation_loss(tokens.repeat_interleave(repeats, 0), said, mask.repeat_interleave(repeats, 0))
    for ours, other in zip(found, expected, strict=True):
        assert torch.equal(ours, other)
    loss = model({"image": pictures(2), "conversations": said, "texts_per_image": [2, 1]})["loss"]
    torch.testing.assert_close(loss, model({"image": pictures(2).repeat_interleave(repeats, 0),
                                            "conversations": said})["loss"])  # fmt: skip


@LLMS
@BOS
@pytest.mark.parametrize("kind", ["causal", "visual", "prefix"])
def test_log_probs_of_drawn_captions_share_the_prompt(llm, bos, kind):
    lm, tokens = language_model(llm, bos, kind), visual(2).requires_grad_()
    sampled = [[7, 9, 30, 4], [8], [12, 13], [5, 6, 7], [9, 10], [11, 5]]
    prompts, repeats = ["a photo of"] * 3 + [""] * 3, torch.tensor([3, 3])
    expected = lm.log_probs(tokens.repeat_interleave(repeats, 0), sampled, prompts, MASK[[1] * 3 + [2] * 3], 0.7)
    found = lm.log_probs(tokens, sampled, prompts, MASK[1:], 0.7, [3, 3])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-4)
    assert found[1].tolist() == expected[1].tolist()
    torch.testing.assert_close(gradients(found[0], tokens), gradients(expected[0], tokens), rtol=1e-4, atol=1e-4)
