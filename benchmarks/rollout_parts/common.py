"""What all sections of `benchmarks/rollouts.py` share: the models, stored rows, figures of the table, the scenes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reelway.actors.generator import Student
from reelway.actors.judge import VERSION
from reelway.kernels.clips import Pixels
from reelway.kernels.metrics.statistics import Interval, bootstrap
from reelway.kernels.sprites.captions import caption
from reelway.kernels.sprites.render import render
from reelway.kernels.sprites.scene import COLORS, GROUNDS, SHAPES, Scene
from reelway.kernels.sprites.splits import POOR_CONTRAST, clip_seed, is_held_out, sample_scene
from reelway.pipelines.evaluation.plan import model_fingerprint
from reelway.pipelines.recipe import fingerprint
from reelway.pipelines.training import write_json
from reelway.pipelines.video import VideoWriter

FRAME_RATE = 16
CLIP = 81  # frames of a training clip
FORMAT = 1  # raised when the meaning of a row changes
Row = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A line of the table. met: None where nothing is asked."""

    name: str
    value: str
    target: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Result:
    """What a section says: its figures, and all that they were made from."""

    figures: list[Figure]
    details: Row


@dataclass(frozen=True)
class Bench:
    """What is measured. cases: of a section that counts them. level: of the sprites world. size: pixels of a side."""

    teacher: Path
    student: Path
    out: Path
    cases: int = 40
    seed: int = 0
    level: int = 1
    size: int = 64
    threads: int = 2
    minutes: float = 10.0
    streams: int = 4
    noises: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)

    @cached_property
    def model(self) -> Student:
        """The student, loaded once for all sections."""
        torch.set_num_threads(self.threads)
        return Student.from_pretrained(self.student)

    @cached_property
    def prints(self) -> dict[str, str]:
        """Fingerprints of the two models."""
        return {"teacher": model_fingerprint(self.teacher), "student": model_fingerprint(self.student)}

    def ledger(self, section: str, models: tuple[str, ...] = ("student",), **more: Any) -> "Ledger":
        """The stored rows of a section. models, more: what decides them besides the seed, the world and the judge."""
        what = {
            "format": FORMAT,
            "judge": VERSION,
            "models": {name: self.prints[name] for name in models},
            "world": [self.seed, self.level, self.size],
            "torch": torch.__version__,
            **more,
        }
        return Ledger(self.out / section, fingerprint(what))


@dataclass(frozen=True)
class Ledger:
    """Rows on disk, a file each. A row is made once; with another fingerprint it is made again."""

    folder: Path
    print: str

    def row(self, name: str, make: Callable[[], Row]) -> Row:
        """The row of that name, from disk or from `make`."""
        path = self.folder / f"{name}.json"
        if path.is_file():
            stored = json.loads(path.read_text())
            if stored["print"] == self.print:
                found: Row = stored["row"]
                return found
        self.folder.mkdir(parents=True, exist_ok=True)
        row = make()
        write_json(path, {"print": self.print, "row": row})
        return row


def write_video(bench: Bench, section: str, name: str, frames: Pixels) -> str:
    """A video to look at; its path below the folder of all results."""
    path = bench.out / section / f"{name}.mp4"
    with VideoWriter(path, FRAME_RATE) as writer:
        writer.write(frames)
    return path.relative_to(bench.out).as_posix()


# --- Scenes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A scene, its caption, and the seed of its rendering."""

    caption: str
    scene: Scene
    clip: int

    def rendered(self, frames: int, bench: Bench) -> np.ndarray:
        """uint8 [frames, size, size, 3]."""
        return render(self.scene, self.clip, frames, level=bench.level, size=bench.size)


def heldout(bench: Bench) -> Iterator[Shown]:
    """Held-out scenes without end."""
    for index in count():
        clip = clip_seed("heldout", index, bench.seed)
        scene = sample_scene("heldout", clip, level=bench.level)
        yield Shown(caption(scene, clip), scene, clip)


def singles(bench: Bench, wanted: int) -> list[Shown]:
    """Held-out scenes with one large sprite that moves."""
    return list(islice((each for each in heldout(bench) if _is_single(each.scene)), wanted))


def _is_single(scene: Scene) -> bool:
    return len(scene.sprites) == 1 and scene.sprites[0].motion != "still" and scene.sprites[0].size == "large"


def changed(shown: Shown, kinds: tuple[str, ...]) -> Shown:
    """The scene with another value of each attribute in `kinds` (color, shape, ground, motion).

    The change is what is asked about, so it makes a combination that training has seen, if there is one.
    """
    options = list(_changes(shown.scene, kinds))
    start = shown.clip % len(options)
    turned = [*options[start:], *options[:start]]
    scene = next((each for each in turned if not is_held_out(each)), turned[0])
    return Shown(caption(scene, shown.clip), scene, shown.clip)


def _changes(scene: Scene, kinds: tuple[str, ...]) -> Iterator[Scene]:
    (sprite,) = scene.sprites
    grounds = _others(GROUNDS, scene.ground) if "ground" in kinds else [scene.ground]
    for ground in grounds:
        visible = [color for color in COLORS if color not in POOR_CONTRAST[ground]]
        colors = _others(visible, sprite.color) if "color" in kinds else [sprite.color]
        shapes = _others(SHAPES, sprite.shape) if "shape" in kinds else [sprite.shape]
        motions = _others(("left", "right", "up", "down"), sprite.motion) if "motion" in kinds else [sprite.motion]
        for color in colors:
            if color not in visible:
                continue
            for shape in shapes:
                for motion in motions:
                    other = replace(sprite, color=color, shape=shape, motion=motion)
                    yield replace(scene, sprites=(other,), ground=ground)


def _others(values: Any, own: str) -> list[str]:
    return [value for value in values if value != own]


# --- Statistics --------------------------------------------------------------------------------------------------


def ratio_of_means(pairs: list[tuple[float, float]]) -> Interval:
    """Mean of the second values over the mean of the first ones, with its interval over cases."""
    return bootstrap(np.array(pairs, np.float64), lambda means: means[:, 1] / np.maximum(means[:, 0], 1e-9))


def mean_of(values: list[float]) -> Interval:
    return bootstrap(np.array(values, np.float64)[:, None], lambda means: means[:, 0])


def told(found: Interval, places: int = 3) -> str:
    """A figure with its 95 % interval, as the table shows it."""
    if not np.isfinite(found.low):
        return f"{found.mean:.{places}f}"
    return f"{found.mean:.{places}f} ({found.low:.{places}f} to {found.high:.{places}f})"


def finite(value: Any) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None


def plain(found: Interval) -> Row:
    """For JSON."""
    return {name: finite(value) for name, value in asdict(found).items()}
