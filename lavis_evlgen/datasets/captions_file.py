"""Read a captions file, in any of the usual formats, into rows of (image, caption, image id, split).

COCO captions JSON, Karpathy JSON, LAVIS JSON (a list of rows), JSONL (a row a line), and CSV or TSV with a
header. The format is recognised by what the file contains.
"""

import csv
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from lavis_evlgen.datasets.errors import DataError

COLUMNS = ("image", "caption", "image_id", "split")
_OPTIONAL = ("image_id", "split")
_MOST_LINES = 10  # of one row of a table; more is a quote that was not meant


class CaptionRow(NamedTuple):
    """One caption of one image. `image` is a path below the images folder."""

    image: str
    caption: str
    image_id: int | str | None = None
    split: str | None = None


@dataclass
class CaptionsFile:
    """What a captions file holds: usable `rows`, one line of `problems` for each other row, `notes`."""

    path: str
    format: str
    rows: list[CaptionRow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, where: str, image, caption, image_id=None, split=None):
        """Keep the row, or say what is wrong with it."""
        if not isinstance(image, str) or not image.strip():
            self.problems.append(f"{where}: no image name")
        elif not isinstance(caption, str) or not any(mark.isalnum() for mark in caption):
            self.problems.append(f"{where}: no caption for {image}")
        elif not (_encodes(caption) and _encodes(image)):
            self.problems.append(f"{where}: half of a surrogate pair in its text")
        elif image_id is not None and not isinstance(image_id, (int, str)):
            self.problems.append(f"{where}: the image id of {image} is neither number nor text: {image_id!r}")
        else:
            self.rows.append(CaptionRow(image.strip(), caption.strip(), image_id, split))


def _encodes(text: str) -> bool:
    """Whether the text can be written: JSON may hold a lone surrogate, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_captions_file(path, columns: dict[str, str] | None = None) -> CaptionsFile:
    """Parse `path`. `columns` says where tables use other names than image, caption, image_id and split.

    Rows that cannot be used are listed in `.problems`. Raises DataError where the whole file cannot be used.
    """
    columns = {column: name for column, name in (columns or {}).items() if name}
    if unknown := set(columns) - set(COLUMNS):
        raise DataError(f"columns.{min(unknown)} is not known; columns takes {', '.join(COLUMNS)}")
    text = _read_text(path)
    start = text.lstrip()[:200].lower()
    if not start:
        raise DataError(f"the captions file {path} is empty")
    if start.startswith(("<!doctype", "<html")):
        raise DataError(f"{path} looks like HTML, perhaps an error page saved by a downloader")
    if start[0] not in "[{":
        return _read_table(path, text, columns)
    content = _parse_json(path, text)
    if isinstance(content, dict):
        if columns:
            raise DataError(f"{path} is a COCO or Karpathy file, whose fields are fixed; drop `columns`")
        return _read_json_object(path, content)
    kind = "LAVIS JSON" if start[0] == "[" else "JSONL"
    unit = "row" if start[0] == "[" else "line"
    return _read_records(path, kind, ((f"{unit} {n}", record) for n, record in content), columns)


def _read_text(path) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except FileNotFoundError:
        here = "" if os.path.isabs(path) else f" (relative paths start at {os.getcwd()})"
        raise DataError(f"there is no captions file {path}{here}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"the captions file {path} is not UTF-8 text ({error}); convert it first") from None
    except OSError as error:
        raise DataError(f"cannot read the captions file {path}: {error}") from None


def _parse_json(path, text: str):
    """A dict (COCO, Karpathy), or a list of (number, row) from a JSON list or from JSON lines."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # a second value after the first one: JSON lines
            raise DataError(f"{path} is not valid JSON, line {error.lineno}: {error.msg}") from None
    else:
        one_row = isinstance(content, dict) and not {"images", "annotations", "info"} & set(content)
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
    return rows


def _read_json_object(path, content: dict) -> CaptionsFile:
    images = content.get("images")
    if isinstance(images, list) and images and isinstance(images[0], dict):
        if isinstance(content.get("annotations"), list):
            return _read_coco(path, images, content["annotations"])
        if "sentences" in images[0]:
            return _read_karpathy(path, images)
    raise DataError(
        f"{path} is a JSON object with {_names(content)}; expected COCO captions (images, annotations) or a "
        "Karpathy file (images with sentences)"
    )


