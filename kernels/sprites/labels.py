"""The truth about a scene and a clip as numbers: what networks are asked for while they learn the world.

Two kinds: the answers to questions about a caption, and a map of what each token of a clip shows. Both are aids of
training alone; nothing that is exported, sampled or graded uses them.
"""

import numpy as np
from numpy.typing import NDArray

from .render import Track
from .scene import COLORS, GROUNDS, MOTIONS, RELATIONS, SHAPES, SIZES, SPEEDS, Scene

SPRITE_ATTRIBUTES = (
    ("shape", SHAPES),
    ("color", tuple(COLORS)),
    ("size", tuple(SIZES)),
    ("motion", MOTIONS),
    ("speed", tuple(SPEEDS)),
)
MAP_ATTRIBUTES = SPRITE_ATTRIBUTES[:3]  # those that one picture shows
MAP_CHANNELS = sum(len(values) for _, values in MAP_ATTRIBUTES) + 4 + len(GROUNDS) + 1
STEPS_PER_CELL = 8.0  # a velocity of a cell in so many frames counts as 1

Floats = NDArray[np.float32]


def question_sizes() -> tuple[int, ...]:
    """How many answers each question of `answers` has."""
    sprite = [len(values) + 1 for _, values in SPRITE_ATTRIBUTES]
    return (*sprite, *sprite, len(GROUNDS), 2, len(RELATIONS) + 1)


def answers(scene: Scene) -> tuple[int, ...]:
    """Of a scene: five attributes of each of two sprites (0: there is none), ground, gradient, relation (0: none)."""
    sprites = [
        1 + values.index(getattr(sprite, name)) for sprite in scene.sprites for name, values in SPRITE_ATTRIBUTES
    ]
    missing = [0] * (2 * len(SPRITE_ATTRIBUTES) - len(sprites))
    relation = 0 if scene.relation is None else 1 + RELATIONS.index(scene.relation)
    return (*sprites, *missing, list(GROUNDS).index(scene.ground), int(scene.gradient), relation)


def token_maps(scene: Scene, track: Track, grid: int, temporal_factor: int = 4) -> Floats:
    """What each cell of a grid × grid raster shows, float32 [F, grid · grid, MAP_CHANNELS].

    F latent frames: the first stands for the first picture, each other one for the mean of the next `temporal_factor`.
    Channels, each weighed with the share of the cell that the sprite's box covers and summed over sprites: shape,
    colour and size (one-hot), the sprite's centre (x, y) seen from the cell's in cells, its velocity (x, y) in cells
    per `STEPS_PER_CELL` frames; then ground (one-hot) and gradient, the same for all cells.
    """
    frames, sprites = track.positions.shape[:2]
    cover = _cover(track, grid)
    wide, high = _offsets(track, 0, grid), _offsets(track, 1, grid)
    shape = (frames, sprites, grid, grid)
    speeds = _steps(track) * (grid * STEPS_PER_CELL)
    maps = [
        cover * np.broadcast_to(value, shape)
        for value in (wide[:, :, None, :], high[:, :, :, None], *(speeds[..., axis, None, None] for axis in (0, 1)))
    ]
    looks = np.stack([_looks(scene, index) for index in range(sprites)])  # [S, C]
    seen = np.einsum("fsyx,sc->fyxc", cover, looks)
    moving = np.stack(maps, axis=-1).sum(axis=1)
    whole = np.broadcast_to(_whole(scene), (frames, grid, grid, len(GROUNDS) + 1))
    pictures = np.concatenate([seen, moving, whole], axis=-1).reshape(frames, grid * grid, MAP_CHANNELS)
    rest = pictures[1:].reshape(-1, temporal_factor, grid * grid, MAP_CHANNELS).mean(axis=1)
    return np.concatenate([pictures[:1], rest]).astype(np.float32)


def _looks(scene: Scene, index: int) -> Floats:
    sprite = scene.sprites[index]
    parts = [np.eye(len(values))[values.index(getattr(sprite, name))] for name, values in MAP_ATTRIBUTES]
    return np.concatenate(parts).astype(np.float32)


def _whole(scene: Scene) -> Floats:
    ground = np.eye(len(GROUNDS))[list(GROUNDS).index(scene.ground)]
    return np.append(ground, float(scene.gradient)).astype(np.float32)


def _cover(track: Track, grid: int) -> Floats:
    """Share of each cell that the box of each sprite covers, [F, S, grid (y), grid (x)]."""
    edges = np.arange(grid) / grid
    lengths = []
    for axis in (0, 1):
        low = (track.positions[:, :, axis] - track.radii)[..., None]
        high = (track.positions[:, :, axis] + track.radii)[..., None]
        images = [
            np.clip(np.minimum(high + shift, edges + 1 / grid) - np.maximum(low + shift, edges), 0, None)
            for shift in (-1, 0, 1)
        ]
        lengths.append(np.where(track.wraps[..., None], sum(images), images[1]) * grid)
    cover = lengths[1][:, :, :, None] * lengths[0][:, :, None, :]
    shown: Floats = cover * track.visible[:, :, None, None]
    return shown


def _offsets(track: Track, axis: int, grid: int) -> Floats:
    """From each cell's centre to each sprite's along an axis, in cells, the short way round; [F, S, grid]."""
    centres = ((np.arange(grid) + 0.5) / grid).astype(np.float32)
    away = track.positions[:, :, axis, None] - centres
    nearest = np.where(track.wraps[..., None], _short_way(away), away)
    return nearest * grid


def _steps(track: Track) -> Floats:
    """Way of each sprite from each frame to the next, [F, S, 2] in frame sizes; the last step is repeated."""
    if len(track.positions) < 2:
        return np.zeros_like(track.positions)
    ways = np.diff(track.positions, axis=0)
    steps = np.where(track.wraps[1:, :, None] & track.wraps[:-1, :, None], _short_way(ways), ways)
    return np.concatenate([steps, steps[-1:]])


def _short_way(ways: Floats) -> Floats:
    return ways - np.rint(ways)
