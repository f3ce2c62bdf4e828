"""`evlgen demo`: its arguments."""

from __future__ import annotations

from pathlib import Path

from lavis_evlgen.compat.environment import require
from lavis_evlgen.config import ConfigError
from lavis_evlgen.media.images import MOST_MEGAPIXELS


def add_command(commands, load):
    """`evlgen demo` among the subcommands; load(args) -> (model, image processor, decoding, device, seed | None)."""
    p = commands.add_parser("demo", help="a page in the browser: caption pictures, ask about them, see their tokens")
    p.add_argument("--run", required=True, metavar="DIR", help="run folder (holds a checkpoint), or a bundle's folder")
    p.add_argument("--checkpoint", help="which checkpoint (default: best, else last)")
    p.add_argument("--pictures", type=Path, metavar="DIR", help="pictures or clips to pick from (default: drawn ones)")
    p.add_argument("--host", default="127.0.0.1", help="address to serve on (127.0.0.1: this machine alone)")
    p.add_argument("--port", type=int, default=7860, help="default: 7860")
    p.add_argument("--max-upload", type=float, default=20.0, metavar="MB", help="largest upload (20)")
    p.add_argument("--max-pixels", type=float, default=40.0, metavar="MILLIONS",
                   help="most pixels of a picture or of one frame, in millions (40)")  # fmt: skip
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda", "auto"), help="default: cpu")
    p.set_defaults(run_command=lambda args: demo(args, load))


def demo(args, load) -> int:
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
