"""Rows of a text file as dicts: a table with a header (CSV, TSV), a JSON list, or JSON lines.

What a row means, and which columns it needs, is for the readers of captions and of questions.
"""

import csv
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lavis_evlgen.media.errors import DataError

WHERE_FROM = "docs/evaluation.md says where the files of public benchmarks come from"
_MOST_LINES = 10  # of one row of a table; more is a quote that was not meant
_MOST_NAMES = 20  # in a message


@dataclass
class Table:
    """`header`: [] of JSON; `records`: (where, row); `problems`: one line for each record that is no row."""

    format: str
    header: list[str]
    records: list[tuple[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def has_words(text) -> bool:
    """Whether it is text with a letter or digit in it."""
    return isinstance(text, str) and any(mark.isalnum() for mark in text)


def encodes(text: str) -> bool:
    """Whether the text can be written: JSON may hold a lone surrogate, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(path, what: str) -> str:
    """The text of a UTF-8 file; `what` it is, for the errors. Raises DataError, also for an empty file and for HTML."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except FileNotFoundError:
        here = "" if os.path.isabs(path) else f" (relative paths start at {os.getcwd()})"
        raise DataError(f"there is no {what} {path}{here}; {WHERE_FROM}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"the {what} {path} is not UTF-8 text ({error}); convert it first") from None
    except OSError as error:
        raise DataError(f"cannot read the {what} {path}: {error}") from None
    start = text.lstrip()[:200].lower()
    if not start:
        raise DataError(f"the {what} {path} is empty")
    if start.startswith(("<!doctype", "<html")):
        raise DataError(f"{path} looks like HTML, perhaps an error page saved by a downloader")
    return text


def _parse_json(path, text: str, is_file: Callable[[dict], bool]):
    """A list of (number, row) from a JSON list or from JSON lines, or a dict that is a file and not a row.

    `is_file` says of a dict on a single line that it is a whole file. Raises DataError.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise DataError(f"{path} is JSON that is nested too deeply to be annotations") from None
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # a second value after the first one: JSON lines
            raise DataError(f"{path} is not valid JSON, line {error.lineno}: {error.msg}") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path} is not valid JSON: {error}") from None
    else:
        one_row = isinstance(content, dict) and not is_file(content)
        if not one_row or "\n" in text.strip():
            return list(enumerate(content, 1)) if isinstance(content, list) else content
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not valid JSON: {error.msg}") from None
        except ValueError as error:
            raise DataError(f"{path} line {number} is not valid JSON: {error}") from None
        except RecursionError:
            raise DataError(f"{path} line {number} is JSON that is nested too deeply to be a row") from None
    return rows


def read_rows(path, what: str, is_file: Callable[[dict], bool]) -> Table | dict:
    """The rows of a table, a JSON list or JSON lines; or the JSON object that the whole file is.

    `what`: what the file is, for errors; `is_file`: whether a JSON object is a whole file, not a row. Raises DataError.
    """
    text = _read_text(path, what)
    if text.lstrip()[0] not in "[{":
        return _read_table(path, text)
    content = _parse_json(path, text, is_file)
    if isinstance(content, dict):
        return content
    format, unit = ("LAVIS JSON", "row") if text.lstrip()[0] == "[" else ("JSONL", "line")
    return Table(format, [], [(f"{unit} {number}", row) for number, row in content])


def _read_table(path, text: str) -> Table:
    """A table with a header, delimited by tabs, bars, semicolons or commas. Raises DataError."""
    first_line = text.lstrip().partition("\n")[0]
    delimiter = next((mark for mark in "\t|;" if mark in first_line), ",")
    quoted = delimiter in ",;"  # in TSV a caption may open with a quote mark, which would swallow whole lines
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    # strict: a quote that is never closed would take all that follows into one caption
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    problems, records, last = [], [], 0
    try:
        header = [name.strip() for name in next(cells for cells in reader if cells)]
        last = reader.line_num
        for cells in reader:
            where = f"line {reader.line_num}"
            if reader.line_num - last > _MOST_LINES:
                raise DataError(
                    f"{path} line {last + 1}: a quote opens a row that ends only in line {reader.line_num}, and would "
                    'take the lines between into one caption; close it, or double the quote marks of the text ("")'
                )
            first, last = last + 1, reader.line_num
            if last > first and (line := _swallowed_row(cells, delimiter)):
                problems.append(
                    f"lines {first} to {last}: a quote takes what looks like another row into one field, {line!r:.60}; "
                    'close it, or double the quote marks of the text ("")'
                )
            elif len(cells) == len(header):
                cells = cells if quoted else [_unquote(cell) for cell in cells]
                records.append((where, dict(zip(header, cells, strict=True))))
            elif cells:
                problems.append(f"{where}: {len(cells)} fields, but the header has {len(header)}")
    except csv.Error as error:
        lines = f"{path} line {last + 1}" + (f" to {reader.line_num}" if reader.line_num > last + 1 else "")
        raise DataError(f"{lines} is not valid CSV: {error}; look for quote marks that are not closed") from None
    return Table("TSV" if delimiter == "\t" else "CSV", header, records, problems)


def _swallowed_row(cells: list[str], delimiter: str) -> str | None:
    """The first line inside a field of this row that looks like another row's; None where all is the field's text.

    As a quote takes it in: `a.jpg,"a dog` and, a line or two below, `c.jpg,a bird"`. A caption may span lines, too: a
    line is another row if one of its fields looks like this row's image name, where a row would have it.
    """
    for column, cell in enumerate(cells):
        lines = [line for line in cell.splitlines() if line.strip()]
        if len(lines) < 2:
            continue
        parts = [line.split(delimiter) for line in lines]
        # the first line begins in this column and ends the row; the last begins a row and ends in this column
        whole = [len(cells)] * (len(lines) - 2)
        shaped = [len(part) for part in parts] == [len(cells) - column, *whole, column + 1]
        for number, (line, fields) in enumerate(zip(lines, parts, strict=True)):
            first = 0 if number else column
            pairs = [(field, cells[first + n]) for n, field in enumerate(fields[: len(cells) - first])
                     if first + n != column]  # fmt: skip
            if any(_alike(field.strip(' "'), other.strip(), shaped) for field, other in pairs):
                return line
    return None


def _alike(field: str, other: str, shaped: bool) -> bool:
    """Whether both are names of files of one kind; without endings, in lines shaped like rows, both single words."""
    ending = re.search(r"\.\w{1,5}$", other)
    if ending:
        return field.lower().endswith(ending[0].lower())
    return shaped and bool(field) and not re.search(r"\s", field + other) and field.isdigit() == other.isdigit()


def given_columns(columns: dict[str, str] | None, known: tuple[str, ...]) -> dict[str, str]:
    """The config's `columns` that are set. Raises DataError for one that is not `known`."""
    columns = {column: name for column, name in (columns or {}).items() if name}
    if unknown := set(columns) - set(known):
        raise DataError(f"columns.{min(unknown)} is not known; columns takes {', '.join(known)}")
    return columns


def report_problems(path, found, max_bad_fraction: float, config_path: str):
    """Log the notes and problems of a file that was read (`found`: rows, problems, notes).

    Raises DataError where more than `max_bad_fraction` of its rows cannot be used. `config_path`: of the section.
    """
    for note in found.notes:
        logging.info("%s: %s", path, note)
    total = len(found.rows) + len(found.problems)
    if found.problems:
        first = "; ".join(found.problems[:3])
        words = f"{len(found.problems)} of {total} rows of {path} cannot be used, such as {first}"
        if len(found.problems) > max_bad_fraction * total:
            raise DataError(f"{words}. Fix them, or raise {config_path}.max_bad_fraction={max_bad_fraction}")
        logging.warning(words)


def _unquote(cell: str) -> str:
    cell = cell.strip()
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def quoted(keys: Iterable[str]) -> str:
    """Names in quotes, joined by commas; of many, or of long ones, the beginning."""
    keys = iter(keys)
    first = [f"{key!r:.60}" for key in islice(keys, _MOST_NAMES)]
    more = sum(1 for _ in keys)
    return (", ".join(first) or "nothing") + (f" and {more} more" if more else "")


@contextmanager
def laid_out(found: "RowsFile"):
    """Within it, a list or a text where a benchmark's file has an object is a DataError that names the file."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        raise DataError(f"{found.path} is broken: it is not laid out as {found.format} is ({error})") from error


@dataclass
class RowsFile:
    """What a file of annotations holds: usable `rows`, one line of `problems` for each other row, `notes`."""

    path: str
    format: str
    rows: list = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def dicts(self, records: Iterable[tuple[str, Any]], seen: dict) -> Iterator[tuple[str, dict]]:
        """The records that are dicts, the others noted as problems; `seen` gets the keys of all of them."""
        for where, record in records:
            if isinstance(record, dict):
                seen.update(record)
                yield where, record
            else:
                self.problems.append(f"{where}: not a row but {record!r:.40}")


def check_column(path, header: Iterable[str], column: str, wanted: str, needed: str, config_path: str):
    """Raises DataError unless the header has `wanted`, which holds `column`, once; needed: all that a row must have."""
    if (count := list(header).count(wanted)) > 1:
        raise DataError(f"{path} has {count} columns {wanted!r}: which one holds the {column} is not known; rename one")
    if wanted not in header:
        raise DataError(
            f"{path} has no column {wanted!r}; its columns are {quoted(header)}. Needed are {needed}: set "
            f"{config_path}.columns.{column}=NAME to the one that holds the {column.replace('_', ' ')}"
        )


def image_ids(path, named: Iterable[tuple[str, int | str | None]]) -> dict[str, int | str]:
    """The id of each image, in file order, from (image, id or None): that of another row of the image, else its name.

    Raises DataError where two ids name one image or one id two images.
    """
    ids: dict[str, int | str | None] = {}
    for image, image_id in named:
        if ids.setdefault(image, image_id) is None:
            ids[image] = image_id
        elif image_id not in (None, ids[image]):
            raise DataError(f"{path} gives {image} two image ids: {ids[image]!r} and {image_id!r}")
    ids = {image: image if image_id is None else image_id for image, image_id in ids.items()}
    owner: dict[int | str, str] = {}
    for image, image_id in ids.items():
        if owner.setdefault(image_id, image) != image:
            raise DataError(f"{path} gives the id {image_id!r} to two images: {owner[image_id]} and {image}")
    return ids
