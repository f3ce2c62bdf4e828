"""The gradient of SCST is the gradient of the expected reward, its draws are functions of seeds, and it learns."""

import itertools
import logging
import types

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerFast

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets.facts import DatasetFacts
from lavis_evlgen.evaluation.cider_d import CaptionReward
from lavis_evlgen.models.connectors import VisualPrompt
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.language.model import LanguageModel
from lavis_evlgen.runners.optim import adamw
from lavis_evlgen.runners.step import TrainingStep
from lavis_evlgen.tasks.scst import ScstTask, _references
from tests.tiny import pictures, tiny_connector, tiny_llama, tiny_vision

WORDS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "red": 4, "dog": 5}
END = WORDS["</s>"]


def few_words() -> LanguageModel:
    """A language model of six tokens, so that all its captions can be enumerated."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    return LanguageModel(tiny_llama(vocab_size=len(WORDS)), fast)


def all_captions(longest: int) -> list[list[int]]:
    """Every row that sampling can give: ended, or cut off at `longest`."""
    rows, open_ = [], [[]]
    for n in range(longest):
        longer = [row + [token] for row in open_ for token in range(len(WORDS))]
        rows += [row for row in longer if row[-1] == END or n + 1 == longest]
        open_ = [row for row in longer if row[-1] != END]
    return rows


class Policy:
    """EVLGen's side of SCST without pictures: the visual prompts are given."""

    def __init__(self, language_model, rows=None):
        self.language_model, self.rows = language_model, rows

    def sample(self, prompt, samples, **how):
        if self.rows is not None:
            return self.rows
        return self.language_model.sample(prompt.tokens, [""] * len(prompt.tokens), **how)

    log_probs_of = EVLGen.log_probs_of

    def _prompts(self, samples, batch):
        return [""] * batch


def reward_of(key, caption, ended=True):
    """Some number for every caption, its end included, far from 0 on average."""
    words = caption.split()
    return 3.0 + 0.7 * len(words) + (words[:1] == ["dog"]) - 1.3 * ended * ("red" in words), len(words)


def task(**run) -> ScstTask:
    run = {"metrics": ["CIDEr"], "tokenizer": "simple", "max_len": 3, **run}
    model = OmegaConf.create({"pretrained": "checkpoint.pth"})
    found = ScstTask.setup_task(types.SimpleNamespace(run_cfg=OmegaConf.create(run), model_cfg=model))
    found.reward = reward_of
    return found


def prompt_of(visual, copies: int):
    """`copies` pictures with the same prompt (P, D), as a leaf: each gets the gradient of its own term."""
    return visual.detach().repeat(copies, 1, 1).requires_grad_()


def terms(scst, lm, leaf, rows=None):
    """(B, P, D): the gradient of each picture's own mean over its captions."""
    out = scst.objective(0)(Policy(lm, rows), VisualPrompt(leaf), {"image_id": list(range(len(leaf)))})
    return torch.autograd.grad(out["loss"], leaf)[0] * len(leaf)


def expected_gradient(lm, visual, longest):
    """(log-probabilities of all captions, gradient of minus the expected reward), by enumeration."""
    rows = all_captions(longest)
    leaf = visual.clone().requires_grad_()
    log_probs, _ = lm.log_probs(leaf.expand(len(rows), -1, -1), rows, [""] * len(rows))
    captions = lm.text.decode(rows)
    rewards = torch.tensor([reward_of(0, text, row[-1] == END)[0] for text, row in zip(captions, rows, strict=True)])
    (gradient,) = torch.autograd.grad(-(log_probs.exp() * rewards).sum(), leaf)
    return log_probs.detach(), gradient


@pytest.fixture(scope="module")
def lm():
    return few_words()


@pytest.fixture(scope="module")
def visual():
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(3))


def test_captions_are_all_enumerated(lm, visual):
    log_probs, _ = expected_gradient(lm, visual, 3)
    assert len(log_probs) == 1 + 5 + 25 * 6 and log_probs.exp().sum().item() == pytest.approx(1.0, abs=1e-4)


def test_in_expectation_the_gradient_is_that_of_the_expected_reward(lm, visual):
    """Greedy baseline: every caption once, weighted by its probability."""
    log_probs, expected = expected_gradient(lm, visual, 3)
    greedy = lm.sample(visual[None], [""], seeds=[0], num_samples=1, greedy=True, max_new_tokens=3)[0]
    rows = [row for own in all_captions(3) for row in (greedy, own)]
    found = terms(task(), lm, prompt_of(visual, len(log_probs)), rows)
    torch.testing.assert_close((log_probs.exp()[:, None, None] * found).sum(0), expected, rtol=1e-3, atol=1e-4)
    assert expected.abs().max() > 0.01


def test_so_it_is_with_the_other_samples_as_baseline(lm, visual):
    """Leave one out: every pair of captions, weighted by its probability."""
    log_probs, expected = expected_gradient(lm, visual, 2)
    pairs = list(itertools.product(range(len(log_probs)), repeat=2))
    captions = all_captions(2)
    rows = [captions[n] for pair in pairs for n in pair]
    scst = task(baseline="leave_one_out", num_samples=2, max_len=2)
    found = terms(scst, lm, prompt_of(visual, len(pairs)), rows)
    weights = torch.stack([log_probs[a] + log_probs[b] for a, b in pairs]).exp()
    torch.testing.assert_close((weights[:, None, None] * found).sum(0), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("run", [{}, {"baseline": "leave_one_out", "num_samples": 3}], ids=["greedy", "leave_one_out"])
def test_drawn_captions_give_that_gradient_on_average(lm, visual, run):
    _, expected = expected_gradient(lm, visual, 3)
    found = terms(task(**run), lm, prompt_of(visual, 1000))
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() < 5 * error + 1e-6).all()
    assert expected.abs().max() > 10 * error.mean()  # the check is not of noise


