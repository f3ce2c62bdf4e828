"""Examples on the page: the files of a folder, or drawn scenes."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import cv2
from PIL import Image

from lavis_evlgen.datasets import MovingScenesDataset, ScenesDataset
from lavis_evlgen.demo.describing import Refused
from lavis_evlgen.demo.uploads import Limits, preview, read
from lavis_evlgen.media.video import takes_clips

MOST = 24  # files of a folder, in the order of their names
DRAWN = 6  # scenes
_SEED, _SIDE, _FPS = 7, 224, 2.0


def from_folder(source: Path, target: Path, processor, limits: Limits) -> list[Path]:
    """Copies in `target` of the first files of `source` that the model can read; the others are logged and left out."""
    if not source.is_dir():
        raise Refused(f"--pictures: {source} is no folder")
    files, examples = sorted(path for path in source.iterdir() if path.is_file()), []
    for path in files:
        if len(examples) == MOST:
            logging.info("--pictures: the first %d of the files in %s can be picked", MOST, source)
            break
        try:
            read(str(path), processor, limits)
        except Refused as error:
            logging.warning("--pictures: left out: %s", error)
            continue
        examples.append(Path(shutil.copy(path, target / path.name)))
    if not examples:
        raise Refused(f"--pictures: none of the {len(files)} files in {source} can be looked at")
    return examples


def drawn_scenes(target: Path, processor) -> list[Path]:
    """Scenes of the test split, drawn into `target`: PNG; for a processor of clips AVI, as long as it takes frames."""
    if not takes_clips(processor):
        scenes = ScenesDataset("test", DRAWN, seed=_SEED, image_size=_SIDE)
        return [_save(scenes.pil_image(n), target / f"scene {n + 1}.png") for n in range(DRAWN)]
    if not hasattr(processor, "num_frames"):
        return []  # LAVIS's own processors draw frames at random: scenes of a few frames would repeat and skip
    clips = MovingScenesDataset("test", DRAWN, seed=_SEED, image_size=_SIDE, vis_processor=processor)
    return [_write(clips.clip(n), target / f"clip {n + 1}.avi") for n in range(DRAWN)]


def thumbnails(paths: list[Path], limits: Limits) -> list[tuple[Image.Image, str]]:
    """(small picture, name) of each."""
    return [(preview(str(path), limits), path.stem) for path in paths]


def _save(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def _write(clip, path: Path) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), _FPS, (_SIDE, _SIDE))
    for frame in clip.frames(range(len(clip))):
        writer.write(frame[..., ::-1])  # OpenCV's order of colours
    writer.release()
    return path
