"""BLIP-2's connector: learned queries that attend to the visual tokens, LAVIS's own Q-Former inside.

Parameter names below `connector.` are LAVIS's (`query_tokens`, `Qformer.bert...`), so that weights of LAVIS's
`blip2` (stage 1) and `blip2_opt` load by name.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from torch import Tensor, nn

from lavis_evlgen.config.keys import key
from lavis_evlgen.config.limits import LARGEST
from lavis_evlgen.models.connectors.base import (
    SIZES,
    BertSettings,
    Connector,
    VisualPrompt,
    bert_config,
    bert_folder,
    bert_state,
    is_random,
)
from lavis_evlgen.weights.sources import WeightsError, check_floating, on_meta, read_state_dict, resolve


@dataclass(kw_only=True)
class QFormerSettings(BertSettings):
    num_query_token: int | None = key(
        "tokens that qformer (32) or avgpool (29) leaves", 32, at_least=1, at_most=LARGEST["num_query_token"]
    )


NUM_QUERY_TOKEN = QFormerSettings.num_query_token
BERT_KEYS = ("hidden_size", "num_attention_heads", "intermediate_size", "layer_norm_eps", "hidden_act")
# in a stage-1 checkpoint: what reads and writes text, which the second stage drops
TEXT_ONLY = re.compile(
    r"Qformer\.(cls\.|bert\.embeddings\.(word_embeddings|position_embeddings|position_ids)"
    r"|bert\.encoder\.layer\.\d+\.(intermediate|output)\.)"
)
NOT_IN_A_BERT = ("query_tokens", "crossattention")


class QFormerConnector(Connector):
    """(B, L, D_v) -> (B, num_query_token, D_c), as BLIP-2's second stage uses it (Li et al. 2023, section 3)."""

    def __init__(
        self, input_width: int, num_query_token: int = NUM_QUERY_TOKEN, cross_attention_freq: int = 2, **sizes
    ):
        """cross_attention_freq: every so many layers read visual tokens. sizes: fields of Hugging Face's BertConfig;
        what is left out is bert-base."""
        # words and positions are dropped below: they need not be drawn first
        sizes = {"hidden_act": "gelu", **sizes, "vocab_size": 1, "max_position_embeddings": 1}
        config = BertConfig(
            **sizes,
            encoder_width=input_width,
            add_cross_attention=True,
            cross_attention_freq=cross_attention_freq,
            query_length=num_query_token,
        )
        super().__init__(config.hidden_size, num_query_token)
        self.Qformer = BertLMHeadModel(config)
        self.Qformer.cls = None
        embeddings = self.Qformer.bert.embeddings
        embeddings.word_embeddings = embeddings.position_embeddings = None
        embeddings.register_buffer("position_ids", torch.zeros(1, 0, dtype=torch.long), persistent=False)
        for layer in self.Qformer.bert.encoder.layer:
            layer.intermediate = layer.output = None
        self.sizes = {name: getattr(config, SIZES[name]) for name in SIZES if name != "max_positions"}
        self.query_tokens = nn.Parameter(torch.empty(1, num_query_token, config.hidden_size))
        nn.init.normal_(self.query_tokens, std=config.initializer_range)

    def forward(
        self, visual_tokens: Tensor, condition=None, return_source: bool = False, features: Tensor | None = None
    ) -> VisualPrompt:
        """There is no source map: a query reads every patch."""
        output = self.Qformer.bert(
            query_embeds=self.query_tokens.expand(len(visual_tokens), -1, -1),
            encoder_hidden_states=visual_tokens,
            use_cache=False,
            return_dict=True,
        )
        return VisualPrompt(output.last_hidden_state)  # (B, Q, D_c)

    def load_bert(self, state: dict[str, Tensor]):
        """Start from a BertModel's weights (`bert_state`); the queries' MLPs start as the text's.

        Cross-attention and queries, which no BERT has, keep their random start, as in BLIP-2's first stage.
        """
        found = {}
        for name in self.state_dict():
            if not any(part in name for part in NOT_IN_A_BERT):
                found[name] = state.get(name.removeprefix("Qformer.bert.").replace("_query.", "."))
        self._copy(found, "the BERT weights")

    def load_blip2(self, state: dict[str, Tensor], source: str):
        """Start from a checkpoint of LAVIS's `blip2` (stage 1) or `blip2_opt`, with the `ln_vision` it was behind.

        What only stage 1 has is left out, and so are `opt_proj` and frozen weights. Raises WeightsError.
        """
        what = f"BLIP-2 checkpoint {source}"
        own = self.state_dict()
        strange = [k for k in state if k.startswith("Qformer.") and k not in own and not TEXT_ONLY.match(k)]
        if strange:
            raise WeightsError(
                f"connector_init: {what} has {strange[0]}, which has no place in a Q-Former of "
                f"{len(self.Qformer.bert.encoder.layer)} layers; set model.num_layers to the checkpoint's"
            )
        self._copy({name: state.get(name) for name in own}, what)
        norm = {name: state.get(f"ln_vision.{name}") for name in ("weight", "bias")}
        if any(value is None for value in norm.values()):
            raise WeightsError(f"connector_init: {what} lacks ln_vision, the norm that its Q-Former was trained behind")
        self.ln_vision_init = norm

    @torch.no_grad()
    def _copy(self, found: dict[str, Tensor | None], what: str):
        own = self.state_dict()
        missing = [name for name, value in found.items() if value is None]
        if missing:
            raise WeightsError(
                f"connector_init: {len(missing)} of the Q-Former's {len(own)} tensors are not in {what}, first "
                f"{missing[0]}: it has fewer layers than model.num_layers, or is of another kind"
            )
        check_floating(found, own, f"connector_init: {what}")
        for name, value in found.items():
            if value.shape != own[name].shape:
                raise WeightsError(
                    f"connector_init: {name} is {tuple(value.shape)} in {what}, {tuple(own[name].shape)} here: "
                    "model.num_query_token or model.vit_model differs from what it was trained with"
                )
        for name, value in found.items():
            own[name].copy_(value)


