"""Connectors at the paper's sizes: TomeFormer, LAVIS's Q-Former (stages 2 and 1) and Hugging Face's.

    python -m benchmarks.speed.connector

Random weights. (B, 257, 1408) visual tokens in; bert-base inside. `forward` is eval mode without gradients;
`forward+backward` is training mode (dropout 0.1) with gradients of all weights and of the visual tokens, whose
LayerNorm trains.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from benchmarks.common.timing import DTYPES, alternate, backward_of, parser, write

# LAVIS's two classes by way of the package: its bridges must come before any import of LAVIS
from lavis_evlgen.models.connectors.qformer import BertConfig, BertLMHeadModel, QFormerConnector
from lavis_evlgen.models.connectors.tomeformer import TomeFormerConnector
from lavis_evlgen.nn import TomeFormerConfig
from lavis_evlgen.tools.cost.counting import counted

QUERIES, WORDS = 32, 32  # BLIP-2's; captions are padded to 32 tokens


class Ours(nn.Module):
    """One of this package's connectors as (B, L, D_v) -> (B, L', D_c)."""

    def __init__(self, connector: nn.Module):
        super().__init__()
        self.connector = connector

    def forward(self, visual: Tensor) -> Tensor:
        return self.connector(visual, features=visual).tokens


class HuggingFaceQFormer(nn.Module):
    """transformers' Blip2QFormerModel, as its BLIP-2 calls it."""

    def __init__(self, width: int, **sizes):
        super().__init__()
        config = Blip2QFormerConfig(encoder_hidden_size=width, cross_attention_frequency=2, **sizes)
        self.model = Blip2QFormerModel(config)
        self.query_tokens = nn.Parameter(torch.randn(1, QUERIES, config.hidden_size) * 0.02)

    def forward(self, visual: Tensor) -> Tensor:
        queries = self.query_tokens.expand(len(visual), -1, -1)
        return self.model(query_embeds=queries, encoder_hidden_states=visual).last_hidden_state


class Stage1(nn.Module):
    """The passes that LAVIS's `Blip2Qformer.forward` makes through its Q-Former, without the small heads and losses.

    Pictures; texts; matching, which reads three pairs a picture; captioning, which goes on from the pictures' pass,
    with its word head.
    """

    def __init__(self, width: int, **sizes):
        super().__init__()
        sizes = {"hidden_act": "gelu", "vocab_size": 30523, **sizes}
        self.config = BertConfig(
            **sizes, encoder_width=width, add_cross_attention=True, cross_attention_freq=2, query_length=QUERIES
        )
        self.Qformer = BertLMHeadModel(self.config)
        self.query_tokens = nn.Parameter(torch.randn(1, QUERIES, self.config.hidden_size) * 0.02)

    def forward(self, visual: Tensor) -> tuple[Tensor, ...]:
        batch, bert = len(visual), self.Qformer.bert
        words = torch.arange(WORDS, device=visual.device).expand(batch, -1)  # (B, W)
        mask = torch.ones(3 * batch, QUERIES + WORDS, dtype=torch.long, device=visual.device)
        queries = self.query_tokens.expand(3 * batch, -1, -1)
        same = {"return_dict": True}
        seen = bert(query_embeds=queries[:batch], encoder_hidden_states=visual, use_cache=True, **same)
        text = bert(words, attention_mask=mask[:batch, QUERIES:], **same)
        pairs = {"query_embeds": queries, "encoder_hidden_states": visual.repeat(3, 1, 1), "attention_mask": mask}
        match = bert(words.repeat(3, 1), **pairs, **same)
        goes_on = {"past_key_values": seen.past_key_values, "attention_mask": mask[:batch]}
        said = self.Qformer.cls(bert(words, is_decoder=True, **goes_on, **same).last_hidden_state)  # (B, W, V)
        return seen.last_hidden_state, text.last_hidden_state[:, 0], match.last_hidden_state[:, :QUERIES], said


def tomeformer(width: int, layers: int, tokens: int, target: int, **sizes) -> Ours:
    """Ours, from `tokens` to `target` tokens in as even a schedule as can be."""
    cfg = TomeFormerConfig(num_layers=layers, num_tokens=tokens, tome_r={"target": target}, **sizes)
    return Ours(TomeFormerConnector(width, cfg))


# two names of one size: BERT's, and those of TomeFormerConfig
OUR_NAMES = {"hidden_size": "hidden_size", "num_attention_heads": "num_heads", "intermediate_size": "intermediate_size"}


def connectors(width: int, tokens: int, target: int, sizes: dict, layers: tuple[int, int] = (12, 6)) -> dict:
    """{name: module of (B, L, D_v)}; sizes: hidden_size, num_attention_heads, intermediate_size."""
    ours = {OUR_NAMES[key]: value for key, value in sizes.items()}
    theirs = {**sizes, "num_hidden_layers": layers[0]}
    found = {f"TomeFormer-{n}": tomeformer(width, n, tokens, target, **ours) for n in layers}
    found["Q-Former, stage 2 (LAVIS)"] = Ours(QFormerConnector(width, QUERIES, **theirs))
    found["Q-Former, stage 2 (Hugging Face)"] = HuggingFaceQFormer(width, **theirs)
    found["Q-Former, stage 1 (LAVIS)"] = Stage1(width, **theirs)
    return found


def macs(model: nn.Module, visual: Tensor) -> dict[str, int]:
    """MACs of one forward pass on one picture: of linear layers, and all (attention and merging too)."""
    with sdpa_kernel(SDPBackend.MATH):
        _, (linear, products) = counted(lambda: model.eval()(visual[:1]))
    return {"linear": linear, "all": linear + products}


def call(model: nn.Module, visual: Tensor, dtype: torch.dtype, trains: bool):
    """One forward, or forward and backward, as a function of nothing."""

    def run():
        model.train(trains)
        leaf = visual.detach().requires_grad_(trains)
        with torch.set_grad_enabled(trains):
            with torch.autocast(visual.device.type, dtype, enabled=dtype != torch.float32):
                output = model(leaf)
            if trains:
                backward_of(output)
                model.zero_grad(set_to_none=True)

    return run


def measure(models: dict[str, nn.Module], visual: Tensor, args: argparse.Namespace) -> list[dict]:
    """Two rows of all connectors."""
    costs = {name: macs(model, visual) for name, model in models.items()}
    rows = []
    for passes, trains in (("forward", False), ("forward+backward", True)):
        calls = {name: call(model, visual, DTYPES[args.dtype], trains) for name, model in models.items()}
        times = alternate(calls, visual.device, args.repetitions, args.seconds)
        rows.append({"passes": passes, "batch": len(visual), "dtype": args.dtype, "seconds": times, "macs": costs})
        print(passes, {name: f"{1e3 * t['median']:.1f} ms" for name, t in times.items()}, flush=True)
    return rows


def main():
    on_gpu = torch.cuda.is_available()
    args_of = parser(__doc__, repetitions=20 if on_gpu else 3, seconds=60)
    args_of.add_argument("--batch", type=int, default=64 if on_gpu else 1, help="pictures (GPU 64, CPU 1)")
    args_of.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32", help="of autocast")
    args_of.add_argument("--hidden", type=int, default=768, help="width of the BERT inside, a multiple of 64 (768)")
    args = args_of.parse_args()
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "num_attention_heads": args.hidden // 64, "intermediate_size": 4 * args.hidden}
    models = {name: model.to(args.device) for name, model in connectors(1408, 257, 29, sizes).items()}
    visual = torch.randn(args.batch, 257, 1408, device=args.device)
    write("connector", args, measure(models, visual, args))


if __name__ == "__main__":
    main()
