"""What `evlgen caption --out` is to caption: picture files, a folder, a table that names pictures, or tar shards."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets.annotations.files import quoted, read_rows
from lavis_evlgen.datasets.shards.captioned import check_sample
from lavis_evlgen.datasets.shards.dataset import VideoShards
from lavis_evlgen.datasets.shards.names import shard_names
from lavis_evlgen.datasets.shards.reader import IMAGES, ShardIndex
from lavis_evlgen.media.errors import DataError, UnreadableImage
from lavis_evlgen.runners.checkpointing.evaluation_resume import settings_digest
from lavis_evlgen.tools.caption import Encoded

PICTURES = (*IMAGES, "gif", "bmp", "tif", "tiff")  # endings of the files of a folder that are looked at
CLIPS = VideoShards.extensions
TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".json")
COLUMNS = ("image", "file", "path", "filename", "file_name", "filepath", "image_path", "video")
FILES, FOLDER, TABLE, SHARDS = "a picture file", "a folder", "a table", "a tar shard"  # kinds, as messages say them
_TAR = re.compile(r"\.tar(\.\w+)?[}\]]*$")


class Files(Sequence):
    """Some of the pictures of a folder, a table or a command line, as `caption_images` takes them."""

    def __init__(self, names: list[str], root: str):
        self.names, self.root = names, root

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> str:
        return os.path.join(self.root, self.names[number])

    def named(self, number: int) -> dict:
        """What a record says of the picture beside its caption."""
        return {"image": self.names[number]}


class Shard(Sequence):
    """The items of one shard, as `caption_images` takes them. caption_key: of the new shard, None: none is made."""

    def __init__(self, path: str, extensions: tuple[str, ...], caption_key: str | None):
        self.index, self.extensions, self.caption_key = ShardIndex(path, extensions), extensions, caption_key

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Encoded:
        item = self.index[number]
        where = f"{self.index.path}:{item.key}"
        if item.problem is not None:
            raise UnreadableImage(self.index.path, f"the shard: {item.problem}")
        content = next((item.files[kind] for kind in item.files if kind in self.extensions), None)
        if content is None:
            raise UnreadableImage(where, f"a text without a file ({', '.join(self.extensions)}) beside it")
        if self.caption_key is not None:
            check_sample(item, where, self.caption_key)
        return Encoded(content, where)

    def named(self, number: int) -> dict:
        return {"shard": self.index.path, "image": self.index.entries[number].key}


@dataclass
class Inputs:
    """kind: FILES, FOLDER, TABLE or SHARDS; names: of the pictures below `root`, or the shards' files; told: what they
    are, in words; problems: a line for each row of a table that names no picture; clips: whether clips are looked for;
    caption_key: as Shard."""

    kind: str
    names: list[str]
    root: str = ""
    told: str = ""
    problems: list[str] = field(default_factory=list)
    clips: bool = False
    caption_key: str | None = None

    def of(self, clips: bool) -> Inputs:
        """The inputs of a model of clips, or of pictures: of a folder, the files of that kind. Raises DataError."""
        if self.kind != FOLDER:
            return dataclasses.replace(self, clips=clips)
        endings = CLIPS if clips else PICTURES
        names = [name for name in self.names if name.rpartition(".")[2].lower() in endings]
        if not names:
            tars = sum(name.endswith(".tar") for name in self.names)
            also = f"; for its {tars} tar shards give '{self.root}/*.tar'" if tars else ""
            raise DataError(f"{self.root}: no file in it or below it ends with {', '.join(endings)}{also}")
        return dataclasses.replace(self, names=names, clips=clips)

    def parts(self, size: int) -> int:
        """How many parts of `size` pictures there are; of shards, each is one."""
        return len(self.names) if self.kind == SHARDS else -(-len(self.names) // size)

    def part(self, number: int, size: int) -> Files | Shard:
        """Part `number`: its items, of which `named(item)` says what a record says."""
        if self.kind == SHARDS:
            return Shard(self.names[number], CLIPS if self.clips else IMAGES, self.caption_key)
        return Files(self.names[number * size : (number + 1) * size], self.root)

    @property
    def folder(self) -> str | None:
        """Where the names start, links resolved: names alone do not say which pictures they are. None of shards, whose
        files may be moved while they are as large as before."""
        return None if self.kind == SHARDS else os.path.realpath(self.root)

    def fingerprint(self) -> str:
        """Digest of which pictures these are: of shards, names and sizes of their files."""
        if self.kind != SHARDS:
            return settings_digest({"names": self.names})
        return settings_digest({"shards": [(Path(name).name, os.stat(name).st_size) for name in self.names]})


def read_inputs(given: Sequence[str], column: str | None, folder: str | None, caption_key: str | None) -> Inputs:
    """What a command line names: `given`, column and folder of a table, and the key of new shards' captions.

    Raises ConfigError for a mixture of kinds, and for options that belong to another kind; DataError.
    """
    kind = _kind(given[0])
    other = next((text for text in given[1:] if _kind(text) != kind or kind in (FOLDER, TABLE)), None)
    if other is not None:
        raise ConfigError(
            "with --out give one kind of input: picture files, one folder, one table or tar shards; "
            f"{given[0]} is {kind}, and {other} is {_kind(other)}"
        )
    for option, value in (("--column", column), ("--images", folder)):
        if value is not None and kind != TABLE:
            raise ConfigError(f"{option} is for a table of pictures ({', '.join(TABLES)}); {given[0]} is {kind}")
    if caption_key is not None and kind != SHARDS:
        raise ConfigError(f"--out-shards is for tar shards; {given[0]} is {kind}: give --out captions.jsonl")
    if kind == TABLE:
        return _table(given[0], column, folder)
    return _shards(given, caption_key) if kind == SHARDS else _folder(given[0]) if kind == FOLDER else _pictures(given)


def _kind(text: str) -> str:
    if _TAR.search(text):
        return SHARDS
    if os.path.isdir(text):
        return FOLDER
    return TABLE if Path(text).suffix.lower() in TABLES else FILES


def _pictures(given: Sequence[str]) -> Inputs:
    names = list(dict.fromkeys(given))
    if not any(map(os.path.exists, names)):  # one of many that is missing is told in its record
        more = f" and {len(names) - 1} more" if names[1:] else ""
        raise DataError(f"{names[0]}{more}: no such file or folder here ({Path.cwd()}); correct the path")
    return Inputs(FILES, names, told=f"{len(names)} files")


def _folder(root: str) -> Inputs:
    """All files below it in the order of their names, but those whose name, or a folder's, begins with a dot."""
    names = []
    for here, folders, files in os.walk(root, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names += [os.path.relpath(os.path.join(here, name), root) for name in files if not name.startswith(".")]
    return Inputs(FOLDER, sorted(names), root, f"the folder {root}")


def _refuse(error: OSError):
    raise DataError(f"{error.filename} cannot be read ({error.strerror}); change its permissions, or leave it out")


def _table(path: str, column: str | None, folder: str | None) -> Inputs:
    if folder is not None and not os.path.isdir(folder):
        raise ConfigError(f"--images {folder} is not a folder here ({Path.cwd()})")
    table = read_rows(path, "table of pictures", is_file=lambda content: "images" in content)
    if isinstance(table, dict):
        raise DataError(f"{path} is one JSON object; give a table, or JSON lines, with a column of picture names")
    header = table.header or next((list(row) for _, row in table.records if isinstance(row, dict)), [])
    wanted = column or next((name for name in COLUMNS if name in header), None)
    if wanted is None or wanted not in header:
        named = f"no column {column!r}" if column else f"none of the usual columns ({', '.join(COLUMNS)})"
        raise DataError(f"{path} has {named}; it has {quoted(header)}: give --column NAME, the one with picture names")
    if (count := header.count(wanted)) > 1:
        raise DataError(f"{path} has {count} columns {wanted!r}: which one names the pictures is not known; rename one")
    problems, names = list(table.problems), {}
    for where, row in table.records:
        name = row.get(wanted) if isinstance(row, dict) else None
        if isinstance(name, str) and name.strip():
            names[name.strip()] = None
        else:
            problems.append(f"{where}: no name of a picture in {wanted!r}")
    if not names:
        raise DataError(f"{path} names no picture in {wanted!r}" + (f"; {problems[0]}" if problems else ""))
    root = os.path.dirname(path) if folder is None else folder
    return Inputs(TABLE, list(names), root, f"column {wanted!r} of {path}", problems)


def _shards(given: Sequence[str], caption_key: str | None) -> Inputs:
    names = list(dict.fromkeys(shard_names(given, config_path="evlgen caption")))
    missing = [name for name in names if not os.path.isfile(name)]
    if missing:
        raise DataError(f"{len(missing)} of {len(names)} shards are not there: {quoted(missing)}; correct their names")
    if caption_key is not None:  # before weights are read and anything is written
        with contextlib.suppress(UnreadableImage):
            first = ShardIndex(names[0], (*IMAGES, *CLIPS))[0]
            check_sample(first, f"{names[0]}:{first.key}", caption_key)
    return Inputs(SHARDS, names, caption_key=caption_key, told=f"{len(names)} shards, {names[0]} to {names[-1]}")
