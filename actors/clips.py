"""What a decoder is asked for, and what it answers: clips, and reasons why there is none."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..kernels.clips import Pixels


@dataclass(frozen=True)
class ClipSettings:
    """How clips are cut, and which videos and clips are left out.

    frames_per_second, width, height: of the clips; frames: per clip, 1 + 4k, as the causal VAE takes them; stride:
    frames from one clip's start to the next one's. minimum_seconds, minimum_width, minimum_height: of the source, as
    shown (turned upright). static_below: least motion (`kernels.clips.motion`); black_below: least brightness of a
    clip's brightest frame; both in [0, 1]. maximum_pixels and maximum_side: of a source frame; a file beyond them is
    refused before anything is decoded. maximum_gap_seconds: how long one source frame may stand.
    """

    frames_per_second: float
    width: int
    height: int
    frames: int
    stride: int
    minimum_seconds: float = 1.0
    minimum_width: int = 256
    minimum_height: int = 256
    static_below: float = 0.001
    black_below: float = 0.02
    maximum_pixels: int = 8192 * 4320
    maximum_side: int = 8192
    maximum_gap_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("frames_per_second", "width", "height", "frames", "stride", "maximum_pixels", "maximum_side"):
            if not vars(self)[name] > 0:
                raise ValueError(f"{name} must be greater than 0, not {vars(self)[name]}")
        if self.frames % 4 != 1:
            raise ValueError(f"frames must be 1 + 4k, as the causal VAE takes them, not {self.frames}")
        for name in ("static_below", "black_below"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {vars(self)[name]}")

    def cuts(self, frames: int) -> range:
        """Where clips begin in a video of so many frames at the clips' rate. What is left after the last is dropped."""
        return range(0, frames - self.frames + 1, self.stride)


@dataclass(frozen=True, eq=False)
class Clip:
    """frames: uint8 [T, H, W, 3], RGB. index: place among the cuts of its source, those left out counted too."""

    frames: Pixels
    source: Path
    start_seconds: float
    index: int
    decoder: str  # "pyav" or "decord"


@dataclass(frozen=True)
class Skipped:
    """A video (index None) or one of its clips that a filter left out.

    reason: too-short, too-small, near-static or black. text: the rule and the numbers, in one line.
    """

    source: Path
    reason: str
    text: str
    start_seconds: float = 0.0
    index: int | None = None


@dataclass(frozen=True)
class Broken:
    """A clip that cannot be decoded, in a video that can. reason: damaged or crashed."""

    source: Path
    reason: str
    text: str
    start_seconds: float
    index: int


@dataclass(frozen=True)
class Survey:
    """What headers, packets and the first frame say of a video that no filter left out.

    width, height: as shown. frames_per_second: of the source, on average. clips: how many it will be cut into.
    """

    seconds: float
    width: int
    height: int
    frames_per_second: float
    clips: int


class BadVideo(ValueError):
    """A file that is not a whole, readable video. One line: the file, the rule, the value.

    reason: unreadable, empty, truncated, not-a-video, no-video-stream, no-duration, single-frame, too-large, gap,
    damaged or crashed. text: the line without the file.
    """

    def __init__(self, path: Path, reason: str, text: str) -> None:
        # repr() keeps the line one line: line ends and undecodable bytes of a file name come out escaped.
        super().__init__(f"{repr(os.fspath(path))[1:-1]}: {text}")
        self.path = path
        self.reason = reason
        self.text = text
