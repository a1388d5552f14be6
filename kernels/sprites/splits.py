"""Which scenes belong to training, validation and the held-out test of new combinations.

Some pairs of (shape, colour) and of (colour, motion), chosen by a hash, never occur in training or
validation; every held-out scene has at least one of them. Each single value occurs in training. Validation
has the pairs of training, under seeds of its own.
"""

import hashlib
import random
from typing import Literal, get_args

from .captions import caption
from .scene import COLORS, GROUNDS, MOTIONS, RELATIONS, SHAPES, SIZES, SPEEDS, Scene, Sprite

Split = Literal["train", "validation", "heldout"]
HELD_OUT_SHARE = 0.1
TWO_SPRITES_SHARE = 0.4
POOR_CONTRAST = {  # ground -> colours that are hard to see on it
    "black": frozenset[str](),
    "white": frozenset({"yellow"}),
    "gray": frozenset({"purple", "green"}),
    "navy": frozenset({"blue", "purple"}),
    "brown": frozenset({"red"}),
}


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _held_out(pairs: list[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    """The tenth of the pairs with the smallest hashes."""
    ranked = sorted(pairs, key=lambda pair: _digest(f"held out {pair[0]} {pair[1]}"))
    return frozenset(ranked[: round(HELD_OUT_SHARE * len(pairs))])


HELD_OUT_SHAPE_COLOR = _held_out([(shape, color) for shape in SHAPES for color in COLORS])
HELD_OUT_COLOR_MOTION = _held_out([(color, motion) for color in COLORS for motion in MOTIONS])


def is_held_out(scene: Scene) -> bool:
    """Whether a scene has a combination that training never shows."""
    return any(
        (sprite.shape, sprite.color) in HELD_OUT_SHAPE_COLOR or (sprite.color, sprite.motion) in HELD_OUT_COLOR_MOTION
        for sprite in scene.sprites
    )


def clip_seed(split: Split, index: int, seed: int = 0) -> int:
    """Seed in [0, 2**63) of the clip number `index` of a split; no two splits share one."""
    return _digest(f"clip {_checked(split)} {index} {seed}") >> 1


def sample_scene(split: Split, seed: int, *, level: int = 0) -> Scene:
    """A scene of a split: one sprite in 60 % of the cases, else two that differ in shape and colour.

    No sprite stands on a ground of `POOR_CONTRAST`. At level 3, where one of two sprites comes or goes, at
    least one of two moves. Raises ValueError on a split that does not exist.
    """
    rng = random.Random(f"scene {_checked(split)} {seed}")
    two = rng.random() < TWO_SPRITES_SHARE
    while True:
        scene = _any_scene(rng, two=two)
        still = all(sprite.motion == "still" for sprite in scene.sprites)
        if is_held_out(scene) == (split == "heldout") and not (level >= 3 and len(scene.sprites) == 2 and still):
            return scene


def prompts(split: Split, count: int, seed: int = 0, level: int = 0) -> list[tuple[str, Scene]]:
    """Captions and their scenes. Number i is sampled and worded under `clip_seed(split, i, seed)`."""
    seeds = [clip_seed(split, index, seed) for index in range(count)]
    scenes = [sample_scene(split, number, level=level) for number in seeds]
    return [(caption(scene, number), scene) for number, scene in zip(seeds, scenes, strict=True)]


def _checked(split: str) -> str:
    if split not in get_args(Split):
        raise ValueError(f"split: must be one of {', '.join(get_args(Split))}, got {split!r}")
    return split


def _any_scene(rng: random.Random, *, two: bool) -> Scene:
    ground = _pick(rng, list(GROUNDS))
    colors = [color for color in COLORS if color not in POOR_CONTRAST[ground]]
    first = _any_sprite(rng, list(SHAPES), colors)
    if not two:
        return Scene((first,), ground, rng.random() < 0.3)
    shapes = [shape for shape in SHAPES if shape != first.shape]
    second = _any_sprite(rng, shapes, [color for color in colors if color != first.color])
    relation = _pick(rng, list(RELATIONS)) if rng.random() < 0.5 else None
    return Scene((first, second), ground, rng.random() < 0.3, relation)


def _any_sprite(rng: random.Random, shapes: list[str], colors: list[str]) -> Sprite:
    tables = (shapes, colors, list(SIZES), list(MOTIONS), list(SPEEDS))
    return Sprite(*[_pick(rng, table) for table in tables])


def _pick(rng: random.Random, options: list[str]) -> str:
    return options[int(rng.random() * len(options))]
