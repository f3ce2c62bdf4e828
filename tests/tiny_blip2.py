"""LAVIS's own BLIP-2 classes on tiny random parts, and the names that Hugging Face's port gives to their weights.

LAVIS reads a BERT named "bert-base-uncased" and knows two ViTs only: the classes here bring a tiny EVA ViT of LAVIS's
and a BERT folder of that name, which has to stand in the working directory.
"""

import lavis_evlgen  # noqa: F401  (its bridges come before LAVIS)

# isort: split
from functools import partial
from pathlib import Path

import torch
from lavis.models import eva_vit
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    GPT2Tokenizer,
)

from tests.run_tools import redraw
from tests.tiny import tiny_opt, tiny_tokenizer

WIDTH, HEADS, SIDE, PATCH, QUERIES = 32, 2, 28, 7, 5  # 17 visual tokens
VIT_WIDTH, VIT_DEPTH, VIT_HEADS = 24, 2, 3
WORDS = "a red square and blue circle photo of dog on the grass two cats sleep wooden table".split()


def bert_folder(folder: Path) -> Path:
    """A tiny BERT with a word-level vocabulary: config, weights, vocab.txt."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=48, max_position_embeddings=40,
    )  # fmt: skip
    redraw(BertModel(config)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return folder


def opt_folder(folder: Path) -> Path:
    """A tiny OPT with a GPT-2 tokenizer that puts </s> in front, as OPT's does."""
    redraw(tiny_opt()).save_pretrained(folder)
    tiny_tokenizer().backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    ends = dict.fromkeys(("bos_token", "eos_token"), "</s>") | {"pad_token": "<pad>", "unk_token": "<unk>"}
    GPT2Tokenizer.from_pretrained(folder, **ends, add_bos_token=True).save_pretrained(folder)
    return folder


class TinyVision:
    """Mixin of LAVIS's BLIP-2 classes: LAVIS's EVA ViT in tiny."""

    @classmethod
    def init_vision_encoder(cls, model_name, img_size, drop_path_rate, use_grad_checkpoint, precision):
        vit = eva_vit.VisionTransformer(
            img_size=SIDE, patch_size=PATCH, use_mean_pooling=False, embed_dim=VIT_WIDTH, depth=VIT_DEPTH,
            num_heads=VIT_HEADS, mlp_ratio=2.0, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )  # fmt: skip
        return vit, LayerNorm(vit.num_features)


class TinyBlip2OPT(TinyVision, Blip2OPT):
    """In float32: LAVIS loads the language model in half precision, which its CPU path cannot run."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.opt_model.float()


class TinyBlip2Qformer(TinyVision, Blip2Qformer):
    pass


def lavis_blip2_opt(folder: Path, monkeypatch) -> Blip2OPT:
    """LAVIS's second stage in evaluation mode; `folder` becomes the working directory."""
    _stand_in(folder, monkeypatch)
    opt = str(opt_folder(folder / "opt"))
    return _drawn(TinyBlip2OPT(num_query_token=QUERIES, opt_model=opt, prompt="a photo of"))


def lavis_blip2(folder: Path, monkeypatch) -> Blip2Qformer:
    """LAVIS's first stage in evaluation mode; `folder` becomes the working directory."""
    _stand_in(folder, monkeypatch)
    return _drawn(TinyBlip2Qformer(num_query_token=QUERIES))


def _stand_in(folder: Path, monkeypatch):
    bert_folder(folder / "bert-base-uncased")
    monkeypatch.chdir(folder)
    torch.manual_seed(0)


def _drawn(model):
    redraw(model)
    with torch.no_grad():  # so that a norm or bias in the wrong place shows
        for name, parameter in model.named_parameters():
            if name.endswith("cls.predictions.bias"):  # BertModel has none, and LAVIS leaves what is missing unset
                parameter.zero_()
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def hugging_face_qformer_name(name: str) -> str:
    """LAVIS's `Qformer.bert.…` -> the name in Hugging Face's Blip2QFormerModel."""
    name = name.removeprefix("Qformer.bert.")
    name = name.replace("embeddings.LayerNorm", "layernorm")
    return name.replace("attention.self.", "attention.attention.")


def hugging_face_blip2(lavis: Blip2OPT, image_token: int) -> Blip2ForConditionalGeneration:
    """Hugging Face's BLIP-2 with the weights of a tiny LAVIS Blip2OPT; `image_token` marks the queries' places."""
    vision = Blip2VisionConfig(
        hidden_size=VIT_WIDTH, intermediate_size=2 * VIT_WIDTH, num_hidden_layers=VIT_DEPTH,
        num_attention_heads=VIT_HEADS, image_size=SIDE, patch_size=PATCH, hidden_act="gelu", qkv_bias=True,
    )  # fmt: skip
    bert = lavis.Qformer.config
    qformer = Blip2QFormerConfig(
        hidden_size=WIDTH, num_hidden_layers=bert.num_hidden_layers, num_attention_heads=HEADS,
        intermediate_size=bert.intermediate_size, cross_attention_frequency=2, encoder_hidden_size=VIT_WIDTH,
    )  # fmt: skip
    text = tiny_opt().config
    config = Blip2Config(
        vision_config=vision.to_dict(), qformer_config=qformer.to_dict(), text_config=text.to_dict(),
        num_query_tokens=QUERIES, image_token_index=image_token,
    )  # fmt: skip
    theirs = Blip2ForConditionalGeneration(config).eval()
    theirs.vision_model.post_layernorm.eps = lavis.ln_vision.eps
    state = {hugging_face_name(name): value for name, value in lavis.state_dict().items() if _kept(name)}
    for block in range(VIT_DEPTH):
        q, v = (state.pop(f"vision_model.encoder.layers.{block}.self_attn.{x}_bias") for x in "qv")
        state[f"vision_model.encoder.layers.{block}.self_attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    theirs.load_state_dict(state)
    return theirs


def _kept(name: str) -> bool:
    return not name.endswith(("position_ids", "relative_position_index"))


def hugging_face_name(name: str) -> str:
    """A name in LAVIS's Blip2OPT -> in Hugging Face's Blip2ForConditionalGeneration."""
    if name.startswith("Qformer."):
        return "qformer." + hugging_face_qformer_name(name)
    for ours, theirs in (
        ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
        ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
        ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
        ("visual_encoder.blocks", "vision_model.encoder.layers"),
        (".attn.proj", ".self_attn.projection"),
        (".attn.", ".self_attn."),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
        ("ln_vision", "vision_model.post_layernorm"),
        ("opt_proj", "language_projection"),
        ("opt_model", "language_model"),
    ):
        name = name.replace(ours, theirs)
    return name
