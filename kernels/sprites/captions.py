"""Captions of scenes as people write them, and the way back from a text to a scene."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .scene import Scene, Sprite

# What a person may say for a value; the first word is the usual one, and `caption` uses the words up to "|".
# What follows is understood by `parse` only.
SHAPE_WORDS = {
    "circle": "circle disc ball | dot",
    "square": "square box | block",
    "triangle": "triangle",
    "diamond": "diamond | rhombus",
    "star": "star",
    "cross": "cross plus",
}
COLOR_WORDS = {
    "red": "red | crimson scarlet",
    "orange": "orange | amber",
    "yellow": "yellow | golden",
    "green": "green | emerald",
    "cyan": "cyan turquoise | teal",
    "blue": "blue",
    "purple": "purple violet",
    "pink": "pink | magenta",
}
GROUND_WORDS = {"black": "black", "white": "white", "gray": "gray grey", "navy": "navy", "brown": "brown"}
SIZE_WORDS = {"small": "small little | tiny", "large": "large big | huge"}
SPEED_WORDS = {"slow": "slowly gently | slow", "fast": "fast quickly | rapidly swiftly"}
MOTION_WORDS = {
    "left": "left leftward | leftwards",
    "right": "right rightward | rightwards",
    "up": "up upward | upwards rising rises",
    "down": "down downward | downwards falling falls",
    "diagonal": "diagonally | diagonal",
    "circling": "circling circles | orbiting orbits",
    "bouncing": "bouncing bounces",
    "still": "still motionless | stationary resting rests not static",
}
RELATION_WORDS = {"above": "above", "below": "below | under beneath"}
GRADIENT_WORDS = "gradient fades fading"
GROUND_NOUNS = "ground background | backdrop"
MOVING_WORDS = "moving moves drifting drifts gliding glides | sliding slides floating floats flying flies"
FILLER_WORDS = (
    ". , : ; a an and around at from in into is it its of off on over stays staying that the there to "
    "two shapes while with | one are by which toward towards across against frame edge edges picture video"
)

# Several words that mean one thing. The longest phrase wins.
PHRASES: dict[str, tuple[str, str]] = {
    "left of": ("relation", "left of"),
    "to the left of": ("relation", "left of"),
    "right of": ("relation", "right of"),
    "to the right of": ("relation", "right of"),
    "in a circle": ("motion", "circling"),
    "in circles": ("motion", "circling"),
    "dark blue": ("ground", "navy"),
    "from left to right": ("motion", "right"),
    "from right to left": ("motion", "left"),
}

DEFAULT_SPRITE = Sprite("circle", "red")
DEFAULT_GROUND = "black"
DEFAULT_MOTION = "right"  # of a sprite that moves, or has a speed, in no named direction


def _split(words: str) -> tuple[list[str], list[str]]:
    """Words that captions use, and all words that are understood."""
    used, _, more = words.partition("|")
    return used.split(), used.split() + more.split()


def _meanings() -> dict[str, tuple[str, str]]:
    """Word -> (what it tells, value). Filler tells nothing."""
    tables = {
        "shape": SHAPE_WORDS,
        "color": COLOR_WORDS,
        "ground": GROUND_WORDS,
        "size": SIZE_WORDS,
        "speed": SPEED_WORDS,
        "motion": MOTION_WORDS,
        "relation": RELATION_WORDS,
        "gradient": {"yes": GRADIENT_WORDS},
        "moving": {"yes": MOVING_WORDS},
        "filler": {"": FILLER_WORDS + " " + GROUND_NOUNS.replace("|", "")},
    }
    meanings: dict[str, tuple[str, str]] = {}
    for kind, table in tables.items():
        for value, words in table.items():
            for word in _split(words)[1]:
                assert word not in meanings, f"{word} has two meanings"
                meanings[word] = (kind, value)
    return meanings


MEANINGS = _meanings()
VOCABULARY: tuple[str, ...] = tuple(sorted({*MEANINGS, *(w for phrase in PHRASES for w in phrase.split())}))


def tokens(text: str) -> list[str]:
    """Lower-case words and punctuation marks of a text, as `VOCABULARY` lists them."""
    return re.findall(r"[^\W_]+|[.,:;]", text.lower())


# --- scene to text ------------------------------------------------------------------------------------


class _Writer:
    """Phrases for the parts of one scene, with words chosen by a seeded generator."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.scene = scene
        self.rng = rng

    def pick(self, options: list[str]) -> str:
        """The first option in half of the cases, else any."""
        return options[0] if self.rng.random() < 0.5 else options[int(self.rng.random() * len(options))]

    def word(self, table: dict[str, str], value: str) -> str:
        return self.pick(_split(table[value])[0])

    def noun(self, index: int) -> str:
        """ "a small red star" """
        sprite = self.scene.sprites[index]
        size, color = self.word(SIZE_WORDS, sprite.size), self.word(COLOR_WORDS, sprite.color)
        return f"a {size} {color} {self.word(SHAPE_WORDS, sprite.shape)}"

    def again(self, index: int) -> str:
        """ "the star": a sprite that the text has named before."""
        return f"the {self.word(SHAPE_WORDS, self.scene.sprites[index].shape)}"

    def does(self, index: int) -> str:
        """ "moves slowly to the left" """
        return self._motion(self.scene.sprites[index], participle=False)

    def doing(self, index: int) -> str:
        """ "moving slowly to the left" """
        return self._motion(self.scene.sprites[index], participle=True)

    def _motion(self, sprite: Sprite, *, participle: bool) -> str:
        if sprite.motion == "still":
            return self.pick(["staying still", "motionless"] if participle else ["stays still", "is motionless"])
        if sprite.motion == "circling":
            own, ways = ("circling" if participle else "circles"), ["in circles", "in a circle"]
        elif sprite.motion == "bouncing":
            own, ways = ("bouncing" if participle else "bounces"), []
        else:
            own, ways = "", self._ways(sprite.motion)
        verbs = ["moving", "drifting", "gliding"] if participle else ["moves", "drifts", "glides"]
        adverb = self.word(SPEED_WORDS, sprite.speed)
        if own and (not ways or self.rng.random() < 0.5):
            where = self.pick(["", "", "off the edges"]) if sprite.motion == "bouncing" else ""
            return " ".join([own, adverb, where]).strip()
        parts = [adverb, self.pick(ways)]
        return " ".join([self.pick(verbs), *(parts if self.rng.random() < 0.7 else parts[::-1])])

    def _ways(self, motion: str) -> list[str]:
        words = _split(MOTION_WORDS[motion])[0]
        return [f"to the {motion}", *words] if motion in ("left", "right") else words

    def where(self) -> str:
        """ "on a navy background" """
        color = self.word(GROUND_WORDS, self.scene.ground)
        noun = self.pick(_split(GROUND_NOUNS)[0])
        if self.scene.gradient:
            ways = [
                f"a {noun} that fades from {color}",
                f"a {color} gradient",
                f"a {noun} fading from {color}",
            ]
            return f"{self.pick(['over', 'on'])} {self.pick(ways)}"
        return self.pick([f"on {color}", f"on a {color} {noun}", f"over a {color} {noun}"])

    def relation(self) -> str:
        relation = self.scene.relation
        assert relation is not None
        return self.pick([relation, f"to the {relation}"]) if relation.endswith(" of") else relation


