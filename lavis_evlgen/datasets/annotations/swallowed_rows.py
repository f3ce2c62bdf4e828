"""Rows of a table that a quote has taken into one field: `a.jpg,"a dog` and, a line or two below, `c.jpg,a bird"`.

A caption may span lines. What tells the two apart is the row itself: a line inside the caption in which a field looks
like the row's own image name, where a row would have it, is another row.
"""

from __future__ import annotations

import re


def swallowed_row(cells: list[str], delimiter: str) -> str | None:
    """The first line inside a field of this row that looks like another row's; None where all is the field's text."""
    for column, cell in enumerate(cells):
        lines = [line for line in cell.splitlines() if line.strip()]
        if len(lines) < 2:
            continue
        parts = [line.split(delimiter) for line in lines]
        # the first line begins in this column and ends the row; the last begins a row and ends in this column
        whole = [len(cells)] * (len(lines) - 2)
        shaped = [len(part) for part in parts] == [len(cells) - column, *whole, column + 1]
        for number, (line, fields) in enumerate(zip(lines, parts, strict=True)):
            first = 0 if number else column
            pairs = [(field, cells[first + n]) for n, field in enumerate(fields[: len(cells) - first])
                     if first + n != column]  # fmt: skip
            if any(_alike(field.strip(' "'), other.strip(), shaped) for field, other in pairs):
                return line
    return None


def _alike(field: str, other: str, shaped: bool) -> bool:
    """Whether both are names of files of one kind; without endings, in lines shaped like rows, both single words."""
    ending = re.search(r"\.\w{1,5}$", other)
    if ending:
        return field.lower().endswith(ending[0].lower())
    return shaped and bool(field) and not re.search(r"\s", field + other) and field.isdigit() == other.isdigit()
