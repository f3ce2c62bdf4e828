"""`stages.json`, which a run with stages keeps in its folder (runners/stage_ledger.py), as other commands read it."""

from __future__ import annotations

import json
from pathlib import Path

from lavis_evlgen.config import ConfigError

LEDGER, FORMAT = "stages.json", 1
OF_DONE = ("start", "parameters", "tensors", "steps", "seconds", "loss", "scores")  # in the row of a stage that is done


def read_ledger(folder: str | Path) -> dict:
    """What stages.json in `folder` says. Raises ConfigError."""
    path = Path(folder) / LEDGER
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] > FORMAT:
            raise ConfigError(f"{path} was written by a newer version of lavis_evlgen: update")
        for row in content["stages"]:
            content["settings"][row["name"]].items()
            [row[key] for key in ("state", *(OF_DONE if row["state"] == "done" else ()))]
            if Path(row["folder"]).name != row["folder"]:
                raise ValueError(f"{row['folder']} is no folder beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} is not the {LEDGER} of a run ({type(error).__name__}: {error}); if it is damaged, delete it: a "
            "run goes on from what is in the folders of its stages"
        ) from error
    return content


def stage_folders(folder: str | Path) -> list[Path]:
    """The run folders of the stages of the run in `folder`, of those that have begun; [] for any other folder."""
    if not (Path(folder) / LEDGER).is_file():
        return []
    rows = read_ledger(folder)["stages"]
    return [Path(folder) / row["folder"] for row in rows if row["state"] != "waiting"]
