"""Clips: frames that are asked for by number, of a video file or of memory, and which frames of a clip to take.

A clip is anything with `len(clip)`, its number of frames, and `clip.frames(numbers)`, a uint8 array (T, H, W, 3) of
those frames. A video file is decoded only where it is looked at, on one thread, and freed with its `VideoFile`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch

from lavis_evlgen.compat.environment import FIX, BrokenEnvironment
from lavis_evlgen.media.file_checks import EMPTY, Unreadable, first_bytes, problem_with, wrong_content

MISSING = 0.1  # share of a clip's seconds, at least one second, that may be missing at its end


class UnreadableVideo(Unreadable):
    """One video that cannot be read."""

    media = "video"


def takes_clips(processor) -> bool:
    """Whether a processor is of clips: the package's (num_frames) or LAVIS's (n_frms)."""
    return hasattr(processor, "num_frames") or hasattr(processor, "n_frms")


class VideoFile:
    """A video file, opened; `fps` frames a second on average. Raises UnreadableVideo, whatever is wrong with it."""

    def __init__(self, source, name=None):
        """source: a path, or the content of a file (bytes), which then needs a `name` for the errors."""
        self.name = str(source if name is None else name)
        problem = (None if source else EMPTY) if isinstance(source, bytes) else problem_with(source)
        if problem:
            raise UnreadableVideo(self.name, problem)
        self._reader = self._open(source)
        self.fps = float(self._reader.get_avg_fps())
        if not isinstance(source, bytes):
            self._check_whole(str(source))

    def _open(self, source):
        decord = _decord()
        try:
            # fault_tol: a frame that cannot be decoded is an error, not a copy of the one before
            return decord.VideoReader(
                io.BytesIO(source) if isinstance(source, bytes) else str(source), num_threads=1, fault_tol=1
            )
        except MemoryError:
            raise
        except Exception as error:  # RuntimeError, AssertionError (no frames), DECORDError
            reason = wrong_content(first_bytes(source), "video")
            reason = reason or f"broken, truncated or without frames ({_words(error)})"
            raise UnreadableVideo(self.name, reason) from None

    def _check_whole(self, path: str):
        """Truncated Matroska files decode without an error; the header still tells how long they should be."""
        import cv2

        header = cv2.VideoCapture(path)
        frames, fps = header.get(cv2.CAP_PROP_FRAME_COUNT), header.get(cv2.CAP_PROP_FPS)
        header.release()
        if not (frames > 0 and fps > 0):
            return
        there, said = float(self._reader.get_frame_timestamp(len(self) - 1)[1]), frames / fps
        if there < said - max(1.0, MISSING * said):
            raise UnreadableVideo(self.name, f"truncated ({there:.1f} of {said:.1f} seconds are there)")

    def __len__(self) -> int:
        return len(self._reader)

    def frames(self, numbers: Sequence[int]) -> np.ndarray:
        """Frames (T, H, W, 3) uint8 RGB by number, in the order asked for. Raises UnreadableVideo."""
        try:
            batch = self._reader.get_batch(list(numbers))
        except MemoryError:
            raise
        except Exception as error:
            if "size must exactly match" in str(error):
                raise UnreadableVideo(self.name, "decord cannot read this width; scale it to 64 or more") from None
            raise UnreadableVideo(self.name, f"broken or truncated ({_words(error)})") from None
        # LAVIS sets decord, process-wide, to hand out torch tensors
        return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)


class Frames:
    """A clip in memory: an array (N, H, W, 3) of uint8, or N pictures of one size."""

    def __init__(self, frames):
        if not isinstance(frames, np.ndarray):
            pictures = [np.asarray(frame) for frame in frames]
            if len({picture.shape for picture in pictures}) != 1:
                raise ValueError(f"a clip needs frames of one size, not {[p.shape for p in pictures][:4]}")
            frames = np.stack(pictures)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
            raise ValueError(f"a clip is (N, H, W, 3) of uint8 with N above 0, not {frames.shape} of {frames.dtype}")
        self._frames = frames

    def __len__(self) -> int:
        return len(self._frames)

    def frames(self, numbers: Sequence[int]) -> np.ndarray:
        """Frames (T, H, W, 3) by number."""
        return self._frames[list(numbers)]


def uniform(total: int, count: int) -> list[int]:
    """The first frame of each of `count` equal parts of a clip of `total` frames; a short clip repeats in order."""
    return [i * total // count for i in range(count)]


def headtail(total: int, count: int) -> list[int]:
    """Half of `count` frames at random from a clip's first half, half from its second, in order (as ALPRO trains).

    Of an odd count, the odd one comes from either half. A clip of fewer frames gives all it has and repeats in order.
    Draws from torch's generator.
    """
    if total < count:
        return uniform(total, count)
    middle = total // 2
    odd_one = int(torch.randint(2, ()))
    head = min((count + odd_one) // 2, middle)  # never more than a half holds
    return _drawn(0, middle, head) + _drawn(middle, total, count - head)


def _drawn(start: int, end: int, count: int) -> list[int]:
    """`count` different numbers from start to end - 1, sorted."""
    return sorted((start + torch.randperm(end - start)[:count]).tolist())


FRAME_SAMPLING = {"uniform": uniform, "headtail": headtail}


def opened(clip):
    """`clip` itself, or the clip that it names (a path) or holds (an array, a list of pictures)."""
    if hasattr(clip, "frames"):
        return clip
    if isinstance(clip, np.ndarray | list | tuple):
        return Frames(clip)
    if isinstance(clip, str) or hasattr(clip, "__fspath__"):
        return VideoFile(clip)
    raise ValueError(f"a clip is a path, frames (N, H, W, 3) or a list of pictures, not {type(clip).__name__}")


def _decord() -> ModuleType:
    try:
        import decord
    except ImportError as error:
        raise BrokenEnvironment(f"videos are read with decord, which does not load here ({error}): {FIX}.") from None
    decord.logging.set_level(decord.logging.QUIET)  # what is broken is named in our own log, once
    return decord


def _words(error: Exception) -> str:
    """The message of an error; decord adds positions in its source and a C++ stack trace."""
    line = (str(error).splitlines() or [""])[0]
    words = "cannot be opened" if line.startswith("Error reading") else line.rpartition(".cc:")[2].partition(": ")[2]
    return f"{type(error).__name__}: {words or line}"[:160]
