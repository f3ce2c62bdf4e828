"""Tiny random parts that behave like the real ones: everything is built here, nothing is downloaded.

>>> model = tiny_evlgen()
>>> model({"image": pictures(2), "text_input": ["a red square", "a dog"]})["loss"]
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import lavis_evlgen  # noqa: F401  (its bridges come before LAVIS)
from lavis_evlgen.models.connectors import TomeFormerConnector
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.evlgen_video import EVLGenVideo
from lavis_evlgen.models.language.model import LanguageModel
from lavis_evlgen.models.vision.encoder import VisionEncoder, _LayerNorm1e6, clip_vit, eva_vit, wrap_hugging_face
from lavis_evlgen.models.vision.temporal import TemporalVision
from lavis_evlgen.nn import TomeFormerConfig

IMAGE_SIZE, PATCH = 28, 7  # 16 patches
SENTENCES = (
    "a red square and a blue circle",
    "a photo of a dog on the grass",
    "two cats sleep on a wooden table",
    "Question: what color is the square? Short answer: red",
)
_SPREAD = 0.3  # weights large enough that tokens, layers and pictures differ
_VIT = {"image_size": IMAGE_SIZE, "patch_size": PATCH, "initializer_range": _SPREAD}


def pictures(batch: int, seed: int = 0, size: int = IMAGE_SIZE) -> torch.Tensor:
    """(B, 3, size, size) of noise, the same for the same seed."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def clips(batch: int, frames: int = 3, seed: int = 0) -> torch.Tensor:
    """(B, 3, T, H, W) of noise, as LAVIS's video processors give clips."""
    return pictures(batch * frames, seed).unflatten(0, (batch, frames)).transpose(1, 2)


def tiny_tokenizer(bos: str | None = "<s>", eos: str = "</s>", pad: str | None = "<pad>"):
    """Byte-level BPE of a few sentences (any text encodes and decodes, a newline is one token)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, unk_token="<unk>"
    )


def tiny_llama(vocab_size: int = 320, seed: int = 0, **kw) -> LlamaForCausalLM:
    """LLaMA of width 32; tie_word_embeddings=True ties its head."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 128, "initializer_range": _SPREAD,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config | kw)).eval()


def tiny_opt(vocab_size: int = 320, seed: int = 0, **kw) -> OPTForCausalLM:
    """OPT of width 32, its head tied as in every OPT."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": vocab_size, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128, "init_std": _SPREAD,
        "bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return OPTForCausalLM(OPTConfig(**config | kw)).eval()


def tiny_language_model(
    kind: str = "llama", bos: str = "after", max_txt_len: int = 32, llm_train=None, **kw
) -> LanguageModel:
    """kind: llama or opt, with that family's BOS and end-of-caption tokens. llm_train: as LanguageModel."""
    if kind == "opt":
        return LanguageModel(tiny_opt(**kw), tiny_tokenizer(bos="</s>"), bos, max_txt_len, llm_train=llm_train)
    return LanguageModel(tiny_llama(**kw), tiny_tokenizer(), bos, max_txt_len, llm_train=llm_train)


def tiny_dinov2(seed: int = 0, **kw) -> Dinov2Model:
    """DINOv2 of width 24, 3 blocks: 17 tokens."""
    torch.manual_seed(seed)
    config = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2}
    return Dinov2Model(Dinov2Config(**_VIT | config | kw)).eval()


def tiny_clip(seed: int = 0, **kw) -> CLIPVisionModel:
    """CLIP's vision half, width 24, 3 blocks: 17 tokens."""
    torch.manual_seed(seed)
    config = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**_VIT | config | kw)).eval()


def tiny_siglip(seed: int = 0, **kw) -> SiglipVisionModel:
    """SigLIP's vision half, which has no [CLS], width 24, 3 blocks: 16 tokens."""
    torch.manual_seed(seed)
    config = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return SiglipVisionModel(SiglipVisionConfig(**_VIT | config | kw)).eval()


