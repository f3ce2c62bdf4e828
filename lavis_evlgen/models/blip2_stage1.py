"""BLIP-2's first stage on any ViT and any BERT: LAVIS's `blip2` with the parts that it cannot choose replaced.

The losses (contrastive, matching, captioning), generation and features are LAVIS's, inherited. Its second stage is
`arch: evlgen` with `connector: qformer` and `connector_init:` a checkpoint of this one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from lavis.common.registry import registry
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from torch import Tensor, nn
from transformers import BertTokenizer

from lavis_evlgen.compat.lavis_bridge import on_this_rank_alone
from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.as_trained import StartSettings, weights_of
from lavis_evlgen.config.keys import key, keys_of
from lavis_evlgen.config.limits import LARGEST
from lavis_evlgen.models.connectors.base import bert_config, bert_folder, bert_state, is_random
from lavis_evlgen.models.connectors.qformer import NUM_QUERY_TOKEN
from lavis_evlgen.models.vision.encoder import VisionSettings, vision_of
from lavis_evlgen.weights.kept_sizes import is_kept
from lavis_evlgen.weights.sources import WeightsError, check_floating, load_from_hub, on_meta
from lavis_evlgen.weights.trainable import load_checkpoint_file

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "models"
LOSSES = ("loss", "loss_itc", "loss_itm", "loss_lm")


@dataclass(kw_only=True)
class Blip2Stage1Settings(VisionSettings, StartSettings):
    """The model section of `arch: evlgen_blip2`."""

    load_finetuned: bool = key("accepted from LAVIS configs; must be false: use pretrained", False)
    connector_init: str = key(
        "BERT that the Q-Former starts from and whose tokenizer reads the captions (id or folder)", "random"
    )
    num_query_token: int | None = key(
        "learned queries", NUM_QUERY_TOKEN, at_least=1, at_most=LARGEST["num_query_token"]
    )
    embed_dim: int = key("width of the contrastive space", 256, at_least=1, at_most=LARGEST["embed_dim"])
    max_txt_len: int = key("tokens of a caption; longer ones are cut", 32, at_least=3, at_most=LARGEST["max_txt_len"])
    dropout: float | None = key("dropout of the Q-Former; left out: the BERT's", None, at_least=0.0, at_most=0.99)


@registry.register_model("evlgen_blip2")
class Blip2Stage1(Blip2Qformer):
    """BLIP-2's first stage (Li et al. 2023, section 3.2). Types: pretrain, quickstart."""

    PRETRAINED_MODEL_CONFIG_DICT = {
        name: str(CONFIGS / f"blip2_stage1_{name}.yaml") for name in ("pretrain", "quickstart")
    }
    Settings = Blip2Stage1Settings

    def __init__(self, vision: nn.Module, bert: str, dropout: float | None = None, **kwargs):
        """vision: a VisionEncoder; bert: folder of a BERT with vocab.txt; kwargs: num_query_token, embed_dim, …"""
        # a tuple, because LAVIS's constructor asks for its parts before it is a module that can hold any
        self._given = (vision, bert, dropout)
        vision.num_features = vision.width  # LAVIS's name
        super().__init__(freeze_vit=False, **kwargs)  # it is frozen already, in one place
        del self._given
        heads = self.Qformer.config.num_attention_heads
        # shows in no shape of the weights, and the second stage must know
        self.register_buffer("num_attention_heads", torch.tensor(heads))

    def init_tokenizer(self) -> BertTokenizer | range:
        bert = self._given[1]
        if is_kept(bert):  # nothing but the number of its words is asked for, and [DEC] is one more
            return range(bert_config(bert)["vocab_size"] + 1)
        if not (Path(bert) / "vocab.txt").exists():
            raise WeightsError(f"connector_init: {bert} has no vocab.txt, the words of its tokenizer")
        # it reads config.json too, and a BERT's tokenizer needs no code of the folder's
        tokenizer = load_from_hub(BertTokenizer.from_pretrained, bert, "connector_init", trust_remote_code=False)
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        return tokenizer

    def init_vision_encoder(self, *args) -> tuple[nn.Module, nn.Module]:
        vision = self._given[0]
        return vision, LayerNorm(vision.width)

    def init_Qformer(self, num_query_token: int, vision_width: int, cross_attention_freq: int = 2):
        _, folder, dropout = self._given
        sizes = bert_config(folder)
        if dropout is not None:
            sizes |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
        if on_meta():  # LAVIS makes room for the tokenizer's own words, with statistics of weights that are not there
            sizes["vocab_size"] = len(self.tokenizer)
        config = BertConfig(
            **sizes
            | {
                "encoder_width": vision_width, "query_length": num_query_token,
                "add_cross_attention": True, "cross_attention_freq": cross_attention_freq,
            }
        )  # fmt: skip
        qformer = BertLMHeadModel(config)
        if not on_meta():
            _load_bert(qformer, bert_state(folder), folder)
        query_tokens = nn.Parameter(torch.empty(1, num_query_token, config.hidden_size))
        nn.init.normal_(query_tokens, std=config.initializer_range)
        return qformer, query_tokens

    def forward(self, samples: dict) -> dict[str, Tensor]:
        """samples: image (B, 3, H, W), text_input list[str], B >= 2 -> loss and its three terms, means over B."""
        if len(samples["image"]) < 2:
            raise ConfigError(
                "BLIP-2's first stage contrasts the pictures of a rank's batch and needs 2 of them: raise "
                "run.batch_size_train"
            )
        out = super().forward(samples)
        return {name: out[name] for name in LOSSES}

    @torch.no_grad()
    def validation_losses(self, samples: dict) -> dict[str, float]:
        """Losses of one batch of this rank, with the same negatives every time it is asked."""
        gpu = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpu), on_this_rank_alone():
            torch.manual_seed(0)
            return {name: value.item() for name, value in self(samples).items()}

    def generate(self, samples: dict, length_penalty: float = 1.0, repetition_penalty: float = 1.0, **search):
        """Captions by the Q-Former itself: LAVIS's `generate` (num_beams, max_length, min_length, top_p, …)."""
        if (length_penalty, repetition_penalty) != (1.0, 1.0):
            raise ConfigError("LAVIS's first stage knows no length_penalty and no repetition_penalty: leave both at 1")
        return super().generate(samples, **search)

    def load_checkpoint(self, url_or_filename: str):
        """Load trainable weights strictly and safely (no pickled code); raises WeightsError."""
        load_checkpoint_file(self, url_or_filename)

    @classmethod
    def from_config(cls, cfg) -> Blip2Stage1:
        """Build from a LAVIS model config (keys: Settings) and load `pretrained` where given."""
        settings = cls.Settings.read(cfg)
        for name, needed in (("freeze_vit", True), ("load_finetuned", False)):
            if getattr(settings, name) != needed:
                raise ValueError(f"{name}: {getattr(settings, name)} asked; {keys_of(cls)[name].meaning}")
        if is_random(settings.connector_init):
            raise ValueError("connector_init: BLIP-2's first stage needs a BERT, whose tokenizer reads the captions")
        model = cls(
            vision_of(cfg),
            bert_folder(settings.connector_init),
            settings.dropout,
            num_query_token=settings.num_query_token,
            embed_dim=settings.embed_dim,
            max_txt_len=settings.max_txt_len,
        )
        if path := weights_of(cfg):
            model.load_checkpoint(path)
        else:
            logging.info("no model.pretrained: the Q-Former starts from %s", settings.connector_init)
        return model


@torch.no_grad()
def _load_bert(qformer: BertLMHeadModel, state: dict[str, Tensor], source: str):
    """Copy a BERT's weights by name: all of its body, and its word head where it has one.

    What no BERT has stays as it was drawn: cross-attention; the queries' MLPs, which LAVIS then copies from the
    text's. Raises WeightsError.
    """
    own = {**qformer.bert.state_dict(), **{k: v for k, v in qformer.state_dict().items() if k.startswith("cls.")}}
    optional = ("crossattention", "_query.", "cls.", "position_ids")
    missing = [name for name in own if name not in state and not any(part in name for part in optional)]
    if missing:
        raise WeightsError(f"connector_init: {source} lacks {len(missing)} tensors of its BERT, first {missing[0]}")
    check_floating(state, own, f"connector_init: {source}")
    for name, value in own.items():
        if name not in state or name == "embeddings.position_ids":
            continue
        if state[name].shape != value.shape:
            raise WeightsError(
                f"connector_init: {name} is {tuple(state[name].shape)} in {source}, and {tuple(value.shape)} by its "
                "config.json"
            )
        value.copy_(state[name])
