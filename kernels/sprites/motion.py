"""Where each sprite is in any frame of an endless video.

Positions are integers in units of 2**-24 of the frame, so frame n is the same number whether it is asked for
alone, in a long clip or after hours. A path answers for any frame directly; with random turns it needs the
running sums of the turns so far, which are cached.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .scene import FRAMES_PER_SECOND, SIZES, SPEEDS, TURNING_LEVEL, Scene, Sprite

UNIT = 1 << 24
SWERVE_FRAMES = 8
SHORTEST_GAP, MEAN_EXTRA_GAP, LONGEST_EXTRA_GAP = 12, 16, 36  # frames between two turns: 0.75 s to 3 s
CANDIDATE_LAYOUTS = 512
CLEARANCE = 0.02  # frame heights between the sprites of a relation, beyond the sum of their radii

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, sign


def generator(scene: Scene, seed: int, purpose: str) -> np.random.Generator:
    """A random stream of its own for one purpose in one clip. Only `.random` is drawn from it."""
    sprites = [(s.shape, s.color, s.size, s.motion, s.speed) for s in scene.sprites]
    key = f"{sprites}|{scene.ground}|{scene.gradient}|{scene.relation}|{seed}|{purpose}"
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


@dataclass(frozen=True)
class Turns:
    """Random turns of one sprite: frame numbers [K], and three uniform draws for each [K, 3]."""

    frames: Ints
    draws: Floats

    def segment(self, frames: Ints) -> Ints:
        """How many turns have begun by each frame."""
        return np.searchsorted(self.frames, frames, side="right")

    @property
    def starts(self) -> Ints:
        """First frame of every segment [K + 1]; the first segment starts at frame 0."""
        return np.concatenate([np.zeros(1, np.int64), self.frames])


@lru_cache(maxsize=64)
def _turns(key: tuple[Scene, int, int], count: int) -> Turns:
    scene, seed, index = key
    draws = generator(scene, seed, f"turns {index}").random((count, 4))
    extra = np.floor(-MEAN_EXTRA_GAP * np.log1p(-draws[:, 0])).astype(np.int64)
    gaps = SHORTEST_GAP + np.minimum(extra, LONGEST_EXTRA_GAP)
    return Turns(np.cumsum(gaps), draws[:, 1:])


@dataclass(frozen=True)
class TurnSource:
    """Turns of sprite `index` of a clip: a shifted Poisson process, fixed by the seed and never ending."""

    scene: Scene
    seed: int
    index: int

    def until(self, frame: int) -> Turns:
        """At least all turns up to `frame`. A longer list starts with the same turns."""
        count = 1 << max(4, (frame // SHORTEST_GAP + 1).bit_length())
        return _turns((self.scene, self.seed, self.index), count)


class Path(Protocol):
    """The endless way of one sprite."""

    def at(self, frames: Ints) -> Ints:
        """Centres [F, 2] (x, y) in 1/UNIT of the frame, not wrapped. Frames must not be negative."""
        ...

    def heading(self, frame: int) -> Ints:
        """Velocity [2] in 1/UNIT of the frame per frame, without a swerve."""
        ...


@dataclass(frozen=True)
class Rest:
    start: Ints

    def at(self, frames: Ints) -> Ints:
        return np.broadcast_to(self.start, (len(frames), 2))

    def heading(self, frame: int) -> Ints:
        return np.zeros(2, np.int64)


@dataclass(frozen=True)
class Glide:
    """A straight way on a torus. A turn is a short swerve to one side; then the old direction goes on.

    A sprite that moves along an axis swerves between the frame's edges only (`margin` from each).
    """

    start: Ints
    velocity: Ints
    margin: int
    turns: TurnSource | None

    def at(self, frames: Ints) -> Ints:
        ways = self.start + self.velocity * frames[:, None]
        if self.turns is None or not len(frames):
            return ways
        ways = ways + np.rint(self._swerves(frames)[:, None] * self._across()).astype(np.int64)
        for axis in (0, 1):
            if not self.velocity[axis]:
                ways[:, axis] = _fold(ways[:, axis], self.margin)[0]
        return ways

    def heading(self, frame: int) -> Ints:
        return self.velocity

    def _across(self) -> Floats:
        x, y = self.velocity.tolist()
        return np.array([-y, x]) / math.hypot(x, y)

    def _swerves(self, frames: Ints) -> Floats:
        assert self.turns is not None
        turns = self.turns.until(int(frames.max()))
        sizes = (0.10 + 0.12 * turns.draws[:, 1]) * np.where(turns.draws[:, 0] < 0.5, -1, 1)
        steps = np.concatenate([np.zeros(1, np.int64), np.rint(sizes * UNIT).astype(np.int64)])
        segment = turns.segment(frames)
        progress = np.minimum(frames - turns.starts[segment], SWERVE_FRAMES) / SWERVE_FRAMES
        eased = progress * progress * (3.0 - 2.0 * progress)
        swerves: Floats = np.cumsum(steps)[segment] - steps[segment] * (1.0 - eased)
        return swerves


@dataclass(frozen=True)
class Orbit:
    """A circle. A turn reverses the sense."""

    centre: Ints
    radius: float
    phase: float
    rate: float  # radians per frame; the sign is the first sense
    turns: TurnSource | None

    def at(self, frames: Ints) -> Ints:
        angles = self.phase + self.rate * self._elapsed(frames)[0]
        circle = np.stack([np.cos(angles), np.sin(angles)], -1)
        return self.centre + np.rint(circle * (self.radius * UNIT)).astype(np.int64)

    def heading(self, frame: int) -> Ints:
        elapsed, sense = self._elapsed(np.array([frame]))
        angle = self.phase + self.rate * int(elapsed[0])
        speed = self.radius * self.rate * int(sense[0]) * UNIT
        return np.rint(np.array([-math.sin(angle), math.cos(angle)]) * speed).astype(np.int64)

    def _elapsed(self, frames: Ints) -> tuple[Ints, Ints]:
        if self.turns is None or not len(frames):
            return frames, np.ones_like(frames)
        turns = self.turns.until(int(frames.max()))
        starts, segment = turns.starts, turns.segment(frames)
        senses = 1 - 2 * (np.arange(len(starts)) % 2)
        return _piecewise(starts, senses[:, None], segment, frames)[:, 0], senses[segment]


@dataclass(frozen=True)
class Bounce:
    """A slanted way that edges reflect. A turn mirrors one axis and changes the slant."""

    start: Ints
    velocity: Ints
    margin: int
    turns: TurnSource | None

    def at(self, frames: Ints) -> Ints:
        return self._folded(frames)[0]

    def heading(self, frame: int) -> Ints:
        frames = np.array([frame])
        velocities, segment = self._velocities(frames)[1:]
        heading: Ints = (velocities[segment] * self._folded(frames)[1])[0]
        return heading

    def _folded(self, frames: Ints) -> tuple[Ints, Ints]:
        starts, velocities, segment = self._velocities(frames)
        return _fold(self.start + _piecewise(starts, velocities, segment, frames), self.margin)

    def _velocities(self, frames: Ints) -> tuple[Ints, Ints, Ints]:
        """Starts of segments [K + 1], velocities before folding [K + 1, 2], segment of each frame [F]."""
        if self.turns is None or not len(frames):
            return np.zeros(1, np.int64), self.velocity[None], np.zeros_like(frames)
        turns = self.turns.until(int(frames.max()))
        flips = np.stack([turns.draws[:, 0] < 0.5, turns.draws[:, 0] >= 0.5], -1)
        signs = np.sign(self.velocity) * (1 - 2 * (np.cumsum(flips, axis=0) % 2))
        speed = math.hypot(*self.velocity.tolist())
        later = np.rint(signs * _slant(turns.draws[:, 1]) * speed).astype(np.int64)
        return turns.starts, np.concatenate([self.velocity[None], later]), turns.segment(frames)


def _slant(draws: Floats) -> Floats:
    """Unit vectors in the first quadrant, 30 to 60 degrees steep [..., 2]."""
    angles = np.pi / 6 + draws * np.pi / 6
    return np.stack([np.cos(angles), np.sin(angles)], -1)


def _piecewise(starts: Ints, velocities: Ints, segment: Ints, frames: Ints) -> Ints:
    """Way [F, A] covered by each frame at velocities [K + 1, A] that hold from `starts` [K + 1] on."""
    covered = np.zeros_like(velocities)
    np.cumsum(velocities[:-1] * np.diff(starts)[:, None], axis=0, out=covered[1:])
    return covered[segment] + velocities[segment] * (frames - starts[segment])[:, None]


def _fold(ways: Ints, margin: int) -> tuple[Ints, Ints]:
    """Reflect free coordinates into [margin, UNIT - margin]; and the sign of travel there, 1 or -1."""
    span = UNIT - 2 * margin
    unrolled = (ways - margin) % (2 * span)
    return margin + span - np.abs(unrolled - span), np.where(unrolled < span, 1, -1)


@dataclass(frozen=True)
class Presence:
    """Whether a sprite is there from the start to the end, comes in later, or goes away.

    `enters`: up to `frame` it comes along a straight line from outside; its path begins at `frame`.
    `leaves`: from `frame` on it goes straight on, out of the frame, and stays away.
    """

    kind: str = "stays"
    frame: int = 0

    def place(self, path: Path, frames: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Centres [F, 2] and whether they are on the torus [F] (else a part beyond an edge is cut off)."""
        if self.kind == "stays":
            return path.at(frames) % UNIT, np.ones(len(frames), np.bool_)
        clock = frames - self.frame if self.kind == "enters" else frames
        anchor = 0 if self.kind == "enters" else self.frame
        straight = clock < 0 if self.kind == "enters" else clock >= anchor
        line = path.at(np.array([anchor])) % UNIT + path.heading(anchor) * (clock - anchor)[:, None]
        normal = path.at(np.where(straight, anchor, clock)) % UNIT
        return np.where(straight[:, None], line, normal), ~straight


