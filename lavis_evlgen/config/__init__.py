"""Run configs: read from a file and --options, laid over the defaults, every key and value checked."""

from lavis_evlgen.config.errors import ConfigError, config_errors, nearest

__all__ = ["ConfigError", "EvlgenConfig", "config_errors", "nearest"]


def __getattr__(name: str):
    if name == "EvlgenConfig":  # imported when asked for: it needs LAVIS, which the rest of this folder does not
        from lavis_evlgen.config.run_config import EvlgenConfig

        return EvlgenConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
