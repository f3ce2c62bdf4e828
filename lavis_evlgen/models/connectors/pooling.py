"""Connectors without weights, the floor under every comparison: average pooling, and nothing at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lavis_evlgen.config.keys import Settings, key
from lavis_evlgen.config.limits import LARGEST
from lavis_evlgen.models.connectors.base import Connector, VisualPrompt
from lavis_evlgen.nn import MergeMap


@dataclass(kw_only=True)
class PoolingSettings(Settings):
    num_query_token: int | None = key(
        "tokens that avgpool leaves, as many as the paper's TomeFormer", 29, at_least=1,
        at_most=LARGEST["num_query_token"],
    )  # fmt: skip


class LinearConnector(Connector):
    """Every visual token goes on as it is, (B, L, D_v) -> (B, L, D_v): the LLM's projection is all that maps."""

    def forward(
        self, visual_tokens: Tensor, condition=None, return_source: bool = False, features: Tensor | None = None
    ) -> VisualPrompt:
        batch, count, _ = visual_tokens.shape
        source = MergeMap.identity(batch, count, visual_tokens.device) if return_source else None
        return VisualPrompt(visual_tokens, source=source)


class AveragePooling(Connector):
    """Means over the cells of a grid laid on the patches: (B, L, D_v) -> (B, num_query_token, D_v).

    Leading tokens that are no patches ([CLS], registers) stay. Every patch is in exactly one cell; where the grid
    does not divide the side, cells differ by one row or column.
    """

    def __init__(self, width: int, num_tokens: int, protected: int, num_query_token: int):
        super().__init__(width, num_query_token)
        patches, cells = num_tokens - protected, num_query_token - protected
        side = round(patches**0.5)
        if side**2 != patches:
            raise ValueError(f"connector: avgpool needs a square of patches; this ViT gives {patches}")
        rows, columns = grid(cells, side, protected)
        row, column = torch.arange(side) * rows // side, torch.arange(side) * columns // side
        cell = (row[:, None] * columns + column).flatten()  # (s*s,)
        slot = torch.cat([torch.arange(protected), protected + cell])
        self.register_buffer("slot", slot, persistent=False)  # (L,)

    def forward(
        self, visual_tokens: Tensor, condition=None, return_source: bool = False, features: Tensor | None = None
    ) -> VisualPrompt:
        pool = MergeMap(self.slot.expand(len(visual_tokens), -1), self.num_output_tokens)
        return VisualPrompt(pool.merge(visual_tokens), source=pool if return_source else None)

    def noise(self, num_tokens: int, input_width: int) -> Tensor:
        return self.noise_of_groups(num_tokens, input_width)


def grid(cells: int, side: int, protected: int = 0) -> tuple[int, int]:
    """(rows, columns) nearest to each other with rows * columns = cells, none above `side`: 28 = 4 x 7."""
    for rows in range(int(max(cells, 0) ** 0.5), 0, -1):
        if cells % rows == 0 and cells // rows <= side:
            return rows, cells // rows
    known = sorted({protected + a * b for a in range(1, side + 1) for b in range(1, side + 1)})
    near = sorted(sorted(known, key=lambda n: abs(n - cells - protected))[:2])
    raise ValueError(
        f"num_query_token: avgpool cannot leave {cells + protected} tokens of {protected} + {side} x {side}: "
        f"{cells} cells are no grid of at most {side} x {side}; nearest: {', '.join(map(str, near))}"
    )


def build_linear(vision, cfg: dict) -> LinearConnector:
    return LinearConnector(vision.width, vision.num_tokens)


def build_avgpool(vision, cfg: dict) -> AveragePooling:
    tokens = PoolingSettings.read(cfg).num_query_token
    return AveragePooling(vision.width, vision.num_tokens, vision.protected, tokens)
