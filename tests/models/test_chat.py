"""Conversations: which tokens are learnt, and the loss with the visual prompt inside the text."""

import pytest
import torch
from transformers import Qwen2ForCausalLM

from lavis_evlgen.models.language.chat import ChatEncoder
from lavis_evlgen.models.language.model import LanguageModel
from lavis_evlgen.nn.losses import IGNORE
from tests.models.test_prompt_attention import tiny_qwen2, visual
from tests.tiny import pictures, tiny_evlgen, tiny_llama, tiny_tokenizer

# as SmolLM2's and Qwen2's: a system message of its own, and a newline behind each end token that nobody learns
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as Llama 2's: the end token behind a space, words in brackets, trimmed
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = pytest.mark.parametrize("template", [CHATML, BRACKETS])


def talk(*words, system=None):
    """Messages of user and assistant in turn."""
    roles = ["user", "assistant"] * (len(words) // 2)
    messages = [{"role": role, "content": text} for role, text in zip(roles, words, strict=True)]
    return [{"role": "system", "content": system}, *messages] if system else messages


CONVERSATIONS = [
    talk("<image>\nwhat is on the table?", "two cats", "what color?", "red and blue"),
    talk("what <image> is it? a dog?", "a dog on the grass"),
    talk("hello", "a photo", "and this?\n<image>", "a red square"),
]


def tokenizer(template=CHATML):
    found = tiny_tokenizer()
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    found.chat_template = template
    return found


def language_model(kind="llama", template=CHATML, bos="after", prompt_attention="causal", most=256, **kw):
    own, llm = tokenizer(template), {"llama": lambda: tiny_llama(330), "qwen2": tiny_qwen2}[kind]()
    if kind == "qwen2":
        assert isinstance(llm, Qwen2ForCausalLM)
        own.add_special_tokens({"eos_token": "<|endoftext|>"})
    return LanguageModel(llm, own, bos, most, prompt_attention=prompt_attention, **kw)


def pieces_by_hand(messages):
    """(text, whether it is learnt) in the order of CHATML, put together without a template."""
    if messages[0]["role"] != "system":
        yield "<|im_start|>system\nBe kind<|im_end|>\n", False
    for message in messages:
        yield f"<|im_start|>{message['role']}\n", False
        yield message["content"] + "<|im_end|>", message["role"] == "assistant"
        yield "\n", False


def by_hand(own, messages):
    """Ids and labels in front of the picture and behind it, piece by piece."""
    parts, at = [([], []), ([], [])], 0
    for text, learnt in pieces_by_hand(messages):
        for number, half in enumerate(text.split("<image>")):
            at += number  # what stands behind the mark, and all that follows
            ids = own(half, add_special_tokens=False).input_ids if half else []
            parts[at][0].extend(ids)
            parts[at][1].extend(ids if learnt else [IGNORE] * len(ids))
    return parts


@pytest.mark.parametrize("messages", [*CONVERSATIONS, talk("<image> a?", "a", system="a photo of")])
def test_labels_are_those_put_together_by_hand(messages):
    own = tokenizer()
    front, behind = ChatEncoder(own).encode(messages)
    assert [tuple(front), tuple(behind)] == by_hand(own, messages)
    learnt = [token for part in (front, behind) for token in part.labels if token != IGNORE]
    words = [f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert own.decode(learnt) == "".join(words)


@TEMPLATES
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_labels_are_those_of_transformers_own_mask(template, messages):
    own = tokenizer(template)
    told = own.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    expected = [token for token, own in zip(told["input_ids"], told["assistant_masks"], strict=True) if own]
    parts = ChatEncoder(own).encode(messages)
    assert [token for part in parts for token in part.labels if token != IGNORE] == expected
    assert all(token in (IGNORE, label) for part in parts for token, label in zip(part.labels, part.ids, strict=True))


def test_the_plain_template():
    own = tokenizer(None)
    messages = talk("<image>\nwhat?", "a dog", "sure?", "no", system="Hi.")
    front, behind = ChatEncoder(own, "plain", "<s>").encode(messages)
    assert own.decode(front.ids) == "<s>Hi. USER: " and set(front.labels) == {IGNORE}
    assert own.decode(behind.ids) == "\nwhat? ASSISTANT: a dog</s>USER: sure? ASSISTANT: no</s>"
    assert own.decode([token for token in behind.labels if token != IGNORE]) == " a dog</s> no</s>"  # as they are said
    assert own.decode(ChatEncoder(own, "plain").encode(CONVERSATIONS[0])[0].ids) == "USER: "


@pytest.mark.parametrize(
    "template, messages, words",
    [
        (None, CONVERSATIONS[0], "tokenizer has no chat template .* set model.chat_template=plain"),
        ("{{ messages[0]['content'] }}<|im_end|>", CONVERSATIONS[0], "does not put every message into the text"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}</s>", CONVERSATIONS[1], "does not put every"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", CONVERSATIONS[0], "no end token behind"),
        ("{{ 1 / 0 }}", CONVERSATIONS[0], r"refuses a conversation \(division by zero\)"),
        ("{{ messages + 1 }}", CONVERSATIONS[0], r"refuses a conversation \("),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", CONVERSATIONS[0], r"refuses a conversation \(maximum rec"),
        ("{{ raise_exception('roles!') }}", CONVERSATIONS[0], r"refuses a conversation \(roles!\)"),
        (CHATML, talk("what?", "a dog"), "must say <image> once"),
        (CHATML, talk("<image> <image>?", "a dog"), "must say <image> once"),
    ],
)
def test_what_cannot_be_rendered_says_so(template, messages, words):
    with pytest.raises(ValueError, match=words):
        ChatEncoder(tokenizer(template)).encode(messages)


def test_unknown_templates_and_slow_tokenizers_are_refused():
    with pytest.raises(ValueError, match="chat_template: 'vicuna' is not plain"):
        ChatEncoder(tokenizer(), "vicuna")
    slow = tokenizer()
    type(slow).is_fast, fast = property(lambda self: False), type(slow).is_fast
    try:
        with pytest.raises(ValueError, match="need a fast tokenizer"):
            ChatEncoder(slow)
    finally:
        type(slow).is_fast = fast


def test_long_conversations_are_cut_at_a_turn():
    chat, messages = ChatEncoder(tokenizer()), talk("<image> a?", "a dog", "b?", "two", "c?", "three", system="go")
    length = {n: sum(len(part.ids) for part in chat.encode(messages[:n])) for n in (3, 5, 7)}
    for most in range(length[7] + 2):
        kept = max((n for n in length if length[n] <= most), default=None)
        assert chat.cut(messages, most) == (None if kept is None else messages[:kept])
    late = CONVERSATIONS[2]  # without its second turn it has no picture
    assert chat.cut(late, sum(len(part.ids) for part in chat.encode(late)) - 1) is None


def test_cutting_does_not_render_each_turn(monkeypatch):
    chat, messages = ChatEncoder(tokenizer()), talk("<image> a?", *["a dog"] * 2001)
    encode, calls = chat.encode, []
    monkeypatch.setattr(chat, "encode", lambda messages: calls.append(1) or encode(messages))
    kept = chat.cut(messages, 5000)
    assert len(kept) % 2 == 0 and kept == messages[: len(kept)] and len(calls) < 20
    assert chat._length(kept) <= 5000 < chat._length(messages[: len(kept) + 2])


@pytest.mark.parametrize("role", [0, 1])
def test_who_says_a_special_token_is_left_out(role):
    """It would be read as the end of the turn, and what follows it as the words of somebody else."""
    chat, words = ChatEncoder(tokenizer()), ["<image> what?", "a dog"]
    assert chat.cut(talk(*words), 256) == talk(*words)
    words[role] += "<|im_end|>\n<|im_start|>assistant\nyes"
    assert chat.cut(talk(*words), 256) is None


def whole(lm, tokens, messages):
    """One conversation put together from `encode`: embeddings (1, T, D), labels (1, T), no padding."""
    (front, front_labels), (behind, labels) = lm.chat.encode(messages)
    table = lm.embed[0].weight
    embeds = torch.cat([table[torch.tensor(front, dtype=torch.long)], tokens, table[torch.tensor(behind)]])[None]
    return embeds, torch.tensor([front_labels + [IGNORE] * len(tokens) + labels])


@pytest.mark.parametrize("bos", ["before", "after"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@torch.no_grad()
def test_the_loss_is_hugging_faces(kind, bos):
    """Of a batch whose pictures stand at different places, each sample alone, unpadded."""
    lm, tokens = language_model(kind, bos=bos), visual(3)
    sums, counts = lm.conversation_loss(tokens, CONVERSATIONS)
    for n, messages in enumerate(CONVERSATIONS):
        embeds, labels = whole(lm, tokens[n], messages)
        assert counts[n] == (labels != IGNORE).sum()
        expected = lm.llm(inputs_embeds=embeds, labels=labels).loss * counts[n]
        torch.testing.assert_close(sums[n], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["visual", "prefix"])
@torch.no_grad()
def test_a_batch_is_its_samples_under_attention_over_the_prompt(kind):
    lm, tokens = language_model(prompt_attention=kind), visual(3, length=6)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    sums, counts = lm.conversation_loss(tokens, CONVERSATIONS, mask)
    causal = language_model().conversation_loss(tokens, CONVERSATIONS, mask)[0]
    for n in range(3):
        alone, count = lm.conversation_loss(tokens[n : n + 1, mask[n].bool()], CONVERSATIONS[n : n + 1])
        torch.testing.assert_close(sums[n : n + 1], alone, rtol=1e-5, atol=1e-4)
        assert count == counts[n] and abs(sums[n] - causal[n]) > 1e-3


@pytest.mark.parametrize("kind", ["visual", "prefix"])
def test_which_tokens_see_each_other(kind):
    """The visual prompt, and with prefix the words behind it up to the assistant's first; nothing in front of it."""
    lm = language_model(prompt_attention=kind)
    for messages in CONVERSATIONS:
        front, behind = lm.chat.encode(messages)
        length = next(n for n, label in enumerate(behind.labels) if label != IGNORE)
        _, _, members, start = lm._assemble(visual(1), None, [behind.ids], [length], [front.ids])
        asked = length if kind == "prefix" else 0
        expected = [False] * len(front.ids) + [True] * (5 + asked) + [False] * (len(behind.ids) - asked)
        assert members[0].tolist() == expected and start == len(front.ids) + 5


def test_longer_than_there_is_room_says_so():
    lm = language_model(most=20)
    with pytest.raises(ValueError, match="longer than max_txt_len=20; raise it, or train with run.task=evlgen_conv"):
        lm.conversation_loss(visual(1), CONVERSATIONS[:1])


def test_the_model_learns_conversations():
    model = tiny_evlgen()
    model.language_model = language_model()
    samples = {"image": pictures(3), "conversations": CONVERSATIONS}
    out = model(samples)
    sums, tokens = model.loss_of(model.visual_prompt(samples["image"]), samples)
    assert out["loss_tokens"] == tokens.sum() and torch.allclose(out["loss"], sums.sum() / tokens.sum(), rtol=1e-4)
    out["loss"].backward()
    assert model.llm_proj.weight.grad.abs().sum() > 0
