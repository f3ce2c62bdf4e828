"""The caption processor: raw caption in, the text that the language model learns out."""

from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor

from lavis_evlgen.processors.config import read_config


@registry.register_processor("evlgen_caption")
class EvlgenCaptionProcessor(BaseProcessor):
    """Single spaces, no closing punctuation, lower case; idempotent as long as `prompt` is empty."""

    NAME = "evlgen_caption"
    NUMBERS, SWITCHES, TEXTS = {"max_words": (1, 10**6)}, ("lower",), ("prompt",)
    OPTIONAL = ("lower", "prompt")
    CONFIG_KEYS = {
        "prompt": "text put in front of every caption, as it is",
        "max_words": "cut the caption after this many words",
        "lower": "lower-case the caption",
    }

    def __init__(self, prompt: str = "", max_words: int = 50, lower: bool = True):
        if max_words < 1:
            raise ValueError(f"{self.NAME}: max_words={max_words} must be at least 1")
        self.prompt, self.max_words, self.lower = prompt, max_words, lower

    def __call__(self, caption: str) -> str:
        words = caption.lower().split() if self.lower else caption.split()
        text = " ".join(words[: self.max_words]).rstrip(" .,;:!?")
        return self.prompt + text

    @classmethod
    def from_config(cls, cfg=None):
        return cls(**read_config(cls, cfg))
