"""The goals of a training step on a H200, beside what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from lavis_evlgen.reporting.tables import markdown
from lavis_evlgen.tools.cost.hardware import HARDWARE

IMAGES_PER_S = {"opt-2.7b": 380, "vicuna-7b": 230}
MFU, CONNECTOR = 0.40, 0.15  # at least, of the peak; at most, of the step
COLUMNS = ["step of", "compiled", "images/s", "goal", "MFU", "goal", "connector", "goal", "peak, GB"]


def goals_table(results: Path, hardware: str) -> str:
    """One row a model and way to run it; "-" where nothing is known. MFU is of the data sheet's dense bf16 peak."""
    rows = []
    for path in sorted(results.glob(f"step-*-{hardware}.json")):
        row = json.loads(path.read_text())["rows"][0]
        goal = IMAGES_PER_S.get(row["scale"])
        rate, memory = f"{row['images_per_s']:.0f}", row["memory_gb"]["whole"]
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        rows.append([
            row["scale"], " and ".join(row["compile"]) or "no", rate, f">= {goal}" if goal else "-", mfu,
            f">= {MFU:.0%}", f"{connector_share(row):.1%}", f"< {CONNECTOR:.0%}", f"{memory:.1f}",
        ])  # fmt: skip
    peak = HARDWARE["h200"].half / 1e12
    told = f"MFU: FLOPs that the step needs over time over peak (H200: {peak:.0f} TFLOPs dense bf16, data sheet)"
    return f"{markdown(COLUMNS, rows)}\n{told}" if rows else "no step measured yet"


def connector_share(row: dict) -> float:
    """Of the sum of the phases of a step."""
    seconds = {name: time["median"] for name, time in row["phases"].items()}
    return sum(time for name, time in seconds.items() if name.startswith("connector")) / sum(seconds.values())
