"""Video processors: a clip in (a path, frames, or an opened clip), a normalised (3, T, H, W) float tensor out.

They are the image processors on T frames at once: one crop and one mirroring for all frames of a clip.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from lavis.common.registry import registry

from lavis_evlgen.config.keys import key
from lavis_evlgen.config.limits import LARGEST
from lavis_evlgen.media.video import FRAME_SAMPLING, opened
from lavis_evlgen.processors.images import (
    CropSettings,
    EvlgenImageEvalProcessor,
    EvlgenImageTrainProcessor,
    ImageSettings,
)


@dataclass(kw_only=True)
class VideoEvalSettings(ImageSettings):
    shrink_on_load: ClassVar[bool] = False  # frames are no JPEG files
    num_frames: int = key("frames T that are taken of each clip", 4, at_least=1, at_most=LARGEST["num_frames"])


@dataclass(kw_only=True)
class VideoTrainSettings(VideoEvalSettings, CropSettings):
    sampling: Literal[tuple(FRAME_SAMPLING)] | None = key(
        "headtail (half of the frames at random from each half of the clip), or uniform", "headtail"
    )


class _OfFrames:
    """Before an image processor: takes `num_frames` frames of a clip and hands them to it as one tensor."""

    takes_pixels = False  # but frames

    def __call__(self, clip) -> torch.Tensor:
        """(3, T, H, W) of a clip: a path, an array (N, H, W, 3) of uint8, N pictures, or a clip of media/video.py.

        Raises UnreadableVideo for a file that cannot be read.
        """
        clip = opened(clip)
        frames = clip.frames(FRAME_SAMPLING[self.sampling](len(clip), self.num_frames))
        frames = self.transform(torch.from_numpy(frames).permute(0, 3, 1, 2))  # (T, H, W, 3) -> (T, 3, H', W')
        return frames.transpose(0, 1).contiguous()  # (3, T, H', W')


@registry.register_processor("evlgen_video_train")
class EvlgenVideoTrainProcessor(_OfFrames, EvlgenImageTrainProcessor):
    """As evlgen_image_train, on frames drawn at random from both halves of the clip. Randomness is torch's."""

    NAME = "evlgen_video_train"
    Settings = VideoTrainSettings

    def __init__(self, num_frames: int | None = None, sampling: str | None = None, **keys):
        """`keys`: the others of `Settings`."""
        super().__init__(num_frames=num_frames, sampling=sampling, **keys)
        self.num_frames, self.sampling = self.settings.num_frames, self.settings.sampling


@registry.register_processor("evlgen_video_eval")
class EvlgenVideoEvalProcessor(_OfFrames, EvlgenImageEvalProcessor):
    """As evlgen_image_eval, on frames spread evenly over the clip."""

    NAME = "evlgen_video_eval"
    Settings = VideoEvalSettings
    sampling = "uniform"

    def __init__(self, num_frames: int | None = None, **keys):
        """`keys`: the others of `Settings`."""
        super().__init__(num_frames=num_frames, **keys)
        self.num_frames = self.settings.num_frames
