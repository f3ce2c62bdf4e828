"""Whether a language model obeys masks and positions of ours, tried by random changes of its input.

Each check perturbs tokens at random (LayerNorm hides a constant shift) and sees which hidden states move: what may not
see the change must stay as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from lavis_evlgen.models.compile import eager

# what a model that takes no mask of ours may raise
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


@torch.no_grad()
@eager()
def check_prompt_attention(llm: nn.Module, within: Callable) -> str:
    """Why tokens of a prompt cannot see each other in both directions; empty where they can, or nothing is computed.

    within: PromptAttention.within.
    """
    if not _computes(llm):
        return ""
    noise = _noise(llm, 3, 6)  # (3, T, D)
    embeds = noise[:1].repeat(3, 1, 1)
    embeds[1, 2], embeds[2, 4] = noise[1, 2], noise[2, 4]  # the last visual token; a token of the text
    try:
        with within(_members(embeds)):
            moved = _moved(_hidden(llm, embeds))  # (3, T)
    except _REFUSALS as error:
        return _no_mask(error)
    if not moved[1, 0]:
        return "its tokens go on seeing only what stands before them"
    return "its visual prompt would see the caption" if moved[2, :4].any() else ""


@torch.no_grad()
@eager()
def check_segments(llm: nn.Module, within: Callable) -> str:
    """Why texts in one row cannot share the front in this language model; empty where they can.

    within: PromptAttention.within. A front of three tokens, which see each other, a text of two and one of three.
    """
    if not _computes(llm):
        return ""
    noise = _noise(llm, 4, 8)  # (4, T, D)
    embeds = noise[:1].repeat(4, 1, 1)
    for row, changed in ((1, 2), (2, 3), (3, 5)):  # the front's last token; the first of either text
        embeds[row, changed] = noise[row, changed]
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]], device=embeds.device)
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5]], device=embeds.device)
    in_a_row = torch.arange(8, device=embeds.device).unsqueeze(0)
    second = [0, 1, 2, 5, 6, 7]  # the front with the second text
    none = torch.zeros_like(segments)
    try:
        with within(_members(embeds), segments.repeat(4, 1), positions.repeat(4, 1)):
            hidden = _hidden(llm, embeds)
        with within(_members(embeds[:1]), segments, in_a_row):
            elsewhere = _hidden(llm, embeds[:1])
        with within(_members(embeds[:1, second]), none[:, second], in_a_row[:, :6]):
            alone = _hidden(llm, embeds[:1, second])
    except _REFUSALS as error:
        return _no_mask(error)
    moved = _moved(hidden)  # (4, T)
    if not moved[1, 0]:  # of row 1, which saw a change behind it
        return "a mask of its own stays in force beside ours, and may hide the visual prompt from distant texts"
    if not moved[1, 3:].all() or not (moved[2, 4] and moved[3, 6:].all()):
        return "its texts would not see the visual prompt and themselves"
    if moved[2, :3].any() or moved[2, 5:].any() or moved[3, :5].any():
        return "a text would see another"
    if torch.equal(hidden[0, 5:], elsewhere[0, 5:]):
        return "it does not take the positions that it is given"
    apart = (hidden[0, second] - alone[0]).norm() / alone.norm()
    exact = llm.get_input_embeddings().weight.dtype == torch.float32
    return "" if apart < (1e-3 if exact else 0.1) else "a text beside another is not what it is alone"


def _computes(llm: nn.Module) -> bool:
    """Whether there are numbers: not on the meta device, not where operations are only counted."""
    table = llm.get_input_embeddings().weight
    return table.device.type != "meta" and not is_fake(table)


def _noise(llm: nn.Module, rows: int, length: int) -> Tensor:
    """Random embeddings (rows, length, D) of the size of the model's own."""
    table = llm.get_input_embeddings().weight
    noise = torch.randn(rows, length, table.shape[1], generator=torch.Generator().manual_seed(0))
    return (noise * table.float().std().item()).to(table)


def _members(embeds: Tensor) -> Tensor:
    """The first three tokens of each row."""
    members = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    members[:, :3] = True
    return members


def _hidden(llm: nn.Module, embeds: Tensor) -> Tensor:
    """Last hidden states, float32, computed in the format of the weights."""
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    with torch.autocast(embeds.device.type, enabled=False):  # a training step may be what asks first
        return llm.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state.float()


def _moved(hidden: Tensor) -> Tensor:
    """Which states (rows, T) differ from the first row's."""
    return (hidden - hidden[:1]).abs().amax(-1) > 0


def _no_mask(error: Exception) -> str:
    return f"it does not take a mask of its own ({' '.join(str(error).split())[:200]})"
