"""EVLGen's connector: a BERT that merges similar tokens in every layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

from torch import Tensor, nn

from lavis_evlgen.config.keys import key
from lavis_evlgen.config.values import Range
from lavis_evlgen.models.connectors.base import (
    SIZES,
    BertSettings,
    Connector,
    VisualPrompt,
    bert_config,
    bert_folder,
    is_random,
)
from lavis_evlgen.nn import GroupReadout, PooledSkip, QuestionRelevance, TomeFormer, TomeFormerConfig, weighted_mean
from lavis_evlgen.nn.budgets import DRAWS
from lavis_evlgen.nn.merging import MergeMap
from lavis_evlgen.nn.ragged import UNSET
from lavis_evlgen.nn.tomeformer import by_bert_names
from lavis_evlgen.weights.sources import check_floating, on_meta, read_state_dict

# where tokens spread by 0.45 of the average over pictures (0.2 in drawn scenes), the mean of 512 is known to 2 % of it
CALIBRATION_PICTURES = 512


class TomeR(TypedDict, total=False):
    """A line of r over the layers ({r, inflection}), the tokens to leave ({target}), several numbers of tokens that
    training draws from ({elastic}, with draw and beta), or as many as a picture needs ({average, least, most})."""

    r: Annotated[int, Range(0, 10_000)]
    inflection: Annotated[float, Range(-1.0, 1.0)]
    target: Annotated[int, Range(1, 100_000)]
    elastic: list[Annotated[int, Range(1, 100_000)]]
    draw: Literal[DRAWS]
    beta: Annotated[float, Range(0.0, 1e6)]
    average: Annotated[int, Range(1, 100_000)]
    least: Annotated[int, Range(1, 100_000)]
    most: Annotated[int, Range(1, 100_000)]


@dataclass(kw_only=True)
class TomeFormerSettings(BertSettings):
    tome_r: int | list[int] | TomeR | None = key(
        "merges per layer: a number, a list, {r, inflection} or {target}; {elastic: [10, 29, 65], draw, beta}: "
        "training leaves one of these numbers of tokens at a time (draw: one), or the largest and one other (sandwich);"
        " {average, least, most}: of the tokens that are left, each picture its own number", TomeFormerConfig.tome_r,
        at_least=0, at_most=10_000,
    )  # fmt: skip
    tokens: int | None = key(
        "leave so many visual tokens, whatever tome_r says; where that is elastic, in evaluation and captions (left "
        "out: the largest)", None, at_least=1, at_most=100_000,
    )  # fmt: skip
    merge_mean: Literal["plain", "size"] | None = key(
        "plain (released) or size (weighted by patches)", TomeFormerConfig.merge_mean
    )
    partition: Literal["alternate", "random"] | None = key("alternate (released) or random", TomeFormerConfig.partition)
    proportional_attention: bool | None = key(
        "add log(token size) to the attention logits", TomeFormerConfig.proportional_attention
    )
    merge_at: Literal["layers", "input"] | None = key(
        "layers (released): in each layer, by its keys; input: to the same number of tokens before the first layer, by "
        "what the frozen ViT gives", TomeFormerConfig.merge_at,
    )  # fmt: skip
    readout: Literal["none", "group"] | None = key(
        "group: each merged token attends once more to its own patches, which counts from 0 on (released: none)",
        TomeFormerConfig.readout,
    )
    skip: Literal["none", "pooled"] | None = key(
        "pooled: the mean of each merged token's patches goes past the body, which counts from 0 on (released: none)",
        TomeFormerConfig.skip,
    )
    condition: Literal["none", "question"] | None = key(
        "question: what matters to the question stays apart and weighs more, which counts from 0 on (released: none)",
        TomeFormerConfig.condition,
    )


class TomeFormerConnector(Connector):
    """Linear D_v -> D_c, then TomeFormer (EVLGen, eq. 1)."""

    def __init__(self, input_width: int, cfg: TomeFormerConfig):
        super().__init__(cfg.hidden_size, cfg.num_output_tokens)
        self.sizes, self.budgets = {name: getattr(cfg, name) for name in SIZES}, cfg.budgets
        self.input_proj = nn.Linear(input_width, cfg.hidden_size)
        self.tomeformer = TomeFormer(cfg)
        self.skip = PooledSkip(input_width, cfg.hidden_size) if cfg.skip == "pooled" else None
        reads = cfg.readout == "group"
        self.readout = GroupReadout(input_width, cfg.hidden_size, cfg.num_heads) if reads else None
        self.condition, self.conditioning = cfg.condition, None  # read_questions makes it

    def read_questions(self, question_width: int):
        self.conditioning = QuestionRelevance(self.input_proj.in_features, question_width, self.width)

    def relevance(self, visual_tokens: Tensor, condition: Tensor | None) -> Tensor | None:
        """rho (B, L) of visual tokens (B, L, D_v); 0 without a question, None where merging does not look at one."""
        if self.conditioning is None:
            return None
        if condition is None:  # in a batch of captions too, every parameter has a gradient: DistributedDataParallel
            condition = visual_tokens.new_zeros(len(visual_tokens), self.conditioning.query.in_features)
        return self.conditioning(visual_tokens, condition)

    def forward(
        self, visual_tokens: Tensor, condition: Tensor | None = None, return_source: bool = False,
        features: Tensor | None = None, budget: int | None = None,
    ) -> VisualPrompt:  # fmt: skip
        """budget: how many tokens to leave, one of `budgets`. Raises ValueError for another one, and for merge_at input
        without features."""
        inputs, folded, rho = visual_tokens, None, self.relevance(visual_tokens, condition)
        if self.tomeformer.cfg.merge_at == "input":
            if features is None:
                raise ValueError("merge_at: input compares the ViT's own features; give the connector `features`")
            folded = self.tomeformer.fold(features, budget, rho)[-1]
            inputs = _means(folded, visual_tokens, rho)  # (B, L', D_v): all that the projection and the body see
        limits = self.tomeformer.cfg.limits
        groups = return_source or self.skip is not None or self.readout is not None or limits is not None
        tokens, source = self.tomeformer(self.input_proj(inputs), groups, folded, budget, rho)  # (B, L', D_c)
        if self.skip is not None:
            tokens = self.skip(tokens, _means(source, visual_tokens, rho) if folded is None else inputs)
        if self.readout is not None:
            tokens = self.readout(tokens, visual_tokens, source)
        mask = source.alive() if self.lengths_differ else None  # (B, L')
        if mask is not None:
            tokens = tokens.masked_fill(~mask.unsqueeze(2), 0)
        return VisualPrompt(tokens, mask, source if return_source else None)

    @property
    def lengths_differ(self) -> bool:
        limits = self.tomeformer.cfg.limits
        return limits is not None and limits.differ

    @property
    def average_tokens(self) -> int:
        limits = self.tomeformer.cfg.limits
        return super().average_tokens if limits is None else limits.average[-1]

    @property
    def average_merges(self) -> list[int] | None:
        limits = self.tomeformer.cfg.limits
        return None if limits is None else [a - b for a, b in itertools.pairwise(limits.average)]

    @property
    def calibration_pictures(self) -> int:
        return 0 if self.tomeformer.cfg.limits is None else CALIBRATION_PICTURES

    def calibrate(self, batches: Iterable[Tensor]):
        self.tomeformer.calibrate(self.input_proj(visual_tokens) for visual_tokens in batches)

    def calibrated(self) -> bool:
        return self.tomeformer.cfg.limits is None or not bool((self.tomeformer.thresholds == UNSET).any())

    def noise(self, num_tokens: int, input_width: int) -> Tensor:
        make = super().noise if self.skip is None else self.noise_of_groups
        return make(num_tokens, input_width)

    @staticmethod
    def part_of(name: str) -> str:
        if name.endswith(".alpha"):
            return "gates"
        return "input_proj" if name.startswith(("input_proj.", "skip.")) else "connector"


def build_tomeformer(vision, cfg: dict) -> TomeFormerConnector:
    """A TomeFormer for this vision encoder; cfg["connector_init"]: BERT id or folder, or None / "random"."""
    settings, state = TomeFormerSettings.read(cfg), None
    sizes = settings.connector_sizes
    if not is_random(settings.connector_init):
        folder = bert_folder(settings.connector_init)
        bert = bert_config(folder)
        sizes = {ours: bert[theirs] for ours, theirs in SIZES.items() if theirs in bert}
        state = None if on_meta() else read_state_dict(folder, "connector_init")
    config = TomeFormerConfig(
        num_tokens=vision.num_tokens, protected=vision.protected, num_layers=settings.num_layers,
        tome_r=settings.tome_r, tokens=settings.tokens, merge_mean=settings.merge_mean, partition=settings.partition,
        proportional_attention=settings.proportional_attention, dropout=settings.dropout, merge_at=settings.merge_at,
        readout=settings.readout, skip=settings.skip, condition=settings.condition, **sizes,
    )  # fmt: skip
    connector = TomeFormerConnector(vision.width, config)
    if state is not None:
        check_floating(by_bert_names(state), connector.tomeformer.state_dict(), f"connector_init: {folder}")
        connector.tomeformer.load_bert(state)
    return connector


def _means(groups: MergeMap, x: Tensor, rho: Tensor | None) -> Tensor:
    """x (B, L, D) -> (B, L', D): of each group's patches, what matters to a question counts more."""
    return groups.merge(x) if rho is None else weighted_mean(groups, x, rho.exp())
