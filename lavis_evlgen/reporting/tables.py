"""Tables as text: for a terminal, and as Markdown."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]) -> str:
    """The table for a terminal; the columns named in `left` are words, the others numbers."""
    table = Table(box=SIMPLE)
    for column in columns:
        table.add_column(escape(column), justify="left" if column in left else "right")
    for row in rows:
        table.add_row(*map(escape, row))  # cells are values, [brackets] and all
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as Markdown."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines)
