"""Fitting renderings to a sprite that has been found: which shape, which size, where exactly, which colours.

A shape is told by least squares: of all shapes, sizes, sub-pixel positions and blurs, the one whose mask,
times a free colour, explains most of what differs from the ground. Pixels that another sprite covers have no
weight. Positions are (x, y) in pixels on a torus, a pixel's centre at its index + 0.5.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .detect import squared
from .render import distance
from .scene import SHAPES, SIZES

Array = NDArray[np.float32]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

BLURS = (0.0, 0.8, 1.6)  # standard deviations in pixels of a 64-pixel frame
COARSE = tuple(range(-2, 3))
FINE = (-0.5, -0.25, 0.0, 0.25, 0.5)
SHAPE_TEMPERATURE = 0.01  # of the share of energy that a shape leaves unexplained
NOTHING, NOTHING_TEMPERATURE = 0.5, 0.06  # unexplained share at which no shape at all is as likely
COLOR_SPREAD = 0.1  # of pixels about one of a sprite's two colours


def window_of(size: int) -> int:
    """Return the odd side in pixels of the patch that holds any sprite and some ground around it."""
    return 2 * int(np.ceil(max(SIZES.values()) * size)) + 7


def cover(shape: str, radius: float, centres: Array, window: int) -> Array:
    """Return anti-aliased masks [N, window, window] of a shape.

    centres [N, 2] in pixels from the middle of the window's middle pixel. radius in pixels.
    """
    steps = (np.arange(window) - window // 2).astype(np.float32)
    x = (steps - centres[:, :1])[:, None, :] / np.float32(radius)
    y = (steps - centres[:, 1:])[:, :, None] / np.float32(radius)
    x, y = np.broadcast_arrays(x, y)
    mask: Array = np.clip(np.float32(0.5) - distance(shape, x, y) * np.float32(radius), 0, 1)
    return mask


def blurred(images: Array, sigma: float) -> Array:
    """Return images [..., H, W] after a Gaussian blur; sigma in pixels, zero padding."""
    if sigma == 0:
        return images
    reach = int(np.ceil(3 * sigma))
    taps = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / sigma))
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (-1, -2):
        pad = [(0, 0)] * images.ndim
        pad[axis] = (reach, reach)
        padded = np.lib.stride_tricks.sliding_window_view(np.pad(images, pad), len(taps), axis=axis)
        images = padded @ taps
    return images


@cache
def bank(size: int, steps: tuple[float, ...], sigmas: tuple[float, ...]) -> Array:
    """Return all templates, float32 [shapes * sizes * blurs * offsets, window * window].

    The order of the first axis is shape, size, blur, y offset, x offset; the last moves fastest.
    """
    window = window_of(size)
    offsets = np.array([(x, y) for y in steps for x in steps], np.float32)
    masks = []
    for shape in SHAPES:
        for share in SIZES.values():
            sharp = cover(shape, share * size, offsets, window)
            masks += [blurred(sharp, sigma * size / 64) for sigma in sigmas]
    return np.concatenate(masks).reshape(-1, window * window)


def patches(images: Array, anchors: Ints, window: int) -> Array:
    """Cut windows out of images [F, H, W, ...] on the torus, centred on pixels anchors [F, 2] (x, y)."""
    reach = np.arange(window) - window // 2
    columns = (anchors[:, 0, None] + reach) % images.shape[2]
    rows = (anchors[:, 1, None] + reach) % images.shape[1]
    cut: Array = images[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return cut


@dataclass(frozen=True)
class Match:
    """How well each template explains a sprite, frame by frame.

    explained [F, shapes, sizes, blurs]: energy, at the best position. offsets [F, shapes, sizes, blurs, 2]:
    that position in pixels from the middle of the anchor pixel. energy [F]: all there is to explain.
    """

    explained: Array
    offsets: Array
    energy: Array


@dataclass(frozen=True)
class Cut:
    """Patches of the frames about a sprite: window of each frame, and how much its pixels count.

    anchors [F, 2]: middle pixels (x, y), not wrapped. pixels [F, P, P, 3]; weight [F, P, P].
    """

    anchors: Ints
    pixels: Array
    weight: Array


def cut(above: Array, weight: Array, centres: Array, on_torus: Bools) -> Cut:
    """Cut the windows about `centres` [F, 2] out of frames minus ground [F, H, W, 3].

    weight [F, H, W]: how much a pixel counts. What lies across an edge counts only where on_torus [F] holds.
    """
    size = above.shape[1]
    window = window_of(size)
    anchors = np.floor(centres).astype(np.int64)
    counts = patches(weight, anchors, window)
    if not on_torus.all():
        at = anchors[:, :, None] + np.arange(window) - window // 2
        inside = ((at >= 0) & (at < size)) | on_torus[:, None, None]
        counts = counts * (inside[:, 0, None, :] & inside[:, 1, :, None])
    return Cut(anchors, patches(above, anchors, window), counts)


def match(piece: Cut, templates: Array, grid: tuple[int, ...], steps: tuple[float, ...]) -> Match:
    """Compare patches with templates of `bank`, `grid` being (shapes, sizes, blurs) among them.

    The energy that template m explains is sum_c <w d_c, m>^2 / <w m, m>: least squares with a free colour
    for patch d under weights w. A template of which next to nothing can be seen explains little.
    """
    count = len(piece.anchors)
    weighted = (piece.pixels * piece.weight[..., None]).reshape(count, -1, 3).transpose(0, 2, 1)
    energy = (weighted * piece.pixels.reshape(count, -1, 3).transpose(0, 2, 1)).sum(axis=(1, 2))
    products = (weighted.reshape(3 * count, -1) @ templates.T).reshape(count, 3, -1)
    squares = np.square(templates)
    norms = piece.weight.reshape(count, -1) @ squares.T
    explained = np.square(products).sum(axis=1) / np.maximum(norms, 0.1 * squares.sum(axis=1))
    shaped = explained.reshape(count, *grid, len(steps), len(steps))
    return Match(*_peaks(shaped, np.asarray(steps, np.float32)), energy)


def match_all(piece: Cut, size: int) -> Match:
    """Compare patches with every shape, size and blur at all fine positions."""
    grid = (len(SHAPES), len(SIZES), len(BLURS))
    return match(piece, bank(size, FINE, BLURS), grid, FINE)


def recentred(above: Array, weight: Array, centres: Array, on_torus: Bools, kind: tuple[int, int]) -> Array:
    """Return centres [F, 2] moved, by up to about two pixels, to where one shape and size fits best."""
    templates = bank(above.shape[1], COARSE, BLURS[1:2])
    per_kind = len(COARSE) ** 2
    first = (kind[0] * len(SIZES) + kind[1]) * per_kind
    piece = cut(above, weight, centres, on_torus)
    found = match(piece, templates[first : first + per_kind], (1, 1, 1), COARSE)
    return (piece.anchors + np.float32(0.5) + found.offsets[:, 0, 0, 0]).astype(np.float32)


def _peaks(explained: Array, steps: Array) -> tuple[Array, Array]:
    """Maximum over the last two axes, and its place between the grid points by a parabola per axis."""
    count = len(steps)
    flat = explained.reshape(*explained.shape[:-2], count * count)
    peak = flat.argmax(axis=-1)
    best = np.take_along_axis(flat, peak[..., None], -1)[..., 0]
    row, column = np.clip(peak // count, 1, count - 2), np.clip(peak % count, 1, count - 2)
    spacing = steps[1] - steps[0]
    places = []
    for middle, stride, other in ((column, 1, peak // count * count), (row, count, peak % count)):
        at = other + middle * stride
        before, here, after = (np.take_along_axis(flat, (at + k * stride)[..., None], -1)[..., 0] for k in (-1, 0, 1))
        bend = np.minimum(before - 2 * here + after, -1e-12)
        shift = np.clip(0.5 * (before - after) / bend, -1.5, 1.5)
        places.append(steps[middle] + shift * spacing)
    return best, np.stack(places, -1)


def look_masks(centres: Array, kind: tuple[int, int, int], size: int, grow: float = 0.0) -> Array:
    """Return masks [N, P, P] of one (shape, size, blur), by index.

    centres [N, 2] in pixels from the middle of the window's middle pixel; `grow` pixels are added to the
    radius.
    """
    radius = list(SIZES.values())[kind[1]] * size + grow
    masks = cover(SHAPES[kind[0]], radius, centres.astype(np.float32), window_of(size))
    return blurred(masks, BLURS[kind[2]] * size / 64)


def pasted(masks: Array, anchors: Ints, on_torus: Bools, size: int) -> Array:
    """Put windows [N, P, P] into empty frames [N, size, size]; what crosses an edge wraps, or is cut off."""
    reach = np.arange(masks.shape[1]) - masks.shape[1] // 2
    at = anchors[:, :, None] + reach
    inside = ((at >= 0) & (at < size)) | on_torus[:, None, None]
    kept = masks * (inside[:, 0, None, :] & inside[:, 1, :, None])
    frames = np.zeros((len(masks), size, size), np.float32)
    columns, rows = at[:, 0, None, :] % size, at[:, 1, :, None] % size
    frames[np.arange(len(masks))[:, None, None], rows, columns] = kept
    return frames


def two_colors(pixels: Array, weight: Array) -> Array:
    """Return the two colours [2, 3] that weighted pixels [..., 3] gather about; twice the same if plain."""
    points, share = pixels.reshape(-1, 3).astype(np.float64), weight.reshape(-1).astype(np.float64)
    kept = share > 0.05
    points, share = points[kept], share[kept]
    if not len(points):
        return np.zeros((2, 3), np.float32)
    mean = share @ points / share.sum()
    spread = (points - mean).T @ ((points - mean) * share[:, None]) / share.sum()
    variances, axes = np.linalg.eigh(spread)
    means = mean + np.array([[1.0], [-1.0]]) * np.sqrt(max(variances[-1], 0)) * axes[:, -1]
    for _ in range(6):
        nearer = np.square(points[:, None] - means).sum(axis=-1).argmin(axis=1)
        for k in (0, 1):
            part = share * (nearer == k)
            if part.sum() > 1e-6 * share.sum():
                means[k] = part @ points / part.sum()
    return np.asarray(means, np.float32)


def color_costs(pixels: Array, colors: Array) -> Array:
    """Return squared distances of pixels [..., 3] to the nearer of two colours [2, 3]."""
    costs: Array = np.minimum(squared(pixels - colors[0]), squared(pixels - colors[1]))
    return costs


def frame_colors(piece: Cut, mask: Array, colors: Array) -> tuple[Array, Array]:
    """Return each frame's own two colours [F, 2, 3] and their shares [F, 2] near a clip's two colours."""
    weight = piece.weight * mask
    gaps = np.stack([squared(piece.pixels - color) for color in colors], -1)
    leaning = np.exp(-(gaps - gaps.min(axis=-1, keepdims=True)) / (2 * COLOR_SPREAD**2))
    leaning = leaning / leaning.sum(axis=-1, keepdims=True) * weight[..., None]
    amounts = leaning.sum(axis=(1, 2))
    sums = np.einsum("fpqk,fpqc->fkc", leaning, piece.pixels)
    means = np.where(amounts[..., None] > 1e-3, sums / np.maximum(amounts, 1e-3)[..., None], colors)
    return means, amounts / np.maximum(amounts.sum(axis=1, keepdims=True), 1e-6)


def shape_odds(found: Match, noise: float, counted: Array) -> tuple[Array, Array, Array]:
    """Return probabilities of shapes [F, 6] and of sizes [F, 2], and the energy best explained [F].

    The likelihood of a shape falls with the share of energy that it leaves unexplained beside the best one;
    the shapes compete with "nothing of the kind", which wins where even the best explains little. noise:
    standard deviation per pixel; counted [F]: pixels in the window that count.
    """
    frames = len(found.energy)
    best_blur = found.explained.max(axis=(1, 2)).argmax(axis=1)
    explained = np.maximum(found.explained[np.arange(frames), :, :, best_blur] - 3 * noise**2, 0)
    best = explained.max(axis=(1, 2))
    energy = np.maximum(found.energy - 3 * noise**2 * counted, best)
    short = (best[:, None, None] - explained) / np.maximum(best, 1e-6)[:, None, None]
    odds = np.exp(-short / SHAPE_TEMPERATURE)
    unexplained = 1 - best / np.maximum(energy, 1e-6)
    nothing = np.exp(np.minimum(unexplained - NOTHING, 0.5) / NOTHING_TEMPERATURE)
    odds = odds / (odds.sum(axis=(1, 2)) + nothing)[:, None, None]
    return odds.sum(axis=2), odds.sum(axis=1), best
