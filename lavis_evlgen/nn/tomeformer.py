"""TomeFormer: a BERT encoder whose layers merge similar tokens between attention and MLP.

Parameter names are those of Hugging Face's BertModel (without word embeddings and pooler), so
bert-base-uncased, MiniLM and released connectors load by name. With no merging it equals BertModel fed with
`inputs_embeds`. EVLGen, section 3.2 and appendix C.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_evlgen.nn.conditioning import Relevance, weighted_mean
from lavis_evlgen.nn.merging import MergeMap, fold, match
from lavis_evlgen.nn.ragged import NONE, UNSET, RaggedMap, RaggedPass, cut
from lavis_evlgen.nn.tomeformer_config import TomeFormerConfig


class Embeddings(nn.Module):
    """Adds learned absolute positions and token type 0 to the visual tokens, then LayerNorm and dropout."""

    def __init__(self, cfg: TomeFormerConfig):
        super().__init__()
        self.position_embeddings = nn.Embedding(cfg.max_positions, cfg.hidden_size)
        self.token_type_embeddings = nn.Embedding(2, cfg.hidden_size)
        self.LayerNorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, source: MergeMap | None = None) -> Tensor:
        """x (B, T', D). source: of the T tokens that x are means of, whose positions are then averaged likewise."""
        count = x.shape[1] if source is None else source.slot.shape[1]
        positions = self.position_embeddings.weight[:count]  # (T, D)
        if source is not None:
            positions = source.merge(positions.expand(len(x), -1, -1))  # (B, T', D)
        return self.dropout(self.LayerNorm(x + positions + self.token_type_embeddings.weight[0]))


class SelfAttention(nn.Module):
    """Multi-head attention, and the keys averaged over heads, which merging compares."""

    def __init__(self, cfg: TomeFormerConfig):
        super().__init__()
        self.num_heads, self.dropout = cfg.num_heads, cfg.dropout
        self.query = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.key = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.value = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    @torch.no_grad()
    def mean_keys(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> the keys averaged over heads (B, T, d), float32 whatever the autocast.

        By the averaged weights, a small product of its own: keys of half precision would merge other pairs in training
        than in evaluation.
        """
        weight = self.key.weight.unflatten(0, (self.num_heads, -1)).mean(0)  # (d, D)
        bias = self.key.bias.unflatten(0, (self.num_heads, -1)).mean(0)  # (d,)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(weight.dtype), weight, bias)

    def forward(self, x: Tensor, log_sizes: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape

        def heads(projected):
            return projected.view(batch, tokens, self.num_heads, -1).transpose(1, 2)  # (B, H, T, d)

        # softmax ignores what all keys share, so the true gradient of this bias is 0; rounding leaves 1e-9 in its
        # place, Adam would make full steps of that, and merging, which compares keys, would follow the noise
        bias = self.key.bias.detach() + 0 * self.key.bias
        key = heads(F.linear(x, self.key.weight, bias))
        logit_bias = None if log_sizes is None else log_sizes[:, None, None, :].to(key.dtype)  # (B, 1, 1, T)
        mixed = F.scaled_dot_product_attention(
            heads(self.query(x)), key, heads(self.value(x)), logit_bias, self.dropout if self.training else 0.0
        )
        return mixed.transpose(1, 2).reshape(batch, tokens, width)


class AddNorm(nn.Module):
    """BERT's output block: dense, dropout, residual, LayerNorm (post-norm)."""

    def __init__(self, inputs: int, cfg: TomeFormerConfig):
        super().__init__()
        self.dense = nn.Linear(inputs, cfg.hidden_size)
        self.LayerNorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Layer(nn.Module):
    """Attention, merge, MLP. `ModuleDict`s only spell BERT's parameter names."""

    def __init__(self, cfg: TomeFormerConfig):
        super().__init__()
        self.cfg = cfg
        attention = {"self": SelfAttention(cfg), "output": AddNorm(cfg.hidden_size, cfg)}
        self.attention = nn.ModuleDict(attention)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(cfg.hidden_size, cfg.intermediate_size)})
        self.output = AddNorm(cfg.intermediate_size, cfg)

    def forward(
        self, x: Tensor, r: int, sizes: Tensor | None, generator, ragged: RaggedPass | None = None,
        relevance: Relevance | None = None,
    ) -> tuple[Tensor, MergeMap | None]:
        log_sizes = sizes.log() if sizes is not None and self.cfg.proportional_attention else None
        if ragged is not None and log_sizes is None:  # the size of padding is 0, its logarithm -inf
            log_sizes = ragged.key_bias()
        keys = self.attention["self"].mean_keys(x) if r > 0 else None
        x = self.attention["output"](self.attention["self"](x, log_sizes), x)  # (B, T, D)
        step = None
        if keys is not None:
            by_size, price = self.cfg.merge_mean == "size", None if relevance is None else relevance.price
            if ragged is None:
                step = match(keys, r, self.cfg.protected, self.cfg.partition, generator, price)
            else:
                step = ragged.match(keys)
            if relevance is None:
                x = step.merge(x, sizes if by_size else None)  # (B, T - r, D)
            else:
                x = weighted_mean(step, x, relevance.weights(by_size))
        return self.output(F.gelu(self.intermediate["dense"](x)), x), step


