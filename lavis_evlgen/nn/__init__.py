"""Pure PyTorch building blocks: token merging, TomeFormer, temporal mixing, the prefix language-model loss."""

from lavis_evlgen.nn.budgets import Budgets
from lavis_evlgen.nn.conditioning import QuestionRelevance, weighted_mean
from lavis_evlgen.nn.groups import GroupReadout, PooledSkip
from lavis_evlgen.nn.losses import across_picture_share, prefix_lm_loss
from lavis_evlgen.nn.merging import MergeMap, match, merge_schedule, tokens_after
from lavis_evlgen.nn.temporal import TemporalMixing
from lavis_evlgen.nn.tomeformer import TomeFormer
from lavis_evlgen.nn.tomeformer_config import TomeFormerConfig

__all__ = [
    "Budgets",
    "GroupReadout",
    "MergeMap",
    "PooledSkip",
    "QuestionRelevance",
    "TemporalMixing",
    "TomeFormer",
    "TomeFormerConfig",
    "match",
    "merge_schedule",
    "prefix_lm_loss",
    "tokens_after",
    "across_picture_share",
    "weighted_mean",
]
