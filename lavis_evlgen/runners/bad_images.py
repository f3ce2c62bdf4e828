"""Unreadable images: counted once each, named in bad_images.jsonl, fatal above `max_bad_fraction`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from lavis_evlgen import distributed


class TooManyBadImages(RuntimeError):
    """More of the data is unreadable than the config tolerates."""


class BadImages:
    """Distinct unreadable images of a run, over all ranks after `share()`."""

    def __init__(self, folder: Path, datasets: list, resumed: bool = False):
        """resumed: what the run found before counts on; else a list that an earlier run left here is removed."""
        self.file = folder / "bad_images.jsonl"
        # the loosest limit of the mix: with several sets, an image does not say which one it is from
        self.total = sum(getattr(d, "num_images", len(d)) for d in datasets)
        self.allowed = sum(getattr(d, "max_bad_fraction", 0.0) * getattr(d, "num_images", len(d)) for d in datasets)
        self.found: dict[str, str] = {}
        self.new: list[dict] = []
        if resumed and self.file.exists():
            known = map(json.loads, self.file.read_text().splitlines())
            self.found = {entry["image"]: entry["reason"] for entry in known}
        elif distributed.is_main():
            self.file.unlink(missing_ok=True)

    def add(self, entries: list[dict]):
        """Entries {"image", "reason"} that a batch brought along; cheap, no communication."""
        for entry in entries:
            if entry["image"] not in self.found:
                self.found[entry["image"]] = entry["reason"]
                self.new.append(entry)

    def share(self):
        """Exchange new entries between ranks, write and log them; raises TooManyBadImages above the limit."""
        seen = distributed.gather_lists(self.new)
        fresh = {entry["image"]: entry for entry in seen}
        self.found |= {image: entry["reason"] for image, entry in fresh.items()}
        self.new = []
        if fresh and distributed.is_main():
            with open(self.file, "a") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in fresh.values())
            first = next(iter(fresh.values()))
            logging.warning(
                "%d unreadable images so far, of %d; new: %s (%s)%s; all are named in %s",
                len(self.found), self.total, first["image"], first["reason"],
                f" and {len(fresh) - 1} more" if len(fresh) > 1 else "", self.file,
            )  # fmt: skip
        if len(self.found) > self.allowed:
            image, reason = next(iter(self.found.items()))
            raise TooManyBadImages(
                f"{len(self.found)} of {self.total} images are unreadable, more than max_bad_fraction allows "
                f"({self.allowed:g}); the first is {image} ({reason}). Mend or remove them (all are named in "
                f"{self.file}), or raise datasets.NAME.max_bad_fraction"
            )
