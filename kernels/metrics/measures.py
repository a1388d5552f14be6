"""What a video's series say of it as a whole: one figure per question, with its unit and which way is better."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from .frames import Array, Bools
from .seams import seam
from .series import Series

VBENCH_MOVES = 6 / 256 * 8  # short sides per second: 6 pixels of 256 from frame to frame at 8 fps
VBENCH_SHARE = 0.25  # of the steps that must be faster for a video to count as moving
FROZEN_SHARE = 1e-3  # of the pixels; a step that changes no more of them repeats the frame

Better = Literal["higher", "lower", "zero", "one", "neither"]


@dataclass(frozen=True)
class Measure:
    """A measure's unit, which values are better, and what it says in a few words."""

    unit: str
    better: Better
    says: str


MEASURES: dict[str, Measure] = {
    "temporal_flickering": Measure("0-1", "higher", "1 less the mean change of a pixel per frame (VBench)"),
    "flicker": Measure("grey levels", "lower", "change of brightness per frame where nothing moves"),
    "motion": Measure("sides/s", "neither", "speed of the fastest twentieth of the picture"),
    "moving": Measure("share", "neither", "videos that move, by VBench's rule for the dynamic degree"),
    "freeze": Measure("share", "lower", "frames that repeat the one before"),
    "longest_freeze": Measure("s", "lower", "the longest stretch of repeated frames"),
    "sharpness": Measure("grey levels²", "neither", "variance of the Laplacian"),
    "exposure": Measure("0-1", "neither", "mean brightness"),
    "clipped": Measure("share", "lower", "pixels that are black or white"),
    "saturation": Measure("0-1", "neither", "mean chroma"),
    "sharpness_drift": Measure("1/s", "zero", "relative change of sharpness per second"),
    "exposure_drift": Measure("1/s", "zero", "change of mean brightness per second"),
    "saturation_drift": Measure("1/s", "zero", "change of mean chroma per second"),
    "seam": Measure("ratio", "one", "change at block edges over change inside blocks"),
}
# What is shown second by second.
CURVES = ("sharpness", "exposure", "saturation", "clipped", "flicker", "motion", "change")


def summary(
    series: Series, fps: float, edges: Sequence[int] = (), inside: Sequence[int] | None = None
) -> dict[str, float]:
    """Every measure that the video is long enough for, under the names of `MEASURES`.

    fps: frames per second. edges: the first frames of blocks, 0 aside; without any there is no seam. inside: the
    frames that these are held against, all others by default (see `seam`). What cannot be said (the flicker of
    a video in which all moves, the drift of a single frame) is left out.
    """
    if not fps > 0:
        raise ValueError(f"fps: must be above 0, got {fps}")
    values = {
        "temporal_flickering": 1 - _mean(series.change) / 255,
        "flicker": _mean(series.flicker),
        "motion": _mean(series.motion) * fps,
        "moving": float(is_moving(series.motion, fps)) if len(series) > 1 else np.nan,
        **_freezes(series, fps),
        "sharpness": _mean(series.sharpness),
        "exposure": _mean(series.exposure),
        "clipped": _mean(series.clipped),
        "saturation": _mean(series.saturation),
        "sharpness_drift": slope_per_second(series.sharpness, fps) / max(_mean(series.sharpness), 1e-6),
        "exposure_drift": slope_per_second(series.exposure, fps),
        "saturation_drift": slope_per_second(series.saturation, fps),
        "seam": seam(series.change, edges, inside).ratio,
    }
    return {name: value for name, value in values.items() if np.isfinite(value)}


def is_moving(motion: Array, fps: float) -> bool:
    """VBench's dynamic degree of one video, on block matching instead of its flow network.

    motion: short sides per frame [T]. True when a quarter of the steps are faster than 0.1875 sides a second.
    """
    known = motion[np.isfinite(motion)]
    return bool(len(known) and (known * fps > VBENCH_MOVES).mean() >= VBENCH_SHARE)


def frozen(changed: Array) -> Bools:
    """Which frames repeat the one before [T], from the share of changed pixels [T]; the first one never does."""
    return np.nan_to_num(changed, nan=1.0) <= FROZEN_SHARE


def longest_run(flags: Bools) -> int:
    """Length of the longest run of True in flags [T]."""
    edges = np.flatnonzero(np.diff(np.pad(flags.astype(np.int8), 1)))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def slope_per_second(values: Array, fps: float) -> float:
    """Slope of the straight line through values [T], least squares, per second; NaN for fewer than two."""
    known = np.isfinite(values)
    if known.sum() < 2:
        return float("nan")
    times, heights = np.flatnonzero(known) / fps, values[known].astype(np.float64)
    times = times - times.mean()
    return float(times @ heights / (times @ times))


def per_second(values: Array, fps: float) -> list[float]:
    """Mean over each whole second of values [T]; NaN where a second has none."""
    bounds = [round(second * fps) for second in range(int(len(values) / fps + 1e-9) + 1)]
    return [_mean(values[first:last]) for first, last in pairwise(bounds)]


def _freezes(series: Series, fps: float) -> dict[str, float]:
    if len(series) < 2:
        return {}
    repeats = frozen(series.changed)
    return {"freeze": float(repeats[1:].mean()), "longest_freeze": longest_run(repeats) / fps}


def _mean(values: Array) -> float:
    known = values[np.isfinite(values)].astype(np.float64)
    return float(known.mean()) if len(known) else float("nan")
