"""A video's figures frame by frame, gathered chunk by chunk: no more than a chunk is held as floats."""

from dataclasses import dataclass, fields

import numpy as np

from . import frames, motion
from .frames import Array, Video, check_video

CHUNK = 16  # frames that are worked on at once
CHANGED = 2  # grey levels; a pixel that changes by more is a changed one


@dataclass(frozen=True)
class Series:
    """One value per frame [T]. What compares a frame with the one before it is NaN in the first frame.

    exposure: mean brightness, share of white. clipped: share of pixels that are black or white. saturation:
    mean chroma, share of 255. sharpness: variance of the Laplacian, grey levels squared. change: mean absolute
    difference from the frame before over all channels, grey levels. changed: share of pixels whose brightness
    changed by more than 2 grey levels. flicker: mean absolute change of brightness where nothing moves, grey
    levels; NaN where all moves. motion: speed of the fastest twentieth of the picture, short sides per frame.
    """

    exposure: Array
    clipped: Array
    saturation: Array
    sharpness: Array
    change: Array
    changed: Array
    flicker: Array
    motion: Array

    def __len__(self) -> int:
        return len(self.exposure)


class Meter:
    """Takes a video's frames as they come; `series` are the figures of all that were taken."""

    def __init__(self) -> None:
        self._last: Video | None = None
        self._parts: list[Series] = []

    def add(self, video: Video) -> None:
        """Measure the next frames, uint8 [T, H, W, 3]. ValueError if they are no video or of another size."""
        check_video(video)
        for first in range(0, len(video), CHUNK):
            chunk = video[first : first + CHUNK]
            if self._last is not None and self._last.shape[1:] != chunk.shape[1:]:
                raise ValueError(f"video: frames of {self._last.shape[1:3]} before, now of {chunk.shape[1:3]}")
            joined = chunk if self._last is None else np.concatenate([self._last, chunk])
            self._parts.append(_measured(joined, len(chunk)))
            self._last = chunk[-1:].copy()

    def series(self) -> Series:
        """ValueError when no frame was taken."""
        if not self._parts:
            raise ValueError("video: no frames were measured")
        names = [field.name for field in fields(Series)]
        return Series(*(np.concatenate([vars(part)[name] for part in self._parts]) for name in names))


def measure(video: Video) -> Series:
    """The figures of a whole video, uint8 [T, H, W, 3]; a memory map will do."""
    meter = Meter()
    meter.add(video)
    return meter.series()


def _measured(joined: Video, fresh: int) -> Series:
    """Figures of the last `fresh` frames; `joined` has the frame before them first, unless they are the first."""
    brightness = frames.luma(joined)
    inside = np.s_[len(joined) - fresh :]
    change, changed, flicker, speed = _steps(joined, brightness)
    return Series(
        frames.exposure(brightness[inside]),
        frames.clipped(brightness[inside]),
        frames.saturation(joined[inside]),
        frames.sharpness(brightness[inside]),
        *(_as_long_as(fresh, values) for values in (change, changed, flicker, speed)),
    )


def _as_long_as(fresh: int, steps: Array) -> Array:
    """Values of steps as values of the frames after them; the video's first frame has none."""
    return np.pad(steps, (fresh - len(steps), 0), constant_values=np.nan).astype(np.float32)


def _steps(video: Video, brightness: Array) -> tuple[Array, Array, Array, Array]:
    """change, changed, flicker and motion of each step from a frame to the next [T - 1]."""
    height, width = brightness.shape[1:]
    if len(video) < 2:
        return (np.zeros(0, np.float32),) * 4
    change = np.abs(np.diff(video.astype(np.int16), axis=0)).mean(axis=(1, 2, 3), dtype=np.float32)
    gaps = np.abs(np.diff(brightness, axis=0))
    changed = (gaps > CHANGED).mean(axis=(1, 2), dtype=np.float32)
    speeds = motion.block_speeds(brightness[:-1], brightness[1:])
    resting = motion.at_rest(speeds)
    shares = motion.block_means(gaps, motion.block_side(height, width))
    count = resting.sum(axis=(1, 2))
    flicker = np.where(count > 0, np.where(resting, shares, 0).sum(axis=(1, 2)) / np.maximum(count, 1), np.nan)
    speed = motion.top_speed(speeds) / np.float32(min(height, width))
    return change, changed, flicker.astype(np.float32), speed
