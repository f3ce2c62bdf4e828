"""What pages in docs/results/ share: where their tables go, and how a figure over seeds is written."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

START, END = "<!-- tables -->", "<!-- end of the tables -->"


def put_between(page: Path, parts: Sequence[str], of: str = ""):
    """Write and print `parts`, tables and pictures as Markdown, between the two marks of `page`.

    of: says which tables, where a page has several pairs of marks.
    """
    start, end = (mark.replace("tables", f"tables of {of}" if of else "tables") for mark in (START, END))
    before, rest = page.read_text().split(start)
    page.write_text("\n\n".join([before + start, *parts, end + rest.split(end)[1]]))
    print("\n\n".join(parts))


def spread(values: Sequence[float]) -> str:
    """Mean (least to most); nothing of no values."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""
