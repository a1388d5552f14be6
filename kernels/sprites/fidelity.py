"""Measures of sets and of long videos: Fréchet distance, diversity over seeds, and drift over time.

A grade says whether one video is right; it cannot say whether a model's videos are spread as the world's are,
nor whether fine detail has the world's statistics. The Fréchet distance (Heusel et al., arXiv 1706.08500; for
videos Unterthiner et al., arXiv 1812.01717) answers the second, `diversity` the first.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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

FILTERS = 8  # random filters per scale: half see detail, half see change over time
SCALES = 3  # full, half and quarter resolution, in space and in time
FEATURES = FILTERS * SCALES
FLOOR = 1e-5  # added to a filter's energy before the logarithm: a quarter of a grey level, squared, is 1e-6
PHASE_FLOOR = 0.02  # frame heights; below it the world itself has no spread of phases for a prompt


@cache
def random_filters() -> torch.Tensor:
    """Return the fixed random filters [FEATURES, 3 colours, 3 frames, 5, 5], each of zero mean and unit norm.

    Of each scale's, one half is a random 3 × 3 pattern under a Laplacian in space (what blur takes away),
    the other a random 5 × 5 pattern times a difference in time (what a frozen video lacks).
    """
    generator = torch.Generator().manual_seed(20412)
    laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    small = torch.randn(FEATURES * 3, 1, 3, 3, generator=generator)
    detail = functional.conv_transpose2d(small, laplacian).view(FEATURES, 3, 1, 5, 5)
    wide = torch.randn(FEATURES, 3, 1, 5, 5, generator=generator)
    still, moving = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
    sees_change = (torch.arange(FEATURES) % 2 == 1).view(-1, 1, 1, 1, 1)
    filters = torch.where(sees_change, wide * moving.view(1, 1, 3, 1, 1), detail * still.view(1, 1, 3, 1, 1))
    norms: torch.Tensor = torch.linalg.vector_norm(filters, dim=(1, 2, 3, 4), keepdim=True)
    return filters / norms


def features(videos: Iterable[Video]) -> Array:
    """Return the fixed features of each video, [N, FEATURES], for uint8 videos [F, H, W, 3] of any length.

    A feature is the logarithm of the mean energy of a rectified random space-time filter (3 frames × 5 × 5
    pixels × 3 colours, see `random_filters`), at full, half and quarter resolution. It does not know where a
    sprite is; it sees edges and their sharpness, colours against each other, and motion.
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


# --- spread over seeds --------------------------------------------------------------------------------


def diversity(videos: Sequence[Video], scene: Scene, *, level: int = 0, references: int = 64) -> float:
    """Return how widely videos of one prompt under different seeds are spread, as a share of the world's.

    Two spreads, averaged: of where sprites are on the whole (mean distance, on the torus, of two videos' mean
    places), and of how they get there (mean distance of two videos' paths from their starts; it holds the
    phases of circles, the sides of diagonals and random turns). Each is divided by the same spread of
    `references` simulated videos of the scene; about 1 for renderings, 0 for identical videos. The second
    is left out where the world itself has next to none, as for a sprite that always goes left.

    Raises:
        ValueError: fewer than two videos.
    """
    if len(videos) < 2:
        raise ValueError(f"videos: a spread needs at least two, got {len(videos)}")
    frames = min(len(video) for video in videos)
    made = np.stack([found_paths(video[:frames], scene, level=level) for video in videos])
    return diversity_of_paths(made, scene, level=level, references=references)


def diversity_of_paths(made: Array, scene: Scene, *, level: int = 0, references: int = 64) -> float:
    """Return `diversity` of videos whose paths are known: [N, S, F, 2] as `found_paths` gives them.

    Raises:
        ValueError: fewer than two videos, or other sprites than the scene's.
    """
    if made.ndim != 4 or len(made) < 2 or made.shape[1] != len(scene.sprites) or made.shape[3] != 2:
        raise ValueError(f"made: needs paths [N >= 2, {len(scene.sprites)}, F, 2], got {made.shape}")
    places, phases = _world_spreads(scene, made.shape[2], level, references)
    ratios = [_place_spread(made) / max(places, 1e-6)]
    if phases > PHASE_FLOOR:
        ratios.append(_phase_spread(made) / phases)
    return float(np.mean(ratios))


