"""From frames to sprites: what each looks like, and where it is in every frame, also behind another one.

First each track's shape, size and colours are told from frames in which it stands alone. With these known,
frames in which sprites touch, or a sprite crosses an edge, are searched again for exactly that sprite.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from . import detect, fit
from .detect import Ground, Rough
from .scene import SHAPES, SIZES

Array = NDArray[np.float32]
Bools = NDArray[np.bool_]

CLEAR_FRAMES = 16  # frames that tell what a sprite looks like
CLEAR_GAP = 0.36  # frame sizes between two sprites that do not touch
ECHO_GAP = 0.2  # frame sizes; a piece of a half hidden sprite is seen nearer to it than this
SEARCH_REACH, SEARCH_GROWTH = 0.09, 0.035  # frame sizes: from the last sighting, and more per frame since
HIDDEN_SHARE = 0.45  # a sprite of which less can be seen is not judged


@dataclass(frozen=True)
class Look:
    """What a sprite looks like: indices of shape, size and blur, and its two colours [2, 3].

    A plain sprite has twice the same colour; a textured one its base and its shade, in any order.
    """

    shape: int
    size: int
    blur: int
    colors: Array


@dataclass(frozen=True)
class Sprite:
    """A sprite that was found.

    positions [F, 2]: centre in pixels, unwrapped. presence [F] in [0, 1]: how much of the sprite's contrast
    is there where it can be seen. visible [F] in [0, 1]: the part of it that lies inside the frame and not
    behind another. on_torus [F]: what crosses an edge shows on the other side. shapes [F, 6], sizes [F, 2]:
    probabilities. colors [F, 2, 3], shares [F, 2]: the two colours and how much of the sprite each takes.
    depth: the higher, the nearer to the front.
    """

    look: Look
    positions: Array
    presence: Array
    visible: Array
    on_torus: Bools
    shapes: Array
    sizes: Array
    colors: Array
    shares: Array
    depth: int

    @property
    def judged(self) -> Bools:
        """Frames in which enough of the sprite can be seen."""
        return self.visible >= HIDDEN_SHARE

    @property
    def radius(self) -> float:
        """Radius in frame sizes."""
        return list(SIZES.values())[self.look.size]


@dataclass(frozen=True)
class Findings:
    """Everything found in a video: frames in [0, 1] [F, H, W, 3], their ground, and the sprites in them."""

    frames: Array
    ground: Ground
    sprites: tuple[Sprite, ...]


def find(video: NDArray[np.uint8], count: int, *, level: int) -> Findings:
    """Find up to `count` sprites in a video [F, H, W, 3]. From level 3 on, edges may cut sprites off."""
    frames = detect.to_unit(video)
    size = frames.shape[1]
    ground = detect.fit_ground(frames)
    level_frames = frames - ground.offsets[:, None, None]
    above = level_frames - ground.image
    tracks = detect.follow(detect.find_blobs(above, ground.image, count), size, count)
    tracks = _without_echoes(tracks, size)
    looks = [_look(level_frames, above, tracks, index) for index in range(len(tracks))]
    view = _View(level_frames, above, ground, level >= 3)
    placed = _placed(view, tracks, looks)
    masks = [_mask(track, look, size) for track, look in zip(placed, looks, strict=True)]
    ranks = _depths(view, masks, looks)
    sprites = [_sprite(view, placed, looks, masks, ranks, index) for index in range(len(placed))]
    return Findings(frames, ground, tuple(sprites))


def _without_echoes(tracks: list[Rough], size: int) -> list[Rough]:
    """Drop the tracks that were mostly seen close beside a surer one: pieces of a sprite half hidden."""
    kept: list[int] = []
    for index, track in enumerate(tracks):
        near = np.zeros(len(track.seen), np.bool_)
        for other in kept:
            gap = detect.torus_gap(track.positions, tracks[other].positions, size)
            near |= np.linalg.norm(gap, axis=-1) < ECHO_GAP * size
        if not kept or (track.seen * ~near).sum() > 0.25 * track.seen.sum():
            kept.append(index)
    return [tracks[i] for i in kept]


def _clear_frames(tracks: list[Rough], index: int, size: int) -> NDArray[np.int64]:
    """Frames in which a track was seen well and alone; the least bad ones if there is none."""
    track = tracks[index]
    apart = np.full(len(track.seen), float(size))
    for other in range(len(tracks)):
        if other != index:
            gap = detect.torus_gap(track.positions, tracks[other].positions, size)
            apart = np.minimum(apart, np.linalg.norm(gap, axis=-1))
    merit = np.minimum(apart / (CLEAR_GAP * size), 1) + track.seen
    edge = np.abs(track.positions % size / size - 0.5).max(axis=-1)
    merit = merit - 0.2 * (edge > 0.4)
    good = np.flatnonzero(merit >= merit.max() - 0.05)
    if len(good) >= CLEAR_FRAMES:
        return good[np.linspace(0, len(good) - 1, CLEAR_FRAMES).astype(np.int64)]
    return np.sort(np.argsort(-merit)[:CLEAR_FRAMES])


def _look(frames: Array, above: Array, tracks: list[Rough], index: int) -> Look:
    """Tell shape, size, blur and colours from the clear frames of a track."""
    size = above.shape[1]
    rows = _clear_frames(tracks, index, size)
    weight = np.ones((len(rows), size, size), np.float32)
    for other in range(len(tracks)):
        if other != index:
            weight *= 1 - detect.disc(tracks[other].positions[rows], max(SIZES.values()) * size, size)
    there = np.ones(len(rows), np.bool_)
    centres = tracks[index].positions[rows]
    piece = fit.cut(above[rows], weight, centres, there)
    grid = (len(SHAPES), len(SIZES), 1)
    coarse = fit.match(piece, fit.bank(size, fit.COARSE, fit.BLURS[1:2]), grid, fit.COARSE)
    shape, scale = np.unravel_index(coarse.explained[..., 0].sum(axis=0).argmax(), grid[:2])
    centres = piece.anchors + np.float32(0.5) + coarse.offsets[:, shape, scale, 0]
    piece = fit.cut(above[rows], weight, centres, there)
    fine = fit.match_all(piece, size)
    best = np.unravel_index(fine.explained.sum(axis=0).argmax(), fine.explained.shape[1:])
    shape, scale, blur = (int(i) for i in best)
    centres = piece.anchors + np.float32(0.5) + fine.offsets[:, shape, scale, blur]
    window = fit.cut(frames[rows], weight, centres, there)
    mask = fit.look_masks(centres - window.anchors - 0.5, (shape, scale, blur), size)
    return Look(shape, scale, blur, fit.two_colors(window.pixels, window.weight * mask**4))


@dataclass(frozen=True)
class _View:
    """Frames without their ground's flicker [F, H, W, 3], the same minus the ground, and the ground."""

    frames: Array
    above: Array
    ground: Ground
    cuts: bool

    @property
    def size(self) -> int:
        return int(self.frames.shape[1])


