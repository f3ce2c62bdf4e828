"""Captions are drawn from the model's own distribution, by their picture's seed, and their log-probabilities are those
that they were drawn with."""

import functools

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from lavis_evlgen.models.language import model as language
from lavis_evlgen.models.language.gumbel_sampling import GumbelRows, up_to_end
from lavis_evlgen.models.language.model import LanguageModel
from tests.models.test_language import BOS, KINDS, PROMPTS, by_hand, soft_prompts
from tests.models.test_prompt_attention import language_model
from tests.tiny import pictures, tiny_evlgen, tiny_language_model, tiny_tokenizer

SEEDS = [11, 12, 13]


@pytest.fixture
def recorded(monkeypatch):
    """The logits that every step of sampling drew from, (N, V) each."""
    steps = []

    class Recording(GumbelRows):
        def __call__(self, input_ids, scores):
            steps.append(scores.clone())
            return super().__call__(input_ids, scores)

    monkeypatch.setattr(language, "GumbelRows", Recording)
    return steps


def ending(lm, rows):
    return [row[-1] == lm.text.end_id for row in rows]


@KINDS
@BOS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_log_probs_are_those_at_sampling_time(kind, bos, temperature, masked, recorded):
    lm, visual = tiny_language_model(kind, bos), soft_prompts(3, length=6)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 1]]) if masked else None
    how = {"seeds": SEEDS, "num_samples": 6, "temperature": temperature, "max_new_tokens": 5}
    # a token that is drawn often ends captions, so that they end at different places and some not at all
    inside = [token for row in lm.sample(visual, PROMPTS, mask, **how) for token in row[1:4]]
    lm.text.end_id = max(inside, key=inside.count)
    recorded.clear()
    sampled = lm.sample(visual, PROMPTS, mask, **how)
    assert len(sampled) == 18 and len(set(map(len, sampled))) > 1 and {True, False} == set(ending(lm, sampled))
    expected = [
        sum((recorded[t][n] / temperature).log_softmax(0)[token].item() for t, token in enumerate(row))
        for n, row in enumerate(sampled)
    ]
    prompts = [prompt for prompt in PROMPTS for _ in range(6)]
    each = None if mask is None else mask.repeat_interleave(6, 0)
    found, tokens = lm.log_probs(visual.repeat_interleave(6, 0), sampled, prompts, each, temperature)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert tokens.tolist() == [len(row) for row in sampled]  # the end token counts, the padding after it does not


@KINDS
@torch.no_grad()
def test_log_probs_by_hand(kind):
    """One sample put together without our code, scored by a plain forward pass."""
    lm, visual = tiny_language_model(kind), soft_prompts(1)
    ids = [7, 9, 300, lm.text.end_id]
    embeds, _ = by_hand(lm, visual[0], "a photo of")
    table = lm.llm.get_input_embeddings().weight
    logits = lm.llm(inputs_embeds=torch.cat([embeds, table[ids]])[None]).logits[0].log_softmax(-1)
    expected = sum(logits[len(embeds) - 1 + t, token].item() for t, token in enumerate(ids))
    found, _ = lm.log_probs(visual, [ids], ["a photo of "])
    assert found.item() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_draws_follow_the_distribution():
    lm, visual, count = tiny_language_model(), soft_prompts(1), 6_000
    embeds, _ = by_hand(lm, visual[0], "")
    logits = lm.llm(inputs_embeds=embeds[None]).logits[0, -1]
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.6)):
        kept = (logits / temperature).softmax(0)
        if top_p < 1:  # the smallest set of likely tokens that reaches top_p
            order = kept.argsort(descending=True)
            outside = order[1:][kept[order].cumsum(0)[:-1] >= top_p]
            kept[outside] = 0
            kept /= kept.sum()
        sampled = lm.sample(
            visual, [""], seeds=[5], num_samples=count, max_new_tokens=1, temperature=temperature, top_p=top_p
        )
        found = torch.tensor(sampled).flatten().bincount(minlength=len(kept)) / count
        assert ((found - kept).abs() < 5 * (kept * (1 - kept) / count).sqrt() + 1e-9).all()
        assert found[kept == 0].sum() == 0


@KINDS
def test_the_greedy_row_is_greedy_search(kind):
    lm, visual = tiny_language_model(kind), soft_prompts(3)
    rows = lm.sample(visual, PROMPTS, seeds=SEEDS, num_samples=2, greedy=True, max_new_tokens=6)
    expected = lm.generate(visual, PROMPTS, max_new_tokens=6, do_sample=False)
    assert lm.text.decode(torch.tensor([row + [lm.text.end_id] * (6 - len(row)) for row in rows[::3]])) == expected
    drawn = lm.sample(visual, PROMPTS, seeds=SEEDS, num_samples=2, max_new_tokens=6)
    assert drawn == [row for n, row in enumerate(rows) if n % 3]  # and leaves the draws as they are