class TomeFormer(nn.Module):
    """(B, T, D) visual tokens -> (B, T', D) merged tokens, and the source map when asked."""

    def __init__(self, cfg: TomeFormerConfig):
        super().__init__()
        self.cfg = cfg
        self.embeddings = Embeddings(cfg)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(cfg) for _ in range(cfg.num_layers))})
        self.apply(_init_bert)
        if cfg.limits is not None:  # similarity from which on a layer merges, in evaluation
            unset = [UNSET if cfg.limits.merges(n) else NONE for n in range(cfg.num_layers)]
            self.register_buffer("thresholds", torch.tensor(unset))

    def fold(self, features: Tensor, budget: int | None = None, rho: Tensor | None = None) -> list[MergeMap]:
        """Where the T tokens with these features (B, T, C) go in front of the first layer: after 0, 1, ... merges.

        budget, rho (B, T): as `forward`.
        """
        relevance, cfg = None if rho is None else Relevance.of(rho), self.cfg
        prices = None if relevance is None else lambda step: relevance.after(step).price
        return fold(features, cfg.plan(budget)[0], cfg.protected, cfg.partition, self._generator(), prices)

    def forward(
        self, x: Tensor, return_source: bool = False, folded: MergeMap | None = None, budget: int | None = None,
        rho: Tensor | None = None,
    ) -> tuple[Tensor, MergeMap | None]:  # fmt: skip
        """x (B, T, D) -> tokens (B, T', D), source: MergeMap from the T input tokens | None.

        folded: of the T tokens, where x (B, T', D) are already the means of their groups. budget: how many tokens to
        leave, one of an elastic `tome_r`; None: the config's number. rho (B, T): how much each token matters to a
        question (nn/conditioning.py). Raises ValueError.
        """
        cfg, source, ragged = self.cfg, folded, None
        if cfg.limits is not None:
            ragged = RaggedPass(cfg.limits, self.thresholds, cfg.protected, len(x), self.training)
        sizes = self._first_sizes(x, folded)
        if return_source and folded is None:
            source = (MergeMap if ragged is None else RaggedMap).identity(*x.shape[:2], x.device)
        relevance = None if rho is None or folded is not None else Relevance.of(rho)
        generator = self._generator()
        x = self.embeddings(x, folded)
        for n, r in enumerate(cfg.plan(budget)[1]):
            x, sizes, step = self._layer(n, r, x, sizes, generator, ragged, relevance)
            if step is not None:
                relevance = None if relevance is None else relevance.after(step)
                source = None if source is None else source.then(step)
        return x, source

    def _first_sizes(self, x: Tensor, folded: MergeMap | None = None) -> Tensor | None:
        """Patches of each token (B, T) in front of the layers; None where nothing asks for them."""
        if self.cfg.merge_mean != "size" and not self.cfg.proportional_attention:
            return None
        return torch.ones(x.shape[:2], device=x.device) if folded is None else folded.sizes()

    def _layer(
        self, n: int, r: int, x: Tensor, sizes: Tensor | None, generator, ragged: RaggedPass | None,
        relevance: Relevance | None = None,
    ):  # fmt: skip
        """Layer number n: (tokens, their sizes | None, its merge | None)."""
        if ragged is not None:
            ragged.layer, r = n, self.cfg.limits.merges(n)
        x, step = self.encoder["layer"][n](x, r, sizes, generator, ragged, relevance)
        return x, sizes if sizes is None or step is None else step.sizes(sizes), step

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]):
        """Set the thresholds of `{average, least, most}`: with them, the pictures in `batches`, on all ranks, keep
        `average` tokens in the mean. Of a TomeFormer in eval mode.

        batches: (B, T, D) each, as `forward` takes them; on every rank as many rows. One layer after another, as a
        threshold depends on what the layers before it leave.
        """
        cfg, passes = self.cfg, []
        for x in batches:
            ragged = RaggedPass(cfg.limits, self.thresholds, cfg.protected, len(x), training=False)
            passes.append((self.embeddings(x), self._first_sizes(x), ragged))
        for n, layer in enumerate(self.encoder["layer"]):
            if cfg.limits.merges(n):
                for *_, ragged in passes:
                    ragged.layer = n
                pairs = [ragged.pairs(layer.attention["self"].mean_keys(x)) for x, _, ragged in passes]
                self.thresholds[n] = cut(pairs, cfg.limits.average[n + 1])
                del pairs
            for i, (x, sizes, ragged) in enumerate(passes):
                passes[i] = (*self._layer(n, 0, x, sizes, None, ragged)[:2], ragged)

    def _generator(self) -> torch.Generator | None:
        # evaluation must not depend on what ran before: the random partition is then the same every time
        return None if self.training else torch.Generator().manual_seed(0)

    @torch.no_grad()
    def load_bert(self, state: dict[str, Tensor]) -> list[str]:
        """Load a BertModel state dict by name (a `bert.` prefix is dropped); returns the keys left unused.

        Fewer layers than the BERT are taken from its bottom; a missing or misshapen tensor is an error.
        """
        state = by_bert_names(state)
        own = {name: parameter.detach() for name, parameter in self.named_parameters()}
        missing = [k for k in own if k not in state]
        if missing:
            raise ValueError(
                f"the BERT weights lack {len(missing)} of the TomeFormer's {len(own)} tensors, "
                f"first {missing[0]}: fewer layers than num_layers={self.cfg.num_layers}, or not a BERT"
            )
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"BERT weight {name} is {tuple(state[name].shape)}, the TomeFormer needs "
                    f"{tuple(tensor.shape)}: connector_init and the connector's sizes differ"
                )
            tensor.copy_(state[name])
        return sorted(set(state) - set(own))


def by_bert_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A BERT's weights under BertModel's names: no `bert.` in front, no `gamma` and `beta` of old."""
    words = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    named = {}
    for name, value in state.items():
        for old, new in words.items():
            name = name.replace(old, new)
        named[name.removeprefix("bert.")] = value
    return named


def _init_bert(module: nn.Module):
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
