"""What a model says about one picture or clip under given settings: functions of their arguments, no page."""

from __future__ import annotations

import copy
import dataclasses
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets.questions import TEMPLATE
from lavis_evlgen.nn import MergeMap
from lavis_evlgen.nn.merging import max_merges, tokens_after
from lavis_evlgen.tools.tokens import plots
from lavis_evlgen.tools.tokens.maps import TokenMap, shown, token_map

MOST_BEAMS, MOST_LENGTH, MOST_LETTERS = 10, 100, 500


class Refused(ValueError):
    """What was asked cannot be done; the message is for the visitor of the page."""


@dataclass(frozen=True)
class Settings:
    """What a visitor chose. Checked here, whatever a page lets through; raises Refused.

    r: merges in every layer, None: as the model was trained; tokens: how many to leave, in place of r. prompt: what a
    caption begins with, None: the model's. num_beams: 1 is greedy. Lengths count new tokens. question: None asks for a
    caption; else it is asked as the task evlgen_vqa does by default. more: further arguments of `EVLGen.generate`
    (captions only).
    """

    r: int | None = None
    prompt: str | None = None
    num_beams: int = 5
    min_length: int = 1
    max_length: int = 30
    question: str | None = None
    more: dict = field(default_factory=dict)
    tokens: int | None = None

    def __post_init__(self):
        whole = {
            "num_beams": _whole("beams", self.num_beams, 1, MOST_BEAMS),
            "max_length": _whole("longest", self.max_length, 1, MOST_LENGTH),
            "min_length": _whole("shortest", self.min_length, 0, MOST_LENGTH),
        }
        for name, value in whole.items():  # sliders hand out floats
            object.__setattr__(self, name, value)
        if self.min_length > self.max_length:
            raise Refused(f"shortest ({self.min_length} tokens) is above longest ({self.max_length})")
        for name, text in (("prompt", self.prompt), ("question", self.question)):
            if text is not None and len(text) > MOST_LETTERS:
                raise Refused(f"the {name} has {len(text)} letters; at most {MOST_LETTERS}")
        if self.question is not None and not self.question.strip():
            raise Refused("ask a question first")


@dataclass(frozen=True)
class Result:
    """text: caption or answer; asked: what it followed. visual, prompt, said: tokens of the ViT, of the visual prompt
    and of the text. seeing, saying: seconds of ViT and connector, and of the language model. schedule: merges of each
    layer, None without a TomeFormer, and where each picture has its own; folds: of those before the first layer.
    source: from visual tokens to the prompt's; `no_map` says why there is none.
    """

    text: str
    asked: str
    visual: int
    prompt: int
    said: int
    seeing: float
    saying: float
    schedule: tuple[int, ...] | None
    source: MergeMap | None
    no_map: str = ""
    folds: tuple[int, ...] = ()


def largest_r(model) -> int | None:
    """The largest r that still changes something in some layer; None for a connector that does not merge."""
    tomeformer = getattr(model.connector, "tomeformer", None)
    return None if tomeformer is None else max_merges(tomeformer.cfg.num_tokens, tomeformer.cfg.protected)


def tokens_range(model) -> tuple[int, int] | None:
    """The fewest and the most tokens that can be left; None for a connector that does not merge."""
    tomeformer = getattr(model.connector, "tomeformer", None)
    if tomeformer is None:
        return None
    cfg = tomeformer.cfg
    return tokens_after(cfg.num_tokens, [cfg.num_tokens] * cfg.num_layers, cfg.protected), cfg.num_tokens


def with_r(model, r: int):
    """The same model with r merges in every layer, as a view: it shares every weight, and `model` stays as it is.

    Raises Refused for a connector that does not merge, and for an r outside 0 .. largest_r.
    """
    most = largest_r(model)
    if most is None:
        raise Refused(f"{type(model.connector).__name__} does not merge tokens, so it has no r")
    return _merging(model, tome_r=_whole("r", r, 0, most), tokens=None)


def with_tokens(model, tokens: int):
    """The same model, a view as of `with_r`, that leaves so many tokens. Raises Refused as that does."""
    reachable = tokens_range(model)
    if reachable is None:
        raise Refused(f"{type(model.connector).__name__} does not merge tokens, so their number is its own")
    # as a number for all pictures, of a model too in which each has its own
    return _merging(model, tome_r={"target": _whole("tokens", tokens, *reachable)}, tokens=None)


def _merging(model, **changes):
    tomeformer = _view(model.connector.tomeformer)
    tomeformer.cfg = dataclasses.replace(tomeformer.cfg, **changes)
    if model.soft_prompt is not None and tomeformer.cfg.num_output_tokens != len(model.soft_prompt):
        raise Refused(f"the soft prompt of this model has {len(model.soft_prompt)} places, and "
                      f"{tomeformer.cfg.num_output_tokens} tokens would be left")  # fmt: skip
    connector = _view(model.connector, tomeformer=tomeformer)
    connector.num_output_tokens = tomeformer.cfg.num_output_tokens
    return _view(model, connector=connector)