def _read_coco(path, images: list[dict], annotations: list[dict]) -> CaptionsFile:
    found = CaptionsFile(str(path), "COCO JSON")
    for kind, rows in (("image", images), ("annotation", annotations)):
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise DataError(f"{path} is broken: {kind} {number} is not an object but {row!r:.40}")
    if annotations and not any("caption" in row for row in annotations):
        raise DataError(
            f"the annotations of {path} have no `caption` but {_names(annotations[0])}; "
            "COCO's captions are in captions_*.json"
        )
    names: dict = {}
    for image in images:
        name = image.get("file_name")
        if names.setdefault(image.get("id"), name) != name:
            other = names[image["id"]]
            raise DataError(f"{path} gives the id {image['id']} to two images: {other} and {name}")
    for number, row in enumerate(annotations, 1):
        image_id = row.get("image_id")
        if image_id not in names:
            found.problems.append(f"annotation {number}: the image id {image_id!r} is not among the images")
        else:
            found.add(f"annotation {number}", names[image_id], row.get("caption"), image_id)
    if bare := len(names) - len({row.image_id for row in found.rows}):
        found.notes.append(f"{bare} images have no caption and are not used")
    return found


def _read_karpathy(path, images: list[dict]) -> CaptionsFile:
    found = CaptionsFile(str(path), "Karpathy JSON")
    for number, image in enumerate(images, 1):
        name = image.get("filename")
        if isinstance(name, str) and image.get("filepath"):
            name = f"{image['filepath']}/{name}"
        sentences = image.get("sentences") or [{}]  # an image without sentences is one problem, not none
        for sentence in sentences:
            image_id = image.get("cocoid", image.get("imgid"))
            found.add(f"image {number}", name, sentence.get("raw"), image_id, image.get("split"))
    return found


def _read_table(path, text: str, columns: dict) -> CaptionsFile:
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
            last = reader.line_num
            if len(cells) == len(header):
                cells = cells if quoted else [_unquote(cell) for cell in cells]
                records.append((where, dict(zip(header, cells, strict=True))))
            elif cells:
                problems.append(f"{where}: {len(cells)} fields, but the header has {len(header)}")
    except csv.Error as error:
        place = f"{path} line {last + 1}" + (f" to {reader.line_num}" if reader.line_num > last + 1 else "")
        raise DataError(f"{place} is not valid CSV: {error}; look for quote marks that are not closed") from None
    _check_columns(path, header, columns)
    found = _read_records(path, "TSV" if delimiter == "\t" else "CSV", records, columns)
    found.problems[:0] = problems
    return found


def _unquote(cell: str) -> str:
    cell = cell.strip()
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _read_records(path, kind: str, records: Iterable[tuple[str, dict]], columns: dict) -> CaptionsFile:
    """Rows as dicts, from a table, a list or lines; `caption` may be a list of captions."""
    found, seen = CaptionsFile(str(path), kind), {}
    name = {column: columns.get(column, column) for column in COLUMNS}
    for where, record in records:
        if not isinstance(record, dict):
            found.problems.append(f"{where}: not a row but {record!r:.40}")
            continue
        seen.update(record)
        captions = record.get(name["caption"])
        captions = captions if isinstance(captions, list) and captions else [captions]
        for caption in captions:
            optional = (record.get(name[column]) for column in _OPTIONAL)
            found.add(where, record.get(name["image"]), caption, *(None if x == "" else x for x in optional))
    if seen:
        _check_columns(path, seen, columns)
    return found


def _check_columns(path, header: Iterable[str], columns: dict):
    for column in COLUMNS:
        wanted = columns.get(column, column)
        if wanted not in header and (column not in _OPTIONAL or column in columns):
            raise DataError(
                f"{path} has no column {wanted!r}; its columns are {_names(header)}. Needed are image and "
                f"caption: set columns.{column}=NAME to the one that holds the {column.replace('_', ' ')}"
            )


def _names(keys: Iterable[str]) -> str:
    return ", ".join(map(repr, keys)) or "nothing"
