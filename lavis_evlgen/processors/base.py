"""What our processors share: keys that are declared in `Settings`, given as arguments or by a config."""

from __future__ import annotations

from lavis.processors.base_processor import BaseProcessor

from lavis_evlgen.config.keys import Settings, keys_of
from lavis_evlgen.config.values import refuse_unknown


class EvlgenProcessor(BaseProcessor):
    """A processor with the keys of `Settings`; NAME is what a config calls it."""

    NAME = ""
    Settings: type[Settings] = Settings

    def __init__(self, **given):
        """given: keys of `Settings`. Raises ConfigError for unknown keys and impossible values."""
        refuse_unknown(given, keys_of(type(self)), f"{self.NAME}: ")
        self.settings = self.Settings.read(given, f"{self.NAME}: ")

    @classmethod
    def from_config(cls, cfg=None):
        return cls(**{key: cfg[key] for key in cfg if key != "name"} if cfg else {})
