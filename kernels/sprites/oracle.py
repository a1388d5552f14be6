"""Grading a video of the sprites world against its caption's scene, without any network.

The dimensions bear VBench's names (arXiv 2311.17982) where they ask the same; how each is measured here:

- subject_consistency: each sprite looks the same, cell by cell, in all frames;
- background_consistency: the ground does not drift over the clip;
- temporal_flickering: the ground does not change from frame to frame;
- motion_smoothness: no jitter in the paths, no dropped or repeated frames;
- dynamic_degree: sprites said to move do move, those said to stay still stay;
- imaging_quality: a sharp, clean rendering of what was found explains the pixels;
- object_class: shape and size of each sprite, less when there are more sprites than in the caption;
- color: colour of each sprite;
- multiple_objects: two sprites are there at once;
- spatial_relationship: where the first is, seen from the second, as the video starts;
- scene: colour and gradient of the ground;
- temporal_style: direction, or manner, and speed of each sprite's motion.

All answers are graded. The semantic ones are mostly probabilities in which the captioned value competes
with all others and with "nothing of the kind".
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from . import agreement, detect, measures, scores
from .agreement import Path
from .find import Findings, find
from .find import Sprite as Found
from .scene import (
    COLORS,
    FRAMES_PER_SECOND,
    GROUNDS,
    MOTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    TEXTURED_LEVEL,
    TURNING_LEVEL,
    Scene,
    Sprite,
)

Array = NDArray[np.float32]
Bools = NDArray[np.bool_]

SHORTEST = 5  # frames of a video that can be graded
PASSING_LEVEL = 3
COLOR_SCALE, NO_COLOR = 0.09, 0.3
GROUND_SCALE, NO_GROUND = 0.04, 0.14
LIGHTER, DARKER = 0.45, 0.62  # of a texture's second colour
LATEST_ENTRANCE = 4.0  # seconds; a shorter clip may end before a sprite comes in
FIRST_FRAMES = 8  # in which a relation is looked at


@dataclass(frozen=True)
class Seen:
    """What the oracle believes of one sprite, in the caption's words. share: of the frames it is in."""

    shape: str
    color: str
    size: str
    motion: str
    speed: str
    share: float
    start: tuple[float, float]

    def __str__(self) -> str:
        manner = self.motion if self.motion == "still" else f"{self.motion} {self.speed}"
        where = f"from ({self.start[0]:.2f}, {self.start[1]:.2f})"
        return f"{self.size} {self.color} {self.shape}, {manner}, {where}, in {self.share:.0%} of the frames"


@dataclass(frozen=True)
class Grade:
    """Scores in [0, 1] of the dimensions that apply (see `scores.applicable`), and what was found."""

    scores: dict[str, float]
    found: tuple[Seen, ...]
    ground: str

    @property
    def quality(self) -> float:
        """VBench's quality score."""
        return scores.quality(self.scores)

    @property
    def semantic(self) -> float:
        """VBench's semantic score."""
        return scores.semantic(self.scores)

    @property
    def total(self) -> float:
        """VBench's total score, (4 Q + S) / 5."""
        return scores.total(self.scores)

    def __str__(self) -> str:
        seen = "; ".join(str(each) for each in self.found) or "nothing"
        return f"total {self.total:.3f}: {seen}; on {self.ground}"


@dataclass(frozen=True)
class _Judged:
    """A captioned sprite, what was found for it (None: nothing), and in which frames to judge it.

    counted [F]: frames in which it must be there; known [F]: frames in which it is there to be followed.
    """

    wanted: Sprite
    found: Found | None
    counted: Bools
    known: Bools
    path: Path | None


