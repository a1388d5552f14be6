"""The judge: what can be said of a video without any network, by its pixels and, in the sprites world, its caption."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from ..kernels.metrics.frames import check_video
from ..kernels.metrics.measures import CURVES, per_second, summary
from ..kernels.metrics.series import measure
from ..kernels.sprites import oracle
from ..kernels.sprites.captions import MEANINGS, parse, tokens
from ..kernels.sprites.fidelity import curve, features, found_paths
from ..kernels.sprites.oracle import Grade, grade
from ..kernels.sprites.scene import FRAMES_PER_SECOND, Scene
from ..kernels.sprites.scores import mean_scores, quality, semantic, total

SPRITES, PIXELS = "sprites", "pixels"  # the judges' names
VERSION = 1  # raised when a judge's figures change their meaning
END_SECONDS = 5.0  # of a long video's two ends, which are held against each other
LONG_SECONDS = 2 * END_SECONDS  # from here on a video has two ends; up to here it is a clip
PLACES = 4  # decimals of what is kept of paths and features


@dataclass(frozen=True)
class Verdict:
    """Grades of a set of videos. means: mean score of each dimension over the videos that it applies to."""

    grades: list[Grade]
    means: dict[str, float]

    @property
    def table(self) -> dict[str, float]:
        """The means, then Quality, Semantic and Total of the means, as VBench adds up."""
        overall = {"quality": quality(self.means), "semantic": semantic(self.means), "total": total(self.means)}
        return {**self.means, **overall}


def judge(videos: Iterable[np.ndarray], scenes: Iterable[Scene], *, level: int) -> Verdict:
    """Grade videos, uint8 [T, H, W, 3], each against its caption's scene."""
    grades = [grade(video, scene, level=level) for video, scene in zip(videos, scenes, strict=True)]
    return Verdict(grades, mean_scores(each.scores for each in grades))


@dataclass(frozen=True)
class Shot:
    """A stretch of a video that was made under one prompt: its first frame and the prompt."""

    start: int
    prompt: str


@dataclass(frozen=True)
class Examination:
    """What the judges say of one video.

    scores: {judge: {dimension: value}}. drift: {judge: {dimension: a value per second}}; None where a second has
    none. seen: what the oracle believes to be in the video, in words; empty where it was not asked.
    traits: of a clip of the sprites world under one prompt, what figures of whole sets of clips are made from.
    ends: of a long one the oracle's scores of its "first" and its "last" 5 seconds.
    """

    scores: dict[str, dict[str, float]]
    drift: dict[str, dict[str, list[float | None]]]
    seen: str = ""
    traits: "Traits | None" = None
    ends: dict[str, dict[str, float]] | None = None


@dataclass(frozen=True)
class Traits:
    """Of one clip: its fixed features [24] (`fidelity.features`) and its sprites' paths [S, F, 2], as plain lists."""

    features: list[float]
    paths: list[list[list[float]]]


@dataclass(frozen=True)
class Blocks:
    """Where a video's blocks begin: frames, 0 aside. inside: first frames of the latents that begin no block."""

    edges: tuple[int, ...] = ()
    inside: tuple[int, ...] = ()

    @classmethod
    def of(cls, sizes: Sequence[int], frames_per_latent: int) -> "Blocks":
        """From the blocks' sizes in latent frames; the first latent is one frame, the others are as many as said."""
        starts = list(accumulate(sizes[:-1], initial=0)) if sizes else []
        edges = tuple(1 + (start - 1) * frames_per_latent for start in starts if start)
        every = (1 + latent * frames_per_latent for latent in range(sum(sizes) - 1))
        return cls(edges, tuple(frame for frame in every if frame not in edges))


def scene_of(prompt: str) -> Scene | None:
    """The sprites scene that a prompt describes in full; None for a prompt that says anything else."""
    named = any(MEANINGS.get(token, ("", ""))[0] == "shape" for token in tokens(prompt))
    scene, unknown = parse(prompt)
    return scene if named and not unknown else None


