"""Memory of a training step, counted without a weight in memory: the model's own code runs on tensors without numbers,
and what is alive at each moment is added up. `evlgen estimate`; docs/estimate.md."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lavis_evlgen.models.elastic import divergence
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.tools.cost.meta_models import NothingIsPadded, backward, without_weights
from lavis_evlgen.tools.cost.texts import ONE, Texts

NOT_DRAWN = (None,)  # numbers of visual tokens of a model that draws none
FLOAT, MOMENTS = 4, 8  # bytes per trained number: the weight or its gradient; AdamW's two moments


@dataclass(frozen=True)
class StepMemory:
    """Bytes. working: most that a step holds beside weights and moments: activations, gradients, passing tensors."""

    frozen: int
    trained: int
    moments: int
    working: int

    @property
    def whole(self) -> int:
        return self.frozen + self.trained + self.moments + self.working


def step_memory(
    model: EVLGen, image: tuple[int, ...], text_tokens: int, dtype: torch.dtype | None, accumulated: bool = False,
    texts: Texts = ONE,
) -> StepMemory:
    """Of one optimizer step of a model on the meta device (which it spoils), on micro-batches of shape `image`.

    text_tokens: of each caption, BOS and prompt included, all others supervised; dtype: autocast's, None without;
    accumulated: more micro-batches than one a step, so that gradients are there during the passes. Attention counts as
    the fused kernels of a GPU keep it, also where a processor would keep its probabilities. texts: of each picture.
    Where numbers of visual tokens are drawn, of a micro-batch with the most of them.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), FusedAttention():
        without_weights(model.train())
        with Alive() as alive:
            for value in (*model.parameters(), *model.buffers()):
                alive.add(value)
            weights = alive.now
            most = max(model.token_draws(), key=sum, default=NOT_DRAWN)
            for _ in range(1 + accumulated):
                _passes(model, image, text_tokens, dtype, texts, most)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = weights - FLOAT * trained
    return StepMemory(frozen, FLOAT * trained, MOMENTS * trained, alive.most - weights)


def step_flops(model: EVLGen, image: tuple[int, ...], text_tokens: int, texts: Texts = ONE) -> float:
    """Of forward and backward on one picture or clip, with its texts, of a micro-batch of shape `image`, counted (a MAC
    is two). Where numbers of visual tokens are drawn, the mean over all draws."""
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), NothingIsPadded():
        without_weights(model.train(), torch.float32)
        model.visual_encoder.precision = "fp32"
        draws = model.token_draws() or [NOT_DRAWN]
        with FlopCounterMode(display=False) as counter:
            for budgets in draws:
                _passes(model, image, text_tokens, None, texts, budgets)
    return counter.get_total_flops() / len(draws) / image[0]


def _passes(model: EVLGen, image: tuple[int, ...], text_tokens: int, dtype: torch.dtype | None, texts: Texts, budgets):
    """Forward and backward of one micro-batch as EVLGen's, but which positions are supervised is not read from data.

    budgets: its numbers of visual tokens (ModelFacts.token_draws).
    """
    batch = torch.empty(image)  # held to the end, as the runner holds it
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        seen = model.visual_tokens(batch)
        loss, logits = _text_loss(model, seen, text_tokens, texts, budgets[0])
        for budget in budgets[1:]:
            other, others = _text_loss(model, seen, text_tokens, texts, budget)
            loss = loss + other + divergence(logits, others)
            del others
    del seen, logits
    backward(loss, torch.ones_like(loss))


def _text_loss(
    model: EVLGen, seen: Tensor, text_tokens: int, texts: Texts, budget: int | None
) -> tuple[Tensor, Tensor]:
    """(loss, logits of supervised positions) of what the ViT gave."""
    language, (rows, length, labels) = model.language_model, texts.layout(model, text_tokens)
    condition = None
    if texts.own_prompts:
        seen, rows = seen.repeat_interleave(texts.count, 0), 1
        condition = torch.empty(len(seen), language.width)
    prompt = model.prompt_of(seen, budget=budget, condition=condition).tokens.to(language.dtype)  # (B, L', D_l)
    prompt = prompt.repeat_interleave(rows, 0) if rows > 1 else prompt
    text = torch.empty(len(prompt), length, language.width, dtype=language.dtype)
    hidden = language.body(torch.cat([prompt, text], 1))[:, -labels:].flatten(0, 1)  # (B rows labels, D_l)
    logits = language.llm.get_output_embeddings()(hidden)
    return F.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.long)), logits


class Alive(TorchDispatchMode):
    """Bytes of all storages that operations made and nobody has let go: `now`, and the `most` there ever were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self.add(value)
        return made

    def add(self, value: Tensor):
        """Count the storage of `value` until it is freed; views of one storage count once."""
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.now += size
        self.most = max(self.most, self.now)

    def _gone(self, key: int, size: int):
        self.now -= size
        del self.known[key]


class FusedAttention(NothingIsPadded):
    """Attention keeps what the fused kernels of GPUs keep: queries, keys, values, the result and a number per row.

    On a CPU, attention with dropout falls back to the formula, which keeps its probabilities.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return super().__torch_function__(func, types, args, kwargs)


class _Attention(torch.autograd.Function):
    """Shapes of scaled_dot_product_attention: query (B, H, T, D), key and value (B, H or fewer, S, D)."""

    @staticmethod
    def forward(ctx, query, key, value):
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))