def grade(
    video: NDArray[np.uint8],
    scene: Scene,
    *,
    fps: float = FRAMES_PER_SECOND,
    level: int = 0,
    may_have_left: bool = False,
) -> Grade:
    """Grade a video against a scene.

    video: uint8 [F, H, W, 3], square, at least 5 frames of at least 16 pixels. fps: its frames per second.
    level: of the world (see `render`): 1 allows random turns, 2 expects textures, 3 allows that of two
    sprites one comes in late or goes away. may_have_left: the video is a later part of one, in which, at
    level 3, one of two sprites may never be seen; the same holds, without a relation, for a video too short
    to show one come in. The other sprite then answers alone.

    Raises:
        ValueError: the video or the level is not of this form.

    Chance: renderings of random scenes, graded against other random scenes of as many sprites, get about
    0.2 in object_class, 0.13 in color, 0.1 in scene, 0.1 in temporal_style, 0.3 to 0.5 in
    spatial_relationship, 0.9 in dynamic_degree, and 1 in the dimensions that do not ask what the caption
    says. As these weigh four fifths, that is a total of 0.85 with a semantic score of 0.3: read the two apart.
    """
    _check(video, level, fps)
    found = find(video, len(scene.sprites) + 1, level=level)
    textured, passes = level >= TEXTURED_LEVEL, level >= PASSING_LEVEL and len(scene.sprites) == 2
    paths = [_path(found, sprite, fps, level, passes) for sprite in found.sprites]
    chosen = _assigned(scene, found, paths, textured)
    wanted = zip(scene.sprites, chosen, strict=True)
    judged = [_judged(one, found, paths, index, passes) for one, index in wanted]
    too_short = scene.relation is None and len(video) / fps < LATEST_ENTRANCE
    if passes and (may_have_left or too_short):
        judged = [each for each in judged if each.found is not None] or judged
    free = measures.free_ground(found)
    surplus = [sprite for index, sprite in enumerate(found.sprites) if index not in chosen]
    values = {
        **_quality(found, judged, free, textured),
        **_semantic(found, scene, judged, surplus, textured, passes),
    }
    seen = tuple(_seen(sprite, path, textured) for sprite, path in zip(found.sprites, paths, strict=True))
    named = {name: float(np.clip(values[name], 0, 1)) for name in scores.applicable(scene)}
    return Grade(named, seen, _ground_name(found))


def captioned_paths(video: NDArray[np.uint8], scene: Scene, *, level: int = 0) -> list[NDArray[np.float64] | None]:
    """Return the path [F, 2] of each captioned sprite, in frame sizes and without leaps; None if not found.

    Takes and raises what `grade` does.
    """
    _check(video, level, FRAMES_PER_SECOND)
    found = find(video, len(scene.sprites) + 1, level=level)
    passes = level >= PASSING_LEVEL and len(scene.sprites) == 2
    paths = [_path(found, sprite, FRAMES_PER_SECOND, level, passes) for sprite in found.sprites]
    chosen = _assigned(scene, found, paths, level >= TEXTURED_LEVEL)
    return [None if index is None else paths[index].points for index in chosen]


def _check(video: NDArray[np.uint8], level: int, fps: float) -> None:
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3:
        raise ValueError(f"video: must be uint8 [F, H, W, 3], got {video.dtype} {video.shape}")
    frames, height, width = video.shape[:3]
    if frames < SHORTEST or height != width or height < 16 or height % 2:
        raise ValueError(
            f"video: needs at least {SHORTEST} square frames of an even side from 16 pixels on, got {video.shape}"
        )
    if level not in (0, 1, 2, 3):
        raise ValueError(f"level must be one of (0, 1, 2, 3), got {level}")
    if fps <= 0:
        raise ValueError(f"fps must be positive, got {fps}")


# --- who is who ---------------------------------------------------------------------------------------


def _path(found: Findings, sprite: Found, fps: float, level: int, passes: bool) -> Path:
    size = found.frames.shape[1]
    points = detect.unwrapped(sprite.positions, size).astype(np.float64) / size
    known = sprite.judged & (sprite.presence > 0.5)
    return Path(points, known, fps, sprite.radius, level >= TURNING_LEVEL, passes)


def _assigned(scene: Scene, found: Findings, paths: list[Path], textured: bool) -> tuple[int | None, ...]:
    """For each captioned sprite the index of the found one (None: nothing is left), the best fit over all."""
    wanted = scene.sprites
    merit = np.zeros((len(wanted), len(found.sprites)))
    for row, one in enumerate(wanted):
        for column, (sprite, path) in enumerate(zip(found.sprites, paths, strict=True)):
            known = path.known
            if known.any():
                shape = sprite.shapes[known, SHAPES.index(one.shape)].mean()
                color = _color_odds(sprite, textured)[known, list(COLORS).index(one.color)].mean()
                merit[row, column] = 0.01 + known.mean() * (shape + color + 0.5 * agreement.agreement(path, one) + 0.2)
    places = [*range(len(found.sprites)), *[None] * len(wanted)]
    ways = permutations(places, len(wanted))
    return max(ways, key=lambda way: sum(merit[row, at] for row, at in enumerate(way) if at is not None))


