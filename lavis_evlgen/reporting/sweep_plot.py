"""The picture of a sweep: score and training time against the swept value."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lavis_evlgen.reporting.plots import _GREY, _PALETTE, _figure, _save


def sweep_plot(path: str | os.PathLike, key: str, curves: Mapping[str, Sequence[tuple]], score: str) -> Path:
    """Draw a score (line, left) and training time (bars, right) against the values of a swept key, into a PNG.

    `curves`: name ("" where there is one) -> (value as text, scores of its seeds, training seconds of its seeds) for
    each value, in the order of the axis; points are means, whiskers sample standard deviations. (EVLGen, figure 3.)
    """
    names = [value for value, *_ in next(iter(curves.values()))]
    wide = max(5.6, 1.0 + 0.8 * len(names) * max(1, len(curves) / 2))
    figure = _figure((wide, 3.8), "constrained")
    time_axes = figure.subplots()
    axes = time_axes.twinx()
    longest = max((second for points in curves.values() for *_, seconds in points for second in seconds), default=0)
    unit, size = next((u for u in (("hours", 3600), ("minutes", 60)) if longest > 2 * u[1]), ("seconds", 1))
    width = 0.7 / len(curves)
    for number, (name, points) in enumerate(curves.items()):
        color = _PALETTE[number % len(_PALETTE)]
        positions = np.array([names.index(value) for value, *_ in points]) + width * (number - (len(curves) - 1) / 2)
        means = [np.mean(seconds) / size if seconds else 0 for *_, seconds in points]
        time_axes.bar(positions, means, width=0.9 * width, color=color, alpha=0.18)
        known = [(x, scores) for x, (_, scores, _) in zip(positions, points, strict=True) if scores]
        if known:
            x, y, spread = zip(*((x, np.mean(scores), _spread(scores)) for x, scores in known), strict=True)
            axes.errorbar(x, y, yerr=spread, color=color, marker="o", markersize=4, capsize=3, label=name)
    time_axes.set_xticks(range(len(names)), names)
    time_axes.set_xlabel(key, parse_math=False)
    # the line's axis on the left, as in the paper
    axes.yaxis.set_ticks_position("left")
    axes.yaxis.set_label_position("left")
    axes.set_ylabel(score)
    time_axes.yaxis.set_ticks_position("right")
    time_axes.yaxis.set_label_position("right")
    time_axes.set_ylabel(f"training {unit} (bars)", color=_GREY)
    time_axes.set_ylim(top=(time_axes.get_ylim()[1] or 1) * 1.6)
    for panel in (axes, time_axes):
        panel.spines["top"].set_visible(False)
    if len(curves) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=9)
    return _save(figure, path)


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
