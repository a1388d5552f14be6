"""How fast things move between two frames: block matching on a small copy of the picture.

A stand-in for the optical flow network behind VBench's dynamic degree (arXiv 2311.17982): no weights, a few
milliseconds a frame, for translation of up to about one short side of the picture per second at 16 fps. A block's
speed is good to a tenth in the median; the fastest twentieth reads up to four tenths high between whole pixels of the
small copy, so compare speeds with each other and not with a flow network's.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from .frames import Array, Bools

Places = NDArray[np.intp]

GRID = 64  # pixels of the small copy's short side
BLOCK = 8  # pixels of the small copy
REACH = 4  # pixels of the small copy that a block may have moved
UNEXPLAINED = 0.35  # share of a block's change that a displacement may leave
UNEXPLAINED_AT_RIM = 0.1  # where the true match may lie outside, what is left is often chance
NOISE = 2.0  # grey levels; less change than this is no motion
NEARER = 0.01  # of a block's change, per pixel: of two equal matches the nearer one
TOP_SHARE = 0.05  # of the picture: VBench looks at the fastest twentieth


def reduction(height: int, width: int) -> int:
    """Pixels of the picture, each way, that are one pixel of the small copy."""
    return max(1, round(min(height, width) / GRID))


def block_side(height: int, width: int) -> int:
    """Pixels of the picture, each way, that are one block."""
    return BLOCK * reduction(height, width)


def block_means(values: Array, side: int) -> Array:
    """Means of values [N, H, W] over blocks of `side` pixels [N, H // side, W // side]; a rest is left out."""
    rows, columns = values.shape[1] // side, values.shape[2] // side
    whole = values[:, : rows * side, : columns * side]
    return np.asarray(_averaging(rows, side) @ whole @ _averaging(columns, side).T)


@cache
def _averaging(blocks: int, side: int) -> Array:
    """The matrix [blocks, blocks * side] that takes a line to the means of its blocks: products are quick."""
    return np.asarray(np.kron(np.eye(blocks, dtype=np.float32), np.full((1, side), 1 / side, np.float32)))


def block_speeds(before: Array, after: Array) -> Array:
    """How far each block of `before` has moved in `after` [N, rows, columns], pixels of the picture.

    before, after: brightness [N, H, W] of N pairs of frames. 0 where nothing moved, where a block has no
    texture, and where no displacement explains the change (flicker, a cut). Blocks are compared less their
    means, so that a change of brightness is no motion. Of the displacements along an edge the shortest counts.
    """
    factor = reduction(*before.shape[1:])
    costs = _costs(block_means(before, factor), block_means(after, factor))
    still = costs[REACH, REACH]
    offsets = np.arange(-REACH, REACH + 1, dtype=np.float32)
    lengths = np.hypot(offsets[:, None], offsets)[:, :, None, None, None]
    ranked = costs + NEARER * lengths * still
    best = ranked.reshape(len(offsets) ** 2, *still.shape).argmin(axis=0)
    row, column = np.divmod(best, len(offsets))
    down, left = _refined(costs, row, column, 0)
    right, lost = _refined(costs, row, column, 1)
    reached = np.take_along_axis(costs.reshape(-1, *still.shape), best[None], axis=0)[0]
    allowed = np.where(np.isinf(costs).any(axis=(0, 1)), UNEXPLAINED_AT_RIM, UNEXPLAINED)
    moves = (still > NOISE**2) & (reached - left - lost < allowed * still)
    speeds = np.hypot(row - REACH + down, column - REACH + right) * factor
    return np.where(moves, speeds, 0).astype(np.float32)


def top_speed(speeds: Array) -> Array:
    """Mean over the fastest twentieth of the blocks, for each pair [N]; in the unit of speeds [N, rows, columns]."""
    flat = np.sort(speeds.reshape(len(speeds), -1), axis=1)
    return np.asarray(flat[:, -max(1, round(TOP_SHARE * flat.shape[1])) :].mean(axis=1))


def at_rest(speeds: Array) -> Bools:
    """Which blocks neither move nor touch one that does [N, rows, columns]."""
    padded = np.pad(speeds > 0, ((0, 0), (1, 1), (1, 1)))
    rows, columns = speeds.shape[1:]
    touched = np.zeros(speeds.shape, bool)
    for down in range(3):
        for right in range(3):
            touched |= padded[:, down : down + rows, right : right + columns]
    return ~touched


def _costs(before: Array, after: Array) -> Array:
    """Variance of the difference of each block from each displaced one [2R+1, 2R+1, N, rows, columns].

    Infinite where the displaced block leaves the picture.
    """
    count, height, width = before.shape
    rows, columns = height // BLOCK, width // BLOCK
    inside = np.pad(np.ones((1, height, width), np.float32), ((0, 0), (REACH, REACH), (REACH, REACH)))
    padded = np.pad(after, ((0, 0), (REACH, REACH), (REACH, REACH)), mode="edge")
    costs = np.empty((2 * REACH + 1, 2 * REACH + 1, count, rows, columns), np.float32)
    for down in range(2 * REACH + 1):
        for right in range(2 * REACH + 1):
            window = np.s_[:, down : down + height, right : right + width]
            gap = padded[window] - before
            spread = block_means(gap * gap, BLOCK) - block_means(gap, BLOCK) ** 2
            costs[down, right] = np.where(block_means(inside[window], BLOCK) == 1, spread, np.inf)
    return costs


def _refined(costs: Array, row: Places, column: Places, axis: int) -> tuple[Array, Array]:
    """The parabola through the best cost and its two neighbours along an axis: its lowest point, and how far down."""
    last = 2 * REACH
    place = [row, column]
    steps = []
    for step in (-1, 0, 1):
        moved = list(place)
        moved[axis] = np.clip(place[axis] + step, 0, last)
        steps.append(_at(costs, moved[0], moved[1]))
    back, here, ahead = steps
    edge = (place[axis] == 0) | (place[axis] == last)
    known = ~edge & np.isfinite(back) & np.isfinite(ahead)
    back, ahead = np.where(known, back, here), np.where(known, ahead, here)
    bend = back - 2 * here + ahead
    safe = np.where(bend > 1e-6, bend, 1)
    offset = np.where(bend > 1e-6, np.clip((back - ahead) / (2 * safe), -0.5, 0.5), 0)
    return offset.astype(np.float32), (offset**2 * bend / 2).astype(np.float32)


def _at(costs: Array, row: Places, column: Places) -> Array:
    pair, down, right = np.indices(row.shape)
    return np.asarray(costs[row, column, pair, down, right])
