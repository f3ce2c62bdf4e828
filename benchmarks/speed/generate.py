"""Captions a second: greedy and beam search, for several batch sizes, and what the picture's own part of it is.

    python -m benchmarks.speed.generate --scale opt-2.7b --batch 1 8 64       # on a GPU; also vicuna-7b
    python -m benchmarks.speed.generate --scale quickstart --batch 1 8        # on a CPU

Random weights of the given sizes, nothing is downloaded. Every caption has exactly --tokens new tokens: random weights
would end captions anywhere. Greedy, beam 5 and the visual prompt alone (ViT and connector) run in turn.
"""

from __future__ import annotations

import torch

from benchmarks.common.random_models import build, samples, scales
from benchmarks.common.timing import DTYPES, alternate, parser, write
from lavis_evlgen.models.evlgen import EVLGen

SEARCHES = {"greedy": 1, "beam 5": 5}


def calls_of(model: EVLGen, batch: dict, tokens: int) -> dict:
    """What is compared: captions of `tokens` new tokens by each search, and the visual prompt that all begin with."""
    length = {"max_length": tokens, "min_length": tokens}

    def caption(beams: int):
        return lambda: model.generate(batch, num_beams=beams, **length)

    calls = {name: caption(beams) for name, beams in SEARCHES.items()}
    return calls | {"visual prompt": lambda: model.visual_prompt(batch["image"])}


def measure(model: EVLGen, scale, size: int, args) -> dict:
    """One row: seconds of a batch of `size` pictures, and captions a second."""
    device = torch.device(args.device)
    batch = samples(scale, size, device)
    with torch.no_grad():
        times = alternate(calls_of(model, batch, args.tokens), device, args.repetitions, args.seconds)
    rates = {name: size / times[name]["median"] for name in SEARCHES}
    print(size, {name: f"{rate:.3g} captions/s" for name, rate in rates.items()}, flush=True)
    same = {"scale": args.scale, "dtype": args.dtype, "tokens": args.tokens}
    return {**same, "batch": size, "seconds": times, "captions_per_s": rates}


def main():
    args_of = parser(__doc__, repetitions=9, seconds=60)
    on_gpu = torch.cuda.is_available()
    args_of.add_argument("--scale", choices=scales(), default="opt-2.7b" if on_gpu else "quickstart")
    args_of.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64] if on_gpu else [1, 8], help="pictures")
    args_of.add_argument("--tokens", type=int, default=20, help="new tokens of every caption (20)")
    args_of.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the ViT and the language model (bf16)")
    args = args_of.parse_args()
    scale = scales()[args.scale]
    model = build(scale, args.dtype, torch.device(args.device)).eval()
    write(f"generate-{args.scale}", args, [measure(model, scale, size, args) for size in args.batch])


if __name__ == "__main__":
    main()
