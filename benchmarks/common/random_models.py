"""EVLGens of given sizes with random weights, built from numbers: nothing is downloaded, time and memory are real."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from lavis_evlgen.models.connectors.tomeformer import TomeFormerConnector
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.evlgen_video import EVLGenVideo
from lavis_evlgen.models.language.model import LanguageModel
from lavis_evlgen.models.precision import DTYPES
from lavis_evlgen.models.vision.encoder import VisionEncoder, _LinspaceOnCPU, eva_clip_g, wrap_hugging_face
from lavis_evlgen.models.vision.temporal import TemporalVision
from lavis_evlgen.nn import TomeFormerConfig


@dataclass(frozen=True)
class Scale:
    """Sizes of one model. vit: None for EVA-CLIP-g, or a Hugging Face config; connector: TomeFormerConfig fields."""

    llm: PretrainedConfig
    vit: PretrainedConfig | None = None
    connector: dict = field(default_factory=dict)
    image_size: int = 224


def scales() -> dict[str, Scale]:
    """opt-2.7b and vicuna-7b are the paper's; quickstart is projects/evlgen/quickstart.yaml; tiny is for a look."""
    small_vit = {"image_size": 224, "patch_size": 14, "hidden_size": 384, "num_attention_heads": 6}
    smollm2 = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    }  # fmt: skip
    tiny = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2
    }
    opt = {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}
    opt["word_embed_proj_dim"] = 2560
    minilm = {"hidden_size": 384, "num_layers": 6, "num_heads": 12, "intermediate_size": 1536}
    minilm["tome_r"] = {"target": 29}
    tiny_body = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "tome_r": 4}
    tiny_vit = {"image_size": 28, "patch_size": 7, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "opt-2.7b": Scale(OPTConfig(**opt)),
        "vicuna-7b": Scale(LlamaConfig()),
        "quickstart": Scale(LlamaConfig(**smollm2), Dinov2Config(**small_vit, num_hidden_layers=12), minilm),
        "tiny": Scale(LlamaConfig(**tiny), Dinov2Config(**tiny_vit), tiny_body, 28),
    }


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: a caption of N letters is N tokens."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([], trainer)
    words = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **words)


def build(
    scale: Scale,
    precision: str,
    device: torch.device,
    attention: str = "sdpa",
    seed: int = 0,
    frames: int | None = None,
) -> EVLGen:
    """The model on `device`, in training mode; frozen parts in `precision`, what trains in float32.

    frames: length of the clips of an EVLGenVideo; None for an EVLGen.
    """
    torch.manual_seed(seed)
    with torch.device(device):  # weights are drawn where they are used: a processor would take minutes
        vision = vision_encoder(scale, precision)
        body = TomeFormerConfig(num_tokens=vision.num_tokens, protected=vision.protected, **scale.connector)
        connector = TomeFormerConnector(vision.width, body)
        dtype = DTYPES[precision]
        llm = AutoModelForCausalLM.from_config(scale.llm, torch_dtype=dtype, attn_implementation=attention)
        language = LanguageModel(llm.to(dtype), tokenizer())
        if frames is None:
            model = EVLGen(vision, connector, language)
        else:
            model = EVLGenVideo(TemporalVision(vision), connector, language, num_frames=frames)
    return model.to(device).train()


def vision_encoder(scale: Scale, precision: str) -> VisionEncoder:
    """Frozen, on the default device."""
    if scale.vit is not None:
        return wrap_hugging_face(Dinov2Model(scale.vit), scale.image_size, precision, None)
    with _LinspaceOnCPU():  # LAVIS asks for numbers, which the meta device has not
        vit: nn.Module = eva_clip_g(scale.image_size)
    return VisionEncoder(vit, vit.num_features, (scale.image_size // 14) ** 2 + 1, 1, precision)


def samples(
    scale: Scale,
    batch: int,
    device: torch.device,
    seed: int = 0,
    tokens: int | None = None,
    frames: int | None = None,
    texts: int = 1,
) -> dict:
    """Pictures of noise, or clips of `frames`, with `texts` captions each of `tokens` tokens without BOS and end.

    tokens: None for 8 to 20, as COCO's are.
    """
    numbers = random.Random(seed)
    captions = ["a" * (tokens or numbers.randint(8, 20)) for _ in range(batch * texts)]
    generator = torch.Generator().manual_seed(seed)
    times = () if frames is None else (frames,)
    image = torch.randn(batch, 3, *times, scale.image_size, scale.image_size, generator=generator)
    counts = {} if texts == 1 else {"texts_per_image": [texts] * batch}
    return {"image": image.to(device), "text_input": captions, **counts}


def add_step_arguments(parser: argparse.ArgumentParser, dtype: bool = True):
    """--scale, --batch and --dtype of a benchmark of training steps: full size on a GPU, else the quickstart's."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--scale", choices=scales(), default="opt-2.7b" if on_gpu else "quickstart")
    parser.add_argument("--batch", type=int, default=64 if on_gpu else 4, help="pictures (GPU 64, CPU 4)")
    if dtype:
        parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16" if on_gpu else "fp32",
                            help="of autocast and of what is frozen")  # fmt: skip
