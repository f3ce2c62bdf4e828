"""Read a captions file, in any of the usual formats, into rows of (image, caption, image id, split).

COCO captions JSON, Karpathy JSON, LAVIS JSON (a list of rows), JSONL (a row a line), and CSV or TSV with a
header. The format is recognised by what the file contains.
"""

from collections.abc import Iterable
from typing import NamedTuple

from lavis_evlgen.datasets.errors import DataError
from lavis_evlgen.datasets.records import (
    RowsFile,
    check_column,
    encodes,
    given_columns,
    has_words,
    looks_like_json,
    parse_json,
    quoted,
    read_table,
    read_text,
)

COLUMNS = ("image", "caption", "image_id", "split")
_OPTIONAL = ("image_id", "split")


class CaptionRow(NamedTuple):
    """One caption of one image. `image` is a path below the images folder."""

    image: str
    caption: str
    image_id: int | str | None = None
    split: str | None = None


class CaptionsFile(RowsFile):
    """What a captions file holds; `rows` are CaptionRows."""

    def add(self, where: str, image, caption, image_id=None, split=None):
        """Keep the row, or say what is wrong with it."""
        if not isinstance(image, str) or not image.strip():
            self.problems.append(f"{where}: no image name")
        elif not has_words(caption):
            self.problems.append(f"{where}: no caption for {image}")
        elif not (encodes(caption) and encodes(image)):
            self.problems.append(f"{where}: half of a surrogate pair in its text")
        elif image_id is not None and not isinstance(image_id, (int, str)):
            self.problems.append(f"{where}: the image id of {image} is neither number nor text: {image_id!r}")
        else:
            self.rows.append(CaptionRow(image.strip(), caption.strip(), image_id, split))


def read_captions_file(path, columns: dict[str, str] | None = None) -> CaptionsFile:
    """Parse `path`. `columns` says where tables use other names than image, caption, image_id and split.

    Rows that cannot be used are listed in `.problems`. Raises DataError where the whole file cannot be used.
    """
    columns = given_columns(columns, COLUMNS)
    text = read_text(path, "captions file")
    if not looks_like_json(text):
        return _read_table(path, text, columns)
    content = parse_json(path, text, whole=lambda content: bool({"images", "annotations", "info"} & set(content)))
    if isinstance(content, dict):
        if columns:
            raise DataError(f"{path} is a COCO or Karpathy file, whose fields are fixed; drop `columns`")
        return _read_json_object(path, content)
    kind, unit = ("LAVIS JSON", "row") if text.lstrip()[0] == "[" else ("JSONL", "line")
    return _read_records(path, kind, ((f"{unit} {n}", record) for n, record in content), columns)


def _read_json_object(path, content: dict) -> CaptionsFile:
    images = content.get("images")
    if isinstance(images, list) and images and isinstance(images[0], dict):
        if isinstance(content.get("annotations"), list):
            return _read_coco(path, images, content["annotations"])
        if "sentences" in images[0]:
            return _read_karpathy(path, images)
    raise DataError(
        f"{path} is a JSON object with {quoted(content)}; expected COCO captions (images, annotations) or a "
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
            f"the annotations of {path} have no `caption` but {quoted(annotations[0])}; "
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
    table = read_table(path, text)
    _check_columns(path, table.header, columns)
    found = _read_records(path, table.format, table.records, columns)
    found.problems[:0] = table.problems
    return found


def _read_records(path, kind: str, records: Iterable[tuple[str, dict]], columns: dict) -> CaptionsFile:
    """Rows as dicts, from a table, a list or lines; `caption` may be a list of captions."""
    found, seen = CaptionsFile(str(path), kind), {}
    name = {column: columns.get(column, column) for column in COLUMNS}
    for where, record in found.dicts(records, seen):
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
        if column not in _OPTIONAL or column in columns:
            check_column(path, header, column, wanted, "image and caption", "datasets.image_captions")
