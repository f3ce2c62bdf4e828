"""`evlgen compare`, runs side by side: one table and one picture, from run cards and logs alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lavis_evlgen.config import ConfigError
from lavis_evlgen.reporting import tables
from lavis_evlgen.reporting.json_lines import read_json_lines, training_totals
from lavis_evlgen.reporting.plots import comparison_plot
from lavis_evlgen.reporting.stage_files import LEDGER, stage_folders
from lavis_evlgen.tools.paper import paper_row

COLUMNS = ("run", "connector", "trains", "steps", "images", "time", "GMACs/image", "CIDEr", "blind CIDEr",
           "loss, right", "loss, shuffled", "scored on")  # fmt: skip


@dataclass
class RunRecord:
    """What a run folder says: its card, and its log with the images, training seconds and MACs up to each row."""

    name: str
    card: dict
    rows: list[dict]
    folder: Path

    @property
    def model(self) -> dict:
        return self.card["config"]["model"]


def read_runs(folders: list[str | Path]) -> list[RunRecord]:
    """Run folders of train.py; those of the same name are numbered, and one of a run with stages stands for those of
    its stages that have scores. Raises ConfigError that names a bad one."""
    # RUN/* of a run with stages names its ledger, and all else that is there
    staged = [Path(folder).parent for folder in folders if Path(folder).name == LEDGER]
    folders = [*staged, *(folder for folder in folders if Path(folder).parent not in staged)]
    folders = [one for folder in folders for one in _scored_stages(folder) or [folder]]
    runs, names = [read_run(folder) for folder in folders], [Path(folder).resolve().name for folder in folders]
    for n, run in enumerate(runs):
        run.name = f"{names[n]} ({names[: n + 1].count(names[n])})" if names.count(names[n]) > 1 else names[n]
    return runs


def _scored_stages(folder: str | Path) -> list[Path]:
    return [one for one in stage_folders(folder) if (one / "run.json").is_file()]


def read_run(folder: str | Path) -> RunRecord:
    """A run folder of train.py. Raises ConfigError for a folder that holds no finished evaluation."""
    folder = Path(folder)
    card = folder / "run.json"
    if not card.is_file():
        raise ConfigError(f"{folder} has no run.json; give folders that train.py named at the end of a run")
    try:
        content = json.loads(card.read_text())
        content["metrics"], content["config"]["model"], content["data"]["split"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{card} is not a run card ({type(error).__name__}: {error})") from error
    return RunRecord(folder.name, content, training_totals(read_json_lines(folder / "log.jsonl")), folder)


def unlike(runs: list[RunRecord]) -> list[str]:
    """What makes scores of these runs not comparable, one line each."""
    facts = {
        "the data scored": lambda card: (card["data"].get("split"), card["data"].get("fingerprint")),
        "the scoring tokenizer": lambda card: card.get("scoring_tokenizer"),
        "decoding": lambda card: card.get("decoding"),
        "the prompt": lambda card: card.get("prompt"),
        "how many references the loss is over": lambda card: card["metrics"].get("loss_texts_per_image", 1),
    }
    found = []
    for what, of in facts.items():
        first = of(runs[0].card)
        others = [run.name for run in runs[1:] if of(run.card) != first]
        if others:
            found.append(f"{what} differs between {runs[0].name} and {', '.join(others)}: their scores do not compare")
    return found


def table_rows(runs: list[RunRecord]) -> list[tuple[str, ...]]:
    """Cells under COLUMNS: each run, and under it the paper's row of the same recipe where there is one."""
    rows = []
    for run in runs:
        rows.append(_cells(run))
        paper = paper_row(run.card["config"], run.card.get("step"))
        if paper is not None:
            hours = "" if paper.hours is None else f"{paper.hours:g} h, 8 A100"
            cells = {"run": f"  paper: {paper.name}", "connector": paper.connector, "steps": f"{paper.steps:,}"}
            cells |= {"time": hours, "CIDEr": f"{paper.cider:.3f}", "scored on": "COCO val"}
            rows.append(tuple(cells.get(column, "") for column in COLUMNS))
    return rows


def _cells(run: RunRecord) -> tuple[str, ...]:
    card, metrics, model = run.card, run.card["metrics"], run.card["config"]["model"]
    spent = next((row for row in reversed(run.rows) if row["step"] <= _step(card)), {})
    trains = (card.get("model") or {}).get("trainable_parameters")
    cells = {
        "run": run.name,
        "connector": str(model.get("connector") or model.get("arch", "")),
        "trains": "" if trains is None else f"{trains / 1e6:.1f}M",
        "steps": str(card.get("step")),
        "images": f"{spent['images']:,}" if spent else "",
        "time": duration(spent["seconds"]) if spent else "",
        "GMACs/image": f"{spent['macs'] / spent['images'] / 1e9:.1f}" if spent.get("macs") else "",
        "CIDEr": _number(metrics.get("metrics", {}).get("CIDEr")),
        "blind CIDEr": _number(metrics.get("blind", {}).get("CIDEr")),
        "loss, right": _number(metrics.get("loss_right")),
        "loss, shuffled": _number(metrics.get("loss_shuffled")),
        "scored on": f"{card['data'].get('name')} {card['data']['split']}, {card['data'].get('size')}",
    }
    return tuple(cells[column] for column in COLUMNS)


def _step(card: dict) -> float:
    """The step that a card scores; an evaluation of given weights has none."""
    return card["step"] if isinstance(card.get("step"), int) else float("inf")


def duration(seconds: float) -> str:
    """45 s, 8 min, 2.5 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def _number(value) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""


def show(rows: list[tuple[str, ...]]) -> str:
    """The table for a terminal."""
    return tables.show(COLUMNS, rows, left=("run", "connector", "scored on"))


def markdown(rows: list[tuple[str, ...]]) -> str:
    """The table as Markdown."""
    return tables.markdown(COLUMNS, rows)


def main(args) -> int:
    """Print the table, what makes scores not comparable, and where the picture is."""
    if args.paired:
        from lavis_evlgen.tools import paired

        return paired.main(args)
    runs = read_runs(args.runs)
    rows = table_rows(runs)
    print(markdown(rows) if args.markdown else show(rows))
    for difference in unlike(runs):
        print(f"note: {difference}")
    path = comparison_plot(args.out, {run.name: run.rows for run in runs})
    print(f"picture: {path}")
    return 0
