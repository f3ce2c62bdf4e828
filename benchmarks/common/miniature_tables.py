"""The tables and the picture of benchmarks/experiments/miniature.py, from what its runs found."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.common.result_pages import put_between, spread
from benchmarks.common.training_runs import ROOT, run_folder
from lavis_evlgen.reporting.plots import comparison_plot
from lavis_evlgen.reporting.tables import markdown
from lavis_evlgen.tools.compare import duration, read_runs

PAGE, PICTURE = ROOT / "docs/results/miniature.md", ROOT / "docs/images/miniature.png"


def write_page(found: dict[str, dict], folder: Path):
    """Draw the first seed's runs of `folder`, and put the tables between the page's two marks."""
    first = {label: run_folder(folder, result["runs"][0]["name"]) for label, result in found.items()}
    runs = {label: read_runs([run])[0].rows for label, run in first.items()}
    comparison_plot(PICTURE, runs)
    put_between(PAGE, [scores_table(found), costs_table(found), sweep_table(found)])


def scores_table(found: dict[str, dict]) -> str:
    """Mean over seeds, least and most, of the test scores."""
    header = ("connector", "CIDEr", "blind CIDEr", "loss, right picture", "loss, shuffled", "gap, nats/token")
    rows = []
    for label, result in found.items():
        tests = [run["test"] for run in result["runs"]]
        gaps = [test["loss_shuffled"] - test["loss_right"] for test in tests]
        columns = [[test[key] for test in tests] for key in ("cider", "blind_cider", "loss_right", "loss_shuffled")]
        rows.append((label, *(spread(values) for values in (*columns, gaps))))
    return markdown(header, rows)


def costs_table(found: dict[str, dict]) -> str:
    """What a run of each cost: trained parameters, steps, training time, MACs."""
    header = ("connector", "trains", "steps", "training", "MACs")
    rows = []
    for label, result in found.items():
        first = result["runs"][0]
        steps = f"{first['steps_ahead']} + {first['steps']}" if first["steps_ahead"] else str(first["steps"])
        seconds = statistics.median(run["seconds"] for run in result["runs"])
        macs = statistics.mean(run["macs"] for run in result["runs"])
        rows.append((label, f"{first['trains'] / 1e6:.1f}M", steps, duration(seconds), f"{macs / 1e12:.0f} T"))
    return markdown(header, rows)


def sweep_table(found: dict[str, dict]) -> str:
    """Validation loss of every setting tried; the one taken in bold."""
    rows = []
    for label, result in found.items():
        best = min(result["sweep"], key=lambda one: one["val"]["loss_right"], default=None)
        for one in result["sweep"]:
            loss = f"{one['val']['loss_right']:.3f}"
            loss = f"**{loss}**" if one is best else loss
            shuffled = f"{one['val']['loss_shuffled']:.3f}"
            setting = (one["start"], f"{one['init_lr']:g}", f"{one['body']:g}")
            rows.append((label, *setting, str(one["steps"]), loss, shuffled))
    header = ("connector", "body from", "learning rate", "× for the body", "steps", "val loss", "shuffled")
    return markdown(header, rows)