def examine(
    video: np.ndarray, shots: Sequence[Shot], *, fps: float, level: int = 0, blocks: Blocks | None = None
) -> Examination:
    """Judge a video, uint8 [T, H, W, 3], made under one prompt or several.

    The pixels are measured in any video. The oracle of the sprites world grades the stretches whose prompts are
    captions of it, if the video is of its form; of several stretches the scores are the mean, and a relation,
    which is about the start of a video, is asked of the first alone. blocks: where seams may be (`Blocks`).
    """
    check_video(video)
    series, blocks = measure(video), blocks or Blocks()
    curves = {name: per_second(vars(series)[name], fps) for name in CURVES}
    scores = {PIXELS: summary(series, fps, blocks.edges, blocks.inside or None)}
    drift = {PIXELS: {name: [_finite(value) for value in values] for name, values in curves.items() if values}}
    if not _is_of_the_world(video):
        return Examination(scores, drift)
    stretches = [stretch for stretch in _stretches(video, shots) if len(stretch[0]) >= oracle.SHORTEST]
    if stretches:
        grades = [grade(part, scene, fps=fps, level=level, may_have_left=begun > 0) for part, scene, begun in stretches]
        scores[SPRITES] = with_totals(mean_scores(each.scores for each in grades))
        drift |= _sprites_drift(stretches, fps, level)
    seen = " | ".join(map(str, grades)) if stretches else ""
    if len(shots) != 1 or not stretches:
        return Examination(scores, drift, seen)
    scene = stretches[0][1]
    if len(video) < LONG_SECONDS * fps:
        return Examination(scores, drift, seen, traits=_traits(video, scene, fps, level))
    return Examination(scores, drift, seen, ends=_ends(video, scene, fps, level))


def _traits(video: np.ndarray, scene: Scene, fps: float, level: int) -> Traits | None:
    """None at another frame rate than the world's: the world's own clips are what they are held against."""
    if fps != FRAMES_PER_SECOND:
        return None
    paths = found_paths(video, scene, level=level)
    return Traits(features([video])[0].round(PLACES).tolist(), paths.round(PLACES).tolist())


def _ends(video: np.ndarray, scene: Scene, fps: float, level: int) -> dict[str, dict[str, float]]:
    """Scores of the two ends of a long video, both asked the same: a relation is about the start, so of neither."""
    frames, asked = round(END_SECONDS * fps), replace(scene, relation=None)
    ends = {"first": video[:frames], "last": video[-frames:]}
    return {
        name: grade(part, asked, fps=fps, level=level, may_have_left=name == "last").scores
        for name, part in ends.items()
    }


def with_totals(means: dict[str, float]) -> dict[str, float]:
    """Mean scores with VBench's quality, semantic and total of them."""
    return {**means, "quality": quality(means), "semantic": semantic(means), "total": total(means)}


def _is_of_the_world(video: np.ndarray) -> bool:
    frames, height, width = video.shape[:3]
    return bool(frames >= oracle.SHORTEST and height == width and height % 2 == 0)


def _stretches(video: np.ndarray, shots: Sequence[Shot]) -> list[tuple[np.ndarray, Scene, int]]:
    """The parts of the video that have a scene: frames, scene, first frame."""
    ends = [shot.start for shot in shots[1:]] + [len(video)]
    found = []
    for shot, end in zip(shots, ends, strict=True):
        scene = scene_of(shot.prompt)
        if scene is not None:
            asked = replace(scene, relation=None) if shot.start else scene
            found.append((video[shot.start : end], asked, shot.start))
    return found


def _sprites_drift(
    stretches: Sequence[tuple[np.ndarray, Scene, int]], fps: float, level: int
) -> dict[str, dict[str, list[float | None]]]:
    """Quality, semantic and total of each whole second of each stretch, at the second in which it begins."""
    points = {}
    if round(fps) < oracle.SHORTEST:
        return {}
    for part, scene, begun in stretches:
        for point in curve(part, scene, 1.0, fps=fps, level=level):
            points[int(begun / fps + point.start + 1e-6)] = point.grade
    if not points:
        return {}
    seconds = range(max(points) + 1)
    return {
        SPRITES: {
            "quality": [points[second].quality if second in points else None for second in seconds],
            "semantic": [points[second].semantic if second in points else None for second in seconds],
            "total": [points[second].total if second in points else None for second in seconds],
        }
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
