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


def training_totals(log: list[dict]) -> list[dict]:
    """Log rows with what the run had spent up to them: `images`, `seconds` (evaluation left out), `macs` (None
    where the run did not count them)."""
    before, total, rows = 0, {"images": 0.0, "seconds": 0.0, "macs": 0.0}, []
    for row in log:
        if "seconds_per_step" in row:  # a window of training steps, which closes at this one
            steps, before = row["step"] - before, row["step"]
            images = steps * row["seconds_per_step"] * row["images_per_s"]
            counted = total["macs"] is not None and "flops_per_image" in row
            total = {
                "images": total["images"] + images,
                "seconds": total["seconds"] + steps * row["seconds_per_step"],
                "macs": total["macs"] + images * row["flops_per_image"] / 2 if counted else None,
            }
        rows.append({**row, **total, "images": round(total["images"])})
    return rows
