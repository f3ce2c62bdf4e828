"""Connectors behind one interface: visual tokens (B, L, D_v) -> VisualPrompt(tokens (B, L', D_c)).

A new one is a `Connector` (connector_base.py), a builder `build(vision, cfg)` that gets the plain model config, and
a line in CONNECTORS.
"""

from __future__ import annotations

import logging

from lavis_evlgen.models.connectors.base import SIZES, Connector, VisualPrompt, is_random
from lavis_evlgen.models.connectors.pooling import build_avgpool, build_linear
from lavis_evlgen.models.connectors.qformer import build_qformer
from lavis_evlgen.models.connectors.tomeformer import BODY_KEYS, TomeFormerConnector, build_tomeformer

__all__ = ["CONNECTORS", "READS", "SIZES", "Connector", "TomeFormerConnector", "VisualPrompt", "build_connector"]

CONNECTORS = {
    "tomeformer": build_tomeformer,
    "qformer": build_qformer,
    "avgpool": build_avgpool,
    "linear": build_linear,
}
# config keys that each one reads
READS = {
    "tomeformer": ("connector_init", "connector_sizes", *BODY_KEYS),
    "qformer": ("connector_init", "connector_sizes", "num_layers", "num_query_token", "dropout"),
    "avgpool": ("num_query_token",),
    "linear": (),
}


def build_connector(vision, cfg: dict) -> Connector:
    """The connector that cfg["connector"] names (tomeformer), for this vision encoder; raises ValueError."""
    name = cfg.get("connector") or "tomeformer"
    if name not in CONNECTORS:
        raise ValueError(f"connector: {name!r} is not one of {', '.join(CONNECTORS)}")
    if unknown := set(cfg.get("connector_sizes") or {}) - set(SIZES):
        raise ValueError(f"connector_sizes: unknown size {sorted(unknown)[0]}; the sizes are {', '.join(SIZES)}")
    known = dict.fromkeys(key for keys in READS.values() for key in keys)
    idle = [key for key in known if cfg.get(key) is not None and key not in READS[name]]
    if idle:  # the model type's defaults are TomeFormer's
        logging.info("connector %s does not read %s", name, ", ".join(idle))
    if cfg.get("connector_sizes") and not is_random(cfg.get("connector_init")):
        logging.info("connector_sizes is not read: %s has sizes of its own", cfg["connector_init"])
    return CONNECTORS[name](vision, cfg)
