"""Small video files, written where a test wants them."""

import cv2
import numpy as np

SIDE = 64  # some smaller widths (48) decord cannot read


def frames_of(count: int, side: int = SIDE) -> np.ndarray:
    """(N, H, W, 3) uint8; frame n is grey of 8·n, so that a frame tells its number."""
    return np.repeat(np.uint8(8 * np.arange(count))[:, None, None, None], 3, 3) * np.ones((1, side, side, 1), np.uint8)


def write_clip(path, count: int = 10, side: int = SIDE, codec: str = "MJPG", fps: float = 5.0):
    """A clip of `count` frames at `path` (.avi with MJPG, .mp4 and .mkv with mp4v); frame n is grey of about 8·n."""
    path.parent.mkdir(exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (side, side))
    assert writer.isOpened(), f"no {codec} encoder for {path}"
    for frame in frames_of(count, side):
        writer.write(frame)
    writer.release()
    return path


def numbers_in(frames) -> list[int]:
    """Which frames of `write_clip` these (T, H, W, 3) are."""
    return np.rint(np.asarray(frames, dtype=float).mean((1, 2, 3)) / 8).astype(int).tolist()
