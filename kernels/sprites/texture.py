"""Telling the texture of a sprite, so that its rendering can be drawn again.

A texture is stripes, dots or a checker in two colours, at an angle and an offset, fixed to the sprite. Of the
sprite's mean appearance in its own coordinates, the best pattern of a bank is taken and then refined.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .render import TEXTURES

Array = NDArray[np.float32]

PERIOD = 0.7  # of stripes and dots, in radii of the sprite
ANGLES, OFFSETS = 45, 20  # grid of the bank
REFINEMENTS, NARROWER = 5, 0.5


@dataclass(frozen=True)
class Texture:
    """kind: index into TEXTURES; angle in radians; offset in radii of the sprite; x, y: its middle, in pixels
    from the sprite's, which takes up what the sprite's place is wrong by."""

    kind: int
    angle: float
    offset: float
    x: float = 0.0
    y: float = 0.0


def share(kind: int, angle: Array | float, offset: Array | float, x: Array, y: Array, radius: float) -> Array:
    """Return how much of the second colour shows, in [0, 1], at the sprite's own coordinates (1 = radius).

    All arguments but `kind` and `radius` (pixels, for anti-aliasing) may be arrays that broadcast.
    """
    cosine, sine = np.cos(angle), np.sin(angle)
    along = np.asarray(x * cosine + y * sine + offset, np.float32)
    across = np.asarray(y * cosine - x * sine + offset, np.float32)
    if TEXTURES[kind] == "stripes":
        pattern = _stripe(along, PERIOD)
    elif TEXTURES[kind] == "checker":
        first, second = _stripe(along, 2 * PERIOD), _stripe(across, 2 * PERIOD)
        pattern = np.minimum(np.maximum(first, second), -np.minimum(first, second))
    else:
        away = np.hypot(_from_middle(along, PERIOD), _from_middle(across, PERIOD))
        pattern = np.asarray(PERIOD / 4 - away, np.float32)
    shown: Array = np.clip(pattern * radius + 0.5, 0, 1).astype(np.float32)
    return shown


def _from_middle(way: Array, period: float) -> Array:
    return np.asarray((way % period) - period / 2, np.float32)


def _stripe(way: Array, period: float) -> Array:
    return np.asarray(period / 4 - np.abs(_from_middle(way, period)), np.float32)


def grid(window: int, radius: float) -> tuple[Array, Array]:
    """Return the sprite's own coordinates x [1, P] and y [P, 1] of a window centred on it."""
    steps = ((np.arange(window) - window // 2) / radius).astype(np.float32)
    return steps[None, :], steps[:, None]


@cache
def _bank(window: int, radius: float) -> tuple[Array, tuple[Texture, ...]]:
    """All coarse patterns [N, window * window], and what they are."""
    x, y = grid(window, radius)
    patterns, textures = [], []
    for kind in range(len(TEXTURES)):
        span = 2 * PERIOD if TEXTURES[kind] == "checker" else PERIOD
        for angle in np.arange(ANGLES) * np.pi / ANGLES:
            for offset in np.arange(OFFSETS) * span / OFFSETS:
                patterns.append(share(kind, angle, offset, x, y, radius).reshape(-1))
                textures.append(Texture(kind, float(angle), float(offset)))
    return np.stack(patterns), tuple(textures)


def fit_texture(appearance: Array, mask: Array, radius: float) -> Texture:
    """Return the texture that best explains a mean appearance [P, P, 3] under its mask [P, P].

    Least squares with two free colours: the pattern with the greatest share of the weighted variance.
    """
    window = len(mask)
    weight, colors = mask.reshape(-1), appearance.reshape(-1, 3)
    patterns, textures = _bank(window, radius)
    scores = _explained(patterns, colors, weight).reshape(len(TEXTURES), -1)
    firsts = np.arange(len(TEXTURES)) * scores.shape[1]
    candidates = [textures[int(at)] for at in firsts + scores.argmax(axis=1)]
    refined = [_refined(each, colors, weight, window, radius) for each in candidates]
    return max(refined, key=lambda each: each[1])[0]


def _refined(texture: Texture, colors: Array, weight: Array, window: int, radius: float) -> tuple[Texture, float]:
    """Refine angle and offset, and then the middle, on ever narrower grids; also what is explained then."""
    x, y = grid(window, radius)
    turn, slide = (part.reshape(-1, 1, 1) for part in np.meshgrid(*[np.linspace(-1, 1, 5)] * 2))
    spans = np.array([np.pi / ANGLES, PERIOD / OFFSETS, 0.3])
    explained = 0.0
    for _ in range(REFINEMENTS):
        angles, offsets = texture.angle + turn * spans[0], texture.offset + slide * spans[1]
        u, v = x - texture.x / radius, y - texture.y / radius
        near = share(texture.kind, angles, offsets, u, v, radius).reshape(len(turn), -1)
        place = int(_explained(near, colors, weight).argmax())
        texture = replace(texture, angle=float(angles[place, 0, 0]), offset=float(offsets[place, 0, 0]))
        right, down = texture.x + turn * spans[2], texture.y + slide * spans[2]
        u, v = x - right / radius, y - down / radius
        near = share(texture.kind, texture.angle, texture.offset, u, v, radius).reshape(len(turn), -1)
        results = _explained(near, colors, weight)
        place = int(results.argmax())
        texture = replace(texture, x=float(right[place, 0, 0]), y=float(down[place, 0, 0]))
        explained, spans = float(results[place]), spans * NARROWER
    return texture, explained


def _explained(patterns: Array, colors: Array, weight: Array) -> Array:
    """Variance [N] of colours [P, 3] that patterns [N, P] explain, under weights [P]."""
    total = max(float(weight.sum()), 1e-6)
    centred = (colors - weight @ colors / total) * weight[:, None]
    products = patterns @ centred
    mean = patterns @ weight / total
    variance = np.square(patterns) @ weight - total * np.square(mean)
    explained: Array = np.square(products).sum(axis=1) / np.maximum(variance, 0.02 * total)
    return explained