@cache
def _world_spreads(scene: Scene, frames: int, level: int, references: int) -> tuple[float, float]:
    world = np.stack([_simulated_paths(scene, seed, frames, level) for seed in range(references)])
    return _place_spread(world), _phase_spread(world)


def found_paths(video: Video, scene: Scene, *, level: int = 0) -> Array:
    """Paths [S, F, 2] of the captioned sprites in frame sizes; in the middle throughout where not found."""
    paths = oracle.captioned_paths(video, scene, level=level)
    middle = np.full((len(video), 2), 0.5)
    return np.stack([middle if path is None else path for path in paths])


def _simulated_paths(scene: Scene, seed: int, frames: int, level: int) -> Array:
    positions = simulate(scene, seed, frames, level=level).positions.astype(np.float64)
    paths = [detect.unwrapped(positions[:, index].astype(np.float32), 1) for index in range(positions.shape[1])]
    return np.stack(paths).astype(np.float64)


def _place_spread(paths: Array) -> float:
    """Mean torus distance between the mean places of pairs of videos; paths [N, S, F, 2]."""
    places = paths.mean(axis=2)
    gaps = (places[:, None] - places + 0.5) % 1.0 - 0.5
    return _pair_mean(np.linalg.norm(gaps, axis=-1).mean(axis=-1))


def _phase_spread(paths: Array) -> float:
    """Mean distance between the ways that pairs of videos have gone since the first frame."""
    ways = paths - paths[:, :, :1]
    gaps = ways[:, None] - ways
    return _pair_mean(np.linalg.norm(gaps, axis=-1).mean(axis=(2, 3)))


def _pair_mean(distances: Array) -> float:
    first, second = np.triu_indices(len(distances), 1)
    return float(distances[first, second].mean())


# --- drift over time ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurvePoint:
    """The grade of one window of a long video that begins at `start` seconds."""

    start: float
    grade: oracle.Grade


def curve(
    chunks: Video | Iterable[Video],
    scene: Scene,
    seconds: float,
    *,
    fps: float = FRAMES_PER_SECOND,
    level: int = 0,
) -> list[CurvePoint]:
    """Grade a long video window by window: how it drifts.

    chunks: one video [F, H, W, 3] (a memory map will do) or an iterable of chunks of any lengths, each read
    once; no more than a chunk and a window are held. Windows are `seconds` long, do not overlap, and a rest
    of less than a window is left out. A caption's relation is about the start of a video, so only the first
    window answers for it. At level 3 a sprite that is not there in a later window may have left, so that
    window answers for the other one alone.

    Raises:
        ValueError: a window has fewer than 5 frames.
    """
    length = round(seconds * fps)
    if length < oracle.SHORTEST:
        raise ValueError(f"seconds: a window needs at least {oracle.SHORTEST} frames, got {length}")
    points = []
    for index, window in enumerate(_windows(chunks, length)):
        asked = scene if index == 0 else replace(scene, relation=None)
        result = oracle.grade(window, asked, fps=fps, level=level, may_have_left=index > 0)
        points.append(CurvePoint(index * length / fps, result))
    return points


def _windows(chunks: Video | Iterable[Video], length: int) -> Iterator[Video]:
    """Cut a video, or chunks of one, into windows of `length` frames."""
    if isinstance(chunks, np.ndarray):
        for first in range(0, len(chunks) - length + 1, length):
            yield np.asarray(chunks[first : first + length])
        return
    held: list[Video] = []
    count = 0
    for chunk in chunks:
        held.append(chunk)
        count += len(chunk)
        if count >= length:
            whole = np.concatenate(held)
            full = count // length * length
            for first in range(0, full, length):
                yield whole[first : first + length]
            held, count = [whole[full:].copy()], count - full
