"""`moving_scenes`: captioned clips of moving shapes, drawn when asked for; the order of frames tells what happens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from lavis.common.registry import registry

from lavis_evlgen.config.keys import key
from lavis_evlgen.datasets.base import CaptionDataset, CaptionedImage
from lavis_evlgen.datasets.builder import CONFIG_FOLDER, SPLITS, CaptionDatasetBuilder
from lavis_evlgen.datasets.builders.video_captions import Clips
from lavis_evlgen.datasets.synthetic.motion_specs import KINDS, Motion, sample_motion
from lavis_evlgen.datasets.synthetic.scene_drawing import draw_scene
from lavis_evlgen.datasets.synthetic.scenes import DrawnSettings, check_drawing
from lavis_evlgen.media.errors import DataError

_DRAWING = 1  # part of the fingerprint: raise it when the same clip is to look different


class DrawnClip:
    """A clip (see lavis_evlgen/media/video.py) of `length` frames of `side` × `side` pixels."""

    def __init__(self, motion: Motion, length: int, side: int):
        self.motion, self.length, self.side = motion, length, side

    def __len__(self) -> int:
        return self.length

    def frames(self, numbers: Sequence[int]) -> np.ndarray:
        """Frames (T, side, side, 3) uint8 by number."""
        drawn = {n: np.asarray(draw_scene(self.motion.scene(n, self.length), self.side)) for n in set(numbers)}
        return np.stack([drawn[n] for n in numbers])


class MovingScenesDataset(Clips, CaptionDataset):
    """`size` drawn clips of one split. Clip i depends on (seed, split, i) and `kinds` only; 2n and 2n + 1 are twins.

    A clip has as many frames as the video processor takes, so that twins show the model the same set of frames.
    `order_captions` {image_id: the caption whose order word (evaluation/order.py) is right}: all clips.
    """

    def __init__(self, split: str, size: int, *, seed: int = 0, image_size: int = 224,
                 kinds: dict[str, float] | None = None, vis_processor=None, **kwargs):
        """`kinds`: weights of the kinds of event (None: all alike). `kwargs` go to CaptionDataset."""
        self.seed, self.image_size = seed, image_size
        kinds = dict.fromkeys(KINDS, 1) if kinds is None else kinds
        self.kinds = {kind: float(kinds.get(kind) or 0) for kind in KINDS}
        check_drawing("datasets.moving_scenes", size, image_size, kinds, self.kinds)
        if size % 2:
            raise DataError(f"datasets.moving_scenes.sizes.{split}={size} must be even: clips come with their twins")
        self.num_frames = getattr(vis_processor, "num_frames", 0)
        if self.num_frames < 2:
            raise DataError(
                f"datasets.moving_scenes: the {split} split needs a video processor that takes 2 frames or more, for "
                "a clip is drawn with as many; set vis_processor to evlgen_video_train and evlgen_video_eval"
            )
        items = (self._item(split, index) for index in range(size))
        definition = [_DRAWING, seed, image_size, self.kinds, self.num_frames]
        super().__init__("moving_scenes", split, items, vis_processor=vis_processor, definition=definition, **kwargs)
        self.order_captions = {image_id: captions[0] for image_id, captions in self.references.items()}

    def _item(self, split: str, index: int) -> CaptionedImage:
        motion = sample_motion(self.seed, split, index, self.kinds)
        return CaptionedImage(index, f"{split}-{index // 2:06d}{'ab'[index % 2]}", (motion.caption,))

    def source_of(self, row: dict) -> int:
        """A clip and its reverse show the same frames."""
        return row["image"] // 2

    def motion(self, index: int) -> Motion:
        """What the clip of row `index` shows."""
        return sample_motion(self.seed, self.split, self.annotation[index]["image"], self.kinds)

    def _load(self, row: dict) -> DrawnClip:
        motion = sample_motion(self.seed, self.split, row["image"], self.kinds)
        return DrawnClip(motion, self.num_frames, self.image_size)


@dataclass(kw_only=True)
class MovingScenesSettings(DrawnSettings):
    kinds: dict[Literal[tuple(KINDS)], float | None] = key(
        "weights of the kinds of event: {move: W, appear: W, turn: W, meet: W}", at_least=0.0, at_most=1e9
    )


@registry.register_builder("moving_scenes")
class MovingScenesBuilder(CaptionDatasetBuilder):
    """Builds the splits of drawn clips; needs no files."""

    NAME = "moving_scenes"
    train_dataset_cls = eval_dataset_cls = MovingScenesDataset
    DATASET_CONFIG_DICT = {"default": str(CONFIG_FOLDER / "moving_scenes.yaml")}
    Settings = MovingScenesSettings

    def build(self) -> dict[str, MovingScenesDataset]:
        settings = self.settings
        return {
            split: MovingScenesDataset(
                split, size, seed=settings.seed, image_size=settings.image_size, kinds=settings.kinds,
                max_bad_fraction=settings.max_bad_fraction, **self.processors(split),
            )
            for split in SPLITS if (size := settings.sizes.get(split))
        }
