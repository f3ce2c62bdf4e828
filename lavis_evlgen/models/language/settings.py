"""The config keys of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lavis_evlgen.config.keys import Settings, key
from lavis_evlgen.config.limits import LARGEST
from lavis_evlgen.models.language.chat import TEMPLATES as CHAT_TEMPLATES
from lavis_evlgen.models.language.llm_train import LlmTrain
from lavis_evlgen.models.language.prompt_attention import KINDS as PROMPT_ATTENTION
from lavis_evlgen.models.precision import PRECISIONS


@dataclass(kw_only=True)
class LanguageSettings(Settings):
    """Keys of a model config that choose the language model and how texts are put to it."""

    llm_model: str | None = key("any Hugging Face causal language model: id, folder or .gguf file", None)
    opt_model: str | None = key("the released name of llm_model in OPT configs; give one of the two", None)
    llm_precision: Literal[PRECISIONS] = key("fp32, fp16, bf16 or auto, as vit_precision", "fp16")
    prompt: str | None = key("text put before every caption", "")
    max_txt_len: int = key(
        "longest text in tokens, BOS and end token counted", 32, at_least=3, at_most=LARGEST["max_txt_len"]
    )
    bos: Literal["before", "after"] = key(
        "after (released): BOS between visual prompt and text; before: in front of the visual prompt", "after"
    )
    bos_token: str | None = key(
        "the token that stands as BOS; empty: the tokenizer's own (OPT: </s>). </s>: Vicuna as released", None
    )
    label_bos: bool | None = key(
        "whether captions without a prompt also teach the BOS behind the visual prompt; empty: as released (OPT true, "
        "others false)", None,
    )  # fmt: skip
    prompt_attention: Literal[PROMPT_ATTENTION] = key(
        "which tokens of the prompt see each other in both directions: causal (as released: none), visual (visual "
        "tokens), prefix (the text prompt too)", "causal",
    )  # fmt: skip
    llm_train: Literal["lora", "full"] | LlmTrain | None = key(
        "what of the language model learns: nothing (left out), lora, {lora: {rank: 16, alpha: 32, targets: "
        "all-linear}}, or full", None, at_least=1, at_most=LARGEST["max_txt_len"],
    )  # fmt: skip
    chat_template: Literal[CHAT_TEMPLATES] | None = key(
        "how conversations are rendered: by the tokenizer's own chat template (left out), or plain (USER: ... "
        "ASSISTANT: ...)", None,
    )  # fmt: skip
    llm_adapter: str | None = key("folder of a LoRA adapter in peft's format that llm_train=lora starts from", None)
