"""What makes a transformer a causal student: its blocks, its timesteps, its window. The content of student.json."""

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from ..diffusion.schedule import warp
from .masks import block_sizes, check_window


@dataclass(frozen=True)
class StudentSettings:
    """How a student generates. Frames are latent frames.

    timesteps: the few-step list, falling, without 0, already warped by `shift`.
    window: frames that a block attends to, its own and the sink's included.
    origin: where the student came from (recipe fingerprints, parent model), for the reader.
    height, width: of the pixels that it was trained on; both or none, and none is not known.
    sampling: "few-step", a student. "many-step" is a causal model of the flow itself, which takes many guided Euler
    steps; its timesteps are those of the students that are made from it.
    """

    block: int = 3
    first_block: int | None = None
    timesteps: tuple[float, ...] = tuple(warp([1000, 750, 500, 250], shift=5.0))
    shift: float = 5.0
    window: int = 21
    sink: int = 3
    origin: dict[str, Any] = field(default_factory=dict)
    height: int | None = None
    width: int | None = None
    sampling: Literal["few-step", "many-step"] = "few-step"

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", tuple(float(value) for value in self.timesteps))
        check_window(self.window, self.sink, max(self.block, self.first_block or 0))
        levels = self.timesteps
        falling = all(later < earlier for earlier, later in pairwise(levels))
        if not levels or levels[0] > 1000 or levels[-1] <= 0 or not falling:
            raise ValueError(f"student: timesteps must fall within (0, 1000], got {list(levels)}")
        size = (self.height, self.width)
        if size != (None, None) and not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(f"student: height and width must both be pixels, or neither be there, got {size}")
        if self.sampling not in ("few-step", "many-step"):
            raise ValueError(f"student: sampling must be few-step or many-step, got {self.sampling!r}")

    def size_of(self, start: int) -> int:
        """Frames of the block that begins at frame `start` of the stream."""
        return self.first_block if start == 0 and self.first_block is not None else self.block

    def blocks(self, frames: int) -> list[int]:
        """Block sizes of a clip of `frames` latent frames; ValueError if they do not fill whole blocks."""
        return block_sizes(frames, self.block, self.first_block)

    def write(self, folder: Path) -> None:
        """Write `student.json`."""
        (folder / "student.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "StudentSettings":
        """Read `student.json`; FileNotFoundError if the model is not a student, ValueError for a wrong field."""
        path = folder / "student.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: not a student (no student.json)")
        try:
            return cls(**json.loads(path.read_text()))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: {error}") from None