def test_a_picture_is_drawn_by_its_seed_alone():
    lm, visual = tiny_language_model(), soft_prompts(3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole = lm.sample(visual, [""] * 3, seeds=SEEDS, num_samples=2, max_new_tokens=6)
    assert torch.equal(before, torch.get_rng_state())  # dropout goes on as if nothing had been drawn
    torch.manual_seed(2)
    for n in range(3):
        alone = lm.sample(visual[n : n + 1], [""], seeds=SEEDS[n : n + 1], num_samples=2, max_new_tokens=6)
        assert alone == whole[2 * n : 2 * n + 2]
    assert lm.sample(visual, [""] * 3, seeds=[1, 2, 3], num_samples=2, max_new_tokens=6) != whole
    assert whole[0] != whole[1]


def test_ids_end_with_the_first_end_token():
    assert up_to_end(torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8], [2, 1, 1, 1]]), 2) == [[5, 2], [5, 6, 7, 8], [2]]


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match="must be above 0"):
        tiny_language_model().sample(soft_prompts(1), [""], seeds=[1], **wrong)


def test_the_models_own_prompt_reaches_both_and_gradients_its_trainable_parts():
    model = tiny_evlgen(prompt="a photo of")
    samples = {"image": pictures(2)}
    prompt = model.visual_prompt(samples["image"])
    sampled = model.sample(prompt, samples, seeds=[1, 2], num_samples=3, max_new_tokens=4)
    found, _ = model.log_probs_of(prompt, samples, sampled)
    lm, visual = model.language_model, prompt.tokens.repeat_interleave(3, 0)
    torch.testing.assert_close(found, lm.log_probs(visual, sampled, ["a photo of"] * 6)[0])
    assert not torch.allclose(found, lm.log_probs(visual, sampled, [""] * 6)[0])
    found.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (model.llm_proj.weight, model.ln_vision.weight))
    assert all(p.grad is None for p in model.language_model.parameters())


def test_an_objective_takes_the_place_of_the_loss():
    model, seen = tiny_evlgen(), []
    samples = {"image": pictures(2), "text_input": ["a dog"] * 2}

    def objective(own, prompt, given):
        seen.append((own is model, prompt.tokens.shape[0], given["text_input"]))
        return {"loss": prompt.tokens.sum()}

    assert set(model(samples, objective=objective)) == {"loss"} and seen == [(True, 2, ["a dog"] * 2)]
    assert "loss_tokens" in model(samples)


def repeated(lm, monkeypatch, *args, **how):
    """What Hugging Face's own search draws, which reads the prompt once for each caption."""
    with monkeypatch.context() as patch:
        patch.setattr(language, "cache_key", lambda llm: None)
        return lm.sample(*args, **how)


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=330, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)).eval()


def tiny_bloom():
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=330, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3)
    return BloomForCausalLM(config).eval()


@pytest.mark.parametrize("llm", ["llama", "opt", "qwen2", "mistral", tiny_gpt2, tiny_bloom])
@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_captions_that_share_a_prompt_are_those_of_prompts_of_their_own(llm, attention, monkeypatch):
    """Prompts of different length, visual prompts too; captions end at different places; nucleus and greedy rows."""
    if callable(llm):
        lm = LanguageModel(llm(), tiny_tokenizer(), "before")
    else:
        lm = language_model(llm, "before", attention)
    visual, mask = soft_prompts(3, length=6), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 1, 1]])
    inside = [token for row in lm.sample(visual, PROMPTS, mask, seeds=SEEDS, num_samples=4) for token in row[1:6]]
    lm.text.end_id = max(inside, key=inside.count)
    lengths = set()
    for how in ({"greedy": True}, {"top_p": 0.8, "temperature": 0.7}):
        args = (visual, PROMPTS, mask)
        how = {"seeds": SEEDS, "num_samples": 4, "max_new_tokens": 9, **how}
        found = lm.sample(*args, **how)
        assert found == repeated(lm, monkeypatch, *args, **how)
        lengths |= {len(row) for row in found}
    assert len(lengths) > 1


def test_a_prompt_is_read_once_for_all_its_captions(monkeypatch):
    lm, reads = tiny_language_model(), []
    forward = lm.llm.base_model.forward

    @functools.wraps(forward)  # the signature stays, which says by what name the cache goes
    def counting(**kwargs):
        reads.append(tuple(kwargs.get("inputs_embeds", kwargs.get("input_ids")).shape[:2]))
        return forward(**kwargs)

    monkeypatch.setattr(lm.llm.base_model, "forward", counting)
    lm.sample(soft_prompts(2), ["", ""], seeds=SEEDS[:2], num_samples=5, max_new_tokens=3)
    assert reads[0] == (2, 6) and reads[1:] == [(10, 1), (10, 1)]


def test_a_language_model_that_cannot_share_is_scored_in_rows_of_its_own():
    model = tiny_evlgen()
    assert model.language_model.packs()
    model.language_model = LanguageModel(tiny_bloom(), tiny_tokenizer())
    assert not model.language_model.packs()
    samples = {"image": pictures(2)}
    prompt = model.visual_prompt(samples["image"])
    sampled = model.sample(prompt, samples, seeds=[1, 2], num_samples=3, max_new_tokens=4)
    found, _ = model.log_probs_of(prompt, samples, sampled)
    each = prompt.tokens.repeat_interleave(3, 0)
    torch.testing.assert_close(found, model.language_model.log_probs(each, sampled, [""] * 6)[0])
