"""Resuming an evaluation that was interrupted: finished rows are kept in a file beside the results."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets.loading import eval_loader
from lavis_evlgen.reporting.json_lines import read_json_lines
from lavis_evlgen.runners.checkpointing.resume import MAY_CHANGE, flat
from lavis_evlgen.weights.trainable import trainable_state

ROWS = "2"  # raise it when what a row holds changes: rows of two kinds cannot be scored together


class PartialRows:
    """The finished chunks of one rank's rows, a line each; the first line identifies the evaluation.

    `identity` holds what the rows depend on (weights, data, settings, ranks); a file of another identity is refused
    with a ConfigError that names what differs, rather than mixed in. A last line that was cut short is done again.
    """

    def __init__(self, file: Path, identity: Mapping[str, str], of: str = "evaluation", key: str = "run.run_name"):
        """of: what the rows are of, and key: what gives it another file, for the error."""
        self.file, self.rows, self.chunks, self._of, self._key = file, [], 0, of, key
        kept = read_json_lines(file)
        if not kept:
            file.write_text(json.dumps(dict(identity)) + "\n")
            return
        self._check(kept[0], identity)
        for line in kept[1:]:
            self.rows += line["rows"]
        self.chunks = len(kept) - 1
        if not file.read_text().endswith("\n"):  # cut short in the middle of a line
            file.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def _check(self, found: dict, identity: Mapping[str, str]):
        differs = [key for key in identity if found.get(key) != identity[key]]
        if differs:
            raise ConfigError(
                f"{self.file} holds rows of an unfinished {self._of} with other {', '.join(differs)}: finish that one, "
                f"delete the file, or give this {self._of} another {self._key}"
            )

    def add(self, rows: list[dict]):
        """Keep the rows of the next chunk; on disk when this returns."""
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"rows": rows}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows
        self.chunks += 1

    def done(self):
        """Remove the file, once the results are written."""
        self.file.unlink(missing_ok=True)


def rows_in_parts(kept: PartialRows, count: int, size: int, rows_of: Callable[[slice], list[dict]]) -> list[dict]:
    """All rows of this rank's `count` samples, `size` samples at a time: those kept, and the others by `rows_of`.

    The parts are the same whether or not the evaluation was ever cut off, and so are the rows.
    """
    parts = range(0, count, size)
    if kept.chunks:
        logging.info("going on with %s: %d of %d parts are done", kept.file, kept.chunks, len(parts))
    for start in parts[kept.chunks :]:
        kept.add(rows_of(slice(start, start + size)))
        logging.info("evaluation: %d of %d parts are done and kept", kept.chunks, len(parts))
    return kept.rows


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 hex digest of named tensors, names and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def settings_digest(settings: Mapping) -> str:
    """sha256 hex digest of plain nested settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def own_rows(evaluate: Callable, dataset, run, device: torch.device, kept: PartialRows | None) -> list[dict]:
    """This rank's rows of an evaluation, all at once, or in parts that are `kept` as they come.

    evaluate: from a loader of batches to their rows.
    """
    rank, world = distributed.rank(), distributed.world_size()
    batch_size = run.batch_size_eval or run.batch_size_train or 1

    def rows_of(part: slice) -> list[dict]:
        return evaluate(eval_loader(dataset, batch_size, rank, world, run.num_workers, device.type == "cuda", part))

    if kept is None:
        return rows_of(slice(None))
    return rows_in_parts(kept, len(range(rank, len(dataset), world)), run.keep_every * batch_size, rows_of)


def kept_rows(folder: Path, split: str, dataset, config, model) -> PartialRows | None:
    """With `run.keep_every`: rows that an interrupted evaluation left in `folder`, to which this one adds its own."""
    if not (config.run_cfg.get("evaluate") and config.run_cfg.get("keep_every")):
        return None
    settings = {key: value for key, value in flat(config.to_dict()).items() if key not in MAY_CHANGE}
    identity = {
        "kind of rows": ROWS,
        "weights": weights_digest(trainable_state(model)),
        "data": dataset.fingerprint or "",
        # the weights are identified by their content, not by their path
        "settings": settings_digest({k: v for k, v in settings.items() if k != "model.pretrained"}),
        "ranks": f"{distributed.rank()} of {distributed.world_size()}",
    }
    return PartialRows(folder / f"{split}.rank{distributed.rank()}.partial.jsonl", identity)