def tiny_eva(image_size: int = IMAGE_SIZE) -> nn.Module:
    """LAVIS's EVA-CLIP-g, width 24, 2 blocks, patch 14."""
    return eva_vit.VisionTransformer(
        img_size=image_size, patch_size=14, use_mean_pooling=False, embed_dim=24, depth=2, num_heads=2,
        mlp_ratio=2, qkv_bias=True, norm_layer=_LayerNorm1e6,
    )  # fmt: skip


def tiny_lavis_clip(image_size: int = IMAGE_SIZE) -> nn.Module:
    """LAVIS's CLIP-L, width 24, 2 blocks, patch 14."""
    return clip_vit.VisionTransformer(
        image_size, 14, width=24, layers=3, heads=2, use_grad_checkpointing=False
    )


def tiny_lavis_vision(kind=tiny_eva, seed: int = 0, precision: str = "fp32") -> VisionEncoder:
    """One of LAVIS's ViTs in miniature as a frozen VisionEncoder of 5 tokens."""
    torch.manual_seed(seed)
    vit = kind()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return VisionEncoder(vit, 24, 5, 1, precision)


def tiny_vision(kind=tiny_dinov2, precision: str = "fp32", layer: int | None = None, **kw):
    """A tiny ViT as a frozen VisionEncoder."""
    return wrap_hugging_face(kind(**kw), IMAGE_SIZE, precision, layer)


def tiny_connector(vision, seed: int = 0, **kw) -> TomeFormerConnector:
    """Two layers of width 16: 17 tokens become 9."""
    torch.manual_seed(seed)
    cfg = {
        "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "max_positions": 32,
        "dropout": 0.0, "tome_r": 4, "num_tokens": vision.num_tokens, "protected": vision.protected,
    }  # fmt: skip
    connector = TomeFormerConnector(vision.width, TomeFormerConfig(**cfg | kw))
    with torch.no_grad():  # BERT's 0.02 at width 16 would hide the picture behind the position embeddings
        for name, parameter in connector.named_parameters():
            if parameter.ndim > 1 and "embeddings" not in name and not name.startswith("skip."):
                nn.init.normal_(parameter, std=_SPREAD)
    return connector


def tiny_evlgen(
    llm: str = "llama",
    bos: str = "after",
    max_txt_len: int = 32,
    vision=None,
    seed: int = 0,
    connector=None,
    kind=EVLGen,
    llm_train=None,
    **kw,
) -> EVLGen:
    """EVLGen of about 30,000 numbers on the CPU, float32, in training mode.

    llm: llama | opt; llm_train: as LanguageModel; vision: a VisionEncoder; connector: TomeFormerConfig fields; kw goes
    to the class `kind` (prompt, prompt_scale, lr_scale).
    """
    vision = vision or tiny_vision(seed=seed)
    connector = tiny_connector(vision, seed, **connector or {})
    model = kind(vision, connector, tiny_language_model(llm, bos, max_txt_len, llm_train, seed=seed), **kw)
    if "prompt_scale" not in kw:
        torch.manual_seed(seed)
        nn.init.normal_(model.llm_proj.weight, std=_SPREAD)
    return model.train()


def tiny_evlgen_video(
    vision=None, temporal: bool = True, residual: str = "gated", positions: bool = False, alpha: float = 0.0, **kw
) -> EVLGenVideo:
    """The same on clips of 3 frames, with the weights of `tiny_evlgen(vision=vision)`.

    alpha: how far the gates stand open; then the temporal modules attend sharply, and positions are not 0. kw: as
    tiny_evlgen, and num_frames, frame_pooling.
    """
    vision = vision or tiny_vision()
    if temporal:
        vision = TemporalVision(vision, residual, 3 if positions else None)
        torch.manual_seed(7)
        with torch.no_grad():
            for name, parameter in vision.temporal.named_parameters():
                if name.endswith("alpha"):
                    parameter.fill_(alpha)
                elif alpha:
                    nn.init.normal_(parameter, std=_SPREAD)
    return tiny_evlgen(vision=vision, kind=EVLGenVideo, **{"num_frames": 3, **kw})
