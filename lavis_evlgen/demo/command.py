"""`evlgen demo`: what it is asked for, checked."""

from __future__ import annotations

from lavis_evlgen.compat.environment import require
from lavis_evlgen.config import ConfigError
from lavis_evlgen.media.images import MOST_MEGAPIXELS
from lavis_evlgen.tools.load_trained import load


def main(args) -> int:
    """Load the model and serve the page until interrupted."""
    require("gradio", "demo")  # before a model that may take minutes to load
    for name, value in (("--max-upload", args.max_upload), ("--max-pixels", args.max_pixels)):
        if not 0 < value < 1e6:
            raise ConfigError(f"{name}: {value:g} must be above 0 and below a million")
    if args.max_pixels > MOST_MEGAPIXELS:
        raise ConfigError(f"--max-pixels: {args.max_pixels:g}; no picture of more than {MOST_MEGAPIXELS} is decoded")
    if not 0 < args.port < 65536:
        raise ConfigError(f"--port: {args.port} is none; give 1 to 65535")
    model, processor, decoding, device, _ = load(args)
    if not hasattr(model, "connector"):
        raise ConfigError(f"{type(model).__name__} has no connector: evlgen demo shows runs of arch evlgen")
    from lavis_evlgen.demo.page import Visitors, start
    from lavis_evlgen.demo.uploads import Limits

    visitors = Visitors(model.eval(), processor, decoding, device, Limits(args.max_upload, args.max_pixels))
    start(visitors, args.host, args.port, args.pictures)
    return 0
