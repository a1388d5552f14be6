"""What every measure starts from: a checked video, its brightness, and per-frame pictures of both."""

import numpy as np
from numpy.typing import NDArray

Video = NDArray[np.uint8]
Array = NDArray[np.float32]
Bools = NDArray[np.bool_]

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # ITU-R BT.709
DARK, BRIGHT = 4, 251  # grey levels at and beyond which a pixel holds no detail
SMALLEST = 16  # pixels of a side: two motion blocks


def check_video(video: Video, shortest: int = 1) -> None:
    """ValueError unless video is uint8 [T, H, W, 3] of at least `shortest` frames and 16 pixels a side."""
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3:
        raise ValueError(f"video: must be uint8 [T, H, W, 3], got {video.dtype} {video.shape}")
    if len(video) < shortest or min(video.shape[1:3]) < SMALLEST:
        raise ValueError(
            f"video: needs at least {shortest} frames of at least {SMALLEST} pixels a side, got {video.shape}"
        )


def luma(video: Video) -> Array:
    """Brightness [T, H, W], grey levels 0 to 255."""
    return np.asarray(video.astype(np.float32) @ LUMA)


def exposure(brightness: Array) -> Array:
    """Mean brightness of each frame [T], as a share of white."""
    return np.asarray(brightness.mean(axis=(1, 2)) / np.float32(255))


def clipped(brightness: Array) -> Array:
    """Share of each frame's pixels that are as good as black or white [T]: what over-exposure loses."""
    return np.asarray(((brightness <= DARK) | (brightness >= BRIGHT)).mean(axis=(1, 2), dtype=np.float32))


def saturation(video: Video) -> Array:
    """Mean chroma of each frame [T]: largest less smallest colour channel, as a share of 255.

    The chroma of the HSV model and not its saturation, which is noise where a picture is dark.
    """
    chroma = video.max(axis=3) - video.min(axis=3)
    return np.asarray(chroma.mean(axis=(1, 2), dtype=np.float32) / np.float32(255))


def sharpness(brightness: Array) -> Array:
    """Variance of the Laplacian of each frame [T], grey levels squared: high where there is fine detail.

    The Laplacian is the sum of the four neighbours less four times the pixel, inside the border (Pech-Pacheco
    et al., ICPR 2000). It depends on the resolution: compare videos of one size only.
    """
    inner = brightness[:, 1:-1, 1:-1]
    around = brightness[:, :-2, 1:-1] + brightness[:, 2:, 1:-1] + brightness[:, 1:-1, :-2] + brightness[:, 1:-1, 2:]
    return np.asarray((around - 4 * inner).var(axis=(1, 2)))
