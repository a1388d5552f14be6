"""The vocabulary of the sprites world: what can be in a video, and what a caption can say about it."""

from collections.abc import Collection
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 50),
    "green": (40, 170, 60),
    "cyan": (60, 215, 225),
    "blue": (50, 90, 235),
    "purple": (140, 50, 180),
    "pink": (250, 130, 190),
}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 14),
    "white": (244, 244, 240),
    "gray": (128, 130, 134),
    "navy": (18, 26, 78),
    "brown": (104, 66, 36),
}
SIZES: dict[str, float] = {"small": 0.11, "large": 0.19}  # radius over the frame's height
MOTIONS = ("left", "right", "up", "down", "diagonal", "circling", "bouncing", "still")
SPEEDS: dict[str, float] = {"slow": 0.22, "fast": 0.55}  # frame heights per second
RELATIONS = ("left of", "right of", "above", "below")
FRAMES_PER_SECOND = 16
TURNING_LEVEL, TEXTURED_LEVEL = 1, 2  # from which on moving sprites turn, and sprites and grounds have textures


@dataclass(frozen=True)
class Sprite:
    """One moving thing. Values are keys of the tables above; `speed` has no meaning for a still sprite.

    So a still sprite always keeps "slow": equal pictures are equal sprites. Raises ValueError on a value that
    the tables do not know.
    """

    shape: str
    color: str
    size: str = "large"
    motion: str = "still"
    speed: str = "slow"

    def __post_init__(self) -> None:
        _check("shape", self.shape, SHAPES)
        _check("color", self.color, COLORS)
        _check("size", self.size, SIZES)
        _check("motion", self.motion, MOTIONS)
        _check("speed", self.speed, SPEEDS)
        if self.motion == "still":
            object.__setattr__(self, "speed", "slow")


@dataclass(frozen=True)
class Scene:
    """What a caption says: one or two sprites on a ground.

    `relation` (two sprites only) says where the first sprite is, seen from the second, in the first frame.
    Raises ValueError on values that the tables do not know and on a relation that has nothing to relate.
    """

    sprites: tuple[Sprite, ...]
    ground: str
    gradient: bool = False
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.sprites) not in (1, 2):
            raise ValueError(f"sprites: a scene has one or two of them, got {len(self.sprites)}")
        _check("ground", self.ground, GROUNDS)
        if self.relation is not None:
            _check("relation", self.relation, RELATIONS)
            if len(self.sprites) == 1:
                raise ValueError(f"relation: needs two sprites, got one and {self.relation!r}")


def _check(field: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"{field}: must be one of {', '.join(known)}, got {value!r}")