def _radius(look: Look, size: int) -> float:
    return list(SIZES.values())[look.size] * size


# --- searching again, with the looks known ------------------------------------------------------------


def _placed(view: _View, tracks: list[Rough], looks: list[Look]) -> list[Rough]:
    """Put each sprite where it explains the frames best; in clear frames its sighting is good already.

    One after the other, the surest first; with several, the first again when the others are in place.
    """
    placed = list(tracks)
    for index in [*range(len(placed)), 0] if len(placed) > 1 else range(len(placed)):
        placed[index] = _searched(view, placed, looks, index)
    return placed


def _doubtful(view: _View, placed: list[Rough], looks: list[Look], index: int) -> Bools:
    """Frames [F] without a sure sighting: missed, touching another sprite, or cut off by an edge."""
    track, radius = placed[index], _radius(looks[index], view.size)
    doubtful = track.seen < 0.5
    for other in range(len(placed)):
        if other != index:
            gap = detect.torus_gap(track.positions, placed[other].positions, view.size)
            reach = radius + _radius(looks[other], view.size) + 0.06 * view.size
            doubtful = doubtful | (np.linalg.norm(gap, axis=-1) < reach)
    if view.cuts:
        edge = view.size / 2 - np.abs(track.positions - view.size / 2).max(axis=-1)
        doubtful = doubtful | (edge < radius + 0.05 * view.size)
    return doubtful


