"""The vocabulary of the sprites world: what can be in a video, and what a caption can say about it."""

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


@dataclass(frozen=True)
class Sprite:
    """One moving thing. Values are keys of the tables above; `speed` has no meaning for a still sprite."""

    shape: str
    color: str
    size: str = "large"
    motion: str = "still"
    speed: str = "slow"


@dataclass(frozen=True)
class Scene:
    """What a caption says: one or two sprites on a ground.

    `relation` (two sprites only) says where the first sprite is, seen from the second, in the first frame.
    """

    sprites: tuple[Sprite, ...]
    ground: str
    gradient: bool = False
    relation: str | None = None
