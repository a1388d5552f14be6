"""Measures of sets and of long videos: Fréchet distance, diversity over seeds, and drift over time.

A grade says whether one video is right; it cannot say whether a model's videos are spread as the world's are,
nor whether fine detail has the world's statistics. The Fréchet distance (Heusel et al., arXiv 1706.08500; for
videos Unterthiner et al., arXiv 1812.01717) answers the second, `diversity` the first.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from . import detect, oracle
from .render import simulate
from .scene import FRAMES_PER_SECOND, Scene

Video = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]

FILTERS = 12  # random filters per scale
SCALES = 3  # full, half and quarter resolution, in space and in time
FEATURES = FILTERS * SCALES
FLOOR = 1e-5  # added to a filter's energy before the logarithm: a quarter of a grey level, squared, is 1e-6
PHASE_FLOOR = 0.02  # frame heights; below it the world itself has no spread of phases for a prompt


@cache
def random_filters() -> torch.Tensor:
    """Return the fixed random filters [SCALES * FILTERS, 3, 3, 5, 5], each of zero mean and unit norm."""
    generator = torch.Generator().manual_seed(20412)
    filters = torch.randn(FEATURES, 3, 3, 5, 5, generator=generator)
    filters = filters - filters.mean(dim=(1, 2, 3, 4), keepdim=True)
    return filters / filters.flatten(1).norm(dim=1)[:, None, None, None, None]


def features(videos: Iterable[Video]) -> Array:
    """Return the fixed features of each video, [N, FEATURES], for uint8 videos [F, H, W, 3] of any length.

    A feature is the logarithm of the mean energy of a rectified random space-time filter (3 frames × 5 × 5
    pixels × 3 colours, zero mean), at full, half and quarter resolution. It does not know where a sprite is;
    it sees edges and their sharpness, colours against each other, and motion.
    """
    rows = [_video_features(torch.from_numpy(np.ascontiguousarray(video))) for video in videos]
    if not rows:
        raise ValueError("videos: needs at least one video, got none")
    return torch.stack(rows).double().numpy()


def _video_features(video: torch.Tensor) -> torch.Tensor:
    if video.ndim != 4 or video.shape[-1] != 3 or video.shape[0] < 3:
        raise ValueError(f"videos: each must be [F >= 3, H, W, 3], got {tuple(video.shape)}")
    pixels = video.permute(3, 0, 1, 2)[None].float() / 255
    energies = []
    for scale, filters in enumerate(random_filters().split(FILTERS)):
        if scale:
            kernel = (2 if pixels.shape[2] >= 6 else 1, 2, 2)
            pixels = functional.avg_pool3d(pixels, kernel)
        stride = (1, 2, 2) if scale else (2, 2, 2)
        response = functional.conv3d(pixels, filters, stride=stride).relu()
        energies.append(response.square().mean(dim=(0, 2, 3, 4)))
    return (torch.cat(energies) + FLOOR).log()


def _matrix_root(matrix: Array) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    root: Array = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


def frechet_of_features(first: Array, second: Array) -> float:
    """Return the Fréchet distance between the Gaussians fitted to two sets of features [N, D] and [M, D].

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2); arXiv 1706.08500, equation 6. It is biased upward by
    about D / N: compare only distances between sets of the same size, and use N well above D.

    Raises:
        ValueError: a set has fewer than two rows, or the widths differ.
    """
    for name, rows in (("first", first), ("second", second)):
        if rows.ndim != 2 or len(rows) < 2 or rows.shape[1] != first.shape[1]:
            raise ValueError(f"{name}: needs [N >= 2, {first.shape[-1]}] features, got {rows.shape}")
    gap = first.mean(axis=0) - second.mean(axis=0)
    cov_first, cov_second = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = _matrix_root(cov_first)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_second @ root), 0, None)).sum()
    return max(0.0, float(gap @ gap + np.trace(cov_first) + np.trace(cov_second) - 2 * cross))


def frechet(first: Iterable[Video], second: Iterable[Video]) -> float:
    """Return the Fréchet distance between two sets of uint8 videos [F, H, W, 3] on the fixed `features`."""
    return frechet_of_features(features(first), features(second))