def _searched(view: _View, placed: list[Rough], looks: list[Look], index: int) -> Rough:
    track, look = placed[index], looks[index]
    doubtful = _doubtful(view, placed, looks, index)
    rows = np.flatnonzero(doubtful)
    if not len(rows):
        return track
    gain = _gain(view, placed, looks, index, rows)
    reach = _reach(doubtful, view.size)[rows]
    at, score = _peak(gain, look, track.positions[rows], reach, pad=0)
    wraps = np.ones(len(rows), np.bool_)
    if view.cuts:
        pad = int(np.ceil(max(SIZES.values()) * view.size)) + 2
        cut_at, cut_score = _peak(gain, look, track.positions[rows], reach, pad=pad)
        wraps = cut_score <= score * 1.02
        at, score = np.where(wraps[:, None], at, cut_at), np.maximum(score, cut_score)
    expected = _expected(view, look)
    found = score > 0.15 * expected
    positions, seen, on_torus = track.positions.copy(), track.seen.copy(), track.on_torus.copy()
    positions[rows], on_torus[rows] = at, wraps
    seen[rows] = np.where(found, np.clip(score / expected, 0, 1), 0)
    return Rough(detect.bridged(positions, seen, view.size), seen, on_torus)


def _reach(doubtful: Bools, size: int) -> Array:
    """How far [F] from its rough place a sprite may be; more, the longer since a sure sighting."""
    frames, sure = np.arange(len(doubtful)), np.flatnonzero(~doubtful)
    if not len(sure):
        return np.full(len(doubtful), size, np.float32)
    since = np.abs(frames[:, None] - sure).min(axis=1)
    return np.asarray(size * (SEARCH_REACH + SEARCH_GROWTH * since), np.float32)


def _gain(view: _View, placed: list[Rough], looks: list[Look], index: int, rows: NDArray[np.int64]) -> Array:
    """What each pixel [R, H, W] says for this sprite: how much better its colours explain it than the ground.

    Where another sprite may be, a pixel can speak for this one but not against it.
    """
    frames = view.frames[rows]
    own = fit.color_costs(frames, looks[index].colors)
    rest = detect.squared(view.above[rows])
    gain = rest - own
    for other in range(len(placed)):
        if other != index:
            there = detect.disc(placed[other].positions[rows], _radius(looks[other], view.size), view.size)
            theirs = np.minimum(rest, fit.color_costs(frames, looks[other].colors))
            gain = np.where(there > 0.5, np.maximum(theirs - own, 0), gain)
    return np.asarray(gain, np.float32)


