"""The sweep file: which models, prompts, seeds and settings are evaluated."""

from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from ...kernels.sprites.splits import Split
from ..recipe import Positive, Rate, Strict

Mode = Literal["rolling", "overlap", "switch"]
Precision = Literal["float32", "bfloat16"]
Name = Annotated[str, Field(pattern=r"^[\w.+-]+$", max_length=60)]
SPRITES: dict[str, Split] = {"sprites:heldout": "heldout", "sprites:val": "validation", "sprites:train": "train"}
VBENCH = "vbench"


class PromptSet(Strict):
    """Where prompts come from.

    source: sprites:heldout, sprites:val, sprites:train, vbench, or a file that `reelway trajectories` could read.
    count: how many, from the first; all of a file by default, 16 of the sprites. level and seed: of the sprites.
    extended: a text file with one line per prompt of the source: what the models are given instead, while videos
    are named and graded by the prompt itself.
    """

    source: str
    count: Positive | None = None
    level: Annotated[int, Field(ge=0, le=3)] = 0
    seed: int = 0
    extended: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _must_be_known(self) -> "PromptSet":
        prefix = self.source.split(":")[0]
        if prefix == "sprites" and self.source not in SPRITES:
            raise ValueError(f"source: must be one of {', '.join(SPRITES)}, vbench or a file, got {self.source!r}")
        return self

    @property
    def name(self) -> str:
        """As reports call it."""
        return self.source if self.source in (*SPRITES, VBENCH) else Path(self.source).name


class ClipSettings(Strict):
    """The videos' size in pixels, and frames per second."""

    height: Positive
    width: Positive
    frame_rate: Positive = 16


class TeacherSweep(Strict):
    """Settings of the teachers; every combination is run. seconds: length of their clips, the sweep's by default."""

    steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (50,)
    guidance: Annotated[tuple[Rate, ...], Field(min_length=1)] = (5.0,)
    negative_prompt: str = ""
    seconds: Rate | None = None


class StudentSweep(Strict):
    """Settings of the students; every combination is run. A list that is left out stands for the student's own value.

    window, sink: latent frames. mode: "rolling", a window with a sink; "overlap", CausVid's overlapping segments, which
    have neither; "switch", rolling, and in the middle the next prompt of the set takes over.
    """

    steps: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    window: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    sink: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    mode: Annotated[tuple[Mode, ...], Field(min_length=1)] = ("rolling",)

    def combinations(self) -> list[tuple[int | None, int | None, int | None, Mode]]:
        """(steps, window, sink, mode) of every setting; None: the student's own."""
        return list(product(self.steps or [None], self.window or [None], self.sink or [None], self.mode))


class Sweep(Strict):
    """A sweep. models: {name: folder}, a student where the folder has a student.json.

    seeds, seconds: each prompt is made once per seed and per length (a number, or a list). baseline: the model that the
    others are compared with, the first one by default. precision: of the networks' products; float32 on the CPU and
    bfloat16 elsewhere by default.
    """

    models: Annotated[dict[Name, Path], Field(min_length=1)]
    prompts: Annotated[list[PromptSet], Field(min_length=1)]
    clip: ClipSettings
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    seconds: Annotated[tuple[Rate, ...], Field(min_length=1)] = (5.0,)
    teacher: TeacherSweep = TeacherSweep()
    student: StudentSweep = StudentSweep()
    baseline: str | None = None
    precision: Precision | None = None

    @field_validator("seconds", mode="before")
    @classmethod
    def _one_or_many(cls, seconds: Any) -> Any:
        return seconds if isinstance(seconds, list | tuple) else (seconds,)

    @field_validator("seeds", "seconds")
    @classmethod
    def _must_differ(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError("each must stand there once")
        return values

    @model_validator(mode="after")
    def _must_fit_together(self) -> "Sweep":
        names = [prompts.name for prompts in self.prompts]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"prompts: each set must have a name of its own, {twice[0]} stands there twice")
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(f"baseline: must be one of {', '.join(self.models)}, got {self.baseline!r}")
        return self


def read_sweep(path: Path) -> Sweep:
    """Read and validate a sweep file. FileNotFoundError, or ValueError on the first mistake, in one line."""
    if not path.is_file():
        raise FileNotFoundError(f"sweep: no such file: {path}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"sweep {path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"sweep {path}: must be a table of sections, got {type(content).__name__}")
    try:
        return Sweep.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        got = f", got {first['input']!r}" if first["type"] != "value_error" and first["type"] != "missing" else ""
        raise ValueError(f"sweep {path}: {field + ': ' if field else ''}{message}{got}") from None
