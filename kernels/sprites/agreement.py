"""How well a path agrees with a motion in words; whether it moves at all; how smooth it is.

A path is [F, 2] in frame sizes (x, y; y downwards), without leaps at edges, with a mask [F] of the frames in
which it is known. Speeds are in frame sizes per second. Every answer is in [0, 1], 1 within what the world
itself does, and falls smoothly.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .scene import SPEEDS, Sprite

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

CHORD = 4  # frames over which a velocity is measured
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
ANGLE_FREE, ANGLE_SCALE = np.radians(10.0), np.radians(15.0)
SLANT_FREE, SLANT_SCALE = np.radians(22.0), np.radians(10.0)  # either way from 45 degrees
CIRCLES = (0.10, 0.20)  # radii that the world's circles have, with some room
TURNING_SHARE = 0.3  # of the chords that random turns may spoil
STRAIGHT = 0.012  # frame sizes that a straight piece may stray
JITTER_FREE, JITTER_SCALE = 0.0025, 0.012  # frame sizes
BROKEN_WEIGHT = 3.0  # how many frames one broken step spoils, as long as there are few


@dataclass(frozen=True)
class Path:
    """A path and what is known of it.

    points [F, 2], the first in the frame's own coordinates; known [F]; fps; radius of the sprite in frame
    sizes; turns: it may turn at random; passes: it may come in or go away on a straight line.
    """

    points: Floats
    known: Bools
    fps: float
    radius: float
    turns: bool
    passes: bool


def soft(excess: Floats, scale: float) -> Floats:
    """Return exp(-(max(excess, 0) / scale)^2): 1 up to 0, 0.37 at `scale`."""
    fallen: Floats = np.exp(-np.square(np.maximum(excess, 0) / scale))
    return fallen


def chords(points: Floats, known: Bools, fps: float, length: int = CHORD) -> Floats:
    """Return the velocities [N, 2] over `length` frames between frames that are both known."""
    length = max(1, min(length, len(points) // 3))
    both = known[length:] & known[:-length]
    velocities: Floats = ((points[length:] - points[:-length]) * (fps / length))[both]
    return velocities


# --- moving at all, and smoothly ----------------------------------------------------------------------


def movement(path: Path) -> float:
    """Return the share of time in which the path moves: 0 below a quarter of the slow speed, 1 from 0.6.

    A tenth of the time is free: circles that are reversed stand still as they turn.
    """
    speeds = np.linalg.norm(chords(path.points, path.known, path.fps), axis=-1)
    if not len(speeds):
        return 0.0
    moving = np.clip((speeds / SPEEDS["slow"] - 0.25) / 0.35, 0, 1)
    return float(min(1.0, moving.mean() / 0.9))


def smoothness(path: Path) -> float:
    """Return 1 for a path without jitter and without dropped or repeated frames.

    Jitter: how far a point lies from where the points before it, after it, or around it say that it should
    be, whichever is nearest; so a clean turn is no jitter. A broken step is much longer or shorter than the
    typical step around it. Both in frame sizes.
    """
    points, known = path.points, path.known
    if known.sum() < 5:
        return 0.0
    before = _shifted_error(points, known, (-3, -2, -1), (1.0, -3.0, 3.0))
    after = _shifted_error(points, known, (1, 2, 3), (3.0, -3.0, 1.0))
    around = _shifted_error(points, known, (-2, -1, 1, 2), (-1 / 6, 4 / 6, 4 / 6, -1 / 6))
    jitter = np.fmin(np.fmin(before, after), around)
    jitter = np.maximum(jitter[np.isfinite(jitter)] - JITTER_FREE, 0) / JITTER_SCALE
    calm = (1 / (1 + np.square(jitter))).mean() if len(jitter) else 1.0
    return float(calm * np.exp(-BROKEN_WEIGHT * _broken_steps(points, known)))


def _shifted_error(points: Floats, known: Bools, shifts: tuple[int, ...], weights: tuple[float, ...]) -> Floats:
    """Distance [F] of each point from a weighted sum of others at `shifts`; infinite where one is unknown."""
    frames = np.arange(len(points))
    predicted, valid = np.zeros_like(points), known.copy()
    for shift, weight in zip(shifts, weights, strict=True):
        at = frames + shift
        inside = (at >= 0) & (at < len(points))
        at = np.clip(at, 0, len(points) - 1)
        valid &= inside & known[at]
        predicted += weight * points[at]
    errors: Floats = np.where(valid, np.linalg.norm(points - predicted, axis=-1), np.inf)
    return errors


def _broken_steps(points: Floats, known: Bools) -> float:
    """Share of the steps that are far from the median of the seven steps around them."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=-1)
    both = known[1:] & known[:-1]
    if both.sum() < 7:
        return 0.0
    padded = np.pad(np.where(both, steps, np.nan), 3, constant_values=np.nan)
    around = np.lib.stride_tricks.sliding_window_view(padded, 7)[both]
    typical = np.maximum(np.nanmedian(around, axis=1), 1e-6)
    moving = np.clip(typical / (0.25 * SPEEDS["slow"] / 16) - 1, 0, 1)
    ratio = steps[both] / typical
    excess = np.maximum(np.maximum(ratio - 1.5, 0.4 - ratio), 0) / 0.4
    return float((moving * (1 - soft(excess, 0.6))).mean())