def test_the_other_samples_are_the_baseline():
    policy = task(baseline="leave_one_out", num_samples=3).policy
    found = policy.advantages(torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]))
    assert found.tolist() == [[1 - 4.0, 2 - 3.5, 6 - 1.5], [0, 0, 0]]
    assert task(num_samples=2).policy.advantages(torch.tensor([[1.0, 2.0, 0.5]])).tolist() == [[1.0, -0.5]]


def test_ranks_and_accumulation_draw_the_same(monkeypatch):
    policy = task().policy
    whole = policy.seeds(3, 8)
    assert len(set(whole)) == 8 and policy.seeds(4, 8)[0] not in whole
    assert policy.seeds(6, 4) + policy.seeds(7, 4) == whole  # two micro-steps of half the batch
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        halves += policy.seeds(3, 4)
    assert halves == whole
    assert task(seed=1).policy.seeds(3, 4) != halves[:4]


REFERENCES = {"a": ["red dog"], "b": ["dog red"]}
WISHED = {"a": "dog", "b": "red"}


def wishes(key, caption, ended=True):
    """How often the word that this picture is to be called by is said."""
    return float(caption.split().count(WISHED[key])), len(caption.split())


def captioner() -> EVLGen:
    torch.manual_seed(0)
    vision = tiny_vision()
    return EVLGen(vision, tiny_connector(vision), few_words(), prompt_scale=2.0).train()


@pytest.mark.parametrize("run", [{"num_samples": 8}, {"baseline": "leave_one_out", "num_samples": 8}])
def test_it_learns_what_is_rewarded(run):
    """Two pictures, each with a word of its own to be said; at most three of it fit in."""
    scst, model = task(**run), captioner()
    scst.reward = wishes
    samples = {"image": pictures(2), "image_id": list(REFERENCES), "text_input": [""] * 2}
    step = TrainingStep(
        model, adamw(model, 1e-2, 0.0, 0.9), torch.device("cpu"), OmegaConf.create({}), objective=scst.objective
    )
    shown = [step(iter([samples]), n)[0] for n in range(50)]
    first, last = (sum(row["reward"].item() for row in rows) / 5 for rows in (shown[:5], shown[-5:]))
    assert first < 1.5 < 2 < last and shown[-1]["entropy"] < shown[0]["entropy"]
    assert ("reward_greedy" in shown[0]) == scst.policy.greedy


def test_a_wrapped_model_gets_the_same_gradients(tmp_path):
    """The objective goes through DDP's own forward, without which ranks would not average."""
    scst, model = task(num_samples=2), captioner()
    samples = {"image": pictures(2), "image_id": ["a", "b"], "text_input": [""] * 2}
    scst.reward = wishes
    model(samples, objective=scst.objective(0))["loss"].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        for _ in range(2):
            wrapped.zero_grad()
            wrapped(samples, objective=scst.objective(0))["loss"].backward()
    finally:
        dist.destroy_process_group()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient)


def test_an_error_of_the_reward_is_not_lost(lm, visual):
    def broken(*_):
        raise KeyError("no such picture")

    scst = task()
    scst.reward = broken
    with pytest.raises(KeyError, match="no such picture"):
        terms(scst, lm, prompt_of(visual, 1))


def test_short_captions_are_warned_of_once(caplog):
    scst = task()
    scst.reward = CaptionReward({"a": ["one two three four"], "b": ["five six seven eight"]}, "simple")
    with caplog.at_level(logging.WARNING):
        scst.watch({"step": 1, "length": 2.1})
        assert not caplog.records
        scst.watch({"step": 2, "length": 1.9})
        scst.watch({"step": 3, "length": 1.0})
    assert [record.getMessage()[:65] for record in caplog.records] == [
        "captions have become short: 1.9 words at step 2, where references"
    ]


@pytest.mark.parametrize(
    "run, says",
    [
        ({"baseline": "gredy"}, "run.baseline: 'gredy' is not one of greedy, leave_one_out; did you mean greedy"),
        ({"baseline": "leave_one_out", "num_samples": 1}, "set run.num_samples >= 2"),
        ({"end_mark": 1}, "run.end_mark: 1 is not true or false"),
    ],
)
def test_settings_without_sense_are_refused(run, says):
    with pytest.raises(ConfigError, match=says):
        task(**run)


def test_training_data_must_be_one_set_with_all_its_captions():
    own = DatasetFacts()
    own.references = REFERENCES
    assert _references({"one": {"train": own}, "other": {"val": own}}) is REFERENCES
    with pytest.raises(ConfigError, match="of one training set, not of 2"):
        _references({"one": {"train": own}, "other": {"train": own}})
    with pytest.raises(ConfigError, match="ccs14m has no references"):
        _references({"ccs14m": {"train": DatasetFacts()}})
