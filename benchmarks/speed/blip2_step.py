"""Whole training steps of EVLGen and of BLIP-2's two stages, in turn, on the same frozen ViT and language model.

    python -m benchmarks.speed.blip2_step --scale opt-2.7b --batch 64          # on a GPU; also vicuna-7b
    python -m benchmarks.speed.blip2_step --scale quickstart --batch 4

Random weights of the given sizes, nothing is downloaded: TomeFormer, the second stage's Q-Former and the first stage's
have the same BERT inside. The first stage needs no language model; contrast, matching and captioning are its losses.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from benchmarks.common.random_models import Scale, add_step_arguments, build, samples, scales
from benchmarks.common.timing import alternate, parser, write
from benchmarks.speed.step import peak_gb
from lavis_evlgen.models.blip2_stage1 import Blip2Stage1
from lavis_evlgen.models.connectors.qformer import QFormerConnector
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.runners.optim import adamw
from lavis_evlgen.runners.step import TrainingStep

NAMES = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}  # TomeFormer's -> BERT's
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##a")  # a caption of N letters is N tokens


def bert_sizes(scale: Scale) -> dict[str, int]:
    """The BERT inside the scale's TomeFormer, as fields of BertConfig; what is left out is bert-base."""
    return {NAMES.get(key, key): value for key, value in scale.connector.items() if key != "tome_r"}


def bert_folder(folder: Path, sizes: dict[str, int]) -> Path:
    """A BERT with random weights and a vocabulary of bert-base's size."""
    config = BertConfig(**sizes)
    BertModel(config).save_pretrained(folder)
    unused = [f"[unused{n}]" for n in range(config.vocab_size - len(WORDS))]
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *unused]) + "\n")
    return folder


def models(scale: Scale, precision: str, device: torch.device) -> dict[str, torch.nn.Module]:
    """The three, which share what is frozen, in training mode."""
    evlgen, sizes = build(scale, precision, device), bert_sizes(scale)
    vision = evlgen.visual_encoder
    stage2 = EVLGen(vision, QFormerConnector(vision.width, **sizes), evlgen.language_model)
    with tempfile.TemporaryDirectory() as folder:
        stage1 = Blip2Stage1(vision, str(bert_folder(Path(folder), sizes)))
    found = {"EVLGen": evlgen, "BLIP-2, stage 2": stage2, "BLIP-2, stage 1": stage1}
    return {name: model.to(device).train() for name, model in found.items()}


def measure(args) -> dict:
    """The row of one scale."""
    device, scale = torch.device(args.device), scales()[args.scale]
    batch, calls, trains = samples(scale, args.batch, device), {}, {}
    for name, model in models(scale, args.dtype, device).items():
        step = TrainingStep(model, adamw(model, 1e-5, 0.05, 0.999), device, {"amp": args.dtype})
        calls[name] = lambda step=step: step(itertools.repeat(batch))
        trains[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        calls[name]()  # Adam's state is there before memory is measured
    memory = {name: peak_gb(device, call) for name, call in calls.items()}
    row = {"scale": args.scale, "batch": args.batch, "dtype": args.dtype, "trains": trains, "memory_gb": memory}
    return row | {"seconds": alternate(calls, device, args.repetitions, args.seconds)}


def main():
    on_gpu = torch.cuda.is_available()
    args_of = parser(__doc__, repetitions=9 if on_gpu else 3, seconds=120)
    add_step_arguments(args_of)
    args = args_of.parse_args()
    row = measure(args)
    print({name: f"{1e3 * time['median']:.1f} ms" for name, time in row["seconds"].items()})
    write(f"blip2-{args.scale}", args, [row])


if __name__ == "__main__":
    main()