def _judged(one: Sprite, found: Findings, paths: list[Path], index: int | None, passes: bool) -> _Judged:
    frames = len(found.frames)
    if index is None:
        return _Judged(one, None, np.ones(frames, np.bool_), np.zeros(frames, np.bool_), None)
    sprite, path = found.sprites[index], paths[index]
    counted = path.known if passes else sprite.judged
    return _Judged(one, sprite, counted, path.known, path)


# --- quality ------------------------------------------------------------------------------------------


def _quality(found: Findings, judged: list[_Judged], free: Array, textured: bool) -> dict[str, float]:
    return {
        "subject_consistency": _mean([_consistency(found, each) for each in judged]),
        "background_consistency": measures.background_consistency(found, free),
        "temporal_flickering": measures.temporal_flickering(found, free),
        "motion_smoothness": _mean([agreement.smoothness(e.path) if e.path else 0.0 for e in judged]),
        "dynamic_degree": _mean([_dynamics(each) for each in judged]),
        "imaging_quality": measures.imaging_quality(
            found, free, tuple(each.found for each in judged), textured=textured
        ),
    }


def _consistency(found: Findings, each: _Judged) -> float:
    return 0.0 if each.found is None else measures.subject_consistency(found, each.found, each.counted)


def _dynamics(each: _Judged) -> float:
    if each.path is None or not each.known.any():
        return 0.0
    moved = agreement.movement(each.path)
    return 1 - moved if each.wanted.motion == "still" else moved


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# --- semantics ----------------------------------------------------------------------------------------


def _semantic(
    found: Findings,
    scene: Scene,
    judged: list[_Judged],
    surplus: list[Found],
    textured: bool,
    passes: bool,
) -> dict[str, float]:
    extra = sum(float((sprite.presence * sprite.judged).mean()) for sprite in surplus)
    classes = [_framewise(each, _class_odds(each)) for each in judged]
    colors = [_framewise(each, _wanted_color(each, textured)) for each in judged]
    motions = [agreement.agreement(e.path, e.wanted) if e.path else 0.0 for e in judged]
    return {
        "object_class": sum(classes) / (len(classes) + extra),
        "color": _mean(colors),
        "multiple_objects": _together(judged, passes),
        "spatial_relationship": _relation(found, scene, judged),
        "scene": _ground_odds(found).get((scene.ground, scene.gradient), 0.0),
        "temporal_style": _mean(motions),
    }


def _framewise(each: _Judged, odds: Array) -> float:
    """Mean over the counted frames of `odds` [F], times how much of the sprite is there."""
    if each.found is None or not each.counted.any():
        return 0.0
    return float((odds * each.found.presence)[each.counted].mean())


def _class_odds(each: _Judged) -> Array:
    """Probability of the captioned shape [F]; a wrong size costs half of it."""
    if each.found is None:
        return np.zeros(len(each.counted), np.float32)
    shape = each.found.shapes[:, SHAPES.index(each.wanted.shape)]
    sizes = each.found.sizes / np.maximum(each.found.sizes.sum(axis=1, keepdims=True), 1e-6)
    odds: Array = shape * (1 + sizes[:, list(SIZES).index(each.wanted.size)]) / 2
    return odds


def _wanted_color(each: _Judged, textured: bool) -> Array:
    if each.found is None:
        return np.zeros(len(each.counted), np.float32)
    return _color_odds(each.found, textured)[:, list(COLORS).index(each.wanted.color)]


def _color_odds(sprite: Found, textured: bool) -> Array:
    """Probabilities of the palette's colours [F, 8].

    A sprite is plain or, in a textured world, has a lighter or darker second colour; its two colours, in
    either order, are compared with each such pair.
    """
    palette = np.array(list(COLORS.values()), np.float32) / 255
    seconds = [palette, palette + (1 - palette) * LIGHTER, palette * DARKER] if textured else [palette]
    costs = []
    for second in seconds:
        for pair in ((palette, second), (second, palette)):
            gaps = [np.square(sprite.colors[:, k, None] - pair[k]).sum(axis=-1) for k in (0, 1)]
            costs.append(sprite.shares[:, :1] * gaps[0] + sprite.shares[:, 1:] * gaps[1])
    return _competing(np.min(costs, axis=0), COLOR_SCALE, NO_COLOR)


