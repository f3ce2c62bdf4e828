"""Pictures of runs: one run's curves, several runs' side by side, captions beside their references.

Figures are built with matplotlib's objects on the Agg canvas, so nothing global is touched and no display is
needed.
"""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_DPI = 100
_BLUE, _ORANGE, _GREY, _INK = "#2563a8", "#d1661b", "#8a8f98", "#1f2328"
_PALETTE = (_BLUE, _ORANGE, "#3d8f5f", "#8d4fa8", "#b23a48", "#7a6a2b", "#2a9d9a", _GREY)
_BLIND = {"val_loss_right": "val_loss_shuffled", "cider": "blind_cider"}

# the caption sheet, in inches
_WIDTH, _MAX_CELL, _GAP = 12.0, 4.0, 0.12
_FONT = 11
_LINE = _FONT * 1.36 / 72
_CHARACTER = _FONT * 0.60 / 72
_MAX_REFERENCES = 5
_MAX_HEIGHT = 600.0

# scores of the right panel: axis, line, blind line
_SCORES = {
    "cider": ("CIDEr (1.0 = 100 in papers)", "CIDEr", "blind CIDEr (captions of other pictures)"),
    "accuracy": ("accuracy of answers", "accuracy", "blind accuracy (asked with other pictures)"),
}


