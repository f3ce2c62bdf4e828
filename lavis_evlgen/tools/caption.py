"""`evlgen caption`: captions of pictures or clips by a trained model."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lavis_evlgen.errors import one_line
from lavis_evlgen.media.errors import UnreadableImage
from lavis_evlgen.media.images import open_image
from lavis_evlgen.media.video import takes_clips
from lavis_evlgen.tools.load_trained import load


def main(args) -> int:
    """Print `path<TAB>caption` for each picture; exit code 1 when one could not be read."""
    model, vis, decoding, device, _ = load(args)
    decoding |= {"num_beams": args.num_beams} if args.num_beams else {}
    failed = 0
    for path in args.images:
        try:
            image = _pixels(vis, path)[None].to(device)
        except UnreadableImage as error:
            print(f"evlgen caption: {error}", file=sys.stderr)
            failed += 1
            continue
        samples = {"image": image} | ({} if args.prompt is None else {"prompt": args.prompt})
        with torch.inference_mode():
            text = model.generate(samples, **decoding)[0]
        print(f"{path}\t{' '.join(text.split())}")  # a line a picture, whatever an untrained model says
    return int(failed > 0)


def _pixels(vis, path: str):
    """(3, H, W) of a picture or, by a video processor, (3, T, H, W) of a clip; raises UnreadableImage."""
    if not takes_clips(vis):
        return vis(open_image(path, vis))
    if not Path(path).is_file():
        raise UnreadableImage(path, "no such file")
    try:
        return vis(path)
    except (RuntimeError, OSError, ValueError) as error:
        raise UnreadableImage(path, f"the model captions clips, and as a clip: {one_line(error)}") from error
