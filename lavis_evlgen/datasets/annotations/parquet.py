"""Rows of a Parquet file with its pictures inside, as Hugging Face's data sets have them: image {bytes, path}, ...

The rows are read at once without their pictures. Pictures are read once at the start, row group by row group, to tell
them apart, and then one row group at a time, whenever one of its pictures is asked for: a process never holds more
than one row group.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from lavis_evlgen.datasets.annotations.files import Table
from lavis_evlgen.media.errors import DataError, UnreadableImage

LARGE = 256 * 2**20  # bytes of pictures in a row group; one is read for each picture


class Place(NamedTuple):
    """Where a picture is: `row` counts from the start of the row group, `number` from 1 in the file."""

    path: str
    column: str
    group: int
    row: int
    number: int


class ParquetPictures:
    """The pictures of Parquet files by name: {name: Place}, and their content."""

    def __init__(self, places: dict[str, Place] | None = None):
        self.places = places or {}
        self._opened = threading.local()  # a reader for each thread; workers get one at their first picture

    def __getstate__(self):
        return self.places

    def __setstate__(self, places: dict[str, Place]):
        self.__init__(places)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def content(self, name: str) -> tuple[bytes, str]:
        """The file of a picture, and what to call it in messages. Raises UnreadableImage."""
        place = self.places[name]
        where = f"{place.path} row {place.number}"
        if getattr(self._opened, "group", None) != place[:3]:
            self._opened.group = self._opened.pictures = None  # the group before goes first
            try:
                self._opened.pictures = _pictures(_open(place.path), place.column, place.group)
            except (_arrow().ArrowException, OSError) as error:
                raise UnreadableImage(where, f"broken or truncated ({error})") from None
            self._opened.group = place[:3]
        return self._opened.pictures[place.row].as_py()["bytes"], where


def is_parquet(path) -> bool:
    """Whether a file begins as Parquet files do."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False


def read_parquet(path: str, image: str, columns: Collection[str]) -> tuple[Table, dict[str, Place]]:
    """The rows, of these columns alone, and where the pictures of the column `image` are. Raises DataError.

    A picture's name, which stands for it in its rows, is a hash of its content: the same in every file and row. A
    picture without content keeps its path, a file's name.
    """
    # the last two: texts that are not UTF-8, times and numbers that Python has no value for
    path, places, refused = str(path), {}, (_arrow().ArrowException, OSError, ValueError, OverflowError)
    try:
        file = _open(path)
        header = file.schema_arrow.names
        inside = image in header and _holds_pictures(file.schema_arrow.field(image).type)
        wanted = [name for name in header if name in columns and not (inside and name == image)]
        rows = file.read(wanted, use_threads=False).to_pylist()
        if inside:
            _warn_of_large_groups(path, file, image)
            rows = rows or [{} for _ in range(file.metadata.num_rows)]  # of a file that has no other column
            for row, (name, place) in zip(rows, _named(path, file, image), strict=True):
                row[image] = name
                if place is not None:
                    places.setdefault(name, place)
    except refused as error:
        raise DataError(f"{path} is not a Parquet file that can be read ({error}); write or fetch it again") from None
    records: list[tuple[str, Any]] = [(f"row {number}", row) for number, row in enumerate(rows, 1)]
    return Table("Parquet", header, records), places


def _arrow():
    """The package pyarrow, which nothing else here needs. Raises DataError where it is not installed."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(
            f"Parquet files are read by the package pyarrow ({error}): run `uv pip install pyarrow`, or "
            "`pip install pyarrow`, or give the rows as JSON or CSV and the pictures as files"
        ) from None
    return pyarrow


def _open(path: str):
    # memory-mapped: forked data workers have no file position in common
    return _arrow().parquet.ParquetFile(path, memory_map=True)


def _holds_pictures(kind) -> bool:
    types = _arrow().types
    at = kind.get_field_index("bytes") if types.is_struct(kind) else -1
    return at >= 0 and (types.is_binary(kind.field(at).type) or types.is_large_binary(kind.field(at).type))


def _pictures(file, column: str, group: int):
    """The column's {bytes, ...} of a row group; no threads, which a forked worker would not have."""
    return file.read_row_group(group, columns=[column], use_threads=False).column(column)


def _named(path: str, file, column: str) -> Iterator[tuple[str | None, Place | None]]:
    """Name and place of the picture of each row; of none, (its path or None, None)."""
    number = 0
    for group in range(file.num_row_groups):
        for row, picture in enumerate(_pictures(file, column, group)):
            number, picture = number + 1, picture.as_py() or {}
            if content := picture.get("bytes"):
                yield hashlib.sha256(content).hexdigest()[:16], Place(path, column, group, row, number)
            else:
                yield picture.get("path"), None


def _warn_of_large_groups(path: str, file, column: str):
    names = [file.schema.column(n).path for n in range(len(file.schema.names))]
    leaf = names.index(f"{column}.bytes")
    groups = (file.metadata.row_group(n) for n in range(file.num_row_groups))
    largest = max((group.column(leaf).total_uncompressed_size for group in groups), default=0)
    if largest > LARGE:
        logging.warning(
            "%s has row groups of %d MB of pictures, and each picture costs reading one; write it with smaller ones: "
            "pyarrow.parquet.write_table(table, file, row_group_size=100)", path, largest // 2**20,
        )  # fmt: skip