# --- direction and speed ------------------------------------------------------------------------------


def agreement(path: Path, sprite: Sprite) -> float:
    """Return how well a path agrees with a sprite's motion and speed in words.

    The direction (or manner) alone is worth half; right speed doubles it. A still sprite has no speed.
    """
    if path.known.sum() < 4:
        return 0.0
    whole = _whole_agreement(path, sprite)
    if not path.passes or sprite.motion not in ("circling", "bouncing"):
        return whole
    return max(whole, *_passing(path, sprite), 0.0)


def _whole_agreement(path: Path, sprite: Sprite) -> float:
    how, speed = manner(path, sprite.motion)
    if sprite.motion == "still":
        return how
    return how * (1 + speed_agreement(speed, SPEEDS[sprite.speed])) / 2


def manner(path: Path, motion: str) -> tuple[float, float]:
    """Return how well a path is of one of the world's motions, whatever its speed, and that speed."""
    if motion == "still":
        return 1 - movement(path), 0.0
    if motion == "circling":
        return circling(path)
    if motion == "bouncing":
        return bouncing(path)
    if motion == "diagonal":
        ways = [np.array([x, y]) * np.sqrt(0.5) for x in (-1, 1) for y in (-1, 1)]
        return max(gliding(path, way) for way in ways)
    return gliding(path, np.array(DIRECTIONS[motion]))


def speed_agreement(speed: float, wanted: float) -> float:
    """Return 1 within about a tenth of the wanted speed, 0.1 at twice or half of it."""
    gap = abs(np.log(max(speed, 1e-6) / wanted))
    return float(soft(np.array(gap - 0.1), 0.35))


