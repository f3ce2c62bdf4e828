"""Configuration of an EVLGen model for transformers: frozen vision model, connector, causal language model."""

from __future__ import annotations

from transformers import PretrainedConfig


class EvlgenConfig(PretrainedConfig):
    r"""What `EvlgenForConditionalGeneration` is built from. Inference only.

    Args:
        vision_model (`str`): hub id, or a folder relative to this file (it then begins with a dot).
        vision_layer (`int`, *optional*): hidden state to read (0: embeddings); left out: the model's own output.
        vision_dtype, language_dtype (`str`): float32, float16, bfloat16, or auto: bfloat16 on a GPU that has it,
            else float32. The connector is float32.
        vision_width, language_width (`int`): widths of the two models' tokens.
        image_size (`int`): side of the square picture in pixels.
        protected_tokens (`int`): leading visual tokens that are no patches, such as [CLS].
        connector (`dict`): kind tomeformer, avgpool or linear, and its sizes. Of a tomeformer, `folds` are the
            numbers of merges in front of the first layer, `schedule` those of each layer.
        soft_prompt_tokens (`int`): places of the visual prompt that have a learned vector; 0: none.
        language_model (`str`): hub id or relative folder of a causal language model.
        image_token_id (`int`): stands in `input_ids` once, where the picture is; no token of the tokenizer.
        prompt_ids (`list[int]`): the `input_ids` of a picture without a text.
    """

    model_type = "evlgen"

    def __init__(
        self, vision_model="", vision_layer=None, vision_dtype="float32", vision_width=0, image_size=224,
        protected_tokens=1, connector=None, soft_prompt_tokens=0, language_model="", language_dtype="float32",
        language_width=0, image_token_id=0, prompt_ids=(), **kwargs,
    ):  # fmt: skip
        self.vision_model, self.vision_layer, self.vision_dtype = vision_model, vision_layer, vision_dtype
        self.vision_width, self.image_size, self.protected_tokens = vision_width, image_size, protected_tokens
        self.connector, self.soft_prompt_tokens = connector or {"kind": "linear"}, soft_prompt_tokens
        self.language_model, self.language_dtype = language_model, language_dtype
        self.language_width, self.image_token_id = language_width, image_token_id
        self.prompt_ids = list(prompt_ids)
        super().__init__(**kwargs)
