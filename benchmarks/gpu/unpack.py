"""Check and unpack the parts of benchmarks/gpu_pack.sh, and say what is missing. Standard library only.

    bash benchmarks/gpu_setup.sh                 # packages have to be complete: calls 1 and 2 of gpu.sh
    bash benchmarks/gpu_setup.sh --need all      # weights and photos too: call 3

Parts may come one by one: each is kept in build/gpu/arrived, and what is complete is unpacked. Modules that nothing
measured uses, but some import asks for, get an empty stand-in where the machine has none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from benchmarks.gpu.parts import MANIFEST, PACKAGES, PHOTOS, QUICKSTART, join, missing_parts

ROOT = Path(__file__).resolve().parents[2]
FOR = {PACKAGES: "calls 1 and 2", "commit.json": "the commit in results", QUICKSTART: "call 3", PHOTOS: "call 3"}
# module -> its files; LAVIS imports these, and nothing measured uses them (two functions of cv2 are tried at import)
_REFUSES = 'def __getattr__(name):\n    raise AttributeError(f"{__name__}.{name}: only a stand-in is here")\n'
_CV2 = """import numpy


def split(image):
    return [image[..., channel] for channel in range(image.shape[-1])]


def merge(channels):
    return numpy.stack(channels, -1)


"""
STAND_INS = {
    "cv2": {"cv2/__init__.py": _CV2 + _REFUSES,
            "opencv_python_headless-4.10.dist-info/METADATA": "Name: opencv-python-headless\nVersion: 4.10+standin\n"},
    "spacy": {"spacy/__init__.py": _REFUSES},
    "pycocotools": {"pycocotools/__init__.py": "", "pycocotools/coco.py": "class COCO:\n    pass\n"},
}  # fmt: skip
IMPORTS = (
    "import lavis_evlgen, lavis, torch, transformers;"
    "from benchmarks.speed import step, blip2_step, generate, connector, merge, vision, scaling, lengths, numerics;"
    "import lavis_evlgen.launch, lavis_evlgen.runners.trainer, lavis_evlgen.evaluation;"
    "print(f'torch {torch.__version__}, transformers {transformers.__version__}, ' + "
    "(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no CUDA device'))"
)


def arrived_parts(folder: Path) -> dict | None:
    """Move the pieces of all parts that are here into folder/arrived; the manifest, None where no part has come.

    A part of another packing makes all earlier pieces worthless, so they go.
    """
    arrived = folder / "arrived"
    arrived.mkdir(parents=True, exist_ok=True)
    for part in sorted(folder.glob("part[0-9]*")):
        if not (part / MANIFEST).exists():
            print(f"{part.name} has no {MANIFEST}: send it again")
            continue
        manifest = (part / MANIFEST).read_text()
        known = arrived / MANIFEST
        if known.exists() and known.read_text() != manifest:
            shutil.rmtree(arrived)
            arrived.mkdir()
        known.write_text(manifest)
        for piece in part.iterdir():
            shutil.copy(piece, arrived / piece.name)
    return json.loads((arrived / MANIFEST).read_text()) if (arrived / MANIFEST).exists() else None


def unpack(folder: Path, manifest: dict) -> dict[str, list[int]]:
    """Unpack every file that is complete; {file: parts that are missing} of the others."""
    arrived, missing = folder / "arrived", {}
    for name, entry in manifest["files"].items():
        done = arrived / f"{name}.done"
        if done.exists() and done.read_text() == entry["sha256"]:
            continue
        whole = join(manifest, name, arrived, folder)
        if whole is None:
            missing[name] = missing_parts(manifest, name, arrived)
        else:
            if ".tar" in name:
                into = folder if name == PHOTOS else folder / "site"
                into.mkdir(exist_ok=True)
                with tarfile.open(whole) as archive:
                    archive.extractall(into, filter="data")
                whole.unlink()
            done.write_text(entry["sha256"])
    return missing


def stand_in(folder: Path):
    """Stand-ins of the modules that this interpreter has not."""
    shutil.rmtree(folder / "stand_ins", ignore_errors=True)
    (folder / "stand_ins").mkdir(parents=True)
    for module, files in STAND_INS.items():
        if importlib.util.find_spec(module) is None and not (folder / "site" / module).exists():
            print(f"{module}: a stand-in")
            for name, text in files.items():
                path = folder / "stand_ins" / name
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)


def problem_of_imports(folder: Path) -> str | None:
    """The last line of what importing everything says; None where it works."""
    path = [str(ROOT), str(folder / "site"), str(folder / "stand_ins"), os.environ.get("PYTHONPATH", "")]
    # the variables: as in gpu.sh
    environment = {**os.environ, "USE_FLAX": "0", "USE_TF": "0", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    print(*lines[-12:], sep="\n")
    return None if done.returncode == 0 else (lines or ["no word"])[-1]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/gpu", help="where the parts are (build/gpu)")
    parser.add_argument("--need", choices=("packages", "all"), default="packages", help="fail where this is missing")
    args = parser.parse_args(words)
    manifest = arrived_parts(args.folder)
    if manifest is None:
        print(f"no part is in {args.folder}: benchmarks/gpu_pack.sh makes them")
        return 1
    try:
        missing = unpack(args.folder, manifest)
    except ValueError as error:
        print(error)
        return 1
    for name, parts in missing.items():
        print(f"{name} ({FOR.get(name, '')}): missing {', '.join(f'part{n}' for n in parts)} of {manifest['parts']}")
    if PACKAGES in missing:
        return 1
    stand_in(args.folder)
    if problem := problem_of_imports(args.folder):
        print(f"imports fail: {problem}")
        return 1
    print("ready for " + ("all calls" if not missing else "calls 1 and 2"))
    return 1 if missing and args.need == "all" else 0


if __name__ == "__main__":
    sys.exit(main())
