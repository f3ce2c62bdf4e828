"""EVLGen's connector: a BERT that merges similar tokens in every layer."""

from __future__ import annotations

from torch import Tensor, nn

from lavis_evlgen.models.connectors.base import SIZES, Connector, VisualPrompt, bert_config, bert_folder, is_random
from lavis_evlgen.nn import TomeFormer, TomeFormerConfig
from lavis_evlgen.nn.tomeformer import by_bert_names
from lavis_evlgen.weights.sources import check_floating, on_meta, read_state_dict

BODY_KEYS = ("num_layers", "tome_r", "merge_mean", "partition", "proportional_attention", "dropout")


class TomeFormerConnector(Connector):
    """Linear D_v -> D_c, then TomeFormer (EVLGen, eq. 1)."""

    def __init__(self, input_width: int, cfg: TomeFormerConfig):
        super().__init__(cfg.hidden_size, cfg.num_output_tokens)
        self.sizes = {name: getattr(cfg, name) for name in SIZES}
        self.input_proj = nn.Linear(input_width, cfg.hidden_size)
        self.tomeformer = TomeFormer(cfg)

    def forward(self, visual_tokens: Tensor, condition=None, return_source: bool = False) -> VisualPrompt:
        tokens, source = self.tomeformer(self.input_proj(visual_tokens), return_source)
        return VisualPrompt(tokens, source=source)

    @staticmethod
    def part_of(name: str) -> str:
        return "input_proj" if name.startswith("input_proj") else "connector"


def build_tomeformer(vision, cfg: dict) -> TomeFormerConnector:
    """A TomeFormer for this vision encoder; cfg["connector_init"]: BERT id or folder, or None / "random"."""
    sizes, state = cfg.get("connector_sizes") or {}, None
    if not is_random(cfg.get("connector_init")):
        folder = bert_folder(cfg["connector_init"])
        bert = bert_config(folder)
        sizes = {ours: bert[theirs] for ours, theirs in SIZES.items() if theirs in bert}
        state = None if on_meta() else read_state_dict(folder, "connector_init")
    body = {key: cfg[key] for key in BODY_KEYS if cfg.get(key) is not None}
    config = TomeFormerConfig(num_tokens=vision.num_tokens, protected=vision.protected, **sizes, **body)
    connector = TomeFormerConnector(vision.width, config)
    if state is not None:
        check_floating(by_bert_names(state), connector.tomeformer.state_dict(), f"connector_init: {folder}")
        connector.tomeformer.load_bert(state)
    return connector
