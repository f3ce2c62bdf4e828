"""The tables and the picture of benchmarks/experiments/video_scenes.py, from what its runs found."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.common.result_pages import put_between, spread
from benchmarks.common.training_runs import ROOT
from lavis_evlgen.reporting.tables import markdown
from lavis_evlgen.tools.compare import duration

PAGE, PICTURE = ROOT / "docs/results/video.md", "images/video_miniature.png"
CHANCE = 0.5  # of the order of events, for who ignores the order of frames


def write_page(found: dict[str, list[dict]], page: Path = PAGE):
    """Draw the picture, in `images` beside the page's folder, and put the tables between the page's two marks."""
    draw(found, page.resolve().parent.parent / PICTURE)
    picture = f"![order of events and CIDEr of each way to mix frames, a dot a seed](../{PICTURE})"
    put_between(page, [scores_table(found), kinds_table(found), picture, costs_table(found)])


def scores_table(found: dict[str, list[dict]]) -> str:
    """Mean over seeds, least and most, of the test scores."""
    columns = {
        "order of events": "order_accuracy", "CIDEr": "cider", "blind CIDEr": "blind_cider",
        "loss, right clip": "loss_right", "loss, shuffled": "loss_shuffled",
    }  # fmt: skip
    rows = [(label, *(_spread(runs, key) for key in columns.values())) for label, runs in found.items()]
    return markdown(("frames", *columns), rows)


def kinds_table(found: dict[str, list[dict]]) -> str:
    """The order of events by kind of event."""
    keys = sorted({key for runs in found.values() for run in runs for key in run if key.startswith("order_accuracy ")})
    rows = [(label, *(_spread(runs, key) for key in keys)) for label, runs in found.items()]
    return markdown(("right order of", *(key.partition(" ")[2] for key in keys)), rows)


def costs_table(found: dict[str, list[dict]]) -> str:
    """What a run of each cost: trained parameters, steps, training time at the median step."""
    rows = []
    for label, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        rows.append((label, f"{runs[0]['trains'] / 1e6:.1f}M", str(runs[0]["steps"]), duration(seconds)))
    return markdown(("frames", "trains", "steps", "training"), rows)


def draw(found: dict[str, list[dict]], path: Path):
    """Order of events, beside what it is by chance, and CIDEr: a dot for each seed, a bar for their mean."""
    figure = Figure(figsize=(11, 1.2 + 0.4 * len(found)), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    words = {"order_accuracy": "order of events (dashed: chance)", "cider": "CIDEr (1.0 = 100 in papers)"}
    for panel, (key, title) in zip(panels, words.items(), strict=True):
        for row, runs in enumerate(found.values()):
            values = [run[key] for run in runs]
            panel.plot(values, [row] * len(values), "o", color="#2563a8", markersize=5, alpha=0.7)
            panel.plot([statistics.mean(values)], [row], "|", color="#1f2328", markersize=16)
        panel.set_xlabel(title)
        panel.set_xlim(left=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_xlim(0, 1)
    panels[0].axvline(CHANCE, color="#8a8f98", linestyle="--", linewidth=1)
    panels[0].set_yticks(range(len(found)), list(found))
    panels[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def _spread(runs: list[dict], key: str) -> str:
    return spread([run[key] for run in runs if key in run])
