"""Logs of a run as JSON lines: one row a line, appended to, and cut back when a run resumes."""

import json
from pathlib import Path


def read_json_lines(file: Path) -> list[dict]:
    """The rows of a .jsonl file that a run appends to; a last line that a crash cut short is left out."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines[:-1]]
    try:
        return rows + [json.loads(line) for line in lines[-1:]]
    except json.JSONDecodeError:
        return rows


def drop_rows_after(file: Path, step: int):
    """Forget the rows of a .jsonl file after `step`: a resumed run makes them again (0: all, of an earlier run)."""
    if file.exists():
        kept = [row for row in read_json_lines(file) if row["step"] <= step]
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))
