"""The loss is Hugging Face's own; generation does not depend on caches, batches or padding."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from lavis_evlgen.models.language.model import LanguageModel
from tests.tiny import pictures, tiny_language_model, tiny_llama, tiny_opt, tiny_tokenizer
from tests.tiny_blip2 import lavis_blip2_opt

KINDS = pytest.mark.parametrize("kind", ["llama", "opt"])
BOS = pytest.mark.parametrize("bos", ["before", "after"])
TEXTS = ["a red square", "two cats sleep on a wooden table", "dog"]
PROMPTS = ["a photo of", "", "Question: what color is the square? Short answer:"]


def soft_prompts(batch, seed=0, length=5):
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed))


def by_hand(lm, visual, prompt, text=None):
    """One sample put together from the description: embeddings (T, D) and labels (T), no padding."""
    tokenizer, table = lm.text.tokenizer, lm.llm.get_input_embeddings().weight
    bos = {"llama": "<s>", "opt": "</s>"}[lm.llm.config.model_type]
    end = {"llama": "</s>", "opt": "\u010a"}[lm.llm.config.model_type]  # GPT-2's byte alphabet: a newline
    bos_id, end_id = tokenizer.convert_tokens_to_ids([bos, end])
    assert bos_id != end_id and 3 not in (bos_id, end_id)  # 3: <unk>
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False) if prompt else []
    if text is None:
        ids = prompt_ids
    else:
        whole = f"{prompt} {text}" if prompt else text
        ids = tokenizer.encode(whole, add_special_tokens=False) + [end_id]
    labels = [-100] * len(prompt_ids) + ids[len(prompt_ids) :]
    word_embeddings = [table[i] for i in ids]
    before, after = ([table[bos_id]], []) if lm.bos == "before" else ([], [table[bos_id]])
    embeds = torch.stack(before + list(visual) + after + word_embeddings)
    learns_bos = lm.llm.config.model_type == "opt" and lm.bos == "after" and not prompt
    return embeds, torch.tensor([-100] * len(visual) + [bos_id if learns_bos else -100] + labels)


@pytest.mark.parametrize("prompt", ["", "a photo of"])
@torch.no_grad()
def test_the_loss_is_that_of_lavis_blip2(prompt, tmp_path, monkeypatch):
    """Blip2OPT trains on the BOS behind the visual prompt where no text prompt follows, and so does EVLGen's OPT."""
    lavis = lavis_blip2_opt(tmp_path, monkeypatch)
    lavis.prompt, prompts = prompt, []
    lavis.prompt_length = lavis.opt_tokenizer(prompt, return_tensors="pt").attention_mask.sum(1)
    lavis.opt_proj.register_forward_hook(lambda module, args, output: prompts.append(output))
    texts = [f"{prompt} {text}".strip() for text in TEXTS]
    expected = lavis({"image": pictures(3), "text_input": texts})["loss"].item()
    llm = tiny_opt()
    llm.load_state_dict(lavis.opt_model.state_dict())
    lm = LanguageModel(llm, lavis.opt_tokenizer)
    sums, tokens = lm.loss(prompts[0], texts, [prompt] * 3)
    assert (sums.sum() / tokens.sum()).item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_label_bos():
    """One more label, of the last visual token's prediction; never of a BOS in front, nor of what was sampled."""
    visual = soft_prompts(2)

    def losses(kind, prompts=("", ""), bos="after", **kw):
        lm = tiny_language_model(kind, bos)
        return LanguageModel(lm.llm, lm.text.tokenizer, bos, **kw).loss(visual, TEXTS[:2], list(prompts))

    for kind, released in (("opt", True), ("llama", False)):
        with_bos, without = losses(kind, label_bos=True), losses(kind, label_bos=False)
        assert (with_bos[1] - without[1]).tolist() == [1, 1] and (with_bos[0] > without[0]).all()
        for asked, as_released in zip(losses(kind), with_bos if released else without, strict=True):
            assert torch.equal(asked, as_released)
        # a prompt hides it, sample by sample
        mixed = losses(kind, ("a photo of", ""), label_bos=True)[1]
        assert (mixed - losses(kind, ("a photo of", ""), label_bos=False)[1]).tolist() == [0, 1]
        assert torch.equal(losses(kind, bos="before")[1], without[1])
    lm, ids = tiny_language_model("opt"), [[5, 6, 7], [8, 9]]
    assert lm.log_probs(visual, ids, ["", ""])[1].tolist() == [3, 2]
    own, log_probs = lm.token_log_probs(visual[:1], TEXTS[0])
    assert own == lm.text.caption("", TEXTS[0], 32)[0] and len(log_probs) == len(own)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label_bos": "yes"}, "label_bos: 'yes' is not true or false"),
        ({"label_bos": True, "bos": "before"}, "label_bos: true needs a BOS .* bos=before puts it in front"),
        ({"bos_token": "<bos>"}, "bos_token: '<bos>' is no token of this tokenizer; .* own \\('<s>'\\)"),
        ({"bos_token": 2}, "bos_token: 2 is no token"),
    ],
)
def test_what_is_no_bos_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(tiny_llama(), tiny_tokenizer(), **changes)


