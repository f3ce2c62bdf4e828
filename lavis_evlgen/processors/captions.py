"""The caption processor: raw caption in, the text that the language model learns out."""

from dataclasses import dataclass

from lavis.common.registry import registry

from lavis_evlgen.config.keys import Settings, key
from lavis_evlgen.processors.base import EvlgenProcessor


@dataclass(kw_only=True)
class CaptionSettings(Settings):
    prompt: str | None = key("text put in front of every caption, as it is", "")
    max_words: int = key("cut the caption after this many words", 50, at_least=1, at_most=10**6)
    lower: bool | None = key("lower-case the caption", True)


@registry.register_processor("evlgen_caption")
class EvlgenCaptionProcessor(EvlgenProcessor):
    """Single spaces, no closing punctuation, lower case; idempotent as long as `prompt` is empty."""

    NAME = "evlgen_caption"
    Settings = CaptionSettings

    def __init__(self, prompt: str | None = None, **keys):
        """`keys`: the others of `Settings`."""
        super().__init__(prompt=prompt, **keys)

    def __call__(self, caption: str) -> str:
        words = caption.lower().split() if self.settings.lower else caption.split()
        text = " ".join(words[: self.settings.max_words]).rstrip(" .,;:!?")
        return self.settings.prompt + text
