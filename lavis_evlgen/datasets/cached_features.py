"""Tokens of pictures on disk, so that a frozen vision encoder runs once a picture. Files of a data set's split:

    NAME-SPLIT.npy          (pictures x views, L, D_v): float32, float16, or uint16 with the bits of bfloat16
    NAME-SPLIT.json         the index: what the tokens were made by, names of the pictures in the order of the tokens,
                            and a record of each picture that is done: size, time and sha256 of its file, or why it
                            cannot be read
    NAME-SPLIT.rank0.jsonl  while it is being filled: records of pictures whose tokens have reached the disk
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lavis_evlgen.datasets.seeding import generators_kept, mix, seed_all
from lavis_evlgen.errors import writing
from lavis_evlgen.media.errors import DataError, UnreadableImage
from lavis_evlgen.media.file_checks import Unreadable
from lavis_evlgen.reporting.json_lines import read_json_lines

FORMAT = 1  # raise it when the files come to mean something else
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}  # names of torch's types; numpy's own
FLUSH_SECONDS = 10.0  # the most work that a kill undoes


class FeatureStore:
    """The files of one split. An index is {"format", "identity", "versions", "names", "records"}.

    `identity` has "tokens" [L, D_v], "dtype" (a key of STORED), "views" and whatever else the tokens depend on.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.array, self.index_file = folder / f"{name}.npy", folder / f"{name}.json"
        self.unfinished = folder / f"{name}.npy.part"

    def index(self) -> dict | None:
        """None where there is none yet. Raises DataError where the files are not what `create` makes."""
        if not self.index_file.exists():
            return None
        try:
            index = json.loads(self.index_file.read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise ValueError
            names, records, numpy_type = index["names"], index["records"], STORED[index["identity"]["dtype"]]
            shape = _shape(index)
            if len(set(names)) != len(names) or not all(isinstance(r, dict) for r in records.values()):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{self.index_file} is no index of cached features that this version reads; "
                            f"{self.remedy}") from None  # fmt: skip
        if not self.array.exists():
            self._finish()
        try:
            found = np.load(self.array, mmap_mode="r", allow_pickle=False)  # refuses a file that is too short
        except FileNotFoundError:
            raise DataError(f"{self.array} is gone, though its index is there; {self.remedy}") from None
        except (ValueError, EOFError) as error:
            raise DataError(f"{self.array} cannot be read ({str(error).splitlines()[0]}); {self.remedy}") from None
        if found.shape != shape or found.dtype != numpy_type:
            raise DataError(f"{self.array} holds {found.dtype} {found.shape}, and by its index {np.dtype(numpy_type)} "
                            f"{shape}; {self.remedy}")  # fmt: skip
        for file in self._progress():
            for line in read_json_lines(file):
                index["records"] |= line["records"]
        return index

    @property
    def remedy(self) -> str:
        return f"delete {self.folder}, or set run.cache_features to another folder"

    def create(self, identity: dict, names: list[str], versions: dict):
        """An index without records, and a file with room for all tokens, of which the disk gives what is written.

        versions: of the software, for people.
        """
        index = {"format": FORMAT, "identity": identity, "versions": versions, "names": names, "records": {}}
        if self.array.exists():
            raise DataError(f"{self.array} is there without its index {self.index_file.name}; {self.remedy}")
        for file in self._progress():  # of an index that was deleted
            file.unlink()
        with writing(self.array):
            array = np.lib.format.open_memmap(self.unfinished, "w+", STORED[identity["dtype"]], _shape(index))
            array.flush()
        self._write_index(index)
        self._finish()

    def _finish(self):
        """The array gets its name when its index is there: a kill in `create` leaves nothing that is refused later."""
        with contextlib.suppress(FileNotFoundError):  # another rank was first
            os.replace(self.unfinished, self.array)

    def merge(self):
        """Put the records of all ranks into the index."""
        self._write_index(self.index())
        for file in self._progress():
            file.unlink()

    def _progress(self) -> list[Path]:
        return [Path(path) for path in sorted(glob.glob(f"{glob.escape(str(self.folder / self.name))}.rank*.jsonl"))]

    def _write_index(self, index: dict):
        unfinished = self.index_file.with_suffix(".json.part")
        with writing(self.index_file):
            with open(unfinished, "w", encoding="utf-8") as file:
                json.dump(index, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.index_file)


def _shape(index: dict) -> tuple[int, int, int]:
    """Of the tokens of an index; raises ValueError for numbers that are none."""
    numbers = [len(index["names"]), index["identity"]["views"], *index["identity"]["tokens"]]
    if len(numbers) != 4 or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise ValueError(f"not the shape of tokens: {numbers}")
    pictures, views, tokens, width = numbers
    return pictures * views, tokens, width


