"""Unreadable images and videos: counted once each, named in bad_images.jsonl, fatal above `max_bad_fraction`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from lavis_evlgen import distributed
from lavis_evlgen.datasets import ImageShards
from lavis_evlgen.reporting.json_lines import read_json_lines


class TooManyBadImages(RuntimeError):
    """More of the data is unreadable than the config tolerates."""


def noun_of(dataset) -> str:
    """What its rows are about, for messages: images or videos."""
    return f"{getattr(dataset, 'media', 'image')}s"


class BadImages:
    """Distinct unreadable images of a run, over all ranks after `share()`."""

    def __init__(self, folder: Path, datasets: list, resumed: bool = False):
        """resumed: what the run found before counts on; else a list that an earlier run left here is removed."""
        self.file = folder / "bad_images.jsonl"
        datasets = [d for d in datasets if not isinstance(d, ImageShards)]  # bad_shards.py counts those
        # the loosest limit of the mix: with several sets, an image does not say which one it is from
        self.total = sum(getattr(d, "num_images", len(d)) for d in datasets)
        self.allowed = sum(getattr(d, "max_bad_fraction", 0.0) * getattr(d, "num_images", len(d)) for d in datasets)
        self.noun = " and ".join(sorted({noun_of(d) for d in datasets})) or "images"
        self.found: dict[str, str] = {}
        self.new: list[dict] = []
        if resumed:
            known = [entry for entry in read_json_lines(self.file) if "split" not in entry]
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
                "%d unreadable %s so far, of %d; new: %s (%s)%s; all are named in %s",
                len(self.found), self.noun, self.total, first["image"], first["reason"],
                f" and {len(fresh) - 1} more" if len(fresh) > 1 else "", self.file,
            )  # fmt: skip
        if len(self.found) > self.allowed:
            image, reason = next(iter(self.found.items()))
            raise TooManyBadImages(
                f"{len(self.found)} of {self.total} {self.noun} are unreadable, more than max_bad_fraction allows "
                f"({self.allowed:g}); the first is {image} ({reason}). Mend or remove them (all are named in "
                f"{self.file}), or raise datasets.NAME.max_bad_fraction"
            )


def check_unreadable(folder: Path, split: str, dataset, entries: list[dict]):
    """Name the unreadable pictures of an evaluation in bad_images.jsonl and the log; the scores leave them out.

    Every rank calls it with all ranks' entries. Raises TooManyBadImages above the data set's `max_bad_fraction`.
    """
    if not entries:
        return
    entries = list({entry["image"]: entry for entry in entries}.values())  # several questions may share a picture
    file, total = folder / "bad_images.jsonl", getattr(dataset, "num_images", len(dataset))
    count = f"{len(entries)} of {total} {noun_of(dataset)} are unreadable"
    first = f"{entries[0]['image']} ({entries[0]['reason']})"
    if distributed.is_main():
        listed = {(entry["image"], entry.get("split")) for entry in read_json_lines(file)}
        with open(file, "a") as out:
            fresh = [{**entry, "split": split} for entry in entries if (entry["image"], split) not in listed]
            out.writelines(json.dumps(entry) + "\n" for entry in fresh)
        logging.warning("%s: %s, first %s; all are named in %s", split, count, first, file)
    if len(entries) > getattr(dataset, "max_bad_fraction", 0.0) * total:
        raise TooManyBadImages(
            f"{split}: {count}, more than max_bad_fraction allows; the first is {first}. Mend or remove them (all are "
            f"named in {file}), or raise datasets.NAME.max_bad_fraction"
        )
