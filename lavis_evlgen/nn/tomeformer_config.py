"""Sizes of a TomeFormer, and how many tokens each of its layers merges."""

from __future__ import annotations

from dataclasses import dataclass, field

from lavis_evlgen.nn.budgets import Budgets
from lavis_evlgen.nn.merging import fold_schedule, merge_schedule, tokens_after
from lavis_evlgen.nn.ragged import Limits, limits_of


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
    condition: str = "none"  # none (released) | question: what matters to it stays apart (nn/conditioning.py)
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
            ("condition", self.condition, ("none", "question")),
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
        needed = (("partition", self.partition, "alternate"), ("merge_at", self.merge_at, "layers"),
                  ("condition", self.condition, "none"))  # fmt: skip
        for name, value, known in needed:
            if value != known:
                raise ValueError(
                    f"tome_r: {{average, least, most}} needs {name}: {known}, not {value}; leave {name} out, or take "
                    "tome_r: {target: N}, the same number of tokens for every picture"
                )

    @property
    def num_output_tokens(self) -> int:
        """Of every picture; with limits, the most that one has."""
        return tokens_after(self.num_tokens, [*self.folds, *self.schedule], self.protected)
