"""Run configs: read from a file and --options, laid over the defaults, every key and value checked."""

from lavis_evlgen.config.errors import ConfigError, nearest
from lavis_evlgen.config.run_config import EvlgenConfig

__all__ = ["ConfigError", "EvlgenConfig", "nearest"]