class FeatureWriter:
    """Writes tokens of one rank into a FeatureStore; `add` and `close`. Records follow when the tokens are on disk."""

    def __init__(self, store: FeatureStore, index: dict, rank: int):
        self.store, self.views = store, index["identity"]["views"]
        self.places = {name: place for place, name in enumerate(index["names"])}
        shape, numpy_type = _shape(index), STORED[index["identity"]["dtype"]]
        self.size = math.prod(shape[1:]) * np.dtype(numpy_type).itemsize * self.views  # bytes of a picture
        self.start = np.load(store.array, mmap_mode="r", allow_pickle=False).offset
        self.progress = store.folder / f"{store.name}.rank{rank}.jsonl"
        self._pending: dict[str, dict] = {}
        self._flushed = time.monotonic()
        with writing(store.array):
            self.file = open(store.array, "r+b")

    def add(self, name: str, record: dict, tokens: Tensor | None):
        """tokens (views, L, D_v) in the store's type; None of a picture that cannot be read."""
        if tokens is not None:
            with writing(self.store.array):  # not through the map, where a full disk would kill the process
                self.file.seek(self.start + self.places[name] * self.size)
                self.file.write(tokens.cpu().contiguous().view(torch.uint8).numpy())
        self._pending[name] = record
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self):
        with writing(self.store.array):
            self.file.flush()
            os.fsync(self.file.fileno())
        if self._pending:
            with writing(self.progress), open(self.progress, "a", encoding="utf-8") as file:
                file.write(json.dumps({"records": self._pending}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._pending, self._flushed = {}, time.monotonic()

    def close(self):
        self.flush()
        self.file.close()


class CachedFeatures:
    """Reads what a store holds of the pictures of a data set."""

    def __init__(self, store: FeatureStore, index: dict):
        self.array, self.views = store.array, index["identity"]["views"]
        self.type = getattr(torch, index["identity"]["dtype"])
        self.places = {name: place for place, name in enumerate(index["names"])}
        self.unreadable = {n: (r.get("path", n), r["reason"]) for n, r in index["records"].items() if "reason" in r}
        self._map = None

    def __getstate__(self):  # a map would be sent to a worker with its content
        return {**self.__dict__, "_map": None}

    def tokens(self, image, epoch: int) -> Tensor:
        """(L, D_v) of the row whose `image` this is. Raises UnreadableImage where its picture could not be read."""
        name = str(image)
        if name in self.unreadable:
            raise UnreadableImage(*self.unreadable[name])
        if self._map is None:
            self._map = np.load(self.array, mmap_mode="r", allow_pickle=False)
        stored = np.array(self._map[self.places[name] * self.views + epoch % self.views])  # (L, D_v)
        return torch.from_numpy(stored.view(np.uint8)).view(self.type)


class PicturesToStore(Dataset):
    """Pictures as the encoder gets them: item n is (name, record of its file, (views, 3, H, W) or None: unreadable)."""

    def __init__(self, dataset, rows: Sequence[dict], views: int):
        """dataset: a ReadableRows; rows: of its annotation, one of each picture."""
        self.dataset, self.rows, self.views = dataset, rows, views

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> tuple[str, dict, Tensor | None]:
        row = self.rows[n]
        name, record = str(row["image"]), file_record(self.dataset.file_of(row))
        # not by run.seed: runs and stages of other seeds share a cache, whose views stay what they are
        split, picture = (zlib.crc32(text.encode()) for text in (f"{self.dataset.name} {self.dataset.split}", name))
        views = []
        try:
            with generators_kept():
                for view in range(self.views):
                    seed_all(mix(split, view, picture))
                    views.append(self.dataset.processed(row))
        except Unreadable as error:
            return name, {**record, "path": error.path, "reason": error.reason}, None
        return name, record, torch.stack(views)

    @staticmethod
    def collater(items: list[tuple]) -> tuple[list[tuple[str, dict, bool]], Tensor | None]:
        """(name, record, whether readable) of each, and the views of the readable ones, one after another."""
        views = [own for _, _, own in items if own is not None]
        facts = [(name, record, own is not None) for name, record, own in items]
        return facts, torch.cat(views) if views else None


def file_record(path: str | None) -> dict:
    """{"size", "time", "sha256"} of a file; {} where there is none."""
    try:
        if path is None:
            return {}
        facts = os.stat(path)
        return {"size": facts.st_size, "time": facts.st_mtime_ns, "sha256": _sha256(path)}
    except (OSError, ValueError):  # the last: a name that holds a null character
        return {}


def has_changed(record: dict, path: str | None) -> bool:
    """Whether a picture's file is another than the one of its record. Its content is read where only the time is."""
    try:
        facts = None if path is None else os.stat(path)
        if facts is None or "size" not in record:
            return facts is not None
        if facts.st_size != record["size"]:
            return True
        return facts.st_mtime_ns != record.get("time") and _sha256(path) != record.get("sha256")
    except (OSError, ValueError):
        return "size" in record


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
