"""From a picture to its prompt, of any budget of an elastic `tome_r`, and the loss of `draw: sandwich`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from lavis_evlgen.models.connectors import VisualPrompt
from lavis_evlgen.nn import across_picture_share


class VisualPrompts:
    """Of a model with `visual_encoder`, `visual_tokens`, `ln_vision`, `connector` and `project`. A budget is the number
    of tokens that the connector leaves, one of an elastic `tome_r`; None: as the config says."""

    def visual_prompt(
        self, image: Tensor, return_source: bool = False, budget: int | None = None, questions=None, pictures=None
    ) -> VisualPrompt:
        """image (B, 3, H, W), or (B, L, D_v) -> soft prompt of the LLM, tokens (B, L', D_l). EVLGen, eq. 1 and 2.

        questions, pictures: as `asked` (models/questions.py), with model.condition=question; then (N, L', D_l).
        """
        seen, condition = self.asked(self.visual_tokens(image), questions, pictures)
        return self.prompt_of(seen, return_source, budget, condition)

    def connect_seen(
        self, seen: Tensor, return_source: bool = False, budget: int | None = None, condition: Tensor | None = None
    ) -> VisualPrompt:
        """What `visual_tokens` gives -> the connector's tokens (B, L', D_c). condition (B, D_l): as Connector's."""
        more = {} if budget is None else {"budget": budget}  # which other connectors do not know
        return self.connector(self.ln_vision(seen), condition, return_source, seen, **more)

    def prompt_of(
        self, seen: Tensor, return_source: bool = False, budget: int | None = None, condition: Tensor | None = None
    ) -> VisualPrompt:
        """What `visual_tokens` gives -> soft prompt of the LLM, tokens (B, L', D_l)."""
        prompt = self.connect_seen(seen, return_source, budget, condition)  # (B, L', D_c)
        prompt.tokens = self.project(prompt.tokens)  # (B, L', D_l)
        return prompt

    def token_draws(self) -> list[tuple[int, ...]]:
        """ModelFacts.token_draws."""
        return [] if self.connector.budgets is None else self.connector.budgets.draws

    def token_counts(self) -> str:
        """From how many visual tokens to how many of the prompt, for the start-up table."""
        counts = f"{self.visual_encoder.num_tokens} visual -> {self.connector.num_output_tokens} in the prompt"
        return counts + self.mean_words() + self.drawn_words()

    def drawn_words(self) -> str:
        """What `token_draws` are, for the end of a line; nothing where there are none."""
        if (budgets := self.connector.budgets) is None:
            return ""
        *listed, last = map(str, budgets.tokens)
        listed = f"{', '.join(listed)} or {last}" if listed else last
        beside = f"{budgets.largest} and one other of " if budgets.draw == "sandwich" else ""
        return f"; trained with {beside}{listed}"


def sandwich(model, samples: dict, budgets: tuple[int, int], objective=None) -> dict[str, Tensor]:
    """What `EVLGen.forward` returns: CE_largest + CE_other + beta * KL(p_largest || p_other), means over supervised
    tokens in nats, p_largest without a gradient in the KL. The frozen ViT runs once.

    As universally slimmable networks are trained (Yu and Huang 2019, the sandwich rule and inplace distillation).
    Raises ValueError where a task brings another loss, `objective`.
    """
    if objective is not None:
        raise ValueError("tome_r.draw: sandwich has a loss of its own, and so has this task; take draw: one")
    seen, condition = model.asked_in(samples)
    with kept_outputs(model.language_model.llm.get_output_embeddings()) as logits:
        prompts = [model.prompt_of(seen, budget=budget, condition=condition) for budget in budgets]
        (largest, tokens), (other, _) = (model.loss_of(prompt, samples) for prompt in prompts)
    count = tokens.sum()
    terms = {"loss_largest": largest.sum(), "loss_other": other.sum(), "loss_kl": divergence(*logits)}
    terms = {name: nats / count.clamp_min(1) for name, nats in terms.items()}
    loss = terms["loss_largest"] + terms["loss_other"] + model.connector.budgets.beta * terms["loss_kl"]
    share = across_picture_share(prompts[0].tokens)
    return {"loss": loss, "loss_tokens": count, "across_picture_share": share, **terms}


def divergence(said: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(said) || softmax(other)) of logits (N, V), summed over the N rows, in nats, float32: (), with a
    gradient to `other` alone."""
    target = said.detach().float().log_softmax(-1)
    return F.kl_div(other.float().log_softmax(-1), target, reduction="sum", log_target=True)


@contextmanager
def kept_outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """What `module` returns inside, in the order of its calls: of a language model's head, the logits (N, V) of the
    supervised positions (nn/losses.py)."""
    kept: list[Tensor] = []
    hook = module.register_forward_hook(lambda module, given, output: kept.append(output))
    try:
        yield kept
    finally:
        hook.remove()
