"""LAVIS's own BLIP-2 classes on tiny random parts, and the names that Hugging Face's port gives to their weights.

LAVIS reads a BERT named "bert-base-uncased" and knows two ViTs only: the classes here bring a tiny EVA ViT of LAVIS's
and a BERT folder of that name, which has to stand in the working directory.
"""

from functools import partial
from pathlib import Path

import torch
from lavis.models import eva_vit
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import BertConfig, BertModel

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
    """A tiny OPT whose tokenizer puts </s> in front, as OPT's does."""
    redraw(tiny_opt()).save_pretrained(folder)
    tokenizer = tiny_tokenizer(bos="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    tokenizer.save_pretrained(folder)
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
    pass


class TinyBlip2Qformer(TinyVision, Blip2Qformer):
    pass


def lavis_blip2_opt(folder: Path, monkeypatch) -> Blip2OPT:
    """LAVIS's second stage in float32 and evaluation mode; `folder` becomes the working directory."""
    _stand_in(folder, monkeypatch)
    model = TinyBlip2OPT(num_query_token=QUERIES, opt_model=str(opt_folder(folder / "opt")), prompt="a photo of")
    model.opt_model.float()  # LAVIS loads it in half precision, which its CPU path cannot run
    return _drawn(model)


def lavis_blip2(folder: Path, monkeypatch) -> Blip2Qformer:
    """LAVIS's first stage in evaluation mode; `folder` becomes the working directory."""
    _stand_in(folder, monkeypatch)
    return _drawn(TinyBlip2Qformer(num_query_token=QUERIES, embed_dim=8))


def _stand_in(folder: Path, monkeypatch):
    bert_folder(folder / "bert-base-uncased")
    monkeypatch.chdir(folder)
    torch.manual_seed(0)


def _drawn(model):
    redraw(model)
    with torch.no_grad():  # so that a norm or bias in the wrong place shows
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def hugging_face_qformer_name(name: str) -> str:
    """LAVIS's `Qformer.bert.…` -> the name in Hugging Face's Blip2QFormerModel."""
    name = name.removeprefix("Qformer.bert.")
    name = name.replace("embeddings.LayerNorm", "layernorm")
    return name.replace("attention.self.", "attention.attention.")
