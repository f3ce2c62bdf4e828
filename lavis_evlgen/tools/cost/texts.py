"""How the texts of a picture lie in the language model: what `evlgen macs` and `evlgen estimate` count there."""

from __future__ import annotations

from dataclasses import dataclass

from lavis_evlgen.config import ConfigError, EvlgenConfig
from lavis_evlgen.models.evlgen import EVLGen


@dataclass(frozen=True)
class Texts:
    """The texts of a picture: how many, and whether each has a row of its own in the language model, with the visual
    prompt in front of it, or all share one row and prompt. own_prompts: the visual prompt is another one for each."""

    count: int = 1
    own_rows: bool = False
    own_prompts: bool = False

    @classmethod
    def of(cls, cfg: EvlgenConfig) -> Texts:
        """What a run learns of each picture. Own rows: of conversations, which bring what is in front of the picture;
        and where visual tokens see a text prompt, which then cannot be shared. Own prompts: where merging looks at
        each question."""
        asks = cfg.run_cfg.task == "evlgen_vqa" or bool((cfg.model_cfg.get("prompt") or "").strip())
        sees_prompt = cfg.model_cfg.get("prompt_attention") == "prefix" and asks
        talks = cfg.run_cfg.task == "evlgen_conversations"
        own_prompts = cfg.model_cfg.get("condition") == "question" and (talks or cfg.run_cfg.task == "evlgen_vqa")
        return cls(cfg.run_cfg.get("texts_per_image") or 1, sees_prompt or talks or own_prompts, own_prompts)

    def layout(self, model: EVLGen, text_tokens: int) -> tuple[int, int, int]:
        """(rows of a picture, text tokens of a row, supervised ones), of texts of `text_tokens` tokens each."""
        labels = caption_tokens(model, text_tokens)
        if self.own_rows:
            return self.count, text_tokens, labels
        language = model.language_model
        shared = int(language.bos == "before" and language.text.bos_id is not None)  # one BOS, in front of the picture
        return 1, shared + self.count * (text_tokens - shared), self.count * labels


ONE = Texts()


def caption_tokens(model: EVLGen, text_tokens: int) -> int:
    """Supervised tokens of a text: all but the config's prompt, and BOS where it is a label (`model.label_bos`).

    Raises ConfigError where none is left for a caption.
    """
    language = model.language_model
    labels = text_tokens - (language.text.bos_id is not None) - len(language.text.encode(model.prompt.rstrip()))
    if labels < 1:
        raise ConfigError(f"--text-tokens {text_tokens}: BOS and the config's prompt leave no token for a caption")
    return labels + language.labelled_bos(model.prompt)