@torch.no_grad()
def test_the_released_vicuna_starts_with_its_end():
    """Its tokenizer is made with bos_token='</s>', id 2."""
    released = LanguageModel(tiny_llama(), tiny_tokenizer(), bos_token="</s>")
    own, visual = tiny_language_model(), soft_prompts(2)
    assert (own.text.bos_id, released.text.bos_id, released.text.end_id) == (0, 2, 2)
    again = LanguageModel(tiny_llama(), tiny_tokenizer(bos="</s>"))
    decoding = {"max_new_tokens": 6, "do_sample": False}
    loss, tokens = released.loss(visual, TEXTS[:2], ["", ""])
    assert torch.equal(loss, again.loss(visual, TEXTS[:2], ["", ""])[0])
    assert not torch.allclose(loss, own.loss(visual, TEXTS[:2], ["", ""])[0], rtol=1e-3)
    assert tokens.tolist() == own.loss(visual, TEXTS[:2], ["", ""])[1].tolist()
    assert released.generate(visual, ["", ""], **decoding) == again.generate(visual, ["", ""], **decoding)


@KINDS
@BOS
@torch.no_grad()
def test_the_loss_is_hugging_faces(kind, bos):
    lm, visual = tiny_language_model(kind, bos), soft_prompts(3)
    sums, tokens = lm.loss(visual, TEXTS, PROMPTS)
    for i in range(3):
        embeds, labels = by_hand(lm, visual[i], PROMPTS[i], TEXTS[i])
        expected = lm.llm(inputs_embeds=embeds[None], labels=labels[None]).loss.item()
        assert tokens[i].item() == (labels != -100).sum()
        assert sums[i].item() / tokens[i].item() == pytest.approx(expected, rel=1e-5)


@KINDS
@BOS
@torch.no_grad()
def test_the_loss_of_a_batch_is_that_of_its_samples(kind, bos):
    lm, visual = tiny_language_model(kind, bos), soft_prompts(3)
    sums, tokens = lm.loss(visual, TEXTS, PROMPTS)
    for i in range(3):
        alone = lm.loss(visual[i : i + 1], TEXTS[i : i + 1], PROMPTS[i : i + 1])
        torch.testing.assert_close(sums[i : i + 1], alone[0], rtol=1e-5, atol=1e-5)
        assert tokens[i].item() == alone[1].item()