@dataclass(frozen=True)
class Plan:
    """Everything that the seed decides about the motion in a clip."""

    paths: tuple[Path, ...]
    presences: tuple[Presence, ...]
    orders: tuple[int, ...]


@lru_cache(maxsize=512)
def plan(scene: Scene, seed: int, level: int) -> Plan:
    """Choose starts, directions, turns and comings and goings of a clip.

    At level 0 two sprites start apart. From level 1 on their ways meet early where a start allows it.
    """
    sprites = scene.sprites
    draws = generator(scene, seed, "layout").random((CANDIDATE_LAYOUTS, len(sprites), 6))
    chosen = _choose_layout(scene, draws, meet=level >= 1)
    sources = [TurnSource(scene, seed, i) if level >= TURNING_LEVEL else None for i in range(len(sprites))]
    paths = tuple(_path(s, d, t) for s, d, t in zip(sprites, draws[chosen], sources, strict=True))
    presences = [Presence()] * len(sprites)
    moving = [i for i, sprite in enumerate(sprites) if sprite.motion != "still"]
    coming, which, when, front = generator(scene, seed, "presence").random(4).tolist()
    if level >= 3 and len(sprites) == 2 and moving:
        index = moving[int(which * len(moving))]
        enters = coming < 0.5 and scene.relation is None
        radius = SIZES[sprites[index].size]
        presences[index] = (_entrance if enters else _exit)(paths[index], radius, when)
    orders = tuple(range(len(sprites)))
    return Plan(paths, tuple(presences), orders if front < 0.5 else orders[::-1])


