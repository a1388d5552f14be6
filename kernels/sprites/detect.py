"""Finding sprites in frames: the ground, where blobs are, and which blobs are one thing over time.

Nothing here reads a caption. All of it is soft, so that it works on frames that an autoencoder or a
diffusion model has slightly blurred: matched filters and least squares, no thresholds on pixels. Frames are
float32 in [0, 1], positions are (x, y) in pixels on a torus, a pixel's centre at its index + 0.5.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .render import GRADIENT_ENDS
from .scene import GROUNDS, SIZES

Array = NDArray[np.float32]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

GROUND_FRAMES = 12  # frames that the ground is fitted to
GROUND_STRIDE = 2  # every second pixel is enough
GROUND_SCALE = 0.03  # residual at which a pixel loses half of its weight in the fit of the ground
OFFSET_REACH = 0.1  # pixels farther than this from the ground say nothing about its change over time
DISC_SHARE = 0.85  # radius of the disc that answers best to all shapes of radius 1
LATTICE = 10  # points per side of the brightness lattice of a textured ground


@dataclass(frozen=True)
class Ground:
    """A ground that is linear in height, and its change over time.

    top, bottom [3]: colours at the upper and at the lower edge of the frame.
    image [H, W, 3]: the ground itself, with its brightness pattern where one was fitted.
    offsets [F, 3]: what the whole ground of a frame is brighter than `image`.
    noise: standard deviation of a ground pixel about it.
    """

    top: Array
    bottom: Array
    image: Array
    offsets: Array
    noise: float


@dataclass(frozen=True)
class Rough:
    """One thing, followed through the frames.

    positions [F, 2] in pixels of the frame; frames without a sighting hold a linear interpolation. seen [F]
    in [0, 1]: how sure the sighting is; 0 for none. on_torus [F]: what crosses an edge shows on the other
    side; else it is cut off, and a centre may lie outside of the frame.
    """

    positions: Array
    seen: Array
    on_torus: Bools


def to_unit(video: NDArray[np.uint8]) -> Array:
    """Return frames in [0, 1], float32 [F, H, W, 3]."""
    return np.multiply(video, np.float32(1 / 255), dtype=np.float32)


def squared(gaps: Array) -> Array:
    """Return the squared lengths [...] of colour differences [..., 3]."""
    lengths: Array = np.einsum("...c,...c->...", gaps, gaps)
    return lengths


def heights(size: int) -> Array:
    """Return the middle of every row, in frame heights, float32 [size]."""
    return ((np.arange(size) + 0.5) / size).astype(np.float32)


# --- the ground ---------------------------------------------------------------------------------------


def palette_grounds() -> dict[tuple[str, bool], tuple[Array, Array]]:
    """Return the colours at the upper and lower edge of every ground of the world, by (name, gradient)."""
    ends: dict[tuple[str, bool], tuple[Array, Array]] = {}
    for name, color in GROUNDS.items():
        top = np.array(color, np.float32) / np.float32(255)
        bottom = np.array(GRADIENT_ENDS[name], np.float32) / np.float32(255)
        ends[name, False], ends[name, True] = (top, top), (top, bottom)
    return ends


def fit_ground(frames: Array) -> Ground:
    """Fit the ground to frames [F, H, W, 3], whatever stands before it.

    Starts from each ground of the world and from the row medians; takes the start that explains most pixels,
    and refines it by reweighted least squares, so that a ground of an unknown colour is found as well.
    """
    count, size = len(frames), frames.shape[1]
    chosen = np.unique(np.linspace(0, count - 1, min(count, GROUND_FRAMES)).astype(np.int64))
    pixels = frames[chosen, ::GROUND_STRIDE, ::GROUND_STRIDE]
    share = heights(size)[::GROUND_STRIDE]
    starts = [*palette_grounds().values(), _median_line(pixels, share)]
    costs = [_robust_cost(pixels, share, top, bottom) for top, bottom in starts]
    line = starts[int(np.argmin(costs))]
    for _ in range(6):
        line = _reweighted(pixels, share, *line)
    top, bottom = line
    image = np.broadcast_to(_line(heights(size), top, bottom), (size, frames.shape[2], 3))
    offsets = _frame_offsets(frames, image)
    near = pixels - _line(share, top, bottom) - offsets[chosen, None, None]
    noise = float(np.median(np.abs(near)) / 0.6745)
    return Ground(top, bottom, np.ascontiguousarray(image), offsets, noise)


def _line(share: Array, top: Array, bottom: Array) -> Array:
    """Colours [H, 1, 3] of a ground at heights [H]."""
    ramp: Array = (top + (bottom - top) * share[:, None])[:, None]
    return ramp


def _median_line(pixels: Array, share: Array) -> tuple[Array, Array]:
    rows = np.median(pixels, axis=(0, 2)).astype(np.float32)
    third = max(1, len(rows) // 3)
    upper, lower = np.median(rows[:third], axis=0), np.median(rows[-third:], axis=0)
    slope = (lower - upper) / (share[-third:].mean() - share[:third].mean())
    top = upper - slope * share[:third].mean()
    return top.astype(np.float32), (top + slope).astype(np.float32)


def _robust_cost(pixels: Array, share: Array, top: Array, bottom: Array) -> float:
    square = squared(pixels - _line(share, top, bottom))
    return float(np.minimum(square, np.float32(0.02)).mean())


def _reweighted(pixels: Array, share: Array, top: Array, bottom: Array) -> tuple[Array, Array]:
    """One step of least squares for the line, under weights that fall with the present residual."""
    square = squared(pixels - _line(share, top, bottom))
    weight = 1 / np.square(1 + square / np.float32(3 * GROUND_SCALE**2))
    rows = weight.sum(axis=(0, 2)).astype(np.float64)
    colors = np.einsum("fhw,fhwc->hc", weight, pixels).astype(np.float64)
    basis = np.stack([1 - share, share], -1).astype(np.float64)
    normal = basis.T @ (basis * rows[:, None]) + 1e-6 * np.eye(2)
    solution = np.linalg.solve(normal, basis.T @ colors + 1e-6 * np.stack([top, bottom]))
    return solution[0].astype(np.float32), solution[1].astype(np.float32)


def _frame_offsets(frames: Array, image: Array) -> Array:
    """How much brighter each frame's ground is than the common one [F, 3]."""
    residual = frames[:, ::3, ::3] - image[::3, ::3]
    residual = residual.reshape(len(frames), -1, 3)
    middle = np.median(residual, axis=1, keepdims=True)
    near = (np.abs(residual - middle).max(axis=-1, keepdims=True) < OFFSET_REACH).astype(np.float32)
    offsets = (residual * near).sum(axis=1) / np.maximum(near.sum(axis=1), 1)
    return np.asarray(offsets, np.float32)


