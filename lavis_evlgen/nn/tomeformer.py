"""TomeFormer: a BERT encoder whose layers merge similar tokens between attention and MLP.

Parameter names are those of Hugging Face's BertModel (without word embeddings and pooler), so
bert-base-uncased, MiniLM and released connectors load by name. With no merging it equals BertModel fed with
`inputs_embeds`. EVLGen, section 3.2 and appendix C.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_evlgen.nn.budgets import Budgets
from lavis_evlgen.nn.merging import MergeMap, fold, fold_schedule, match, merge_schedule, tokens_after
from lavis_evlgen.nn.ragged import NONE, UNSET, Limits, RaggedMap, RaggedPass, cut, limits_of


@dataclass
class TomeFormerConfig:
    """Sizes of the BERT body and how it merges; the defaults are bert-base with the paper's r = 19."""

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    # int | list | {r, inflection} | {target}: merge_schedule. {elastic}: Budgets. {average, least, most}: Limits
    tome_r: object = 19
    tokens: int | None = None  # leave so many, whatever tome_r says; None: as it says, of budgets the largest
    merge_mean: str = "plain"  # plain (released) | size: weight tokens by the patches they stand for
    partition: str = "alternate"  # alternate (released) | random (the paper's wording)
    proportional_attention: bool = False  # add log(size) to the attention logits
    protected: int = 1  # leading tokens that never merge ([CLS])
    num_tokens: int = 257  # what the schedule is planned for
    merge_at: str = "layers"  # layers (released) | input: before the body, by the features that `fold` is given
    readout: str = "none"  # none (released) | group: tokens attend to their patches, behind the body (nn/groups.py)
    skip: str = "none"  # none (released) | pooled: the means of the groups, past the body (nn/groups.py)
    schedule: list[int] = field(init=False)  # merges of each layer
    folds: list[int] = field(init=False)  # merges in front of the first layer
    budgets: Budgets | None = field(init=False)  # of an elastic tome_r
    limits: Limits | None = field(init=False)  # of pictures that keep as many tokens as they need (nn/ragged.py)

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        if self.num_tokens > self.max_positions:
            raise ValueError(
                f"{self.num_tokens} visual tokens, but the TomeFormer has {self.max_positions} position "
                "embeddings; use a smaller image_size or a connector_init with more positions"
            )
        for name, value, known in (
            ("merge_mean", self.merge_mean, ("plain", "size")),
            ("partition", self.partition, ("alternate", "random")),
            ("merge_at", self.merge_at, ("layers", "input")),
            ("readout", self.readout, ("none", "group")),
            ("skip", self.skip, ("none", "pooled")),
        ):
            if value not in known:
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(known)}")
        self.budgets = Budgets.of(self.tome_r)
        counts = () if self.budgets is None else self.budgets.tokens
        self._plans = {count: self._plan({"target": count}, "tome_r.elastic") for count in counts}
        self.limits, spec = limits_of(self.tome_r, self.num_layers, self.num_tokens, self.protected), self.tome_r
        if self.limits is not None:
            self._check_ragged()
            spec = {"target": self.limits.most[-1]}  # tensors are as wide as the longest picture may be
        trained = self._plan(spec) if self.budgets is None else self._plans[self.budgets.largest]
        given = self.tokens is not None
        self.folds, self.schedule = self._plan({"target": self.tokens}, "tokens") if given else trained

    def _plan(self, tome_r, key: str = "tome_r") -> tuple[list[int], list[int]]:
        """(merges in front of the first layer, merges of each layer). key: what errors name."""
        try:
            schedule = merge_schedule(tome_r, self.num_layers, self.num_tokens, self.protected)
        except ValueError as error:
            raise ValueError(key + str(error).removeprefix("tome_r")) from None
        if self.merge_at == "layers":
            return [], schedule
        left = tokens_after(self.num_tokens, schedule, self.protected)  # the same number, but by other means
        return fold_schedule(self.num_tokens, left, self.protected), [0] * self.num_layers

    def plan(self, budget: int | None = None) -> tuple[list[int], list[int]]:
        """(folds, schedule) that leave `budget` tokens, one of an elastic tome_r; None: those of the config."""
        if budget is None:
            return self.folds, self.schedule
        if budget not in self._plans:
            raise ValueError(f"a budget of {budget} tokens is none of tome_r.elastic: {sorted(self._plans)}")
        return self._plans[budget]

    def _check_ragged(self):
        if self.tokens is not None:
            raise ValueError(
                "tokens: with tome_r: {average, least, most} each picture has its own number, by thresholds that are "
                "trained; leave tokens out, or train with another tome_r"
            )
        for name, value, known in (("partition", self.partition, "alternate"), ("merge_at", self.merge_at, "layers")):
            if value != known:
                raise ValueError(
                    f"tome_r: {{average, least, most}} needs {name}: {known}, not {value}; leave {name} out, or take "
                    "tome_r: {target: N}, the same number of tokens for every picture"
                )

    @property
    def num_output_tokens(self) -> int:
        """Of every picture; with limits, the most that one has."""
        return tokens_after(self.num_tokens, [*self.folds, *self.schedule], self.protected)


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
        self, x: Tensor, r: int, sizes: Tensor | None, generator, ragged: RaggedPass | None = None
    ) -> tuple[Tensor, MergeMap | None]:
        log_sizes = sizes.log() if sizes is not None and self.cfg.proportional_attention else None
        if ragged is not None and log_sizes is None:  # the size of padding is 0, its logarithm -inf
            log_sizes = ragged.key_bias()
        keys = self.attention["self"].mean_keys(x) if r > 0 else None
        x = self.attention["output"](self.attention["self"](x, log_sizes), x)  # (B, T, D)
        step = None
        if keys is not None:
            if ragged is None:
                step = match(keys, r, self.cfg.protected, self.cfg.partition, generator)
            else:
                step = ragged.match(keys)
            x = step.merge(x, sizes if self.cfg.merge_mean == "size" else None)  # (B, T - r, D)
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

    def fold(self, features: Tensor, budget: int | None = None) -> list[MergeMap]:
        """Where the T tokens with these features (B, T, C) go in front of the first layer: after 0, 1, ... merges."""
        folds, _ = self.cfg.plan(budget)
        return fold(features, folds, self.cfg.protected, self.cfg.partition, self._generator())

    def forward(
        self, x: Tensor, return_source: bool = False, folded: MergeMap | None = None, budget: int | None = None
    ) -> tuple[Tensor, MergeMap | None]:
        """x (B, T, D) -> tokens (B, T', D), source: MergeMap from the T input tokens | None.

        folded: of the T tokens, where x (B, T', D) are already the means of their groups. budget: how many tokens to
        leave, one of an elastic `tome_r`; None: the config's number. Raises ValueError.
        """
        cfg, source, ragged = self.cfg, folded, None
        if cfg.limits is not None:
            ragged = RaggedPass(cfg.limits, self.thresholds, cfg.protected, len(x), self.training)
        sizes = self._first_sizes(x, folded)
        if return_source and folded is None:
            source = (MergeMap if ragged is None else RaggedMap).identity(*x.shape[:2], x.device)
        generator = self._generator()
        x = self.embeddings(x, folded)
        for n, r in enumerate(cfg.plan(budget)[1]):
            x, sizes, step = self._layer(n, r, x, sizes, generator, ragged)
            source = source if step is None or source is None else source.then(step)
        return x, source

    def _first_sizes(self, x: Tensor, folded: MergeMap | None = None) -> Tensor | None:
        """Patches of each token (B, T) in front of the layers; None where nothing asks for them."""
        if self.cfg.merge_mean != "size" and not self.cfg.proportional_attention:
            return None
        return torch.ones(x.shape[:2], device=x.device) if folded is None else folded.sizes()

    def _layer(self, n: int, r: int, x: Tensor, sizes: Tensor | None, generator, ragged: RaggedPass | None):
        """Layer number n: (tokens, their sizes | None, its merge | None)."""
        if ragged is not None:
            ragged.layer, r = n, self.cfg.limits.merges(n)
        x, step = self.encoder["layer"][n](x, r, sizes, generator, ragged)
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
