"""How the frames of a clip meet behind the ViT: the ways of `frame_pooling`, and the modules that two of them train.

Those two follow models that the paper compares with (EVLGen, section 4.2), in the style of, on this project's parts:
docs/video.md says what differs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavis_evlgen.models.connectors.base import Connector, VisualPrompt
from lavis_evlgen.models.connectors.qformer import NUM_QUERY_TOKEN, QFormerConnector
from lavis_evlgen.nn import MergeMap

POOLINGS = {
    "mean": "frames' ViT features averaged, then one pass of the connector (released)",
    "concat": "each frame through the connector, the prompts one after the other",
    "connector_mean": "each frame through the connector, the prompts averaged",
    "temporal_qformer": "each frame through the connector, then a Q-Former over all of their tokens, which know their "
    "frame (in the style of Video-LLaMA)",
    "temporal_queries": "as mean, and behind its tokens those of learned queries that attend to all frames' ViT tokens "
    "(in the style of VideoChat)",
}
LAYERS = 2  # of the temporal Q-Former, as in Video-LLaMA
TEMPORAL_QUERIES = 64  # as in VideoChat, beside its 32 others


def concatenated(prompt: VisualPrompt, frames: int) -> VisualPrompt:
    """Prompts of single frames (B T, L', D) -> (B, T L', D), frame after frame; mask and source likewise."""
    mask = None if prompt.mask is None else prompt.mask.unflatten(0, (-1, frames)).flatten(1, 2)
    tokens = prompt.tokens.unflatten(0, (-1, frames)).flatten(1, 2)
    if prompt.source is None:
        return VisualPrompt(tokens, mask)
    slots = prompt.source.num_slots
    slot = prompt.source.slot.unflatten(0, (-1, frames))  # (B, T, L)
    first = slots * slot.new_tensor(range(frames))[:, None]  # of each frame's slots
    return VisualPrompt(tokens, mask, MergeMap((slot + first).flatten(1, 2), slots * frames))


def averaged(prompt: VisualPrompt, frames: int) -> VisualPrompt:
    """Prompts of single frames (B T, L', D) -> their mean (B, L', D); raises ValueError where there is none."""
    _one_length(prompt, "connector_mean")
    if prompt.source is not None:
        raise ValueError("frame_pooling: a token of connector_mean stands for other patches in each frame: no source")
    return VisualPrompt(prompt.tokens.unflatten(0, (-1, frames)).mean(1))


def _one_length(prompt: VisualPrompt, pooling: str):
    if prompt.mask is not None:
        raise ValueError(f"frame_pooling: {pooling} needs prompts of one length; take mean or concat")


def q_former(connector: Connector, input_width: int, queries: int, dropout: float | None) -> QFormerConnector:
    """LAVIS's Q-Former as wide as the connector, random, of LAYERS layers that all attend to what is given.

    dropout: None for BERT's 0.1.
    """
    width, sizes = connector.width, connector.sizes or {}
    heads = sizes.get("num_heads") or max(width // 64, 1)
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return QFormerConnector(
        input_width, queries, cross_attention_freq=1, hidden_size=width, num_hidden_layers=LAYERS,
        num_attention_heads=heads, intermediate_size=sizes.get("intermediate_size") or 4 * width,
        **({} if dropout is None else dict.fromkeys(dropouts, dropout)),
    )  # fmt: skip


class TemporalQFormer(nn.Module):
    """Connector tokens of each frame (B T, L', D_c) -> (B, 32, D_c), in the style of Video-LLaMA (Zhang et al. 2023).

    A learned embedding of a frame's place is added to its tokens, then queries attend to the tokens of all frames.
    """

    def __init__(self, connector: Connector, num_frames: int, dropout: float | None = None):
        super().__init__()
        self.num_output_tokens = NUM_QUERY_TOKEN
        self.positions = nn.Embedding(num_frames, connector.width)
        self.q_former = q_former(connector, connector.width, NUM_QUERY_TOKEN, dropout)

    def forward(self, prompt: VisualPrompt, frames: int) -> VisualPrompt:
        """There is no source map: a query reads every token. Raises ValueError for prompts of different length."""
        _one_length(prompt, "temporal_qformer")
        place = self.positions.weight[:frames, None]  # (T, 1, D_c)
        tokens = prompt.tokens.unflatten(0, (-1, frames)) + place  # (B, T, L', D_c)
        return self.q_former(tokens.flatten(1, 2))


class TemporalQueries(nn.Module):
    """ViT tokens of all frames (B, T, L, D_v), and the prompt (B, L', D_c) of their mean -> (B, L' + 64, D_c).

    In the style of VideoChat (Li et al. 2023): learned queries that attend to the tokens of all frames at once. They
    see a set: the order of frames shows only where the ViT's own tokens tell it (`temporal_positions`).
    """

    def __init__(self, connector: Connector, input_width: int, dropout: float | None = None):
        super().__init__()
        self.num_output_tokens = connector.num_output_tokens + TEMPORAL_QUERIES
        self.q_former = q_former(connector, input_width, TEMPORAL_QUERIES, dropout)

    def forward(self, tokens: Tensor, prompt: VisualPrompt) -> VisualPrompt:
        """There is no source map: a query reads every patch. Raises ValueError for prompts of different length."""
        _one_length(prompt, "temporal_queries")
        temporal = self.q_former(tokens.flatten(1, 2)).tokens  # (B, 64, D_c)
        return VisualPrompt(torch.cat([prompt.tokens, temporal], 1))