def _peak(gain: Array, look: Look, around: Array, reach: Array, *, pad: int) -> tuple[Array, Array]:
    """Best place [R, 2] of a sprite's mask, and what it gains there [R], within `reach` of `around`.

    With padding the edges cut sprites off, and centres may be outside of the frame.
    """
    size = gain.shape[1]
    side = size + 2 * pad
    middle = np.zeros((1, 2), np.float32)
    mask = fit.look_masks(middle, (look.shape, look.size, look.blur), size)
    anchor, there = np.zeros((1, 2), np.int64), np.ones(1, np.bool_)
    spectrum = np.conj(np.fft.rfft2(fit.pasted(mask, anchor, there, side)))
    padded = np.pad(gain, ((0, 0), (pad, pad), (pad, pad))) if pad else gain
    score = np.fft.irfft2(np.fft.rfft2(padded) * spectrum, s=(side, side))
    places = (np.arange(side) + 0.5 - pad).astype(np.float32)
    wide = np.square(detect.torus_gap(places, around[:, :1], size))
    high = np.square(detect.torus_gap(places, around[:, 1:], size))
    allowed = high[:, :, None] + wide[:, None, :] <= np.square(reach)[:, None, None]
    score = np.where(allowed, score, -np.inf).reshape(len(gain), -1)
    peak = score.argmax(axis=1)
    best = np.take_along_axis(score, peak[:, None], 1)[:, 0]
    return np.stack([places[peak % side], places[peak // side]], -1), best.astype(np.float32)


def _expected(view: _View, look: Look) -> float:
    """What a sprite that is wholly seen gains."""
    ground = view.ground.image.mean(axis=(0, 1))
    contrast = float(np.square(look.colors - ground).sum(axis=-1).mean())
    mask = fit.look_masks(np.zeros((1, 2), np.float32), (look.shape, look.size, 0), view.size)
    return contrast * float(mask.sum())


# --- the final fit ------------------------------------------------------------------------------------


def _mask(track: Rough, look: Look, size: int, grow: float = 0.0) -> Array:
    """A sprite's mask in whole frames [F, H, W]; `grow` adds pixels to its radius."""
    anchors = np.floor(track.positions).astype(np.int64)
    shifts = track.positions - anchors - np.float32(0.5)
    masks = fit.look_masks(shifts, (look.shape, look.size, 0), size, grow)
    return fit.pasted(masks, anchors, track.on_torus, size)


def _depths(view: _View, masks: list[Array], looks: list[Look]) -> list[int]:
    """Rank of each sprite, the highest in front: where two overlap, the pixels have the front one's colours."""
    ranks = [0] * len(looks)
    for first in range(len(looks)):
        for second in range(first):
            both = np.minimum(masks[first], masks[second])
            rows = np.flatnonzero(both.max(axis=(1, 2)) > 0.5)
            costs = [fit.color_costs(view.frames[rows], looks[i].colors) for i in (first, second)]
            ahead = float((both[rows] * (costs[1] - costs[0])).sum()) > 0
            ranks[first if ahead else second] += 1
    return ranks


def _sprite(
    view: _View,
    placed: list[Rough],
    looks: list[Look],
    masks: list[Array],
    ranks: list[int],
    index: int,
) -> Sprite:
    """Fit one sprite in all frames, at sub-pixel places; what other sprites cover has no weight."""
    track, look, size = placed[index], looks[index], view.size
    weight, covered = np.ones(view.frames.shape[:3], np.float32), np.ones(view.frames.shape[:3], np.float32)
    for other in range(len(placed)):
        if other != index:
            hidden = _mask(placed[other], looks[other], size, grow=1.0)
            if ranks[other] > ranks[index]:
                covered = covered * (1 - masks[other])
            else:
                hidden = hidden * (1 - _mask(track, look, size, grow=0.5))
            weight = weight * (1 - hidden)
    centres = track.positions
    for _ in range(2):
        centres = fit.recentred(view.above, weight, centres, track.on_torus, (look.shape, look.size))
    piece = fit.cut(view.above, weight, centres, track.on_torus)
    found = fit.match_all(piece, size)
    shapes, sizes, best = fit.shape_odds(found, view.ground.noise, piece.weight.sum(axis=(1, 2)))
    positions = piece.anchors + np.float32(0.5) + found.offsets[:, look.shape, look.size, look.blur]
    final = replace(track, positions=positions.astype(np.float32))
    window = fit.cut(view.frames, weight, positions, track.on_torus)
    kind = (look.shape, look.size, look.blur)
    mask = fit.look_masks(positions - window.anchors - 0.5, kind, size)
    colors, shares = fit.frame_colors(window, mask**4, look.colors)
    whole = float(mask.sum(axis=(1, 2)).mean())
    visible = (_mask(final, look, size) * covered).sum(axis=(1, 2)) / whole
    return Sprite(
        look,
        final.positions,
        _presence(best, visible, track.seen),
        visible,
        track.on_torus,
        shapes,
        sizes,
        colors,
        shares,
        ranks[index],
    )


def _presence(explained: Array, visible: Array, seen: Array) -> Array:
    """How much of a sprite's usual contrast is there [F]: 0 at a tenth of its usual energy, 1 at half."""
    per_share = explained / np.maximum(visible, 0.2)
    clear = (seen > 0.5) & (visible > 0.8)
    usual = np.median(per_share[clear] if clear.any() else per_share)
    presence: Array = np.clip((per_share / max(float(usual), 1e-6) - 0.1) / 0.4, 0, 1)
    return presence