def _competing(costs: Array, scale: float, nothing: float) -> Array:
    """Probabilities from squared distances [..., N]; "none of these" lies at the distance `nothing`."""
    best = np.minimum(costs.min(axis=-1, keepdims=True), nothing**2)
    odds = np.exp(-(costs - best) / (2 * scale**2))
    none = np.exp(-(nothing**2 - best) / (2 * scale**2))
    shares: Array = odds / (odds.sum(axis=-1, keepdims=True) + none)
    return shares


def _ground_odds(found: Findings) -> dict[tuple[str, bool], float]:
    """Probabilities of the world's grounds by (name, gradient): distance of the colours over the height."""
    palette = detect.palette_grounds()
    shift = found.ground.offsets.mean(axis=0)
    top, bottom = found.ground.top + shift, found.ground.bottom + shift
    costs = []
    for upper, lower in palette.values():
        first, last = top - upper, bottom - lower
        costs.append(float((first @ first + first @ last + last @ last) / 3))
    odds = _competing(np.array(costs, np.float32), GROUND_SCALE, NO_GROUND)
    return dict(zip(palette, odds.tolist(), strict=True))


def _together(judged: list[_Judged], passes: bool) -> float:
    """How far all captioned sprites are there at once; one that may come or go need not be there always."""
    presences = [each.found.presence * 1.0 if each.found else np.zeros(len(each.counted)) for each in judged]
    if passes:
        return float(np.prod([min(1.0, (each.known.mean() + 1e-9) / 0.05) for each in judged]))
    hidden = [~each.found.judged if each.found else np.zeros(len(each.counted)) for each in judged]
    there = [np.maximum(presence, unseen) for presence, unseen in zip(presences, hidden, strict=True)]
    return float(np.prod(there, axis=0).mean())


def _relation(found: Findings, scene: Scene, judged: list[_Judged]) -> float:
    """1 where the sprites start apart in the captioned direction; 0 where they start the other way round."""
    if scene.relation is None or len(judged) != 2 or judged[0].found is None or judged[1].found is None:
        return 0.0
    first, second = judged[0].found, judged[1].found
    size = found.frames.shape[1]
    both = np.flatnonzero((judged[0].known & judged[1].known)[:FIRST_FRAMES])
    if not len(both):
        return 0.0
    gap = (first.positions[both[0]] - second.positions[both[0]]) / size
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[scene.relation]
    return float(np.clip(sign * gap[axis] / (0.6 * (first.radius + second.radius)), 0, 1))


# --- in words -----------------------------------------------------------------------------------------


def _seen(sprite: Found, path: Path, textured: bool) -> Seen:
    known = path.known if path.known.any() else np.ones_like(path.known)
    color = list(COLORS)[int(_color_odds(sprite, textured)[known].mean(axis=0).argmax())]
    shape = SHAPES[int(sprite.shapes[known].mean(axis=0).argmax())]
    size = list(SIZES)[sprite.look.size]
    motion, speed = _named_motion(path)
    start = path.points[np.flatnonzero(known)[0]] % 1.0
    share = float(path.known.mean())
    return Seen(shape, color, size, motion, speed, share, (float(start[0]), float(start[1])))


def _named_motion(path: Path) -> tuple[str, str]:
    """The motion that a path is most like, and the speed nearest to its own; a still one is "slow"."""
    if path.known.sum() < 4:
        return "still", "slow"
    manners = {motion: agreement.manner(path, motion) for motion in MOTIONS}
    motion = max(MOTIONS, key=lambda each: manners[each][0])
    if motion == "still":
        return motion, "slow"
    pace = max(manners[motion][1], 1e-6)
    return motion, min(SPEEDS, key=lambda each: abs(np.log(pace / SPEEDS[each])))


def _ground_name(found: Findings) -> str:
    odds = _ground_odds(found)
    name, gradient = max(odds, key=lambda key: odds[key])
    if odds[name, gradient] < 0.5:
        red, green, blue = (round(float(255 * part)) for part in found.ground.image.mean(axis=(0, 1)))
        return f"an unknown ground (mean colour {red}, {green}, {blue})"
    assert name in GROUNDS
    return f"{name} gradient" if gradient else name
