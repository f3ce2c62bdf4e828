"""What travels to a machine without network: files cut into pieces, in folders part1, part2, ... of at most so many MB.

    part1/manifest.json     {"parts": P, "files": {name: {"sha256", "bytes", "pieces": [{"part", "name", "sha256"}]}}}
    part1/packages.tar.gz.0, ...

Every part has the whole manifest, so that whichever arrives tells what is missing. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

MANIFEST = "manifest.json"
PACKAGES, QUICKSTART, PHOTOS = "packages.tar.gz", "quickstart.tar", "photos.tar"  # what is packed
CHUNK = 1 << 20


def sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def cut(files: Iterable[Path], out: Path, limit: int) -> list[Path]:
    """Fill out/part1, part2, ... with `files`, in order, each part at most `limit` bytes with its manifest.

    Raises ValueError where the manifest alone would take half of a part.
    """
    files = list(files)
    pieces = len(files) + 2 * sum(path.stat().st_size for path in files) // limit + 2
    room = limit - 400 * pieces  # the manifest has a name and a sha256 or two of each
    if room < limit / 2:
        raise ValueError(f"parts of {limit} bytes are too small for these files: allow larger ones")
    for old in out.glob("part[0-9]*"):
        shutil.rmtree(old)
    entries, number, left = {}, 0, 0
    for path in files:
        entry = entries[path.name] = {"sha256": sha256(path), "bytes": path.stat().st_size, "pieces": []}
        with open(path, "rb") as file:
            while file.tell() < entry["bytes"]:
                if not left:
                    number, left = number + 1, room
                    (out / f"part{number}").mkdir(parents=True)
                piece = out / f"part{number}" / f"{path.name}.{len(entry['pieces'])}"
                left -= _copy(file, piece, left)
                entry["pieces"].append({"part": number, "name": piece.name, "sha256": sha256(piece)})
    parts = [out / f"part{n}" for n in range(1, number + 1)]
    for part in parts:
        (part / MANIFEST).write_text(json.dumps({"parts": number, "files": entries}, indent=1))
    return parts


def _copy(file, piece: Path, most: int) -> int:
    """At most `most` bytes of an open file into a new one; how many they were."""
    written = 0
    with open(piece, "wb") as out:
        while written < most and (chunk := file.read(min(CHUNK, most - written))):
            written += out.write(chunk)
    return written


def join(manifest: dict, name: str, arrived: Path, out: Path) -> Path | None:
    """The file `name` put together in `out` from pieces in `arrived`; None where pieces are missing.

    Raises ValueError, with the part to send again, where a piece is damaged.
    """
    entry = manifest["files"][name]
    pieces = [(arrived / piece["name"], piece) for piece in entry["pieces"]]
    for path, piece in pieces:
        if path.exists() and sha256(path) != piece["sha256"]:
            path.unlink()
            raise ValueError(f"{piece['name']} is damaged: send part{piece['part']} again")
    if not all(path.exists() for path, _ in pieces):
        return None
    with open(out / name, "wb") as whole:
        for path, _ in pieces:
            with open(path, "rb") as file:
                shutil.copyfileobj(file, whole)
    if sha256(out / name) != entry["sha256"]:
        raise ValueError(f"{name} has another sha256 than it was packed with: pack and send it again")
    return out / name


def missing_parts(manifest: dict, name: str, arrived: Path) -> list[int]:
    """Numbers of the parts that still have to come for the file `name`."""
    pieces = manifest["files"][name]["pieces"]
    return sorted({piece["part"] for piece in pieces if not (arrived / piece["name"]).exists()})
