"""Whether the places show where a video's blocks were joined."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .frames import Array
from .statistics import CONFIDENCE, RESAMPLES, draws, percentile_interval


@dataclass(frozen=True)
class Seam:
    """Change at block edges over change inside the blocks beside them, with its interval; 1: no seam to see.

    NaN throughout where there is no edge with frames on both sides, or nothing ever changes; the interval alone
    is NaN with fewer than two edges.
    """

    ratio: float
    low: float
    high: float
    edges: int


def seam(change: Array, edges: Sequence[int], inside: Sequence[int] | None = None, seed: int = 0) -> Seam:
    """Compare the steps into `edges` with those into other frames of the two blocks beside each.

    change: each frame's difference from the one before [T], first NaN. edges: first frames of blocks, 0 aside.
    inside: frames to compare with. A VAE that makes four frames from one latent has a rhythm of its own, so a
    fair comparison is with the first frames of latents inside the blocks; by default all frames that are no edge.
    The ratio of sums holds edges against their own neighbourhood: a video whose motion grows has no seam from
    that. The interval is a bootstrap over edges.
    """
    marks = sorted({edge for edge in edges if 0 < edge < len(change)})
    others = [frame for frame in (inside if inside is not None else range(1, len(change))) if frame not in marks]
    pairs = []
    for index, edge in enumerate(marks):
        first = marks[index - 1] if index else 0
        last = marks[index + 1] if index + 1 < len(marks) else len(change)
        beside = [change[frame] for frame in others if first < frame < last and np.isfinite(change[frame])]
        if beside:
            pairs.append((float(change[edge]), float(np.mean(beside))))
    return _ratio(np.array(pairs, np.float64).reshape(-1, 2), seed)


def _ratio(pairs: NDArray[np.float64], seed: int) -> Seam:
    count, nan = len(pairs), float("nan")
    at_edges, beside = pairs.sum(axis=0)
    if not count or beside <= 0:
        return Seam(nan, nan, nan, count)
    if count < 2:
        return Seam(at_edges / beside, nan, nan, count)
    sums = draws(count, RESAMPLES, seed) @ pairs
    ratios = sums[:, 0] / np.maximum(sums[:, 1], 1e-12)
    low, high = percentile_interval(ratios, count, CONFIDENCE)
    return Seam(float(at_edges / beside), low, high, count)
