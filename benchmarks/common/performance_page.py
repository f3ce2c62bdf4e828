"""The tables of docs/performance.md, from benchmarks/results/NAME-HARDWARE.json: nothing there is typed by hand.

    python -m benchmarks.common.performance_page

Each benchmark has a place between two markers, <!-- NAME --> and <!-- /NAME -->; what stands between them is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common.performance_tables import TABLES, floor_table

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs/performance.md", ROOT / "benchmarks/results"
NO_GPU = "Not yet run on a GPU."

def origin(card: dict) -> str:
    """On what, with what and when it was measured."""
    hardware, machine, versions, commit = (card[key] for key in ("hardware", "machine", "versions", "commit"))
    on_gpu = machine["device"] == "cuda"
    where = hardware["gpu"] if on_gpu else f"CPU ({hardware['machine']}, {hardware['cpu_count']} cores)"
    busy = "" if on_gpu else f"; load of the machine at the end {machine['load_average']:.1f}"
    code = commit.get("sha", commit.get("version", ""))[:7] + (" with changes" if commit.get("dirty") else "")
    return (
        f"**{where}**, {machine['threads']} thread{'s' * (machine['threads'] != 1)}{busy}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}; commit {code}, {card['date'][:10]}"
    )


def cards_of(name: str, results: Path = RESULTS) -> Iterator[dict]:
    """The result files of one benchmark, GPUs first."""
    cards = [json.loads(path.read_text()) for path in sorted(results.glob(f"{name}-*.json"))]
    yield from sorted(cards, key=lambda card: card["machine"]["device"] != "cuda")


def section(name: str, results: Path = RESULTS) -> str:
    """What stands between the markers of benchmark `name`."""
    if name == "floor":  # counted, not measured: on no hardware
        path = results / "floor.json"
        return floor_table(json.loads(path.read_text())) if path.exists() else "Not counted yet."
    cards = list(cards_of(name, results))
    parts = [f"{origin(card)}\n\n{TABLES[name](card)}" for card in cards]
    if not any(card["machine"]["device"] == "cuda" for card in cards):
        parts.insert(0, NO_GPU)
    return "\n\n".join(parts)


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with all its tables as the results are now. Raises ValueError for a benchmark without its place."""
    for name in ("floor", *TABLES):
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not marked.search(page):
            raise ValueError(f"{PAGE.name} has no place for {name}: add <!-- {name} --> and <!-- /{name} -->")
        page = marked.sub(lambda found, name=name: f"{found[1]}{section(name, results)}\n{found[2]}", page)
    return page


def main():
    PAGE.write_text(filled(PAGE.read_text()))
    print(f"-> {PAGE}")


if __name__ == "__main__":
    main()
