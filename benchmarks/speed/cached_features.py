"""A training step that runs the frozen ViT, against one that reads its stored tokens (run.cache_features).

    python -m benchmarks.speed.cached_features --scale quickstart --batch 4
    python -m benchmarks.speed.cached_features --scale opt-2.7b --batch 64          # on a GPU; also vicuna-7b

Random weights of the given sizes, nothing is downloaded. Pictures are in memory already: decoding them, which a cache
saves too, is not in the figures. Tokens are read at every step from a file of 64 pictures, which the system keeps in
memory, and reading them is also measured alone. Storing them costs one forward pass of the ViT a picture.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common.random_models import add_step_arguments, build, samples, scales
from benchmarks.common.timing import alternate, parser, write
from benchmarks.speed.step import peak_gb
from lavis_evlgen.datasets.cached_features import CachedFeatures, FeatureStore, FeatureWriter
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.precision import DTYPES
from lavis_evlgen.runners.cost import flops_per_image
from lavis_evlgen.runners.optim import adamw
from lavis_evlgen.runners.step import TrainingStep

PICTURES = 64
WAYS = ("with the ViT", "cached features")


def stored(folder: Path, model: EVLGen, step: TrainingStep, batch: dict, dtype: torch.dtype) -> CachedFeatures:
    """A store of PICTURES, the tokens of those of `batch` over and over."""
    encoder = model.visual_encoder
    with torch.no_grad(), step.autocast():
        tokens = encoder(batch["image"]).to(dtype)  # (B, L, D_v)
    store, names = FeatureStore(folder, "pictures"), [str(n) for n in range(PICTURES)]
    size = [encoder.num_tokens, encoder.width]
    store.create({"tokens": size, "dtype": str(dtype).removeprefix("torch."), "views": 1}, names, {})
    writer = FeatureWriter(store, store.index(), 0)
    for n, name in enumerate(names):
        writer.add(name, {}, tokens[n % len(tokens)])
    writer.close()
    store.merge()
    return CachedFeatures(store, store.index())


def from_store(features: CachedFeatures, batch: dict) -> Iterator[dict]:
    """The batch without end, its tokens read anew each time."""
    for first in itertools.count(step=len(batch["image"])):
        rows = range(first, first + len(batch["image"]))
        yield {**batch, "image": torch.stack([features.tokens(row % PICTURES, 0) for row in rows])}


def measure(args, folder: Path) -> dict:
    """The row of one scale."""
    device, scale = torch.device(args.device), scales()[args.scale]
    model = build(scale, args.dtype, device)
    step = TrainingStep(model, adamw(model, 1e-5, 0.05, 0.999), device, {"amp": args.dtype})
    batch = samples(scale, args.batch, device)
    features = stored(folder, model, step, batch, DTYPES[args.dtype])
    batches = {WAYS[0]: itertools.repeat(batch), WAYS[1]: from_store(features, batch)}
    flops = {name: flops_per_image(step, next(own)) for name, own in batches.items()}
    calls = {name: lambda own=own: step(own) for name, own in batches.items()}
    for call in calls.values():
        call()  # Adam's state is there before memory is measured
    memory = {name: peak_gb(device, call) for name, call in calls.items()}
    calls["reading tokens"] = lambda: next(batches[WAYS[1]])
    tokens = features.tokens(0, 0)
    row = {"scale": args.scale, "batch": args.batch, "dtype": args.dtype, "flops": flops, "memory_gb": memory}
    row["bytes_a_picture"] = tokens.numel() * tokens.element_size()
    return row | {"seconds": alternate(calls, device, args.repetitions, args.seconds)}


def main():
    on_gpu = torch.cuda.is_available()
    args_of = parser(__doc__, repetitions=9 if on_gpu else 5, seconds=120)
    add_step_arguments(args_of)
    args = args_of.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(args, Path(folder))
    print({name: f"{1e3 * time['median']:.1f} ms" for name, time in row["seconds"].items()})
    write(f"cached_features-{args.scale}", args, [row])


if __name__ == "__main__":
    main()