@KINDS
@BOS
@pytest.mark.parametrize("prompts", [["", ""], ["a photo of", ""]])
@torch.no_grad()
def test_loss_and_generation_ignore_masked_visual_tokens(kind, bos, prompts):
    lm, visual = tiny_language_model(kind, bos), soft_prompts(2, length=6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    sums, tokens = lm.loss(visual, TEXTS[:2], prompts, mask)
    texts = lm.generate(visual, prompts, mask, max_new_tokens=6, do_sample=False)
    for i, length in enumerate((6, 3)):
        short = visual[i : i + 1, :length]
        alone, count = lm.loss(short, TEXTS[i : i + 1], prompts[i : i + 1])
        assert sums[i].item() == pytest.approx(alone.item(), rel=1e-5)
        assert tokens[i].item() == count.item()
        assert lm.generate(short, prompts[i : i + 1], max_new_tokens=6, do_sample=False) == [texts[i]]


@KINDS
def test_gradients_reach_the_visual_prompt_and_nothing_else(kind):
    lm, visual = tiny_language_model(kind).train(), soft_prompts(2).requires_grad_()
    lm.loss(visual, TEXTS[:2], ["", ""])[0].sum().backward()
    assert (visual.grad.abs().amax(-1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in lm.parameters())
    assert not any(module.training for module in lm.llm.modules())


@torch.no_grad()
def greedy_without_cache(lm, visual, prompt, max_new, min_new):
    """Ids of one sample: the whole sequence anew for every token, alone, without padding."""
    embeds, _ = by_hand(lm, visual, prompt)
    ids = []
    while len(ids) < max_new:
        logits = lm.llm(inputs_embeds=embeds[None], use_cache=False).logits[0, -1]
        if len(ids) < min_new:
            logits[lm.text.end_id] = -torch.inf
        ids.append(logits.argmax().item())
        if ids[-1] == lm.text.end_id:
            break
        embeds = torch.cat([embeds, lm.llm.get_input_embeddings().weight[ids[-1]][None]])
    return ids


@KINDS
@BOS
def test_generation_equals_one_by_one_without_a_cache(kind, bos):
    lm, visual = tiny_language_model(kind, bos), soft_prompts(3)
    texts = lm.generate(visual, PROMPTS, max_new_tokens=8, min_new_tokens=2, do_sample=False)
    for i in range(3):
        ids = greedy_without_cache(lm, visual[i], PROMPTS[i], 8, 2)
        assert texts[i] == lm.text.decode(torch.tensor([ids]))[0] != ""
        alone = lm.generate(
            visual[i : i + 1], [PROMPTS[i]], max_new_tokens=8, min_new_tokens=2, do_sample=False
        )
        assert alone == [texts[i]]
    assert len(set(texts)) == 3


@KINDS
@BOS
@torch.no_grad()
def test_beam_search_is_hugging_faces(kind, bos):
    lm, visual = tiny_language_model(kind, bos), soft_prompts(3)
    decoding = {"num_beams": 3, "max_new_tokens": 7, "length_penalty": 0.5, "do_sample": False}
    texts = lm.generate(visual, PROMPTS, num_return_sequences=2, **decoding)
    rows = [by_hand(lm, visual[i], PROMPTS[i])[0] for i in range(3)]
    longest = max(map(len, rows))
    embeds, mask = torch.zeros(3, longest, 32), torch.zeros(3, longest, dtype=torch.long)
    for i, row in enumerate(rows):
        embeds[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    ids = lm.llm.generate(
        inputs_embeds=embeds, attention_mask=mask, num_return_sequences=2,
        eos_token_id=lm.text.end_id, pad_token_id=lm.text.pad_id, **decoding,
    )  # fmt: skip
    assert texts == lm.text.decode(ids) and len(texts) == 6
    greedy = lm.generate(visual, PROMPTS, max_new_tokens=7, do_sample=False)
    assert texts[::2] != greedy


@torch.no_grad()
def test_generation_stops_at_the_end_of_a_caption(monkeypatch):
    lm, visual = tiny_language_model("llama"), soft_prompts(1)
    ids = greedy_without_cache(lm, visual[0], "", 8, 8)
    lm.text.end_id = ids[3]  # as if the fourth token ended captions
    decode, seen = lm.text.decode, []
    monkeypatch.setattr(lm.text, "decode", lambda rows: seen.extend(rows.tolist()) or decode(rows))
    text = lm.generate(visual, [""], max_new_tokens=8, do_sample=False)
    end = ids.index(ids[3])
    assert seen == [ids[: end + 1]]
    assert text == [lm.text.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()]


@BOS
@torch.no_grad()
def test_the_longest_text_counts_its_bos(bos):
    lm = tiny_language_model(bos=bos, max_txt_len=6)
    _, tokens = lm.loss(soft_prompts(2), ["dog " * 20, ""], ["", ""])
    assert tokens.tolist() == [5, 1]  # BOS and five tokens; an empty caption still has its end


def test_a_prompt_that_leaves_no_room_for_a_caption_is_refused():
    lm = tiny_language_model(max_txt_len=6)
    with pytest.raises(ValueError, match="prompt: 'dog dog.* tokens, and max_txt_len=6 has room for 5"):
        lm.loss(soft_prompts(1), ["a cat"], ["dog " * 20])


class ScaledLogits(LlamaForCausalLM):
    """A head that does more than a product, as Cohere's and Granite's do."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


def test_a_model_that_scales_its_logits_is_refused():
    with pytest.raises(ValueError, match="ScaledLogits post-processes its logits"):
        LanguageModel(ScaledLogits(tiny_llama().config), tiny_tokenizer())


@pytest.mark.parametrize("soft_cap", [None, 1.0])
def test_gemmas_soft_cap_is_refused(soft_cap):
    config = Gemma2Config(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.3, final_logit_softcapping=soft_cap,
        attn_implementation="eager",
    )  # fmt: skip
    llm = Gemma2ForCausalLM(config).eval()
    if soft_cap is None:
        assert LanguageModel(llm, tiny_tokenizer()).width == 32
    else:
        with pytest.raises(ValueError, match="Gemma2ForCausalLM post-processes"):
            LanguageModel(llm, tiny_tokenizer())


def test_bos_must_be_before_or_after():
    with pytest.raises(ValueError, match="bos: 'never' is not one of before, after"):
        tiny_language_model(bos="never")


@KINDS
@torch.no_grad()
def test_half_precision_is_close(kind):
    lm, visual = tiny_language_model(kind), soft_prompts(3)
    exact, _ = lm.loss(visual, TEXTS, PROMPTS)
    half, _ = tiny_language_model(kind).to(torch.bfloat16).loss(visual, TEXTS, PROMPTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.5)


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("texts", [["a cat", "two dogs on a sofa"], ["a cat", "a dog"]])
def test_the_loss_needs_no_table_of_what_may_be_seen(kind, texts, monkeypatch):
    """transformers makes one where it sees padding, or no mask at all; attention is then not fused on every GPU."""
    model, masks = tiny_language_model(kind), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        masks.append((kwargs.get("attn_mask"), kwargs.get("is_causal")))
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model.loss(torch.randn(2, 3, model.width), texts, ["", ""])
    assert masks and all(mask is None and causal for mask, causal in masks)
