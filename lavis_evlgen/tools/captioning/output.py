"""What `evlgen caption --out` writes: FILE, FILE.card.json, and while it is at work the folder FILE.parts.

The pictures are parted into pieces that do not depend on how many processes there are. A piece that is being captioned
is a file of the rows that are done (`PartialRows`), one that is done a file of its records, and at the end all of them
one after another are FILE. So a kill costs the batches that are not written yet, and any process can go on with any
piece.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.errors import shown
from lavis_evlgen.errors import writing
from lavis_evlgen.reporting.run_card import plain, write_run_card
from lavis_evlgen.runners.checkpointing.evaluation_resume import PartialRows, settings_digest
from lavis_evlgen.runners.checkpointing.lock import RunLock

FORMATS = (".jsonl", ".csv")
MOST = 1000  # pictures of a piece, of which each process has at least one
_OF_CARD = "captioning"  # key of the run card


class Output:
    """FILE and what belongs to it; `shards`: where new shards go, None where none are made."""

    def __init__(self, file: Path, shards: Path | None = None):
        self.file, self.shards = file, shards
        self.card = file.with_name(f"{file.name}.card.json")
        self.folder = file.with_name(f"{file.name}.parts")
        self.lock = RunLock(self.folder, "--out" if shards is None else "--out-shards", "caption.lock")

    def begin(self, card: dict, identity: dict, size: int) -> tuple[int, dict | None]:
        """Take the output, and write its card where it is new: (size of a piece, counts where all is done).

        card: a run card without figures; identity: what the captions depend on; size: of a piece, where it is new.
        Raises ConfigError where another process writes here, or something else than an unfinished output of the same
        identity is here.
        """
        before = self._card() if self.card.exists() else None
        if not (before or {}).get("metrics") and (there := self._in_the_way(before is None)):
            raise ConfigError(f"{there} is there, and no {self.card.name} that says what made it: remove it, or give "
                              f"another {self.lock.key}")  # fmt: skip
        if before is not None:
            self._check(before[_OF_CARD]["identity"], plain(identity))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock.take()
        if before is not None:
            before = self._card()  # another process may have finished in between
        else:
            before = {**card, _OF_CARD: {"identity": identity, "piece": size}}
            write_run_card(self.card, before)
        done = before["metrics"] if self.file.exists() else None
        if done is not None:
            self.clear()
        return before[_OF_CARD]["piece"], done

    def _card(self) -> dict:
        """The card of an output that was begun before. Raises ConfigError."""
        try:
            card = json.loads(self.card.read_text(encoding="utf-8"))
            identity, piece = card[_OF_CARD]["identity"], card[_OF_CARD]["piece"]
            if isinstance(identity, dict) and isinstance(piece, int) and piece > 0:
                return card
        except (ValueError, KeyError, TypeError):
            pass
        raise ConfigError(f"{self.card} is not a card that evlgen caption wrote: remove it, or give another "
                          f"{self.lock.key}")  # fmt: skip

    def _in_the_way(self, new: bool) -> Path | None:
        """What is where an output that is not complete would be written; new: one that was not begun either."""
        folder = self.shards
        if new and any(self.folder.glob("*.jsonl")):  # with settings that nobody knows any more
            return self.folder
        if new and folder is not None and folder.exists():
            others = not folder.is_dir() or any(self._is_of_others(path) for path in folder.iterdir())
            if others:
                return folder
        return self.file if self.file.exists() else None

    def _is_of_others(self, path: Path) -> bool:
        """Whether it is no trace of a command that was killed before it had written its card."""
        return path != self.folder and not path.name.startswith(f".{self.card.name}")

    def _check(self, begun: Mapping, now: Mapping):
        """Raises ConfigError that names what differs."""
        differs = [f"{key} ({shown(begun.get(key))} there, {shown(now.get(key))} now)"
                   for key in {**begun, **now} if begun.get(key) != now.get(key)]  # fmt: skip
        if differs:
            raise ConfigError(
                f"{self.file} was begun with another {'; another '.join(differs)}: go on with what it was begun with, "
                f"remove {self.card}, {self.folder} and what is written, or give another {self.lock.key}"
            )

    def kept(self, number: int, identity: Mapping) -> PartialRows:
        """The rows of a piece that are done; to these, new ones are added."""
        of = {"captions of": settings_digest(plain(identity)), "piece": str(number)}
        return PartialRows(self.folder / f"{number:06d}.partial.jsonl", of, "captioning", self.lock.key)

    def records(self, number: int) -> Iterator[dict]:
        """Of a piece that is done."""
        with open(self._done(number), encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def is_done(self, number: int) -> bool:
        return self._done(number).exists()

    def _done(self, number: int) -> Path:
        return self.folder / f"{number:06d}.jsonl"

    def finish_piece(self, number: int, kept: PartialRows):
        """All rows of a piece are there."""
        _write(self._done(number), map(_line, kept.rows))
        kept.done()

    def finish(self, pieces: int, problems: list[str]) -> dict:
        """Join the pieces; the counts that the card says. problems: rows of the input that name no picture."""
        counts = Counter(captions=0, unreadable=0)

        def records():
            for number in range(pieces):
                for record in self.records(number):
                    counts["unreadable" if "error" in record else "captions"] += 1
                    yield record

        temporary = self.file.with_name(f".{self.file.name}.tmp")
        with writing(self.file):
            if self.file.suffix == ".csv":
                _write_table(temporary, records())
            else:
                _write(temporary, map(_line, records()))
        metrics = {**counts, "rows_left_out": len(problems)}
        write_run_card(self.card, {**self._card(), "metrics": metrics})
        os.replace(temporary, self.file)  # last: where FILE is, all is done
        self.clear()
        return metrics

    def clear(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _write(path: Path, lines: Iterator[str]):
    """Write `path`, whole or not at all; half of a surrogate pair, of a file's name, becomes its JSON escape."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path), open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_table(path: Path, records: Iterator[dict]):
    """CSV with a header: shard (of shards), image, caption, error."""
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = None
        for record in records:
            if table is None:
                table = csv.DictWriter(file, [*(["shard"] if "shard" in record else []), "image", "caption", "error"])
                table.writeheader()
            table.writerow(record)
        file.flush()
        os.fsync(file.fileno())