def loss_plot(path: str | os.PathLike, history: Sequence[Mapping], title: str = "") -> Path:
    """Draw a run's curves into a PNG, 1200 px wide with scores and 720 without.

    Each row of `history` has `step` and any of `loss`, `val_loss_right`, `val_loss_shuffled` (validation
    loss on the right and on shuffled pictures), `cider`, `blind_cider` (native scale, 1.0 is 100 in papers), or
    `accuracy`, `blind_accuracy` (of answers, 0 to 1).
    Left: raw and smoothed training loss (its first 50th may leave the top) with the two validation losses;
    right: the score against its blind twin, left out when no row has a score. A step that comes twice (a resumed
    run) counts once, the later row. Raises `ValueError` when there is nothing finite to draw.
    """
    names = ("loss", "val_loss_right", "val_loss_shuffled", "cider", "blind_cider", "accuracy", "blind_accuracy")
    curves = {name: _series(history, name) for name in names}
    if not any(len(steps) for steps, _ in curves.values()):
        raise ValueError(f"the history has no finite {', '.join(names)} to draw")
    scored = next((name for name in _SCORES if any(len(curves[key][0]) for key in (name, f"blind_{name}"))), None)
    figure = _figure((12 if scored else 7.2, 4.6), "constrained")
    panels = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]

    steps, loss = curves["loss"]
    if len(steps):
        panels[0].plot(steps, loss, color=_GREY, alpha=0.35, linewidth=0.8)
        panels[0].plot(steps, _smooth(loss), color=_INK, linewidth=1.6, label="training")
        # the first steps of a fresh connector may tower over all the rest
        validation = (max(curves[name][1], default=0.0) for name in names[1:3])
        highest = max(loss[len(loss) // 50 :].max(), *validation)
        panels[0].set_ylim(top=highest * 1.05 if highest > 0 else None)
    _line(panels[0], curves["val_loss_right"], _BLUE, "validation, right pictures")
    _line(panels[0], curves["val_loss_shuffled"], _ORANGE, "validation, shuffled pictures")
    terms = {key for row in history for key in row if key.startswith("loss_")}
    _dress(panels[0], f"loss (sum of {', '.join(sorted(terms))})" if terms else "loss (nats per token)")
    if scored:
        axis, right, blind = _SCORES[scored]
        _line(panels[1], curves[scored], _BLUE, right)
        _line(panels[1], curves[f"blind_{scored}"], _ORANGE, blind)
        panels[1].set_ylim(bottom=0)
        _dress(panels[1], axis)
    if title:
        figure.suptitle(title, fontsize=12, color=_INK, parse_math=False)
    return _save(figure, path)


def comparison_plot(path: str | os.PathLike, runs: Mapping[str, Sequence[Mapping]]) -> Path:
    """Draw several runs' validation loss and CIDEr against steps, training hours and MACs into a PNG.

    `runs`: name -> rows with `step`, `seconds`, `macs` (None where not counted) and any of `val_loss_right`,
    `val_loss_shuffled` (dashed), `cider`, `blind_cider` (dashed). An axis that no run has is left out. Raises
    `ValueError` when no run has a validation to draw.
    """
    scores = {"val_loss_right": "validation loss (nats per token)", "cider": "CIDEr (1.0 = 100 in papers)"}
    costs = {"step": ("step", 1.0), "seconds": ("training hours", 3600.0), "macs": ("training MACs", 1.0)}
    drawn = [row for rows in runs.values() for row in rows if any(row.get(name) is not None for name in scores)]
    scores = {name: label for name, label in scores.items() if any(row.get(name) is not None for row in drawn)}
    costs = {name: about for name, about in costs.items() if any(row.get(name) is not None for row in drawn)}
    if not scores:
        raise ValueError("none of the runs has a validation to draw; set run.valid_splits")
    size = (4.2 * len(costs), 3.4 * len(scores) + 0.25 * len(runs))
    figure = _figure(size, "constrained")
    panels = figure.subplots(len(scores), len(costs), squeeze=False)
    for line, (score, label) in zip(panels, scores.items(), strict=True):
        for axes, (cost, (unit, scale)) in zip(line, costs.items(), strict=True):
            for number, rows in enumerate(runs.values()):
                style = {"color": _PALETTE[number % len(_PALETTE)], "marker": "os^Dv<>"[number // len(_PALETTE) % 7]}
                for name, dashes in ((score, "-"), (_BLIND[score], "--")):
                    points = [(row[cost] / scale, row[name]) for row in rows if _known(row, cost) and _known(row, name)]
                    axes.plot(*zip(*points, strict=True), linestyle=dashes, markersize=4, **style) if points else None
            _dress(axes, label, unit, legend=False)
    solid = [line for line in panels[0][0].get_lines() if line.get_linestyle() == "-"]
    names = [name for name, rows in runs.items() if any(_known(row, next(iter(scores))) for row in rows)]
    note = "dashed: shuffled pictures, blind CIDEr"
    figure.legend(solid, names, loc="outside lower center", frameon=False, fontsize=9, title=note, title_fontsize=8)
    return _save(figure, path)


def _known(row: Mapping, name: str) -> bool:
    return row.get(name) is not None and math.isfinite(row[name])


def caption_sheet(
    path: str | os.PathLike,
    images: "Sequence[Image]",
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    scores: Sequence[float | None] | None = None,
    columns: int = 4,
    score_name: str = "CIDEr",
) -> Path:
    """Draw N pictures in a PNG grid, each over its predicted caption (dark), score and references (grey).

    `images` are PIL pictures of any size and mode, `scores` are per caption, named `score_name`. With 3 columns or
    more the sheet is 1200 px wide. At most 5 references are shown, with a count of the rest. Raises `ValueError`
    for lists of unequal length, no pictures, or more pictures than one PNG can hold.
    """
    n = len(images)
    scores = [None] * n if scores is None else scores
    if n == 0 or columns < 1 or not len(captions) == len(references) == len(scores) == n:
        raise ValueError(
            "a caption sheet needs as many pictures as captions, references and scores, and at least one: "
            f"got {n}, {len(captions)}, {len(references)} and {len(scores)} in {columns} columns"
        )
    columns = min(columns, n) if n < 3 else columns
    cell = min(_WIDTH / columns, _MAX_CELL)
    inner = cell - 2 * _GAP
    texts = [_cell_text(*item, inner, score_name) for item in zip(captions, references, scores, strict=True)]
    shapes = [min(image.height / image.width, 1.0) * inner for image in images]
    rows = [range(start, min(start + columns, n)) for start in range(0, n, columns)]
    pictures = [max(shapes[i] for i in row) for row in rows]
    heights = [
        picture + max(len(texts[i]) for i in row) * _LINE + 4 * _GAP
        for picture, row in zip(pictures, rows, strict=True)
    ]
    total = sum(heights)
    if total > _MAX_HEIGHT:
        fit = int(n * _MAX_HEIGHT / total)
        raise ValueError(f"{n} pictures make too tall a sheet; at most about {fit} fit on one")

    figure = _figure((cell * columns, total))
    top = total
    for row, picture, height in zip(rows, pictures, heights, strict=True):
        for column, i in enumerate(row):
            left = column * cell + _GAP
            _draw_cell(figure, images[i], texts[i], left, top - _GAP, inner, picture)
        top -= height
    return _save(figure, path)


def _draw_cell(figure, image, text, left: float, top: float, width: float, height: float) -> None:
    """One picture in a box of `width` by `height` inches, upper left corner at (left, top), and its text."""
    across, up = figure.get_size_inches()
    axes = figure.add_axes((left / across, (top - height) / up, width / across, height / up), anchor="SW")
    small = image.convert("RGB")
    small.thumbnail((2 * int(width * _DPI), 2 * int(height * _DPI)))
    axes.imshow(np.asarray(small))
    axes.set_axis_off()
    for line, (words, color, weight) in enumerate(text):
        y = (top - height - _GAP - line * _LINE) / up
        style = {"fontsize": _FONT, "color": color, "weight": weight, "va": "top", "parse_math": False}
        figure.text(left / across, y, words, **style)


def _cell_text(
    caption: str, references: Sequence[str], score: float | None, width: float, score_name: str
) -> list[tuple]:
    """The lines under one picture as (text, colour, weight), wrapped to `width` inches."""
    characters = max(12, int(width / _CHARACTER))
    predicted = textwrap.wrap(caption, int(characters * 0.9)) or ["(empty caption)"]
    lines = [(line, _INK, "bold") for line in predicted]
    if score is not None:
        lines.append((f"{score_name} {score:.2f}", _BLUE, "normal"))
    for reference in references[:_MAX_REFERENCES]:
        wrapped = textwrap.wrap(reference, characters, initial_indent="\u2013 ", subsequent_indent="   ")
        lines += [(line, "#5c636d", "normal") for line in wrapped]
    if len(references) > _MAX_REFERENCES:
        lines.append((f"and {len(references) - _MAX_REFERENCES} more references", _GREY, "normal"))
    return lines


def _series(history: Sequence[Mapping], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the finite values under `name`, by step, the last row of a step winning."""
    rows = [row for row in history if row.get(name) is not None and math.isfinite(row[name])]
    found = {row["step"]: row[name] for row in rows}
    steps = sorted(found)
    return np.array(steps, dtype=float), np.array([found[step] for step in steps], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a 30th of the run.

    At the steep start the window shrinks on both sides; at the end on one side only, where the noise is all.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    half = np.minimum(middle, len(values) // 60)
    first, last = middle - half, np.minimum(middle + half, len(values) - 1)
    return (sums[last + 1] - sums[first]) / (last - first + 1)


def _line(axes, curve: tuple[np.ndarray, np.ndarray], color: str, label: str) -> None:
    if len(curve[0]):
        axes.plot(*curve, color=color, linewidth=1.8, marker="o", markersize=4, label=label)


def _dress(axes, label: str, unit: str = "step", legend: bool = True) -> None:
    axes.set_xlabel(unit)
    axes.set_ylabel(label)
    axes.grid(color="#e4e6ea", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines and legend:
        axes.legend(frameon=False, fontsize=9)


def _figure(size: tuple[float, float], layout: str | None = None) -> "Figure":
    """An empty figure, `size` in inches. matplotlib takes a second to import, so only what draws imports it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=_DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: str | os.PathLike) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", facecolor="white")
    return path
