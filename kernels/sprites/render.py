"""From a scene and a seed to the frames of an endless video.

Levels add uncertainty and detail, each on top of the lower ones:

- 0: plain sprites on a plain or graded ground, straight, circling or bouncing motion for ever;
- 1: a moving sprite turns at random moments: a swerve, a reversed circle, a new bouncing angle; two sprites pass in
  front of each other;
- 2: textured sprites and faintly textured grounds;
- 3: of two sprites, a moving one enters or leaves at a random moment.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .motion import UNIT, generator, plan
from .scene import COLORS, GROUNDS, SIZES, TEXTURED_LEVEL, Scene

LEVELS = (0, 1, 2, 3)
FRAMES_PER_BATCH = 32
GRADIENT_ENDS: dict[str, tuple[int, int, int]] = {  # the colour at the bottom of a graded ground
    "black": (72, 72, 78),
    "white": (172, 174, 180),
    "gray": (52, 54, 58),
    "navy": (70, 80, 128),
    "brown": (36, 22, 12),
}
TEXTURES = ("stripes", "dots", "checker")

Frames = NDArray[np.uint8]
Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Track:
    """What is where, frame by frame; the truth behind a clip.

    positions [F, S, 2] float32: centres (x, y) in units of the frame's width and height, y downwards; in
        [0, 1) where `wraps` holds, else possibly outside of the frame.
    radii [S] float32: half of a sprite's bounding box, in units of the frame's height.
    visible [F, S] bool: some part of the sprite's bounding box is in the frame (it may still be covered by
        the other sprite).
    wraps [F, S] bool: what crosses an edge shows on the other side (a torus); otherwise it is cut off.
    orders: indices of the sprites from back to front.
    """

    positions: NDArray[np.float32]
    radii: NDArray[np.float32]
    visible: NDArray[np.bool_]
    wraps: NDArray[np.bool_]
    orders: tuple[int, ...]


def render(scene: Scene, seed: int, frames: int, *, level: int = 0, size: int = 64, start: int = 0) -> Frames:
    """Frames `start` … `start + frames - 1` of the endless video of a scene, uint8 [F, size, size, 3].

    The same (scene, seed, level, size) gives the same pixels in a frame whatever `start` and `frames` are.
    Raises ValueError on a level, size, seed or frame number that does not exist.
    """
    track = simulate(scene, seed, frames, level=level, start=start)
    return draw(scene, track, size, level=level, seed=seed)


def simulate(scene: Scene, seed: int, frames: int, *, level: int = 0, start: int = 0) -> Track:
    """Where the sprites of `render` with the same arguments are."""
    _check_level(level)
    if start < 0 or frames < 0:
        raise ValueError(f"start and frames must not be negative, got {start} and {frames}")
    clip = plan(scene, seed, level)
    numbers = np.arange(start, start + frames, dtype=np.int64)
    placed = [presence.place(path, numbers) for path, presence in zip(clip.paths, clip.presences, strict=True)]
    positions = np.stack([(centres / UNIT).astype(np.float32) for centres, _ in placed], axis=1)
    wraps = np.stack([on_torus for _, on_torus in placed], axis=1)
    radii = np.array([SIZES[sprite.size] for sprite in scene.sprites], np.float32)
    inside = np.all((positions > -radii[:, None]) & (positions < 1 + radii[:, None]), axis=-1)
    return Track(positions, radii, inside, wraps, clip.orders)


def draw(scene: Scene, track: Track, size: int, *, level: int, seed: int) -> Frames:
    """Paint a track, uint8 [F, size, size, 3]. The seed chooses only the textures of level 2 and above."""
    _check_level(level)
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    backdrop = ground(scene, size, level=level, seed=seed)
    frames = np.repeat(backdrop[None], len(track.positions), axis=0)
    for index in track.orders:
        paint = _paint(scene, index, level, seed)
        shown = np.flatnonzero(track.visible[:, index])
        for first in range(0, len(shown), FRAMES_PER_BATCH):
            _stamp(frames, shown[first : first + FRAMES_PER_BATCH], track, index, paint)
    return frames


def ground(scene: Scene, size: int, *, level: int, seed: int) -> Frames:
    """The empty ground, uint8 [size, size, 3]."""
    top = np.array(GROUNDS[scene.ground], np.float32)
    bottom = np.array(GRADIENT_ENDS[scene.ground] if scene.gradient else GROUNDS[scene.ground], np.float32)
    share = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None, None]
    colors = top + (bottom - top) * share
    if level >= TEXTURED_LEVEL:
        colors = colors + _cloth(scene, size, seed)[:, :, None]
    return _to_bytes(np.broadcast_to(colors, (size, size, 3)))


def _cloth(scene: Scene, size: int, seed: int) -> Array:
    """A faint brightness pattern [size, size]: random values on a coarse lattice, interpolated."""
    lattice = generator(scene, seed, "ground").random((10, 10)).astype(np.float32) * 2 - 1
    at = np.arange(size, dtype=np.float32) * (9.0 / size)
    low = at.astype(np.int64)
    share = at - low.astype(np.float32)
    rows = lattice[low] + (lattice[low + 1] - lattice[low]) * share[:, None]
    return 9.0 * (rows[:, low] + (rows[:, low + 1] - rows[:, low]) * share)


def _check_level(level: int) -> None:
    if level not in LEVELS:
        raise ValueError(f"level must be one of {LEVELS}, got {level}")


def _to_bytes(colors: Array) -> Frames:
    return np.clip(np.rint(colors), 0, 255).astype(np.uint8)


# --- sprites: shape, colour and texture ---------------------------------------------------------------


@dataclass(frozen=True)
class _Paint:
    """How one sprite looks: distances and texture are functions of its own coordinates, 1 = its radius."""

    shape: str
    color: Array  # [3]
    shade: Array  # [3]; the second colour of the texture
    texture: str | None
    angle: float
    offset: float


def _paint(scene: Scene, index: int, level: int, seed: int) -> _Paint:
    sprite = scene.sprites[index]
    color = np.array(COLORS[sprite.color], np.float32)
    if level < TEXTURED_LEVEL:
        return _Paint(sprite.shape, color, color, None, 0.0, 0.0)
    kind, tone, turn, offset = generator(scene, seed, f"texture {index}").random(4).tolist()
    lighter = color.mean() < 150 and (tone < 0.5 or sum(GROUNDS[scene.ground]) < 300)
    shade = color + (255 - color) * 0.45 if lighter else color * 0.62
    return _Paint(sprite.shape, color, shade, TEXTURES[int(kind * 3)], math.pi * turn, offset)


def _stamp(frames: Frames, shown: NDArray[np.int64], track: Track, index: int, paint: _Paint) -> None:
    """Blend one sprite into some of the frames. Works on the patch around the sprite only."""
    size = frames.shape[1]
    radius = float(track.radii[index]) * size
    patch = min(int(2 * radius) + 4, size)
    centres = track.positions[shown, index] * size
    first = np.floor(centres - patch / 2).astype(np.int64) + 1
    pixels = first[:, :, None] + np.arange(patch)  # [F, 2, P]
    local = (pixels.astype(np.float32) + 0.5 - centres[:, :, None]) / radius
    x, y = local[:, 0, None, :], local[:, 1, :, None]
    cover = np.clip(0.5 - distance(paint.shape, x, y) * radius, 0, 1)
    kept = (pixels >= 0) & (pixels < size) | track.wraps[shown, index, None, None]
    cover = cover * (kept[:, 0, None, :] & kept[:, 1, :, None])
    columns, rows = pixels[:, 0, None, :] % size, pixels[:, 1, :, None] % size
    flat = frames.reshape(-1, 3)
    where = (shown[:, None, None] * size + rows) * size + columns
    under = flat[where].astype(np.float32)
    flat[where] = _to_bytes(under + (_colors(paint, x, y, radius) - under) * cover[..., None])


def distance(shape: str, x: Array, y: Array) -> Array:
    """Signed distance to the edge of a shape of radius 1, negative inside; y points down.

    Exact on straight edges and inside; outside a corner it is the distance to the nearer edge's line, which
    keeps corners sharp when half a pixel of it is used for anti-aliasing.
    """
    wide, high = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.sqrt(x * x + y * y) - 0.94
    if shape == "square":
        return np.maximum(wide, high) - 0.82
    if shape == "diamond":
        return (wide + high - 1.0) * math.sqrt(0.5)
    if shape == "cross":
        cross: Array = np.maximum(np.maximum(wide, high) - 0.94, np.minimum(wide, high) - 0.3)
        return cross
    if shape == "triangle":
        triangle: Array = np.maximum(y - 0.8, _beyond_line(wide, y, (0.0, -0.95), (0.98, 0.8)))
        return triangle
    assert shape == "star", shape
    return _star(wide, y)


def _beyond_line(x: Array, y: Array, start: tuple[float, float], end: tuple[float, float]) -> Array:
    """Signed distance to the line from start to end; negative on the side of the origin (y down)."""
    run, rise = end[0] - start[0], end[1] - start[1]
    level = rise * start[0] - run * start[1]
    scale = math.copysign(math.hypot(run, rise), level)
    return (x * rise - y * run - level) / scale


def _star(wide: Array, y: Array) -> Array:
    """Five points. Mirroring brings every point into the wedge between one tip and the notch beside it."""
    y = y - 0.09  # the middle of the bounding box, not of the pentagon
    tip, notch = 1.0, 0.47
    for degrees in (108.0, 36.0):  # mirror lines through the centre, at this angle from the upper tip
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        beyond = 2.0 * np.maximum(wide * cosine + y * sine, 0)
        wide, y = np.abs(wide - beyond * cosine), y - beyond * sine
    wedge = math.radians(36.0)
    return _beyond_line(wide, y, (0.0, -tip), (notch * math.sin(wedge), -notch * math.cos(wedge)))


def _colors(paint: _Paint, x: Array, y: Array, radius: float) -> Array:
    """Colour of the sprite at its own coordinates: [3], or [F, P, P, 3] with a texture."""
    if paint.texture is None:
        return paint.color
    cosine, sine = math.cos(paint.angle), math.sin(paint.angle)
    along = x * cosine + y * sine + paint.offset
    across = y * cosine - x * sine + paint.offset
    period = 0.7
    if paint.texture == "stripes":
        pattern = _wave(along, period)
    elif paint.texture == "checker":
        one, other = _wave(along, 2 * period), _wave(across, 2 * period)
        pattern = np.minimum(np.maximum(one, other), -np.minimum(one, other))
    else:
        pattern = 0.25 * period - np.hypot(_centred(along, period), _centred(across, period))
    share: Array = np.clip(0.5 + pattern * radius, 0, 1)[..., None]
    return paint.color + (paint.shade - paint.color) * share


def _centred(way: Array, period: float) -> Array:
    """Signed way from the middle of the period that a point is in."""
    centred: Array = way - period * (np.floor(way / period) + 0.5)
    return centred


def _wave(way: Array, period: float) -> Array:
    """Signed distance to the nearest stripe edge: positive in one half of every period."""
    edge: Array = period / 4 - np.abs(_centred(way, period))
    return edge
