"""From a video's frames to a clip: which frame shows at which time, how it is framed, and whether anything is in it."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

TIME_SLACK: Final = 0.001  # seconds; containers round times, Matroska to whole milliseconds
MOTION_BLOCK: Final = 8  # pixels per side: means over so many hide film grain and coding noise
LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def shown_frames(times: Floats, end: float, rate: float, slack: float = TIME_SLACK) -> Integers:
    """Return which source frame a player shows at 0, 1 / rate, 2 / rate, ... seconds, as indices that never fall.

    times: presentation times of the source frames [N], seconds, rising, the first one 0. end: when the last frame's
    time is over. slack: how much too late, in seconds, a frame may be stamped and still count as due.
    """
    assert len(times) > 0
    assert times[0] == 0
    count = max(0, int(np.ceil((end - slack) * rate)))
    due = np.arange(count) / rate
    return np.searchsorted(times, due + slack, side="right").astype(np.int64) - 1


def fit(frame: Pixels, height: int, width: int, pixel_aspect: float = 1.0) -> Pixels:
    """Return a frame [H, W, 3] as [height, width, 3]: resized until it covers that, then cropped about its centre.

    The resize is bicubic and antialiased. pixel_aspect: width of a source pixel over its height.
    """
    rows, columns = frame.shape[0], frame.shape[1] * pixel_aspect
    scale = max(height / rows, width / columns)
    size = max(height, round(rows * scale)), max(width, round(columns * scale))
    if size != frame.shape[:2]:
        import torch  # here only: a process that decodes and does not resize starts in a tenth of the time
        from torch.nn import functional

        picture = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]
        frame = functional.interpolate(picture, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return np.ascontiguousarray(frame[top : top + height, left : left + width])


def brightness(frames: Pixels) -> float:
    """Return the mean luma of the brightest frame of a clip [T, H, W, 3], in [0, 1]."""
    return max(float(frame.mean(axis=(0, 1), dtype=np.float32) @ LUMA) for frame in frames) / 255


def motion(frames: Pixels) -> float:
    """Return how much a clip [T, H, W, 3] changes from one frame to the next, in [0, 1]; 0 for a single frame.

    That is the mean absolute change of the luma of blocks of 8 × 8 pixels, over all blocks and pairs of frames: a mean
    and not a median, because at a raised frame rate most pairs show the same source frame twice.
    """
    if len(frames) < 2:
        return 0.0
    blocks = np.stack([_block_luma(frame) for frame in frames])
    return float(np.abs(np.diff(blocks, axis=0)).mean()) / 255


def _block_luma(frame: Pixels) -> NDArray[np.float32]:
    side = min(MOTION_BLOCK, *frame.shape[:2])
    rows, columns = frame.shape[0] // side, frame.shape[1] // side
    luma = frame[: rows * side, : columns * side].astype(np.float32) @ LUMA
    means: NDArray[np.float32] = luma.reshape(rows, side, columns, side).mean(axis=(1, 3))
    return means
