"""A shard once more with a new caption of every picture beside the old text, for `evlgen caption --out-shards`."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

from lavis_evlgen.datasets.shards.reader import ShardEntry, ShardIndex, ShardItem, all_members
from lavis_evlgen.errors import writing
from lavis_evlgen.media.errors import DataError, UnreadableImage


def leads_out(name: str) -> bool:
    """Whether a file of this name would be unpacked outside of the folder that its shard is unpacked in."""
    return name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/")


def check_sample(item: ShardItem, where: str, caption_key: str):
    """Raises UnreadableImage for a sample that cannot get a caption, DataError where it has one under this key."""
    if leads_out(item.key):
        raise UnreadableImage(where, "its name leads out of the folder that the shard is unpacked in")
    _row(item.files, where, caption_key, "")


def write_captioned(index: ShardIndex, target: Path, captions: Mapping[int, str], caption_key: str):
    """Write the shard of `index` to `target`, whole or not at all, with these captions by number of the item.

    A sample keeps its key and all its files, byte for byte, but for KEY.json, which gets `caption_key`; one without a
    json gets one, with the text of its txt as `caption`. Samples without a new caption are left out; files of no
    sample are kept, those whose name leads out of the folder are not. Raises DataError as `check_sample`.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with writing(target), open(temporary, "wb") as out:
            with tarfile.open(fileobj=out, mode="w") as tar, open(index.path, "rb") as file:
                for name, content in _files(index, file, captions, caption_key):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _files(index: ShardIndex, file, captions: Mapping[int, str], caption_key: str):
    """(name, content) of every file of the new shard."""
    entries = [(n, entry) for n, entry in enumerate(index.entries) if isinstance(entry, ShardEntry)]
    number_of = {member.start: n for n, entry in entries for member in entry.members}
    by_key = {entry.key: n for n, entry in entries}  # of files that are neither picture nor text
    for member in all_members(file):
        number = number_of.get(member.start, by_key.get(member.key))
        if leads_out(member.name) or (number is not None and number not in captions):
            continue
        own = index.entries[number].members if member.start in number_of else []
        json_file = next((text for text in own if text.extension == "json"), None)
        if member != json_file:
            file.seek(member.start)
            yield member.name, file.read(member.size)
        if own and member == (json_file or own[-1]):
            item = index[number]
            row = _row(item.files, f"{index.path}:{item.key}", caption_key, captions[number])
            name = f"{item.key}.json" if json_file is None else json_file.name
            yield name, json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace")


def _row(files: Mapping[str, bytes], where: str, caption_key: str, caption: str) -> dict:
    """The content of KEY.json with the new caption in it."""
    kind = "json" if "json" in files else "txt"
    try:
        if kind == "json":
            row = json.loads(files[kind])
        else:
            row = {"caption": files[kind].decode("utf-8-sig").strip()} if kind in files else {}
            if caption_key in row:
                row = {}  # the old text stays in KEY.txt
    except (ValueError, RecursionError) as error:  # of UTF-8 too
        raise UnreadableImage(where, f"its {kind} cannot be read ({error})") from None
    if not isinstance(row, dict):
        raise UnreadableImage(where, f"its json is a {type(row).__name__} and no object, so it cannot get a caption")
    if caption_key in row:
        raise DataError(f"{where}: its json has a key {caption_key!r} already: give the captions another --caption-key")
    return {**row, caption_key: caption}