@torch.inference_mode()
def describe(model, image: Tensor, settings: Settings) -> Result:
    """Caption of, or answer about, one picture (1, 3, H, W) or clip (1, 3, T, H, W) on the model's device.

    `model`: an EVLGen in eval mode, left as it was. Raises Refused.
    """
    if settings.tokens is not None:
        model = with_tokens(model, settings.tokens)
    elif settings.r is not None:
        model = with_r(model, settings.r)
    start = _now(image.device)
    question = None if settings.question is None else settings.question.strip()
    prompt, no_map = _visual_prompt(model, image, question)
    seen = _now(image.device)
    decoding = {"num_beams": settings.num_beams, "visual_prompt": prompt}
    lengths = settings.min_length, settings.max_length
    if settings.question is None:
        asked = model.prompt if settings.prompt is None else settings.prompt
        decoding |= dict(zip(("min_length", "max_length"), lengths, strict=True))
        text = model.generate({"prompt": asked}, **{**settings.more, **decoding})[0]
    else:
        asked = TEMPLATE.format(question)
        decoding |= dict(zip(("min_len", "max_len"), lengths, strict=True))
        decoding |= {key: value for key, value in settings.more.items() if key == "repetition_penalty"}
        text = model.predict_answers({"text_input": question}, prompt=TEMPLATE, **decoding)[0]
    end, text = _now(image.device), " ".join(text.split())
    frames = image.shape[2] if image.ndim == 5 else 1
    tomeformer = getattr(model.connector, "tomeformer", None)
    merges = (None, ())
    if tomeformer is not None and tomeformer.cfg.limits is None:
        merges = tuple(tomeformer.cfg.schedule), tuple(tomeformer.cfg.folds)
    tokens = prompt.tokens.shape[1] if prompt.mask is None else int(prompt.mask.sum())
    return Result(
        text, asked, frames * model.visual_encoder.num_tokens, tokens,
        len(model.language_model.text.encode(text)), seen - start, end - seen,
        merges[0], prompt.source, no_map, merges[1],
    )  # fmt: skip


def _visual_prompt(model, image: Tensor, question: str | None):
    """(visual prompt, with its source where there is one; else why there is none)."""
    if getattr(model, "frame_pooling", None) == "connector_mean":
        no_map = "frame_pooling connector_mean: a token has other patches in each frame"
        return model.visual_prompt(image, questions=question), no_map
    prompt = model.visual_prompt(image, return_source=True, questions=question)
    name = type(model.connector).__name__
    return prompt, "" if prompt.source is not None else f"{name} has no source map: each token reads every patch"


def maps_of(result: Result, image: Tensor, protected: int) -> list[TokenMap]:
    """The tokens of each frame of image (1, 3, H, W) or (1, 3, T, H, W); [] where there is no source."""
    if result.source is None:
        return []
    frames = image.shape[2] if image.ndim == 5 else 1
    slot = result.source.slot.cpu()
    # one map for all frames where they were averaged, else a part of it for each
    parts = slot.chunk(frames, 1) if slot.shape[1] == result.visual and frames > 1 else [slot] * frames
    return [token_map(MergeMap(part, result.source.num_slots), protected) for part in parts]


def tokens_picture(result: Result, image: Tensor, processor, protected: int, style: str) -> tuple[Image.Image, str]:
    """(the merged tokens over each frame side by side, what could not be drawn and why); without a map the frames."""
    frames = image[0].transpose(0, 1) if image.ndim == 5 else image  # (T, 3, H, W)
    note = result.no_map
    try:
        pictures = [shown(frame, processor) for frame in frames]
    except ConfigError as error:  # a processor of LAVIS's whose numbers cannot be taken back to colours
        return Image.new("RGB", (2, 2), "white"), f"the picture is not drawn: {error}"
    try:
        maps = maps_of(result, image, protected)
    except ConfigError as error:
        maps, note = [], str(error)
    return _drawn(pictures, maps, style), f"merged tokens are not drawn: {note}" if note else ""


def _drawn(pictures: Sequence[np.ndarray], maps: Sequence[TokenMap], style: str) -> Image.Image:
    figure = Figure(figsize=(4 * len(pictures), 4), dpi=120 if len(pictures) == 1 else 90)
    panels = figure.subplots(1, len(pictures), squeeze=False)[0]
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.02)
    for n, (axes, picture) in enumerate(zip(panels, pictures, strict=True)):
        axes.set_axis_off()
        if maps:
            plots.draw(axes, picture, maps[n], style)
        else:
            axes.imshow(picture)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return Image.open(buffer).convert("RGB")


def facts(result: Result) -> str:
    """Time and tokens, in Markdown."""
    merged = "" if result.schedule is None else f" (merges of each layer: {', '.join(map(str, result.schedule))})"
    if result.folds:
        merged = f" (merges before the first layer: {', '.join(map(str, result.folds))})"
    return (
        f"**{result.visual}** visual tokens → **{result.prompt}** in the prompt{merged} → **{result.said}** said  \n"
        f"**{result.seeing:.2f} s** to see, **{result.saying:.2f} s** to say"
    )


def _whole(name: str, value, least: int, most: int) -> int:
    """`value` as an int. Raises Refused unless it is a whole number from least to most."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise Refused(f"{name}: {value!r} is no whole number")
    if not least <= value <= most:
        raise Refused(f"{name}: {value} is outside {least} to {most}")
    return int(value)


def _view(module: nn.Module, **children: nn.Module) -> nn.Module:
    """A copy that shares everything with `module` but its table of children, where `children` take their places."""
    view = copy.copy(module)
    view._modules = {**module._modules, **children}
    return view


def _now(device: torch.device) -> float:
    """Seconds of a clock that only runs on; on a GPU when all that was asked of it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
