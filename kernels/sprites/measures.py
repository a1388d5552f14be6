"""Measures on pixels: how steady the ground and the sprites are, and how well a rendering explains them."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from . import detect, fit
from .find import Findings, Sprite
from .texture import fit_texture, grid, share

Array = NDArray[np.float32]
Bools = NDArray[np.bool_]

FLICKER_BLOCK, FLICKER_SCALE = 16, 0.08  # blocks per side; change per frame that halves the score
DRIFT_BLOCK, DRIFT_SCALE, DRIFT_FRAMES = 8, 0.08, 8
LOOK_CELLS, LOOK_FREE, LOOK_SCALE = 7, 0.025, 0.12  # cells per side; change of colour that is still free
ERROR_FREE, ERROR_SCALE = 0.01, 0.08  # of the root mean square error about a sprite or of the ground
RENDERED_FRAMES = 16  # frames that a sprite's texture and colours are taken from


def halving(error: float, scale: float) -> float:
    """Return 1 / (1 + (error / scale)^2)."""
    return 1 / (1 + (error / scale) ** 2)


def free_ground(found: Findings) -> Array:
    """Return how surely each pixel shows the ground [F, H, W]: away from every sprite."""
    size = found.frames.shape[1]
    free = np.ones(found.frames.shape[:3], np.float32)
    for sprite in found.sprites:
        rows = np.flatnonzero(sprite.presence > 0.05)
        reach = (sprite.radius + 0.04) * size
        free[rows] *= 1 - detect.disc(sprite.positions[rows], reach, size)
    return free


def _blocks(found: Findings, free: Array, count: int) -> tuple[Array, Array]:
    """Means over blocks of what lies above the ground [F, b, b, 3], and the free share of each [F, b, b]."""
    frames, size = len(free), free.shape[1]
    side = max(1, size // count)
    used = size // side * side
    shape = (frames, used // side, side, used // side, side)
    above = (found.frames - found.ground.image) * free[..., None]
    sums = above[:, :used, :used].reshape(*shape, 3).sum(axis=(2, 4))
    shares = free[:, :used, :used].reshape(shape).sum(axis=(2, 4)) / side**2
    return sums / np.maximum(shares * side**2, 1e-3)[..., None], shares


def temporal_flickering(found: Findings, free: Array) -> float:
    """Return 1 for a ground whose small blocks do not change from one frame to the next."""
    means, shares = _blocks(found, free, FLICKER_BLOCK)
    both = np.minimum(shares[1:], shares[:-1]) > 0.6
    change = np.square(np.diff(means, axis=0)).mean(axis=-1)
    return halving(float(np.sqrt(_mean(change, both))), FLICKER_SCALE)


def background_consistency(found: Findings, free: Array) -> float:
    """Return 1 for a ground that stays what it is over the clip; quick flicker, which averages out, is free."""
    means, shares = _blocks(found, free, DRIFT_BLOCK)
    shares = shares * (shares > 0.3)
    width = min(DRIFT_FRAMES, len(means))
    sums = _running_sums(means * shares[..., None], width)
    weight = _running_sums(shares, width)
    slow = sums / np.maximum(weight, 1e-3)[..., None]
    slow = np.where((weight > 0.5)[..., None], slow, np.nan)
    seen = ~np.isnan(slow).all(axis=0)
    usual = np.nanmedian(np.where(seen, slow, 0), axis=0)
    drift = np.sqrt(np.nanmean(np.square(slow - usual), axis=(1, 2, 3)))
    scores = 1 / (1 + np.square(np.maximum(drift - 0.003, 0) / DRIFT_SCALE))
    return float(np.nanmean(scores)) if np.isfinite(drift).any() else 0.0


def _running_sums(values: Array, width: int) -> Array:
    total = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
    return np.asarray(total[width:] - total[:-width])


def _mean(values: Array, where: Bools) -> float:
    return float(values[where].mean()) if where.any() else 0.0


# --- sprites ------------------------------------------------------------------------------------------


def _aligned(images: Array, sprite: Sprite) -> Array:
    """Windows [F, P, P, ...] of images [F, H, W, ...] with the sprite in the exact middle (bilinear)."""
    corner = sprite.positions - np.float32(0.5)
    anchors = np.floor(corner).astype(np.int64)
    rest = (corner - anchors).reshape(len(corner), 2, *[1] * (images.ndim - 1))
    window = fit.window_of(images.shape[1])
    cut = fit.patches(images, anchors, window + 2)[:, 1:, 1:]
    rows = cut[:, :-1] + (cut[:, 1:] - cut[:, :-1]) * rest[:, 1]
    return np.asarray(rows[:, :, :-1] + (rows[:, :, 1:] - rows[:, :, :-1]) * rest[:, 0])


def _inside(sprite: Sprite, window: int, size: int) -> Bools:
    """Where a sprite's window lies in the frame [F, P, P]; everywhere, on the torus."""
    reach = np.arange(window) - window // 2
    at = sprite.positions[:, :, None] + reach
    inside = ((at >= 0) & (at < size)) | sprite.on_torus[:, None, None]
    both: Bools = inside[:, 0, None, :] & inside[:, 1, :, None]
    return both


