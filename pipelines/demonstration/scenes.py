"""What the demo's videos show: prompts of the sprites world, and the scenes of the rollouts."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...kernels.sprites.captions import caption
from ...kernels.sprites.scene import COLORS, SHAPES, Scene
from ...kernels.sprites.splits import POOR_CONTRAST, Split, clip_seed, is_held_out, prompts

SCENES = 200  # that the rollouts' scenes are looked for in
LASTING = ("bouncing", "circling")  # motions that can be told from each other for as long as one likes


@dataclass(frozen=True)
class Shown:
    """A scene as a caption and as a rendering: `render(scene, clip, ...)`."""

    caption: str
    scene: Scene
    clip: int


@dataclass(frozen=True)
class Captions:
    """The rollouts' prompts. image, video: the scene that is rendered for the model to begin with.

    redrawn: the prompt under which the video is redrawn. switched: the prompts before and after the switch.
    """

    clip: str
    minute: str
    image: Shown
    video: Shown
    redrawn: str
    switched: tuple[str, str]

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def distinct(split: Split, count: int, seed: int, level: int) -> list[str]:
    """The first captions of a split, each once."""
    wanted: dict[str, None] = {}
    tried = count
    while len(wanted) < count:
        wanted = dict.fromkeys(text for text, _ in prompts(split, tried, seed, level))
        tried *= 2
    return list(wanted)[:count]


def choose(graded: list[str], seed: int, level: int) -> Captions:
    """Scenes for the rollouts: held-out ones with a single sprite that moves, no two alike. graded: prompts that every
    model is graded on; the clip that teacher and student make of one prompt is the first of them with one sprite.
    """
    found = list(_singles(seed, level))
    first = next((each.caption for each in found if each.caption in graded), graded[0])
    rest = [each for each in found if each.caption not in graded]
    lasting = [each for each in rest if each.scene.sprites[0].motion in LASTING]
    others = [each for each in rest if each not in lasting]
    before = lasting[1]
    return Captions(
        clip=first,
        minute=lasting[0].caption,
        image=others[0],
        video=others[1],
        redrawn=caption(_changed(others[1].scene, shape=False), others[1].clip),
        switched=(before.caption, caption(_changed(before.scene, shape=True), before.clip)),
    )


def _singles(seed: int, level: int) -> Iterator[Shown]:
    for index, (text, scene) in enumerate(prompts("heldout", SCENES, seed, level)):
        if len(scene.sprites) == 1 and scene.sprites[0].motion != "still" and scene.sprites[0].size == "large":
            yield Shown(text, scene, clip_seed("heldout", index, seed))


def _changed(scene: Scene, *, shape: bool) -> Scene:
    """The scene in another colour that stands out from its ground, and with another shape if that is wanted.

    The change is what is shown here, so it makes a combination that training has seen, if there is one.
    """
    (sprite,) = scene.sprites
    colors = [color for color in COLORS if color not in POOR_CONTRAST[scene.ground] | {sprite.color}]
    shapes = [each for each in SHAPES if each != sprite.shape] if shape else [sprite.shape]
    made = [replace(scene, sprites=(replace(sprite, color=c, shape=s),)) for s in shapes for c in reversed(colors)]
    return next((each for each in made if not is_held_out(each)), made[0])