def _one(w: _Writer) -> list[Callable[[], str]]:
    return [
        lambda: f"{w.noun(0)} {w.does(0)} {w.where()}",
        lambda: f"{w.noun(0)} {w.doing(0)} {w.where()}",
        lambda: f"{w.where()}, {w.noun(0)} {w.does(0)}",
        lambda: f"{w.noun(0)} that {w.does(0)}, {w.where()}",
        lambda: f"{w.noun(0)}, {w.doing(0)}, {w.where()}",
    ]


def _two(w: _Writer) -> list[Callable[[], str]]:
    return [
        lambda: f"{w.noun(0)} {w.does(0)} and {w.noun(1)} {w.does(1)} {w.where()}",
        lambda: f"two shapes {w.where()}: {w.noun(0)} {w.doing(0)} and {w.noun(1)} that {w.does(1)}",
        lambda: f"{w.where()}, {w.noun(0)} {w.does(0)} while {w.noun(1)} {w.does(1)}",
        lambda: f"{w.noun(0)}, {w.doing(0)}, with {w.noun(1)}, {w.doing(1)}, {w.where()}",
    ]


def _related(w: _Writer) -> list[Callable[[], str]]:
    first, second = w.scene.sprites
    side_by_side: list[Callable[[], str]] = [
        lambda: f"{w.noun(0)} {w.doing(0)}, {w.relation()} {w.noun(1)} that {w.does(1)} {w.where()}",
        lambda: f"{w.where()}, {w.noun(0)} that {w.does(0)}, {w.relation()} {w.noun(1)}, {w.doing(1)}",
    ]
    named_again: list[Callable[[], str]] = [
        lambda: (
            f"{w.noun(0)} {w.relation()} {w.noun(1)} {w.where()}. {w.again(0)} {w.does(0)}, {w.again(1)} {w.does(1)}"
        ),
        lambda: (
            f"two shapes {w.where()}: {w.noun(0)} {w.relation()} {w.noun(1)}. {w.again(0)} {w.does(0)} "
            f"while {w.again(1)} {w.does(1)}"
        ),
    ]
    return side_by_side + (named_again if first.shape != second.shape else [])


