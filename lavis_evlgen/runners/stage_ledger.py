"""`stages.json` of a run with stages: which are done, what each started from, trained and scored, with which config."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path

from lavis_evlgen.config import ConfigError, EvlgenConfig
from lavis_evlgen.reporting.json_lines import read_json_lines, training_totals
from lavis_evlgen.reporting.run_card import plain, write_run_card
from lavis_evlgen.reporting.stage_files import FORMAT, LEDGER, read_ledger
from lavis_evlgen.reporting.tables import show
from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.runners.checkpointing.resume import MAY_CHANGE, flat

_SHOWN = 5  # changed settings in a message
# words of the table: where they are among the scores of a row
SCORES = {"CIDEr": "metrics.CIDEr", "accuracy": "metrics.accuracy", "loss": "loss_right", "text loss": "text_loss"}
COLUMNS = ("stage", "trains", "tensors", "steps", "time", "loss, first", "loss, last", "scored", "starts from")


class StageLedger:
    """The stages of the run in `folder`. Its methods are for the main rank; `rows` is what the file says of each.

    A row: name, folder, state (waiting, running, done), start (file below `folder`; of the first stage
    model.pretrained), parameters and tensors that train, started and ended (UTC), steps, seconds (of training), loss
    (first and last), scores (of the stage's run card).
    """

    def __init__(self, folder: Path, cfgs: list[EvlgenConfig]):
        self.folder, self.file = folder, folder / LEDGER
        self.settings = {cfg.stage.name: _settings(cfg) for cfg in cfgs}
        self.rows = [{"name": cfg.stage.name, "folder": cfg.stage.folder, "state": "waiting"} for cfg in cfgs]

    def begin(self, resumes: bool) -> list[dict]:
        """The rows to go on with: those of the file where the run resumes. Raises ConfigError for a folder that is in
        use, and for a config that is not the one that the run was started with."""
        if not self.file.exists():
            if (self.folder / checkpoints.LAST).exists():
                raise ConfigError(f"{self.folder} holds a run without stages: give this one another run.run_name")
            self._write()
            return self.rows
        if not resumes:
            raise ConfigError(
                f"{self.folder} holds the {LEDGER} of another run: go on with it by run.resume_ckpt_path=auto, or give "
                "this run another run.run_name"
            )
        content = read_ledger(self.folder)
        changed = _changed(content, self.rows, self.settings)
        if changed:
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            raise ConfigError(
                f"{self.file} was started with another config: {', '.join(changed[:_SHOWN])}{more}. Resume with the "
                "config that it was started with, or give this run another run.run_name"
            )
        self.rows = content["stages"]
        return self.rows

    def start(self, n: int, start: str | None, parameters: int, tensors: int):
        """Stage n (from 0) begins, or goes on."""
        about = {"state": "running", "start": start, "parameters": parameters, "tensors": tensors}
        self.rows[n] |= {"started": _now(), **self.rows[n], **about}
        self._write()

    def end(self, n: int):
        """Stage n is done: what it took and scored, from the files in its folder."""
        folder = self.folder / self.rows[n]["folder"]
        log = training_totals(read_json_lines(folder / "log.jsonl"))
        losses = [row["loss"] for row in log if row.get("loss") is not None]
        last = log[-1] if log else {"step": 0, "seconds": 0.0}
        self.rows[n] |= {
            "state": "done", "ended": _now(), "steps": last["step"], "seconds": last["seconds"],
            "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
            "scores": _scores(folder / "run.json"),
        }  # fmt: skip
        self._write()

    def _write(self):
        content = {"format": FORMAT, "config_sha256": _sha256(self.settings), "stages": self.rows}
        write_run_card(self.file, {**content, "settings": self.settings})


def _settings(cfg: EvlgenConfig) -> dict:
    """A stage's config as {"run.max_iters": 4, ...}, without what says where and how fast."""
    found = {key: value for key, value in flat(cfg.to_dict()).items() if key not in MAY_CHANGE}
    return json.loads(json.dumps(plain(found)))


def _sha256(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _changed(then: dict, rows: list[dict], now: dict) -> list[str]:
    """What differs between the ledger and the config of now, in words."""
    before, after = (", ".join(row["name"] for row in stages) for stages in (then["stages"], rows))
    if before != after:
        return [f"stages: {before} -> {after}"]
    found = []
    for name, settings in now.items():
        earlier = then["settings"][name]
        for key in sorted(settings | earlier):
            before, after = earlier.get(key), settings.get(key)
            if before != after:
                found.append(f"stages.{name}: {key}: {before} -> {after}")
    return found


def _scores(card: Path) -> dict | None:
    """{"split", "step", and the numbers of its metrics} of a run card; None where nothing was scored.

    text_loss: nats a token on plain text, of a language model that learns.
    """
    if not card.exists():
        return None
    content = json.loads(card.read_text(encoding="utf-8"))
    scores = flat(content["metrics"])
    if "text_loss" in content:
        scores["text_loss"] = content["text_loss"]["now"]["nats_per_token"]
    # what is not finite is text in a run card
    numbers = {key: value for key, value in scores.items() if isinstance(value, int | float)}
    return {"split": content["data"]["split"], "step": content["step"], **numbers}


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def summary(rows: list[dict]) -> str:
    """All stages in one table."""
    return show(COLUMNS, [_cells(row) for row in rows], left=("stage", "scored", "starts from"))


def _cells(row: dict) -> tuple[str, ...]:
    loss, scores = row["loss"] or {}, row["scores"]
    scored = ""
    if scores is not None:
        values = "  ".join(f"{word} {scores[name]:.4f}" for word, name in SCORES.items() if name in scores)
        scored = f"{scores['split']} at step {scores['step']}: {values}"
    return (
        row["folder"], f"{row['parameters'] / 1e6:.2f}M", str(row["tensors"]), str(row["steps"]),
        f"{row['seconds']:.0f} s", *(f"{loss[key]:.4f}" if key in loss else "" for key in ("first", "last")), scored,
        row["start"] or "",
    )  # fmt: skip