def sizes_in(state: dict[str, Tensor], source: str) -> dict:
    """BertConfig fields read off the weights of a BLIP-2 checkpoint.

    The number of heads shows in no shape: our own stage 1 writes it beside the weights; LAVIS's Q-Formers are
    bert-base, whose heads are 64 wide.
    """
    dense = state.get("Qformer.bert.encoder.layer.0.intermediate_query.dense.weight")
    if dense is None:
        raise WeightsError(
            f"connector_init: {source} is no checkpoint of LAVIS's blip2 or blip2_opt: it has no "
            "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight"
        )
    intermediate, hidden = dense.shape
    heads = state.get("num_attention_heads")
    heads = hidden // 64 if heads is None else int(heads)
    return {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}


def build_qformer(vision, cfg: dict) -> QFormerConnector:
    """cfg["connector_init"]: random, a BERT (id or folder), or a BLIP-2 checkpoint of LAVIS (.pth, .safetensors)."""
    settings = QFormerSettings.read(cfg)
    init, queries = settings.connector_init, settings.num_query_token
    dropouts = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), settings.dropout)
    sizes = {"num_hidden_layers": settings.num_layers, **dropouts}
    to_come = on_meta() and init and Path(init).suffix in (".pth", ".safetensors") and not Path(init).exists()
    if to_come:  # counting needs shapes only
        logging.warning("connector_init: %s does not exist yet; counted with the sizes of bert-base, or with model."
                        "connector_sizes where they are given", init)  # fmt: skip
    if to_come or is_random(init):
        given = {SIZES[name]: value for name, value in settings.connector_sizes.items()}
        return QFormerConnector(vision.width, queries, **sizes | given)
    source = resolve(init, "connector_init")
    if Path(source).is_file():
        state = read_state_dict(source, "connector_init")
        connector = QFormerConnector(vision.width, queries, **sizes | sizes_in(state, source))
        connector.load_blip2(state, source)
        return connector
    folder = bert_folder(init)
    bert = bert_config(folder)
    sizes |= {key: bert[key] for key in BERT_KEYS if key in bert}
    connector = QFormerConnector(vision.width, queries, **sizes)
    if not on_meta():
        connector.load_bert(bert_state(folder))
    return connector
