"""Pictures of merged tokens: beside the photo, layer by layer, word by word; PNG, SVG and GIF."""

from __future__ import annotations

import colorsys
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from lavis_evlgen.tools.tokens.maps import TokenMap, Word

_INK, _GREY, _BLUE = "#1f2328", "#5c636d", "#2563a8"
_DPI = 150
_PANEL = 2.6  # inches
_TEXT = {"color": _INK, "fontsize": 9, "parse_math": False}


def overview(stem: Path, picture: np.ndarray, maps: dict[str, TokenMap], style: str, caption: str) -> list[Path]:
    """The photo, each of `maps` (title -> map) beside it, and the sizes of their tokens; the caption below.

    picture: (H, W, 3) in 0..1. Writes stem.png and stem.svg.
    """
    figure, panels = _row(len(maps) + 2, bottom=0.3)
    _photo(panels[0], picture, "what the model sees")
    for axes, (title, found) in zip(panels[1:], maps.items(), strict=False):
        draw(axes, picture, found, style)
        axes.set_title(textwrap.fill(f"{title}: {_tokens(found)}", 40), **_TEXT)
    _sizes(panels[-1], maps)
    figure.supxlabel("\n".join(textwrap.wrap(caption, 100)), **_TEXT)
    return _save(figure, stem)


def layers_strip(
    stem: Path, picture: np.ndarray, maps: Sequence[TokenMap], style: str, seconds: float = 0.8, step: str = "layer"
) -> list[Path]:
    """The map after every `step` side by side (stem.png, stem.svg) and one after the other (stem.gif, `seconds` each).
    """
    titles = ["patches", *(f"after {step} {n}" for n in range(1, len(maps)))]
    figure, panels = _grid(len(maps), title=0.5)
    for axes, title, found in zip(panels, titles, maps, strict=False):
        draw(axes, picture, found, style)
        axes.set_title(f"{title}\n{_tokens(found)}", **{**_TEXT, "fontsize": 8})
    frames = [_frame(picture, found, style, title) for title, found in zip(titles, maps, strict=True)]
    gif = stem.with_name(stem.name + ".gif")
    times = [int(1000 * seconds)] * (len(frames) - 1) + [int(3000 * seconds)]  # the last stays longer
    written = _save(figure, stem)
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=times, loop=0)
    return [*written, gif]


def words_sheet(stem: Path, picture: np.ndarray, found: TokenMap, words: Sequence[Word]) -> list[Path]:
    """For each word, how much it relies on each token, and an outline of the one that it relies on most.

    The share of tokens without a patch ([CLS], registers) stands in the title.
    """
    figure, panels = _grid(len(words), title=0.7)
    whole = _whole(picture, found)
    grey = whole.mean(-1, keepdims=True).repeat(3, -1) * 0.6 + 0.4
    tint = matplotlib.colormaps["viridis"]
    for axes, word in zip(panels, words, strict=False):
        share = word.reliance[found.cells]  # (rows, columns)
        strength = np.kron(share / max(share.max(), 1e-30), np.ones(_patch(picture, found)))[..., None]
        mixed = grey * (1 - 0.75 * strength) + tint(strength[..., 0])[..., :3] * 0.75 * strength
        axes.imshow(mixed, extent=_extent(found))
        most = int(found.cells.ravel()[share.argmax()])
        axes.add_collection(_borders(np.where(found.cells == most, 1, 0), "#d1661b", 1.8, frame=True))
        leading = word.reliance[: found.protected].sum()
        lead = f", no patch {leading:.0%}" if found.protected else ""
        title = f"{word.text}  (p {np.exp(word.log_prob):.2f})\ntoken {share.max():.0%}{lead}"
        axes.set_title(title, **{**_TEXT, "fontsize": 8})
        _frame_off(axes, found)
    return _save(figure, stem)


def draw(axes, picture: np.ndarray, found: TokenMap, style: str):
    """One map: regions in the mean colour of their patches (mean), or tinted and outlined on the photo (outline)."""
    if style == "mean":
        axes.imshow(found.mean_colours(picture), extent=_extent(found), interpolation="nearest")
        axes.add_collection(_borders(found.cells, "white", 0.6))
    else:
        hues = palette(found.num_tokens)[found.cells]  # (rows, columns, 3)
        tint = np.kron(hues, np.ones((*_patch(picture, found), 1)))
        axes.imshow(0.6 * _whole(picture, found) + 0.4 * tint, extent=_extent(found))
        axes.add_collection(_borders(found.cells, "white", 1.0))
    _frame_off(axes, found)