def caption(scene: Scene, seed: int) -> str:
    """A lower-case English text that tells everything that the scene fixes.

    The seed chooses the template and the synonyms. `parse` gives the same scene back.
    """
    rng = random.Random(f"caption {seed}")
    writer = _Writer(scene, rng)
    templates = _one if len(scene.sprites) == 1 else _two if scene.relation is None else _related
    options = templates(writer)
    return options[int(rng.random() * len(options))]()


# --- text to scene ------------------------------------------------------------------------------------

ATTRIBUTES = frozenset({"color", "size", "speed", "motion", "moving", "ground"})
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BEHIND = frozenset({"on", "over", "against"})


@dataclass(frozen=True)
class _Item:
    """A word or phrase and what it tells; kind "unknown" for a word without a meaning here."""

    text: str
    kind: str
    value: str


@dataclass
class _Mention:
    """What the text says about one sprite."""

    values: dict[str, str] = field(default_factory=dict)
    moves: bool = False

    def take(self, item: _Item) -> bool:
        """Note one attribute. False if it contradicts an earlier word."""
        if item.kind == "moving":
            self.moves = True
            return True
        return self.values.setdefault(item.kind, item.value) == item.value

    def sprite(self) -> Sprite:
        moving = self.moves or "speed" in self.values
        default = replace(DEFAULT_SPRITE, motion=DEFAULT_MOTION if moving else DEFAULT_SPRITE.motion)
        return replace(default, **self.values)


def parse(text: str) -> tuple[Scene, list[str]]:
    """Read a text: the scene, and the words that did not go into it, in order.

    Those words are unknown, or contradict an earlier word, or ask for what the world does not have (a third
    sprite, a black star, a red ground). What the text leaves open is `DEFAULT_SPRITE` and `DEFAULT_GROUND`;
    a sprite that moves in no named direction moves to the `DEFAULT_MOTION`.
    """
    items = _items(tokens(text))
    owners, mentions = _assign(items)
    told: dict[str, str] = {}
    unused: list[str] = []
    for index, (item, owner) in enumerate(zip(items, owners, strict=True)):
        if item.kind == "relation":
            relation = _seen_from_second(items, owners, index)
            kept = relation is not None and told.setdefault("relation", relation) == relation
        elif item.kind in ("ground", "gradient") and owner is None:
            kept = told.setdefault(item.kind, item.value) == item.value
        elif item.kind in ATTRIBUTES or item.kind == "shape":
            kept = owner is not None and item.kind != "ground" and mentions[owner].take(item)
        else:
            kept = item.kind == "filler"
        unused += [] if kept else [item.text]
    sprites = tuple(mention.sprite() for mention in mentions)
    scene = Scene(sprites, told.get("ground", DEFAULT_GROUND), "gradient" in told, told.get("relation"))
    return scene, list(dict.fromkeys(unused))


