"""What `reelway rollout` was asked for, and what can be said of it before any model is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..actors.bench_report import FRAME_RATE
from ..actors.modes import Mode, Redraw
from ..kernels.causal.student import StudentSettings
from .places import check_file
from .schedule import Schedule, length_of
from .video import VideoFile, check_target, read_image

if TYPE_CHECKING:
    from ..actors.generator import Student

SMALLEST = 16  # pixels: an image is read at this size to see whether it can be read


@dataclass(frozen=True)
class Plan:
    """What decides a video besides its prompt and what it begins with. samples: videos of one prompt.

    settings: student.json's, changed as the user said. height, width: None for what the model was trained on.
    """

    student: Path
    settings: StudentSettings
    seconds: float | None
    blocks: int | None
    seed: int
    samples: int
    height: int | None
    width: int | None
    mode: Mode
    segment: int
    device: str
    dtype: torch.dtype

    def load(self) -> "Student":
        """The networks on their device."""
        from ..actors.generator import Student  # here only: the text encoder's library takes seconds to import

        return Student.from_pretrained(self.student, self.device, dtype=self.dtype, settings=self.settings)

    def size(self, student: "Student") -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height or student.default_size[0], self.width or student.default_size[1]


@dataclass(frozen=True)
class Order:
    """What a user asked for. image, video, extend: at most one; redraw: with `video`."""

    plan: Plan
    schedule: Schedule
    out: Path
    image: Path | None = None
    video: VideoFile | None = None
    extend: VideoFile | None = None
    redraw: Redraw | None = None

    @property
    def targets(self) -> list[Path]:
        """A path for each sample: the given one, or numbered ones beside it."""
        if self.plan.samples == 1:
            return [self.out]
        return [self.out.with_name(f"{self.out.stem}-{index}{self.out.suffix}") for index in range(self.plan.samples)]

    @property
    def begins_with(self) -> str:
        starts = {"image": self.image, "video": self.video, "extended video": self.extend}
        return next((name for name, given in starts.items() if given is not None), "text")

    @property
    def frames(self) -> int:
        """Frames to be made."""
        plan = self.plan
        length = length_of(plan.settings, plan.seconds, plan.blocks, continues=self.extend is not None)
        if self.video is None:
            return length
        whole = plan.seconds is None and plan.blocks is None
        return self.video.frames if whole else min(length, self.video.frames)

    def unreached(self) -> list[float]:
        """Seconds of the schedule at which the video has ended."""
        return [start for start, _ in self.schedule.entries if start * FRAME_RATE >= self.frames]

    def check(self, json_path: Path | None) -> None:
        """Look at every file that is read or written. ValueError or FileNotFoundError in one line."""
        for target in self.targets:
            check_target(target)
        if self.image is not None:
            read_image(self.image, SMALLEST, SMALLEST)
        if json_path is not None:
            check_file(json_path, "--json")