def palette(count: int) -> np.ndarray:
    """(count, 3) colours, neighbours in number far apart in hue."""
    golden = 0.61803398875
    return np.array([colorsys.hsv_to_rgb(n * golden % 1, (0.9, 0.55)[n % 2], (0.95, 0.75)[n // 2 % 2])
                     for n in range(count)])  # fmt: skip


def _borders(cells: np.ndarray, color: str, width: float, frame: bool = False) -> LineCollection:
    """Lines between neighbouring patches of different tokens; `frame`: also where a 1 touches the picture's edge."""
    if frame:
        padded = np.pad(cells, 1)
        upright, level = padded[1:-1, :-1] != padded[1:-1, 1:], padded[:-1, 1:-1] != padded[1:, 1:-1]
        left = top = 0
    else:
        upright, level = cells[:, :-1] != cells[:, 1:], cells[:-1] != cells[1:]
        left = top = 1
    lines = [[(x + left, y), (x + left, y + 1)] for y, x in np.argwhere(upright)]
    lines += [[(x, y + top), (x + 1, y + top)] for y, x in np.argwhere(level)]
    return LineCollection(lines, colors=color, linewidths=width, capstyle="projecting")


def _whole(picture: np.ndarray, found: TokenMap) -> np.ndarray:
    """The part of the picture that patches cover."""
    (rows, columns), (height, width) = found.cells.shape, _patch(picture, found)
    return picture[: rows * height, : columns * width]


def _patch(picture: np.ndarray, found: TokenMap) -> tuple[int, int]:
    return picture.shape[0] // found.cells.shape[0], picture.shape[1] // found.cells.shape[1]


def _extent(found: TokenMap) -> tuple[float, ...]:
    rows, columns = found.cells.shape
    return 0, columns, rows, 0


def _frame_off(axes, found: TokenMap):
    axes.set_xlim(0, found.cells.shape[1])
    axes.set_ylim(found.cells.shape[0], 0)
    axes.set_aspect("equal")
    axes.set_axis_off()


def _tokens(found: TokenMap) -> str:
    with_patches = len(np.unique(found.cells))
    return f"{with_patches} tokens" + (f" + {found.protected} leading" if found.protected else "")


def _photo(axes, picture: np.ndarray, title: str):
    axes.imshow(picture)
    axes.set_axis_off()
    axes.set_title(title, **_TEXT)


def _sizes(axes, maps: dict[str, TokenMap]):
    """Patches of each token, from the largest token to the smallest."""
    for (title, found), color in zip(maps.items(), (_BLUE, "#d1661b"), strict=False):
        sizes = found.sizes()
        axes.step(np.arange(len(sizes) + 1), [*sizes, sizes[-1]], where="post", color=color, linewidth=1.4, label=title)
    axes.set_title("patches in each token", **_TEXT)
    axes.set_xlabel("token, largest first", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_box_aspect(1)
    if len(maps) > 1:
        axes.legend(frameon=False, fontsize=8)


def _row(count: int, bottom: float):
    # higher than its panels are wide: the layout counts a square panel's title only where width is what limits it
    figure = Figure(figsize=(count * _PANEL, _PANEL + 0.8 + bottom), dpi=_DPI, layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _grid(count: int, title: float):
    """At least `count` small panels without axes, five in a row; title: inches above each."""
    columns = min(count, 5)
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * _PANEL * 0.8, rows * (_PANEL * 0.8 + title)), dpi=_DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    return figure, panels


def _frame(picture: np.ndarray, found: TokenMap, style: str, title: str) -> Image.Image:
    figure = Figure(figsize=(3.2, 3.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    draw(axes, picture, found, style)
    axes.set_title(f"{title}: {_tokens(found)}", **_TEXT)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return Image.open(buffer).convert("RGB").quantize(128)


def _save(figure: Figure, stem: Path) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + ending) for ending in (".png", ".svg")]
    FigureCanvasAgg(figure)
    for path in paths:
        figure.savefig(path, facecolor="white")
    return paths
