"""Pure PyTorch building blocks: token merging, TomeFormer, the prefix language-model loss."""

from lavis_evlgen.nn.losses import prefix_lm_loss, variance_share
from lavis_evlgen.nn.merging import MergeMap, match, merge_schedule, tokens_after
from lavis_evlgen.nn.tomeformer import TomeFormer, TomeFormerConfig

__all__ = [
    "MergeMap",
    "TomeFormer",
    "TomeFormerConfig",
    "match",
    "merge_schedule",
    "prefix_lm_loss",
    "tokens_after",
    "variance_share",
]
