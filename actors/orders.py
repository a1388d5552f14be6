"""What is ordered of a scheduler, and what it gives or refuses. Without torch: who only passes it on needs no model."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ..kernels.clips import Pixels
from .modes import Mode, Redraw

State = Literal["running", "ended", "failed"]


class Busy(ValueError):
    """No room for a stream: bytes or sessions. The message says which, in figures."""


class TooSlow(Busy):
    """No room for a stream by the speed that was measured, which other work on the machine lowers."""


@dataclass(frozen=True)
class StreamOrder:
    """Everything that decides a stream's pictures, and how fast they are wanted. ValueError in one line.

    stream: its id. height, width: pixels; None: the image's, or the student's. frame_rate: of playback, it sets the
    deadlines; None: no deadline, served after the streams that have one. frames: ends after so many that were not
    flushed; None: without end. image: uint8 [H, W, 3], image-to-video. redraw: video-to-video, frames come by `feed`.
    """

    stream: str
    prompt: str
    seed: int = 0
    height: int | None = None
    width: int | None = None
    frame_rate: float | None = 16.0
    frames: int | None = None
    mode: Mode = "rolling"
    image: Pixels | None = field(default=None, compare=False)
    redraw: Redraw | None = None

    def __post_init__(self) -> None:
        if not self.stream:
            raise ValueError("stream: an id is needed, got an empty one")
        if self.frame_rate is not None and not 0 < self.frame_rate <= 1000:
            raise ValueError(f"frame_rate: must lie in (0, 1000], got {self.frame_rate:g}")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames: must be 1 or more, got {self.frames}")
        if self.image is not None and self.redraw is not None:
            raise ValueError("image, redraw: a stream begins with at most one of them")

    def to_json(self) -> dict[str, Any]:
        """All but the image, as JSON has it."""
        fields = asdict(replace(self, image=None))
        del fields["image"]
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any], image: Pixels | None = None) -> "StreamOrder":
        redraw = fields.get("redraw")
        return cls(**{**fields, "redraw": redraw and Redraw(**redraw)}, image=image)


@dataclass(frozen=True)
class Piece:
    """The pictures of one latent frame, which is what a viewer gets first.

    first: index of its first frame in the stream. frames: uint8 [T, H, W, 3]. chunk: which block. prompt: index of the
    one that made it. seconds: computing spent on this chunk so far, its share of the batch. late: seconds past its
    deadline; negative: before it.
    """

    first: int
    frames: Pixels
    chunk: int
    ends_chunk: bool
    prompt: int
    seconds: float
    late: float

    @property
    def end(self) -> int:
        return self.first + len(self.frames)


@dataclass(frozen=True)
class Taken:
    """pieces: what is there now. state: "ended" and "failed" mean that nothing comes after these pieces.

    due: source frames that the stream waits for (video-to-video).
    """

    pieces: tuple[Piece, ...]
    state: State
    reason: str = ""
    due: int = 0