def _choose_layout(scene: Scene, draws: Floats, *, meet: bool) -> int:
    if len(scene.sprites) == 1:
        return 0
    first, second = (_starts(sprite, draws[:, i]) for i, sprite in enumerate(scene.sprites))
    reach = sum(SIZES[sprite.size] for sprite in scene.sprites)
    if scene.relation is None:
        slack = np.linalg.norm(first - second, axis=-1) - reach
    else:
        axis, sign = SIDES[scene.relation]
        slack = sign * (first - second)[:, axis] - reach - CLEARANCE
    valid = np.flatnonzero(slack > 0)
    if not len(valid):
        return int(np.argmax(slack))
    if meet:
        for index in valid[:12].tolist():
            if _closest(scene.sprites, draws[index]) < 0.7 * reach:
                return int(index)
    return int(valid[0])


def _closest(sprites: tuple[Sprite, ...], draws: Floats) -> float:
    """Least distance of the two centres on the torus in the first five seconds."""
    frames = np.arange(0, 5 * FRAMES_PER_SECOND, 4)
    first, second = (_path(sprite, d, None).at(frames) for sprite, d in zip(sprites, draws, strict=True))
    apart = (first - second + UNIT // 2) % UNIT - UNIT // 2
    return float(np.sqrt((apart.astype(np.float64) ** 2).sum(-1)).min()) / UNIT


def _orbit_radius(draws: Floats) -> Floats:
    return 0.12 + 0.06 * draws[..., 2]


def _starts(sprite: Sprite, draws: Floats) -> Floats:
    """First centres [..., 2] from draws [..., 6]: the sprite, and its whole circle, inside the frame."""
    margin = SIZES[sprite.size]
    if sprite.motion != "circling":
        return margin + (1.0 - 2.0 * margin) * draws[..., :2]
    angles = 2.0 * np.pi * draws[..., 3]
    spokes: Floats = _orbit_radius(draws)[..., None] * np.stack([np.cos(angles), np.sin(angles)], -1)
    return _orbit_centre(margin, draws) + spokes


def _orbit_centre(margin: float, draws: Floats) -> Floats:
    edge: Floats = margin + _orbit_radius(draws)[..., None]
    return edge + (1.0 - 2.0 * edge) * draws[..., :2]


def _path(sprite: Sprite, draws: Floats, turns: TurnSource | None) -> Path:
    start = _fixed(_starts(sprite, draws))
    margin = round(SIZES[sprite.size] * UNIT)
    speed = SPEEDS[sprite.speed] / FRAMES_PER_SECOND
    signs = np.where(draws[4:] < 0.5, -1.0, 1.0)
    if sprite.motion == "still":
        return Rest(start)
    if sprite.motion == "circling":
        radius = float(_orbit_radius(draws))
        centre = _fixed(_orbit_centre(SIZES[sprite.size], draws))
        return Orbit(centre, radius, 2.0 * math.pi * float(draws[3]), float(signs[0]) * speed / radius, turns)
    if sprite.motion == "bouncing":
        return Bounce(start, _fixed(signs * _slant(draws[2]) * speed), margin, turns)
    if sprite.motion == "diagonal":
        return Glide(start, _fixed(signs * speed * math.sqrt(0.5)), margin, turns)
    return Glide(start, _fixed(np.array(DIRECTIONS[sprite.motion]) * speed), margin, turns)


def _fixed(values: Floats) -> Ints:
    return np.rint(values * UNIT).astype(np.int64)


def _frames_to_edge(centre: Ints, velocity: Ints, radius: float) -> int:
    """Frames until a sprite that goes straight on is wholly outside."""
    margin = math.ceil(radius * UNIT)
    times: list[int] = []
    for place, speed in zip(centre.tolist(), velocity.tolist(), strict=True):
        way = (UNIT - place if speed > 0 else place) + margin
        times += [-(-way // abs(speed))] if speed else []
    return min(times)


def _entrance(path: Path, radius: float, when: float) -> Presence:
    """First seen between 1 s and 3 s."""
    shown = round((1.0 + 2.0 * when) * FRAMES_PER_SECOND)
    start = path.at(np.zeros(1, np.int64))[0] % UNIT
    return Presence("enters", shown + _frames_to_edge(start, -path.heading(0), radius))


def _exit(path: Path, radius: float, when: float) -> Presence:
    """Sets out between 1 s and 3 s, at the first moment when no edge cuts the sprite in two."""
    first = round((1.0 + 2.0 * when) * FRAMES_PER_SECOND)
    frames = np.arange(first, first + 40 * FRAMES_PER_SECOND)
    depth = 0.5 - np.abs(path.at(frames) % UNIT / UNIT - 0.5).max(-1)
    inside = np.flatnonzero(depth > radius - 1e-6)
    return Presence("leaves", int(frames[inside[0] if len(inside) else np.argmax(depth)]))
