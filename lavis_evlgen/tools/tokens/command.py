"""`evlgen tokens`: pictures of what each token of the visual prompt stands for. docs/tokens.md."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch

from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets import UnreadableImage
from lavis_evlgen.datasets.questions import TEMPLATE
from lavis_evlgen.media.images import open_image
from lavis_evlgen.tools.load_trained import load
from lavis_evlgen.tools.tokens import maps as token_maps
from lavis_evlgen.tools.tokens import plots


def main(args) -> int:
    """Load the model and draw."""
    return draw(args, *load(args))


def draw(args, model, processor, decoding: dict, device: torch.device, seed: int | None) -> int:
    """Draw each picture and print the files; exit code 1 when one could not be read."""
    if not hasattr(model, "connector"):
        raise ConfigError(f"{type(model).__name__} has no connector: evlgen tokens draws runs of arch evlgen")
    if args.before and seed is None:
        raise ConfigError("--before: a bundle does not say what its connector started from; give --run the run folder")
    if args.question:
        check_questions(args, model)
    before = token_maps.untrained(model.visual_encoder, model.config, seed) if args.before else None
    failed, stems = 0, _stems(args.images)
    for path, stem in zip(args.images, stems, strict=True):
        try:
            image = processor(open_image(path, processor))[None].to(device)
        except UnreadableImage as error:
            print(f"evlgen tokens: {error}", file=sys.stderr)
            failed += 1
            continue
        for written in draw_one(args, model, before, image, processor, decoding, args.out / stem):
            print(written)
    return int(failed > 0)


def check_questions(args, model):
    """Raises ConfigError where a picture of the tokens for a question would not show what it asks for."""
    if not model.reads_questions:
        raise ConfigError(
            "--question: this model merges the same tokens whatever is asked; train one with model.condition=question"
        )
    if args.words:
        raise ConfigError("--words draws the words of a caption; leave it or --question out")


def draw_one(args, model, before, image, processor, decoding: dict, stem: Path) -> list[Path]:
    """The files of one picture (1, 3, H, W). stem: folder and name without ending."""
    picture = token_maps.shown(image[0], processor)
    maps, words = (_for_questions if args.question else _for_caption)(args, model, image, decoding, bool(before))
    after = list(maps.values())[-1]
    if before:
        maps = {"before training": token_maps.layer_maps(model.visual_encoder, *before, image), **maps}
    files = plots.overview(
        _named(stem, "tokens"), picture, {title: found[-1] for title, found in maps.items()}, args.style, words
    )
    if args.layers:
        for title, found in maps.items():
            number = args.question.index(title) + 1 if title in args.question and len(args.question) > 1 else ""
            name = "layers_before" if title == "before training" else f"layers{number and f'_{number}'}"
            step = "merge" if token_maps.merges_first(model.connector) else "layer"
            files += plots.layers_strip(_named(stem, name), picture, found, args.style, step=step)
    if args.words:
        found = token_maps.words_of(model, image, words)
        if found:
            files += plots.words_sheet(_named(stem, "words"), picture, after[-1], found)
        else:
            logging.warning("%s: the caption is empty, so there is no word to draw", stem.name)
    return files


def _for_caption(args, model, image, decoding: dict, before: bool) -> tuple[dict[str, list], str]:
    """{title: maps}, and the model's caption."""
    maps = token_maps.layer_maps(model.visual_encoder, model.ln_vision, model.connector, image)
    with torch.inference_mode():
        caption = " ".join(model.generate({"image": image}, **decoding)[0].split())
    return {"trained" if before else "tokens": maps}, caption


def _for_questions(args, model, image, decoding: dict, before: bool) -> tuple[dict[str, list], str]:
    """{question: maps}, and each question with the model's answer."""
    maps, said = {}, []
    for question in args.question:
        condition = model.language_model.mean_embeddings([question])
        parts = (model.visual_encoder, model.ln_vision, model.connector)
        maps[question] = token_maps.layer_maps(*parts, image, condition)
        with torch.inference_mode():
            answer = model.predict_answers({"image": image, "text_input": question}, prompt=TEMPLATE)[0]
        said.append(f"{question} {' '.join(answer.split())}")
    return maps, "  ".join(said)


def _stems(images: list[str]) -> list[str]:
    """File names without ending, numbered where two are alike."""
    names = [Path(path).stem for path in images]
    return [f"{name}_{names[: n + 1].count(name)}" if names.count(name) > 1 else name for n, name in enumerate(names)]


def _named(stem: Path, what: str) -> Path:
    return stem.with_name(f"{stem.name}_{what}")
