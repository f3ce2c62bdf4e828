"""Connectors behind one interface: visual tokens (B, L, D_v) -> VisualPrompt(tokens (B, L', D_c)).

Today TomeFormer; a new one is a module with `.width`, `.num_output_tokens` and `part_of(name)`, and a line in
CONNECTORS.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lavis_evlgen.models.sources import WeightsError, load_from_hub, read_state_dict, resolve
from lavis_evlgen.nn import MergeMap, TomeFormer, TomeFormerConfig


@dataclass
class VisualPrompt:
    """tokens (B, L', D_c); mask (B, L') where lengths differ, else None; source: which token each patch is in."""

    tokens: Tensor
    mask: Tensor | None = None
    source: MergeMap | None = None


class TomeFormerConnector(nn.Module):
    """Linear D_v -> D_c, then TomeFormer (EVLGen, eq. 1). `condition` is accepted and unused: merging that looks
    at the question would read it."""

    def __init__(self, input_width: int, cfg: TomeFormerConfig):
        super().__init__()
        self.width, self.num_output_tokens = cfg.hidden_size, cfg.num_output_tokens
        self.input_proj = nn.Linear(input_width, cfg.hidden_size)
        self.tomeformer = TomeFormer(cfg)

    def forward(self, visual_tokens: Tensor, condition=None, return_source: bool = False) -> VisualPrompt:
        tokens, source = self.tomeformer(self.input_proj(visual_tokens), return_source)
        return VisualPrompt(tokens, source=source)

    @staticmethod
    def part_of(name: str) -> str:
        """Which part of the model a parameter belongs to, for `lr_scale`."""
        return "input_proj" if name.startswith("input_proj") else "connector"


def bert_sizes(folder: str) -> dict:
    """TomeFormerConfig fields from the config.json of a BERT folder."""
    file = Path(folder) / "config.json"
    if not file.exists():
        raise WeightsError(f"connector_init: {folder} has no config.json")
    cfg = json.loads(file.read_text())
    names = {
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_heads",
        "intermediate_size": "intermediate_size",
        "max_position_embeddings": "max_positions",
        "layer_norm_eps": "layer_norm_eps",
    }
    return {ours: cfg[theirs] for theirs, ours in names.items() if theirs in cfg}


def build_tomeformer(vision, connector_init: str | None, **cfg) -> TomeFormerConnector:
    """A TomeFormer for this vision encoder; `connector_init`: BERT id or folder, or None / "random"."""
    sizes, state = {}, None
    if connector_init and connector_init != "random":
        source = resolve(connector_init, "connector_init")
        if not Path(source).exists():
            from huggingface_hub import snapshot_download

            patterns = ["config.json", "model.safetensors"]
            source = load_from_hub(snapshot_download, source, "connector_init", allow_patterns=patterns)
        sizes, state = bert_sizes(source), read_state_dict(source, "connector_init")
    config = TomeFormerConfig(num_tokens=vision.num_tokens, protected=vision.protected, **(sizes | cfg))
    connector = TomeFormerConnector(vision.width, config)
    if state is not None:
        connector.tomeformer.load_bert(state)
    return connector


CONNECTORS = {"tomeformer": build_tomeformer}
