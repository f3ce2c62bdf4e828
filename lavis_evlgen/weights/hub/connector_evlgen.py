"""Connectors of an EVLGen model: visual tokens (B, L, D_v) -> (B, L', D_c), for inference.

EVLGen, section 3.2 and appendix C; bipartite soft matching, Bolya et al. 2023.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_evlgen import EvlgenConfig


class LinearConnector(nn.Module):
    """Every visual token goes on as it is."""

    def __init__(self, config: EvlgenConfig):
        super().__init__()

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        return x


class AveragePooling(nn.Module):
    """Means over the cells of a grid of `rows` x `columns`; leading tokens that are no patches stay."""

    def __init__(self, config: EvlgenConfig):
        super().__init__()
        self.rows, self.columns = config.connector["rows"], config.connector["columns"]
        self.protected = config.protected_tokens

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L', D)."""
        first = self.protected
        side = round((x.shape[1] - first) ** 0.5)
        place = torch.arange(side, device=x.device)
        cell = (place * self.rows // side)[:, None] * self.columns + place * self.columns // side  # (side, side)
        slot = torch.cat([torch.arange(first, device=x.device), first + cell.flatten()])  # (L,)
        return means(F.one_hot(slot).T.to(x.dtype).expand(len(x), -1, -1), x)


def means(groups: Tensor, x: Tensor) -> Tensor:
    """Means of the tokens x (B, T, D) in each group; groups (B, T', T): their weights -> (B, T', D)."""
    return groups @ x / groups.sum(-1, keepdim=True)


class TomeFormerConnector(nn.Module):
    """Linear D_v -> D_c, then a BERT that merges similar tokens, between attention and MLP of every layer.

    `groups` (B, T, L) says by 1 and 0 which of the L visual tokens each of the T tokens stands for.
    """

    def __init__(self, config: EvlgenConfig):
        super().__init__()
        own, self.protected = config.connector, config.protected_tokens
        width, eps = own["hidden_size"], own["layer_norm_eps"]
        self.options, self.heads = own, own["num_heads"]
        self.input_proj = nn.Linear(config.vision_width, width)
        embeddings = {
            "position_embeddings": nn.Embedding(own["max_positions"], width),
            "token_type_embeddings": nn.Embedding(2, width), "LayerNorm": nn.LayerNorm(width, eps),
        }  # fmt: skip
        layers = nn.ModuleList(Layer(width, own["intermediate_size"], self.heads, eps) for _ in own["schedule"])
        body = {"embeddings": nn.ModuleDict(embeddings), "encoder": nn.ModuleDict({"layer": layers})}
        self.tomeformer = nn.ModuleDict(body)
        self.skip = Gated(config.vision_width, width, ("proj",)) if own["skip"] == "pooled" else None
        names = ("query", "key", "value", "output")
        self.readout = Gated(config.vision_width, width, names) if own["readout"] == "group" else None

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """x (B, L, D_v); features (B, L, D_v): x before its LayerNorm -> (B, L', D_c)."""
        groups, generator = self._fold(features), torch.Generator().manual_seed(0)
        layers, tables = self.tomeformer["encoder"]["layer"], self.tomeformer["embeddings"]
        positions = tables["position_embeddings"].weight[: x.shape[1]].expand(len(x), -1, -1)  # (B, L, D_c)
        y = self.input_proj(means(groups, x)) + means(groups, positions) + tables["token_type_embeddings"].weight[0]
        y = tables["LayerNorm"](y)
        for layer, r in zip(layers, self.options["schedule"], strict=True):
            sizes = groups.sum(-1)  # (B, T): patches of each token
            keys = layer.mean_keys(y)
            y = layer.attend(y, sizes.log() if self.options["proportional_attention"] else None)
            if r > 0:
                step = self._match(keys, r, generator)
                by_size = self.options["merge_mean"] == "size"
                y, groups = means(step * sizes.unsqueeze(1) if by_size else step, y), step @ groups
            y = layer.output(F.gelu(layer.intermediate["dense"](y)), y)
        if self.skip is not None:
            y = self.skip.proj(means(groups, x)) + self.skip.alpha * y
        return y if self.readout is None else self._read(y, x, groups)

    def _fold(self, features: Tensor) -> Tensor:
        """Groups in front of the first layer, by what the vision model gives: `folds` merges one after another."""
        groups = torch.eye(features.shape[1], device=features.device).expand(len(features), -1, -1)  # (B, L, L)
        generator = torch.Generator().manual_seed(0)
        for r in self.options["folds"]:
            groups = self._match(means(groups, features), r, generator) @ groups
        return groups

    def _match(self, keys: Tensor, r: int, generator: torch.Generator) -> Tensor:
        """The r most similar pairs of T tokens with these keys (B, T, C), as 0/1 weights (B, T - r, T).

        Tokens are split in A and B; each of A points at the most similar one of B, and the r strongest pointers merge.
        The order afterwards: unmerged A, then B. The first `protected` tokens are in A and stay.
        """
        batch, tokens, _ = keys.shape
        r = min(r, (tokens - self.protected) // 2)
        if r <= 0:
            return torch.eye(tokens, device=keys.device).expand(batch, -1, -1)
        set_a, set_b = (each.to(keys.device) for each in self._partition(tokens, generator))
        unit = F.normalize(keys.float(), dim=-1)
        similarity = unit[:, set_a] @ unit[:, set_b].transpose(1, 2)  # (B, A, B)
        similarity[:, : self.protected] = float("-inf")
        strength, partner = similarity.max(-1)  # (B, A)
        merged = torch.zeros_like(partner, dtype=torch.bool).scatter_(1, strength.topk(r, -1).indices, True)
        kept = len(set_a) - r
        slot = torch.empty(batch, tokens, dtype=torch.long, device=keys.device)
        slot[:, set_a] = torch.where(merged, kept + partner, (~merged).cumsum(1) - 1)
        slot[:, set_b] = kept + torch.arange(len(set_b), device=keys.device)
        return F.one_hot(slot, tokens - r).transpose(1, 2).float()

    def _partition(self, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Positions of A, with the protected tokens first, and of B: every other one, or at random."""
        first, places = self.protected, torch.arange(tokens)
        if self.options["partition"] == "random":
            drawn = torch.randperm(tokens - first, generator=generator) + first
            half = (tokens - first + 1) // 2
            return torch.cat([places[:first], drawn[half:].sort().values]), drawn[:half].sort().values
        if first == 0:
            return places[::2], places[1::2]
        return torch.cat([places[:first], places[first + 1 :: 2]]), places[first::2]

    def _read(self, y: Tensor, x: Tensor, groups: Tensor) -> Tensor:
        """Each token y (B, L', D_c) looks once more at the patches x (B, L, D_v) that it stands for."""
        query, key, value = (by_heads(each, self.heads) for each in
                             (self.readout.query(y), self.readout.key(x), self.readout.value(x)))  # fmt: skip
        read = F.scaled_dot_product_attention(query, key, value, groups.bool().unsqueeze(1))  # (B, H, L', d)
        return y + self.readout.alpha * self.readout.output(read.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """Linear layers without biases, of visual tokens (key, value, proj) or the body's, and how much they count."""

    def __init__(self, input_width: int, width: int, names: tuple[str, ...]):
        super().__init__()
        for name in names:
            of_patches = name in ("key", "value", "proj")
            self.add_module(name, nn.Linear(input_width if of_patches else width, width, bias=False))
        self.alpha = nn.Parameter(torch.zeros(1))


def by_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, D) -> (B, H, T, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class AddNorm(nn.Module):
    """BERT's output block: dense, residual, LayerNorm."""

    def __init__(self, inputs: int, width: int, eps: float):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, width), nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class Layer(nn.Module):
    """A BERT layer by BERT's names, in two halves: merging stands between them."""

    def __init__(self, width: int, hidden: int, heads: int, eps: float):
        super().__init__()
        own = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.heads, self.attention = heads, nn.ModuleDict({"self": own, "output": AddNorm(width, width, eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = AddNorm(hidden, width, eps)

    def mean_keys(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> the keys averaged over heads (B, T, d), by the averaged weights."""
        key = self.attention["self"]["key"]
        weight, bias = (each.unflatten(0, (self.heads, -1)).mean(0) for each in (key.weight, key.bias))
        return F.linear(x, weight, bias)

    def attend(self, x: Tensor, log_sizes: Tensor | None) -> Tensor:
        """x (B, T, D); log_sizes (B, T): added to the logits of each key -> (B, T, D)."""
        query, key, value = (by_heads(self.attention["self"][n](x), self.heads) for n in ("query", "key", "value"))
        bias = None if log_sizes is None else log_sizes[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, bias)  # (B, H, T, d)
        return self.attention["output"](mixed.transpose(1, 2).flatten(2), x)
