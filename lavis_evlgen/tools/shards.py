"""`evlgen shards`: tar shards from a folder of pictures and a captions file."""

from __future__ import annotations

import sys

from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets.shards.writer import write_shards


def main(args) -> int:
    """Write shards; says what to put into a config, and what was left out."""
    if wrong := [text for text in args.columns if "=" not in text]:
        raise ConfigError(f"--columns {wrong[0]}: write COLUMN=NAME, e.g. image=file")
    found = write_shards(
        args.out, args.images, args.captions, columns=dict(text.split("=", 1) for text in args.columns),
        split=args.split, per_shard=args.per_shard, seed=args.seed, max_bad_fraction=args.max_bad_fraction,
    )  # fmt: skip
    for line in [*map(str, found.unreadable), *found.problems]:
        print(f"left out: {line}", file=sys.stderr)
    left_out = f", {len(found.unreadable)} unreadable images and {len(found.problems)} rows left out"
    print(f"{found.samples} samples{left_out if found.unreadable or found.problems else ''}. In a config:")
    print(f"  datasets.image_shards.shards: {found.shards}")
    return 0
