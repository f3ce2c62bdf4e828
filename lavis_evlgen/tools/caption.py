"""`evlgen caption`: captions of pictures or clips by a trained model, or answers to a question about them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets.questions import TEMPLATE
from lavis_evlgen.errors import one_line
from lavis_evlgen.media.errors import UnreadableImage
from lavis_evlgen.media.images import decode_image, open_image, to_rgb
from lavis_evlgen.media.video import VideoFile, takes_clips
from lavis_evlgen.tools.load_trained import load

MANY = (".csv", ".tsv", ".jsonl", ".tar")
MANY_ONLY = ("batch_size", "workers", "column", "folder", "caption_key")  # arguments; of cli.py, --images is `folder`


def main(args) -> int:
    """Print `path<TAB>caption` for each picture, or write many to a file; exit code 1 when one could not be read."""
    if args.out or args.out_shards:
        if args.question is not None:
            raise ConfigError("--question answers about a few pictures and prints; leave it or --out out")
        from lavis_evlgen.tools.captioning.command import caption_many  # what a few pictures need not wait for

        return caption_many(args)
    _check_few(args)
    model, vis, decoding, device, _ = load(args)
    decoding |= {"num_beams": args.num_beams} if args.num_beams else {}
    failed = 0
    for path in args.images:
        try:
            image = pixels(vis, path)[None].to(device)
        except UnreadableImage as error:
            print(f"evlgen caption: {error}", file=sys.stderr)
            failed += 1
            continue
        if args.question is None:
            said = captions_of(model, image, args.prompt, decoding)[0]
        else:
            said = _answer(model, image, args.question, decoding)
        print(f"{path}\t{said}")
    return int(failed > 0)


def _answer(model, image: torch.Tensor, question: str, decoding: dict) -> str:
    """The answer about one picture (1, 3, H, W) or clip, in one line; of `decoding`, what answers have too."""
    search = {key: decoding[key] for key in ("num_beams", "repetition_penalty") if key in decoding}
    samples = {"image": image, "text_input": question}
    with torch.inference_mode():
        return " ".join(model.predict_answers(samples, prompt=TEMPLATE, **search)[0].split())


def _check_few(args):
    """Raises ConfigError for what needs --out: without it, pictures are captioned one by one and printed."""
    given = next((name for name in MANY_ONLY if getattr(args, name) is not None), None)
    if given is not None:
        option = "--images" if given == "folder" else f"--{given.replace('_', '-')}"
        raise ConfigError(f"{option} is for many pictures at once: name their file by --out captions.jsonl")
    of_many = next((path for path in args.images if Path(path).is_dir() or path.endswith(MANY)), None)
    if of_many is not None:
        raise ConfigError(f"{of_many} holds or names many pictures: name the file of their captions by --out X.jsonl")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("several processes share the work of --out FILE; without it, start one")


class Encoded(NamedTuple):
    """A picture or clip as the content of a file; `name` says which in errors."""

    content: bytes
    name: str


def pixels(vis, picture) -> torch.Tensor:
    """(3, H, W) of a picture or, by a video processor, (3, T, H, W) of a clip.

    picture: a path, an Encoded or, by an image processor, a PIL picture. Raises Unreadable.
    """
    if isinstance(picture, Image.Image):
        return vis(to_rgb(picture))
    if isinstance(picture, Encoded):
        return vis(VideoFile(*picture) if takes_clips(vis) else decode_image(*picture, vis))
    if not takes_clips(vis):
        return vis(open_image(picture, vis))
    if not Path(picture).is_file():
        raise UnreadableImage(picture, "no such file")
    try:
        return vis(picture)
    except (RuntimeError, OSError, ValueError) as error:
        raise UnreadableImage(picture, f"the model captions clips, and as a clip: {one_line(error)}") from error


def captions_of(model, image: torch.Tensor, prompt: str | None, decoding: dict) -> list[str]:
    """Captions, a line each whatever an untrained model says, of image (B, 3, H, W) or (B, 3, T, H, W).

    prompt: what they begin with, None: the model's; decoding: arguments of its `generate`.
    """
    samples = {"image": image} | ({} if prompt is None else {"prompt": prompt})
    with torch.inference_mode():
        return [" ".join(text.split()) for text in model.generate(samples, **decoding)]
