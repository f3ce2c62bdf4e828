"""Read a captions file, in any of the usual formats, into rows of (image, caption, image id, split).

A file of clips names them under `video`, and is read the same way. COCO captions JSON, Karpathy JSON, MSR-VTT's JSON
(videos and sentences), LAVIS JSON (a list of rows), JSONL (a row a line), and CSV or TSV with a header. The format is
recognised by what the file contains.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lavis_evlgen.datasets.annotations.files import (
    RowsFile,
    check_column,
    encodes,
    given_columns,
    has_words,
    laid_out,
    quoted,
    read_rows,
)
from lavis_evlgen.media.errors import DataError

_OPTIONAL = ("image_id", "split")


class CaptionRow(NamedTuple):
    """One caption of one image or clip. `image` is its path below the folder, `source` the film that it is from,
    `file` the captions file."""

    image: str
    caption: str
    image_id: int | str | None = None
    split: str | None = None
    source: str | None = None
    file: str = ""


@dataclass
class CaptionsFile(RowsFile):
    """What a captions file holds; `rows` are CaptionRows. `config_path`: of the data set's section."""

    media: Literal["image", "video"] = "image"
    config_path: str = "datasets.image_captions"

    def add(self, where: str, image, caption, image_id=None, split=None, source=None):
        """Keep the row, or say what is wrong with it."""
        if not isinstance(image, str) or not image.strip():
            self.problems.append(f"{where}: no {self.media} name")
        elif not has_words(caption):
            self.problems.append(f"{where}: no caption for {image}")
        elif not (encodes(caption) and encodes(image)):
            self.problems.append(f"{where}: half of a surrogate pair in its text")
        elif image_id is not None and not isinstance(image_id, (int, str)):
            self.problems.append(f"{where}: the {self.media} id of {image} is neither number nor text: {image_id!r}")
        else:
            self.rows.append(CaptionRow(image.strip(), caption.strip(), image_id, split, source, self.path))


def read_captions_file(
    path, columns: dict[str, str] | None = None, media: str = "image", config_path: str = "datasets.image_captions"
) -> CaptionsFile:
    """Parse `path`. `columns` says where tables use other names than image (or `media`), caption, image_id and split.

    `config_path` is that of the data set's section, for errors. Rows that cannot be used are listed in `.problems`.
    Raises DataError where the whole file cannot be used.
    """
    found = CaptionsFile(str(path), "", media=media, config_path=config_path)
    columns = given_columns(columns, (media, "caption", *_OPTIONAL))
    fields = {"images", "annotations", "videos", "info"}  # of a benchmark's file
    table = read_rows(path, "captions file", is_file=lambda content: bool(fields & set(content)))
    if isinstance(table, dict):
        if columns:
            raise DataError(f"{path} is a file of one of the benchmarks, whose fields are fixed; drop `columns`")
        with laid_out(found):
            _read_json_object(found, table)
        return found
    found.format = table.format
    if table.header:
        _check_columns(found, table.header, columns)
    _read_records(found, table.records, columns)
    found.problems[:0] = table.problems
    return found


def _read_json_object(found: CaptionsFile, content: dict):
    images, videos = content.get("images"), content.get("videos")
    if isinstance(images, list) and images and isinstance(images[0], dict):
        if isinstance(content.get("annotations"), list):
            return _read_coco(found, images, content["annotations"])
        if "sentences" in images[0]:
            return _read_karpathy(found, images)
    if found.media == "video" and isinstance(videos, list) and isinstance(content.get("sentences"), list):
        return _read_msrvtt(found, videos, content["sentences"])
    raise DataError(
        f"{found.path} is a JSON object with {quoted(content)}; expected COCO captions (images, annotations) or a "
        "Karpathy file (images with sentences)" + " or MSR-VTT's (videos, sentences)" * (found.media == "video")
    )


def _objects(found: CaptionsFile, kind: str, rows: list):
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{found.path} is broken: {kind} {number} is not an object but {row!r:.40}")


def _read_coco(found: CaptionsFile, images: list[dict], annotations: list[dict]):
    path, found.format = found.path, "COCO JSON"
    _objects(found, "image", images)
    _objects(found, "annotation", annotations)
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
        found.notes.append(f"{bare} {found.media}s have no caption and are not used")


def _read_karpathy(found: CaptionsFile, images: list[dict]):
    found.format = "Karpathy JSON"
    for number, image in enumerate(images, 1):
        name = image.get("filename")
        if isinstance(name, str) and image.get("filepath"):
            name = f"{image['filepath']}/{name}"
        sentences = image.get("sentences") or [{}]  # an image without sentences is one problem, not none
        for sentence in sentences:
            image_id = image.get("cocoid", image.get("imgid"))
            found.add(f"image {number}", name, sentence.get("raw"), image_id, image.get("split"))


def _read_msrvtt(found: CaptionsFile, videos: list[dict], sentences: list[dict]):
    """MSR-VTT's own files: {"videos": [{"video_id", "split", "url"}], "sentences": [{"video_id", "caption"}]}."""
    found.format = "MSR-VTT JSON"
    _objects(found, "video", videos)
    _objects(found, "sentence", sentences)
    splits = {video.get("video_id"): (video.get("split"), _text_or_none(video.get("url"))) for video in videos}
    for number, row in enumerate(sentences, 1):
        name = row.get("video_id")
        if name not in splits:
            found.problems.append(f"sentence {number}: the video {name!r} is not among the videos")
        else:
            found.add(f"sentence {number}", f"{name}.mp4", row.get("caption"), name, *splits[name])


def _text_or_none(value) -> str | None:
    return value if isinstance(value, str) and value else None


def _read_records(found: CaptionsFile, records: Iterable[tuple[str, dict]], columns: dict):
    """Rows as dicts, from a table, a list or lines; `caption` may be a list of captions."""
    seen: dict = {}
    name = {column: columns.get(column, column) for column in (found.media, "caption", *_OPTIONAL)}
    for where, record in found.dicts(records, seen):
        captions = record.get(name["caption"])
        captions = captions if isinstance(captions, list) and captions else [captions]
        for caption in captions:
            optional = (record.get(name[column]) for column in _OPTIONAL)
            found.add(where, record.get(name[found.media]), caption, *(None if x == "" else x for x in optional))
    if seen:
        _check_columns(found, seen, columns)


def _check_columns(found: CaptionsFile, header: Iterable[str], columns: dict):
    for column in (found.media, "caption", *_OPTIONAL):
        wanted = columns.get(column, column)
        if column not in _OPTIONAL or column in columns:
            check_column(found.path, header, column, wanted, f"{found.media} and caption", found.config_path)
