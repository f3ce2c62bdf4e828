"""Connectors behind one interface: visual tokens (B, L, D_v) -> VisualPrompt(tokens (B, L', D_c)).

A new one is a `Connector` (base.py), a builder `build(vision, cfg)` that gets the plain model config, a line in
CONNECTORS and in READS, and its `Settings` among the bases of ConnectorSettings.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from lavis_evlgen.config.keys import Settings, key, keys_of
from lavis_evlgen.models.connectors.base import Connector, VisualPrompt, is_random
from lavis_evlgen.models.connectors.pooling import PoolingSettings, build_avgpool, build_linear
from lavis_evlgen.models.connectors.qformer import QFormerSettings, build_qformer
from lavis_evlgen.models.connectors.tomeformer import TomeFormerConnector, TomeFormerSettings, build_tomeformer

__all__ = [
    "CONNECTORS",
    "READS",
    "Connector",
    "ConnectorSettings",
    "TomeFormerConnector",
    "VisualPrompt",
    "build_connector",
]

CONNECTORS = {
    "tomeformer": build_tomeformer,
    "qformer": build_qformer,
    "avgpool": build_avgpool,
    "linear": build_linear,
}
# the dataclass of the config keys that each one reads
READS = {"tomeformer": TomeFormerSettings, "qformer": QFormerSettings, "avgpool": PoolingSettings, "linear": Settings}


@dataclass(kw_only=True)
class ConnectorSettings(TomeFormerSettings, QFormerSettings):
    """Keys of a model config that choose and size the connector; each connector reads those in READS."""

    connector: Literal[tuple(CONNECTORS)] | None = key(f"the connector: {', '.join(CONNECTORS)}", "tomeformer")


def build_connector(vision, cfg: dict) -> Connector:
    """The connector that cfg["connector"] names, for this vision encoder; raises ValueError."""
    settings = ConnectorSettings.read(cfg)
    name = settings.connector
    if settings.condition == "question" and "condition" not in keys_of(READS[name]):
        raise ValueError(f"condition: question needs connector tomeformer, whose merging looks at it; {name} does not")
    known = dict.fromkeys(key for settings in READS.values() for key in keys_of(settings))
    idle = [key for key in known if cfg.get(key) is not None and key not in keys_of(READS[name])]
    if "tokens" in idle:
        raise ValueError(f"tokens: connector {name} leaves a number of tokens of its own; leave the key out")
    if idle:  # the model type's defaults are TomeFormer's
        logging.info("connector %s does not read %s", name, ", ".join(idle))
    if cfg.get("connector_sizes") and not is_random(cfg.get("connector_init")):
        logging.info("connector_sizes is not read: %s has sizes of its own", cfg["connector_init"])
    return CONNECTORS[name](vision, cfg)