def lattice_basis(size: int) -> Array:
    """Return the bilinear interpolation from lattice points to pixels of one axis, [size, LATTICE]."""
    at = np.arange(size) * ((LATTICE - 1) / size)
    low = at.astype(np.int64)
    basis = np.zeros((size, LATTICE), np.float32)
    basis[np.arange(size), low] = 1 - (at - low)
    basis[np.arange(size), low + 1] += (at - low).astype(np.float32)
    return basis


def with_pattern(ground: Ground, frames: Array, free: Array) -> Ground:
    """Return the ground with a still brightness pattern fitted to the pixels that are free of sprites.

    free [F, H, W] in [0, 1]: how surely a pixel shows the ground. The pattern is a lattice of LATTICE ×
    LATTICE values, interpolated; its values come from regularised least squares. The lattice cannot follow
    sharper detail, which remains in the residual.
    """
    seen = free.sum(axis=0)
    above = np.einsum("fhw,fhwc->hwc", free, frames) / np.maximum(seen, 1e-3)[..., None]
    shift = np.einsum("fhw,fc->hwc", free, ground.offsets) / np.maximum(seen, 1e-3)[..., None]
    target = (above - shift - ground.image).mean(axis=-1)
    weight = np.minimum(seen, 3.0)
    rows, columns = lattice_basis(frames.shape[1]), lattice_basis(frames.shape[2])
    by_rows = np.einsum("hi,hj->hij", rows, rows).reshape(len(rows), -1)
    by_columns = np.einsum("wk,wl->wkl", columns, columns).reshape(len(columns), -1)
    normal = (by_rows.T @ weight @ by_columns).reshape((LATTICE,) * 4)  # i j k l
    normal = normal.transpose(0, 2, 1, 3).reshape(LATTICE**2, LATTICE**2)
    right = (rows.T @ (weight * target) @ columns).reshape(-1)
    values = np.linalg.solve(normal + 1e-2 * np.eye(LATTICE**2), right).reshape(LATTICE, LATTICE)
    pattern = (rows @ values.astype(np.float32) @ columns.T)[..., None]
    return Ground(ground.top, ground.bottom, ground.image + pattern, ground.offsets, ground.noise)


# --- blobs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blobs:
    """The strongest blobs of every frame, K of them.

    positions [F, K, 2]; mean colours [F, K, 3]; radii [F, K] in pixels; certainty [F, K] in [0, 1]: how
    surely it is a blob at all.
    """

    positions: Array
    colors: Array
    radii: Array
    certainty: Array


def torus_gap(first: Array, second: Array, size: int) -> Array:
    """Return first - second on the torus, each coordinate in [-size / 2, size / 2)."""
    gap: Array = (first - second + size / 2) % size - size / 2
    return gap