def gliding(path: Path, way: Floats) -> tuple[float, float]:
    """Return how well a path goes along the unit vector `way`, and its speed along it.

    A path that may swerve keeps its speed along the way in every frame, and its direction between swerves;
    so the steadiness along the way is asked of all chords, and the direction of the best of them.
    """
    velocities = chords(path.points, path.known, path.fps, 2 if path.turns else CHORD)
    along = velocities @ way
    across = velocities @ np.array([-way[1], way[0]])
    angles = np.abs(np.arctan2(across, along))
    straight = soft(angles - ANGLE_FREE, ANGLE_SCALE)
    crawl = np.clip(np.hypot(along, across) / (0.25 * SPEEDS["slow"]), 0, 1)
    speed = float(np.median(along))
    if not path.turns:
        return float((straight * crawl).mean()), speed
    steady = soft(np.abs(along / max(speed, 1e-6) - 1) - 0.25, 0.4) * (speed > 0)
    best = np.sort(straight * crawl)[-max(1, len(straight) // 5) :]
    return float(steady.mean() * best.mean()), speed


def circling(path: Path) -> tuple[float, float]:
    """Return how well a path goes round on one circle of the world's sizes, and its speed."""
    points = path.points[path.known]
    centre, radius = fit_circle(points)
    away = np.linalg.norm(path.points - centre, axis=-1)
    near = soft(np.abs(away / radius - 1) - 0.05, 0.15)[path.known].mean()
    low, high = CIRCLES
    sized = soft(np.array(max(np.log(low / radius), np.log(radius / high))), 0.25)
    velocities = np.linalg.norm(chords(path.points, path.known, path.fps), axis=-1)
    if not len(velocities):
        return 0.0, 0.0
    span = max(1, min(CHORD, len(path.points) // 3)) / path.fps
    arcs = 2 * radius * np.arcsin(np.clip(velocities * span / (2 * radius), 0, 1)) / span
    return float(near * sized), float(np.median(arcs))


def fit_circle(points: Floats) -> tuple[Floats, float]:
    """Return centre and radius of the circle through points [N, 2]: least squares, then four reweightings."""
    middle = points.mean(axis=0)
    shifted = points - middle
    basis = np.concatenate([2 * shifted, np.ones((len(points), 1))], axis=1)
    square = np.square(shifted).sum(axis=-1)
    weight = np.ones(len(points))
    centre, radius = np.zeros(2), 1.0
    for _ in range(5):
        normal = basis.T @ (basis * weight[:, None]) + 1e-12 * np.eye(3)
        solution = np.linalg.solve(normal, basis.T @ (weight * square))
        centre = solution[:2]
        radius = float(np.sqrt(max(solution[2] + centre @ centre, 1e-8)))
        error = np.linalg.norm(shifted - centre, axis=-1) - radius
        weight = 1 / (1 + np.square(error / 0.01))
    return centre + middle, radius


def bouncing(path: Path) -> tuple[float, float]:
    """Return how well a path is slanted, stays between the edges, and is reflected there; and its speed."""
    rows = np.flatnonzero(path.known)
    inner = np.arange(rows[0], rows[-1] + 1)
    margin = path.radius
    places = path.points[inner]
    outside = np.maximum(margin - places, places - (1 - margin)).max(axis=-1)
    within = soft(outside - 0.01, 0.04)[path.known[inner]].mean()
    free = np.stack([_unfolded(places[:, axis], margin) for axis in (0, 1)], -1)
    velocities = chords(free, path.known[inner], path.fps)
    speeds = np.linalg.norm(velocities, axis=-1)
    slants = np.arctan2(np.abs(velocities[:, 1]), np.abs(velocities[:, 0])) - np.pi / 4
    slanted = soft(np.abs(slants) - SLANT_FREE, SLANT_SCALE) * np.clip(speeds / (0.25 * SPEEDS["slow"]), 0, 1)
    if not len(speeds):
        return 0.0, 0.0
    share = 1 - TURNING_SHARE if path.turns else 1.0
    straight = _straightness(velocities, share)
    return float(within * straight * _best(slanted, share)), float(np.median(speeds))


def _unfolded(places: Floats, margin: float) -> Floats:
    """Undo reflections at margin and 1 - margin: of all mirror images, the one nearest to going straight on."""
    span = 1 - 2 * margin
    rest = places - margin
    free, speed = np.empty(len(places)), 0.0
    free[0] = rest[0]
    for frame in range(1, len(places)):
        expected = free[frame - 1] + speed
        images = np.array([rest[frame], -rest[frame]])
        images = images + 2 * span * np.round((expected - images) / (2 * span))
        free[frame] = images[np.abs(images - expected).argmin()]
        step = free[frame] - free[frame - 1]
        speed = step if frame == 1 else 0.5 * speed + 0.5 * step
    return free


def _straightness(velocities: Floats, share: float) -> float:
    """How little the direction changes from one chord to the next, in the best `share` of the chords."""
    angles = np.arctan2(velocities[:, 1], velocities[:, 0])
    if len(angles) <= CHORD:
        return 1.0
    turned = np.abs((angles[CHORD:] - angles[:-CHORD] + np.pi) % (2 * np.pi) - np.pi)
    return _best(soft(turned - np.radians(8.0), np.radians(10.0)), share)


def _best(values: Floats, share: float) -> float:
    count = max(1, int(np.ceil(share * len(values))))
    return float(np.sort(values)[-count:].mean())


# --- coming in and going away -------------------------------------------------------------------------


def _passing(path: Path, sprite: Sprite) -> list[float]:
    """Agreements of what is left of a path without a straight piece at its start or end.

    A circling or bouncing sprite comes in, and goes away, on a straight line. If nearly all that is seen of
    one that came in late is such a line, only the speed is left to judge.
    """
    rows = np.flatnonzero(path.known)
    lead, tail = _straight_lead(path.points[rows]), _straight_lead(path.points[rows[::-1]])
    left = []
    for first, last in ((lead, len(rows)), (0, len(rows) - tail)):
        if last - first >= max(8, 0.1 * len(path.known)):
            known = np.zeros_like(path.known)
            known[rows[first:last]] = True
            left.append(_whole_agreement(replace(path, known=known), sprite))
    if rows[0] > 0.1 * len(path.known) and lead > 0.8 * len(rows):
        speeds = np.linalg.norm(chords(path.points, path.known, path.fps), axis=-1)
        speed = float(np.median(speeds)) if len(speeds) else 0.0
        left.append((1 + speed_agreement(speed, SPEEDS[sprite.speed])) / 2 * min(1.0, speed / 0.1))
    return left


def _straight_lead(points: Floats) -> int:
    """How many points [N, 2] from the first on lie on one straight line."""
    length = min(3, len(points))
    for last in range(3, len(points)):
        way = points[last] - points[0]
        normal = np.array([-way[1], way[0]]) / max(float(np.linalg.norm(way)), 1e-6)
        if np.abs((points[: last + 1] - points[0]) @ normal).max() > STRAIGHT:
            break
        length = last + 1
    return length