def _unhidden(found: Findings, sprite: Sprite) -> Array:
    """Weight [F, H, W] without the pixels where another sprite may be in the way."""
    size = found.frames.shape[1]
    weight = np.ones(found.frames.shape[:3], np.float32)
    for other in found.sprites:
        if other is not sprite:
            rows = np.flatnonzero(other.presence > 0.05)
            reach = other.radius * size + 1
            weight[rows] *= 1 - detect.disc(other.positions[rows], reach, size)
    return weight


def subject_consistency(found: Findings, sprite: Sprite, counted: Bools) -> float:
    """Return 1 for a sprite that looks the same in all `counted` frames [F].

    Its appearance is the mean colour of each cell of a grid that moves with it, and the probabilities of the
    shapes that it may have. Each frame is compared with the median.
    """
    if not counted.any():
        return 0.0
    size = found.frames.shape[1]
    window, radius = fit.window_of(size), sprite.radius * size
    frames = found.frames - found.ground.offsets[:, None, None]
    middle = np.zeros((1, 2), np.float32)
    mask = fit.look_masks(middle, (sprite.look.shape, sprite.look.size, 0), size)[0]
    unhidden = _aligned(_unhidden(found, sprite), sprite) * _inside(sprite, window, size)
    weight = (unhidden * mask)[counted].reshape(-1, window**2)
    pixels = _aligned(frames, sprite)[counted].reshape(-1, window**2, 3)
    cells = _cells(window, radius)
    masses = weight @ cells
    sums = np.einsum("fpc,pk->fkc", pixels * weight[..., None], cells, optimize=True)
    means = sums / np.maximum(masses, 1e-3)[..., None]
    shown = masses > 0.5 * (mask.reshape(-1) @ cells)
    usual = np.nanmedian(np.where(shown[..., None], means, np.nan)[:, shown.any(axis=0)], axis=0)
    masses, means = (masses * shown)[:, shown.any(axis=0)], means[:, shown.any(axis=0)]
    change = (np.square(means - usual).mean(axis=-1) * masses).sum(axis=1) / np.maximum(masses.sum(axis=1), 1e-3)
    alike = 1 / (1 + np.square(np.maximum(np.sqrt(change) - LOOK_FREE, 0) / LOOK_SCALE))
    shapes = sprite.shapes[counted]
    usual_shape = shapes.mean(axis=0)
    overlap = np.sqrt(shapes * usual_shape).sum(axis=1) / max(float(usual_shape.sum()), 1e-3)
    return float((alike * np.minimum(overlap, 1)).mean())


def _cells(window: int, radius: float) -> Array:
    """Which of LOOK_CELLS^2 cells each pixel of a window belongs to [P * P, cells]; none outside."""
    x, y = grid(window, radius)
    column = np.floor((x + 1) / 2 * LOOK_CELLS).astype(np.int64)
    row = np.floor((y + 1) / 2 * LOOK_CELLS).astype(np.int64)
    inside = (column >= 0) & (column < LOOK_CELLS) & (row >= 0) & (row < LOOK_CELLS)
    cell = np.where(inside, row * LOOK_CELLS + column, -1).reshape(-1)
    return np.asarray(cell[:, None] == np.arange(LOOK_CELLS**2), np.float32)


# --- rendering again ----------------------------------------------------------------------------------


def imaging_quality(found: Findings, free: Array, sprites: tuple[Sprite | None, ...], *, textured: bool) -> float:
    """Return how well the best-fitting rendering of what was found explains the pixels.

    Half for the ground, half for the surroundings of the captioned sprites (None: not found, worth 0). The
    rendering is sharp and clean: blur, noise and a lost texture all cost.
    """
    ground = found.ground
    level = found.frames - ground.offsets[:, None, None]
    if textured:
        ground = detect.with_pattern(ground, found.frames, free)
    picture = np.repeat(ground.image[None], len(level), axis=0)
    near: dict[int, Array] = {}
    for sprite in sorted(found.sprites, key=lambda each: each.depth):
        near[id(sprite)] = _draw(picture, found, level, ground.image, sprite, textured)
    error = detect.squared(level - picture) / np.float32(3)
    ground_score = _clearness(error, free)
    scores = [0.0 if one is None else _clearness(error, near[id(one)]) for one in sprites]
    return 0.5 * ground_score + 0.5 * sum(scores) / len(scores)