def disc(centres: Array, radius: Array | float, size: int) -> Array:
    """Return soft discs on the torus: centres [F, 2] and radii [F] in pixels to [F, size, size]."""
    middles = (np.arange(size) + 0.5).astype(np.float32)
    wide = np.square(torus_gap(middles, centres[:, :1], size))
    high = np.square(torus_gap(middles, centres[:, 1:], size))
    away = np.sqrt(high[:, :, None] + wide[:, None, :])
    reach = np.reshape(np.asarray(radius, np.float32), (-1, 1, 1))
    cover: Array = np.clip(reach + np.float32(0.5) - away, 0, 1)
    return cover


def find_blobs(above: Array, image: Array, count: int) -> Blobs:
    """Find the `count` strongest blobs of each frame.

    Matched filtering of `above` [F, H, W, 3] (frames minus ground) at half resolution with a disc of each of
    the world's sizes; a blob that has been found is covered before the next is looked for. `image`
    [H, W, 3] is the ground.
    """
    frames, size = above.shape[0], above.shape[1]
    half = above.reshape(frames, size // 2, 2, size // 2, 2, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    kept = np.ones((frames, size // 2, size // 2), np.float32)
    found = []
    for _ in range(count):
        one = _strongest(half * kept[:, None], size)
        found.append(one)
        reach = (one[2] / 2 + 0.75).astype(np.float32)
        kept = kept * (1 - disc((one[0] / 2).astype(np.float32), reach, size // 2))
    positions, colors, radii, certainty = (np.stack(parts, axis=1) for parts in zip(*found, strict=True))
    columns, rows = positions.astype(np.int64).transpose(2, 0, 1)
    return Blobs(positions, colors + image[rows, columns], radii, certainty)


def _strongest(pixels: Array, size: int) -> tuple[Array, Array, Array, Array]:
    """Position [F, 2], colour [F, 3], radius [F] and certainty [F] of the best blob in [F, 3, h, h]."""
    small, everyone = size // 2, np.arange(len(pixels))
    spectrum = np.fft.rfft2(pixels)
    energy = np.fft.rfft2(np.square(pixels).sum(axis=1))
    best: list[tuple[Array, Array, Array, Array]] = []
    for share in SIZES.values():
        radius = share * size / 2
        mask, window = (_kernel(factor * radius, small) for factor in (DISC_SHARE, 1.35))
        match = np.fft.irfft2(spectrum * mask[1], s=(small, small))
        explained = np.square(match).sum(axis=1) / mask[2]
        peak = explained.reshape(len(pixels), -1).argmax(axis=1)
        rows, columns = peak // small, peak % small
        around = np.fft.irfft2(energy * window[1], s=(small, small))[everyone, rows, columns]
        color = match[everyone, :, rows, columns] / mask[0].sum()
        position = 2 * np.stack([columns, rows], -1).astype(np.float32) + 1
        strength = explained[everyone, rows, columns]
        best.append((position, color, strength, strength / np.maximum(around, 1e-6)))
    larger = best[1][2] > best[0][2]
    position, color, _, share_of = (
        np.where(larger.reshape((-1,) + (1,) * (b.ndim - 1)), b, a) for a, b in zip(*best, strict=True)
    )
    radii = np.where(larger, SIZES["large"], SIZES["small"]) * size
    contrast = np.linalg.norm(color, axis=-1)
    certainty = np.clip((share_of - 0.15) / 0.3, 0, 1) * np.clip((contrast - 0.04) / 0.1, 0, 1)
    return position, color, radii.astype(np.float32), certainty.astype(np.float32)


def _kernel(radius: float, size: int) -> tuple[Array, NDArray[np.complex64], float]:
    """A disc about pixel (0, 0): itself, its conjugate spectrum, and its squared norm."""
    mask = disc(np.full((1, 2), 0.5, np.float32), radius, size)[0]
    return mask, np.conj(np.fft.rfft2(mask)), float(np.square(mask).sum())


# --- tracks -------------------------------------------------------------------------------------------

STEP, STEP_SCALE = 0.08, 0.03  # frame sizes: a free step per frame, and how fast a longer one gets dear
ABSENCE_COST = 0.5  # of a frame without a sighting
CHANGE_COST = 1.0  # of a change between seen and not seen
STRANGE_COST = 6.0  # most that a leap or another colour costs
COLOR_SCALE = 0.12  # change of colour that costs a half
SAME_COLOR = 0.05  # spread of one sprite's colour
MINIMUM_SHARE = 0.06  # of the frames, for a track to count


def follow(blobs: Blobs, size: int, count: int) -> list[Rough]:
    """Link blobs to at most `count` tracks, one of which may be of something that nobody asked for.

    Each track is the cheapest path through the blobs that no earlier track has taken (dynamic programming):
    leaps, changes of colour and frames without a sighting cost. Of two sprites whose ways cross, each has one
    of the two commonest colours, so that its track does not go on with the other one.
    """
    certainty = blobs.certainty.copy()
    own = _common_colors(blobs, count - 1) if count > 2 else []
    tracks: list[Rough] = []
    for index in range(count):
        strange = _strangeness(blobs.colors, own, index) if index < len(own) else np.zeros_like(certainty)
        taken = _cheapest(blobs, certainty, strange, size)
        rows = np.flatnonzero(taken < blobs.certainty.shape[1])
        if len(rows) < max(2, MINIMUM_SHARE * len(taken)):
            continue
        tracks.append(_rough(blobs, certainty, taken, size))
        certainty[rows, taken[rows]] = 0
    return tracks


def _common_colors(blobs: Blobs, count: int) -> list[Array]:
    """The commonest colours of sure blobs, at most `count`, each unlike the others."""
    colors, sure = blobs.colors.reshape(-1, 3), blobs.certainty.reshape(-1).astype(np.float32)
    square = np.square(colors[:, None] - colors).sum(axis=-1)
    common: list[Array] = []
    for _ in range(count):
        support = np.exp(-square / (2 * SAME_COLOR**2)) @ sure
        best = int(support.argmax())
        if support[best] < MINIMUM_SHARE * len(blobs.colors):
            break
        common.append(colors[best])
        sure = sure * (square[best] > COLOR_SCALE**2)
    return common


def _strangeness(colors: Array, own: list[Array], index: int) -> Array:
    """What it costs [F, K] to take a blob that looks more like another sprite than like this one."""
    costs = np.stack([_color_cost(colors - color) for color in own])
    others = np.delete(costs, index, axis=0)
    if not len(others):
        return np.zeros_like(costs[0])
    return np.asarray(np.maximum(costs[index] - others.min(axis=0), 0))


def _cheapest(blobs: Blobs, certainty: Array, strange: Array, size: int) -> Ints:
    """Index of the blob taken in every frame [F]; K for none. strange [F, K]: what each blob costs more."""
    frames, states = certainty.shape[0], certainty.shape[1] + 1
    unary = np.full((frames, states), ABSENCE_COST, np.float32)
    unary[:, :-1] = 1 - certainty + 4.0 * (certainty < 0.02) + strange
    gap = torus_gap(blobs.positions[1:, None], blobs.positions[:-1, :, None], size)
    leap = np.square(np.maximum(np.linalg.norm(gap, axis=-1) / size - STEP, 0) / STEP_SCALE)
    change = _color_cost(blobs.colors[1:, None] - blobs.colors[:-1, :, None])
    move = np.full((frames - 1, states, states), CHANGE_COST, np.float32)
    move[:, :-1, :-1] = np.minimum(leap + change, STRANGE_COST)
    move[:, -1, -1] = 0
    cost, origin = unary[0], np.zeros((frames, states), np.int64)
    for frame in range(1, frames):
        ways = cost[:, None] + move[frame - 1]
        origin[frame] = ways.argmin(axis=0)
        cost = ways.min(axis=0) + unary[frame]
    taken = np.empty(frames, np.int64)
    taken[-1] = cost.argmin()
    for frame in range(frames - 1, 0, -1):
        taken[frame - 1] = origin[frame, taken[frame]]
    return taken


def _color_cost(gap: Array) -> Array:
    cost: Array = np.minimum(np.square(gap).sum(axis=-1) / (2 * COLOR_SCALE**2), STRANGE_COST / 2)
    return cost


def _rough(blobs: Blobs, certainty: Array, taken: Ints, size: int) -> Rough:
    rows = np.flatnonzero(taken < certainty.shape[1])
    positions, seen = np.zeros((len(taken), 2), np.float32), np.zeros(len(taken), np.float32)
    positions[rows] = blobs.positions[rows, taken[rows]]
    seen[rows] = certainty[rows, taken[rows]]
    return Rough(bridged(positions, seen, size), seen, np.ones(len(taken), np.bool_))


def unwrapped(positions: Array, size: int) -> Array:
    """Return positions [F, 2] on the torus as a path without leaps."""
    steps = torus_gap(positions[1:], positions[:-1], size)
    return np.concatenate([positions[:1], positions[:1] + np.cumsum(steps, axis=0)])


def bridged(positions: Array, seen: Array, size: int) -> Array:
    """Return positions [F, 2] with those of frames that were not seen interpolated on the torus."""
    rows = np.flatnonzero(seen > 0)
    if not len(rows) or len(rows) == len(seen):
        return positions
    path, frames = unwrapped(positions[rows], size), np.arange(len(seen))
    between = np.stack([np.interp(frames, rows, path[:, axis]) for axis in (0, 1)], -1)
    filled: Array = np.where((seen > 0)[:, None], positions, between % size).astype(np.float32)
    return filled
