"""Video processors: a clip in (a path, frames, or an opened clip), a normalised (3, T, H, W) float tensor out.

They are the image processors on T frames at once: one crop and one mirroring for all frames of a clip.
"""

import torch
from lavis.common.registry import registry

from lavis_evlgen.media.video import FRAME_SAMPLING, opened
from lavis_evlgen.processors.images import SHRINK_KEY, EvlgenImageEvalProcessor, EvlgenImageTrainProcessor

_FRAMES = {"num_frames": (1, 10_000)}
_FRAME_KEYS = {"num_frames": "frames T that are taken of each clip (4)"}


def _keys(processor: type) -> dict[str, str]:
    """The config keys of an image processor that mean something for frames, which are no JPEG files."""
    return {key: words for key, words in processor.CONFIG_KEYS.items() if key not in SHRINK_KEY} | _FRAME_KEYS


class _OfFrames:
    """Before an image processor: takes `num_frames` frames of a clip and hands them to it as one tensor."""

    takes_pixels = False  # but frames

    def _take(self, num_frames: int, sampling: str):
        if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
            raise ValueError(f"{self.NAME}: num_frames={num_frames} must be a whole number of at least 1")
        if sampling not in FRAME_SAMPLING:
            raise ValueError(f"{self.NAME}: sampling={sampling} is not known; give {' or '.join(FRAME_SAMPLING)}")
        self.num_frames, self.sampling = num_frames, sampling

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
    NUMBERS = {**EvlgenImageTrainProcessor.NUMBERS, **_FRAMES}
    CHOICES = {**EvlgenImageTrainProcessor.CHOICES, "sampling": tuple(FRAME_SAMPLING)}
    OPTIONAL = (*EvlgenImageTrainProcessor.OPTIONAL, "sampling")
    CONFIG_KEYS = {
        **_keys(EvlgenImageTrainProcessor),
        "sampling": "headtail (half of the frames at random from each half of the clip), or uniform",
    }

    def __init__(self, num_frames: int = 4, sampling: str = "headtail", **keys):
        """`keys`: those of evlgen_image_train."""
        self._take(num_frames, sampling)
        super().__init__(**keys)


@registry.register_processor("evlgen_video_eval")
class EvlgenVideoEvalProcessor(_OfFrames, EvlgenImageEvalProcessor):
    """As evlgen_image_eval, on frames spread evenly over the clip."""

    NAME = "evlgen_video_eval"
    NUMBERS = {**EvlgenImageEvalProcessor.NUMBERS, **_FRAMES}
    CONFIG_KEYS = _keys(EvlgenImageEvalProcessor)

    def __init__(self, num_frames: int = 4, **keys):
        """`keys`: those of evlgen_image_eval."""
        self._take(num_frames, "uniform")
        super().__init__(**keys)