def _seen_from_second(items: list[_Item], owners: list[int | None], index: int) -> str | None:
    """A relation as seen from the second sprite; None if it does not stand between two known sprites."""
    named = [(i, owner) for i, owner in enumerate(owners) if items[i].kind == "shape"]
    before = [owner for i, owner in named if i < index]
    after = [owner for i, owner in named if i > index]
    ends = (before[-1] if before else None, after[0] if after else None)
    if ends not in ((0, 1), (1, 0)):
        return None
    return items[index].value if ends == (0, 1) else OPPOSITES[items[index].value]


def _items(words: list[str]) -> list[_Item]:
    items: list[_Item] = []
    while words:
        longest = max((n for n in range(2, 5) if " ".join(words[:n]) in PHRASES), default=1)
        text, words = " ".join(words[:longest]), words[longest:]
        kind, value = PHRASES.get(text) or MEANINGS.get(text) or _plural(text)
        if text == "circles" and items and items[-1].kind in ("color", "size"):
            kind, value = "shape", "circle"
        items.append(_Item(text, kind, value))
    return items


def _plural(word: str) -> tuple[str, str]:
    kind, value = MEANINGS.get(word.removesuffix("s"), ("unknown", ""))
    return (kind, value) if kind == "shape" else ("unknown", "")


def _assign(items: list[_Item]) -> tuple[list[int | None], list[_Mention]]:
    """The sprite that each item speaks of (None: the whole picture, or nothing), and a mention per sprite.

    Attributes before a noun belong to its phrase ("a fast red star"), what follows to the last noun, and what
    stands before every phrase to the first. "the star" speaks of a sprite named before.
    """
    nouns = [i for i, item in enumerate(items) if item.kind == "shape"]
    sprites: list[list[_Item]] = []
    owners: list[int | None] = [0] * len(items)
    in_phrase = [False] * len(items)
    for noun in nouns:
        start = _phrase_start(items, noun)
        phrase = items[start : noun + 1]
        owner = _same_as(sprites, phrase) if start and items[start - 1].text == "the" else None
        if owner is None and len(sprites) < 2:
            owner = len(sprites)
            sprites.append(phrase)
        owners[start:] = [owner] * (len(items) - start)
        in_phrase[start : noun + 1] = [True] * len(phrase)
    for i, item in enumerate(items):
        whole = item.kind in ("ground", "gradient") or (item.kind == "color" and _is_ground(items, i))
        if whole and not in_phrase[i]:
            owners[i] = None
    return owners, [_Mention() for _ in range(max(1, len(sprites)))]


def _phrase_start(items: list[_Item], noun: int) -> int:
    """First item of the attributes before a noun.

    Motion is part of them only behind an article or a mark: in "a star moves left small blue square" it
    belongs to the noun before.
    """
    start = noun
    while start and items[start - 1].kind in ATTRIBUTES:
        start -= 1
    if start and items[start - 1].kind == "shape":
        start = noun
        while items[start - 1].kind in ("color", "size"):
            start -= 1
    return start


def _same_as(sprites: list[list[_Item]], phrase: list[_Item]) -> int | None:
    """The sprite named before that has the shape of this phrase and no other colour."""
    wanted = {item.kind: item.value for item in phrase if item.kind in ("shape", "color")}
    for index, named in enumerate(sprites):
        known = {item.kind: item.value for item in named}
        if all(known.get(kind, value) == value for kind, value in wanted.items()):
            return index
    return None


def _is_ground(items: list[_Item], index: int) -> bool:
    """Whether a sprite's colour is said of the ground: "on a red background", "over red"."""
    follower = items[index + 1] if index + 1 < len(items) else None
    if follower is not None and (follower.kind == "gradient" or follower.text in _split(GROUND_NOUNS)[1]):
        return True
    before = [item.text for item in items[:index] if item.text not in ("a", "an", "the")]
    return bool(before) and before[-1] in BEHIND