def _clearness(error: Array, region: Array) -> float:
    """How small the error [F, H, W] is in a region [F, H, W] of weights; 0 where there is no region."""
    amount = float(region.sum())
    if amount < 1:
        return 0.0
    return halving(max(float(np.sqrt((error * region).sum() / amount)) - ERROR_FREE, 0.0), ERROR_SCALE)


def _draw(picture: Array, found: Findings, level: Array, image: Array, sprite: Sprite, textured: bool) -> Array:
    """Paint a sprite into `picture` [F, H, W, 3] where it is present.

    Returns its surroundings [F, H, W] in the frames that show enough of it to be judged.
    """
    size = picture.shape[1]
    radius = sprite.radius * size
    kind = (sprite.look.shape, sprite.look.size, 0)
    anchors = np.floor(sprite.positions).astype(np.int64)
    shifts = sprite.positions - anchors - np.float32(0.5)
    masks = fit.look_masks(shifts, kind, size)
    shares = _shares(level, found, sprite, shifts, radius) if textured else np.zeros_like(masks)
    colors = _colors(level, found, image, sprite, anchors, masks, shares)
    drawn = (sprite.presence > 0.3).astype(np.float32)[:, None, None]
    whole = fit.pasted(masks * drawn, anchors, sprite.on_torus, size)[..., None]
    mixed = fit.pasted(shares, anchors, sprite.on_torus, size)[..., None]
    picture += whole * (colors[0] + mixed * (colors[1] - colors[0]) - picture)
    grown = fit.look_masks(shifts, kind, size, grow=1.5)
    return fit.pasted(grown * drawn * sprite.judged[:, None, None], anchors, sprite.on_torus, size)


def _clearest(sprite: Sprite) -> NDArray[np.int64]:
    """Frames in which most of a sprite can be seen."""
    merit = np.minimum(sprite.visible, 0.98) * sprite.presence
    good = np.flatnonzero(merit >= merit.max() - 0.02)
    return good[np.linspace(0, len(good) - 1, min(len(good), RENDERED_FRAMES)).astype(np.int64)]


def _shares(level: Array, found: Findings, sprite: Sprite, shifts: Array, radius: float) -> Array:
    """The second colour's share in every window [F, P, P], from the texture that fits best."""
    size = level.shape[1]
    window = fit.window_of(size)
    rows = _clearest(sprite)
    shown = replace(sprite, positions=sprite.positions[rows])
    weight = _aligned(_unhidden(found, sprite)[rows], shown) + np.float32(1e-3)
    mean = (_aligned(level[rows], shown) * weight[..., None]).sum(axis=0) / weight.sum(axis=0)[..., None]
    inner = fit.look_masks(np.zeros((1, 2), np.float32), (sprite.look.shape, sprite.look.size, 0), size, -0.7)[0]
    texture = fit_texture(mean, inner, radius)
    x, y = grid(window, radius)
    centres = shifts + np.array([texture.x, texture.y], np.float32)
    x, y = x - (centres[:, 0] / radius)[:, None, None], y - (centres[:, 1] / radius)[:, None, None]
    return share(texture.kind, texture.angle, texture.offset, x, y, radius)


def _colors(
    level: Array,
    found: Findings,
    image: Array,
    sprite: Sprite,
    anchors: NDArray[np.int64],
    masks: Array,
    shares: Array,
) -> Array:
    """The two colours [2, 3] that, with masks and shares, explain the clearest frames best (least squares)."""
    rows = _clearest(sprite)
    window = masks.shape[1]
    pixels = fit.patches(level[rows], anchors[rows], window)
    under = fit.patches(np.broadcast_to(image, level[rows].shape), anchors[rows], window)
    weight = fit.patches(_unhidden(found, sprite)[rows], anchors[rows], window)
    cover = masks[rows]
    target = (pixels - (1 - cover)[..., None] * under).reshape(-1, 3)
    basis = np.stack([cover * (1 - shares[rows]), cover * shares[rows]], -1).reshape(-1, 2)
    weighted = basis * weight.reshape(-1, 1)
    normal = weighted.T @ basis + np.float32(1e-4) * np.eye(2, dtype=np.float32)
    return np.asarray(np.linalg.solve(normal, weighted.T @ target), np.float32)
