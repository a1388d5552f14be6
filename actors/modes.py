"""What a stream can be asked for besides a prompt. Light to import: the command line and clients of the protocol use
these names too.
"""

from dataclasses import dataclass
from typing import Final, Literal

Mode = Literal["rolling", "overlap"]  # a window with a sink; segments that overlap by a block
MODES: Final[tuple[Mode, ...]] = ("rolling", "overlap")
SNAPSHOT: Final = "reelway.stream"  # names the JSON in a file that holds a stream
CLIP_LATENTS: Final = 21  # latent frames of the clips that Wan2.1 was trained on: 81 frames, 5 seconds


@dataclass(frozen=True)
class Redraw:
    """Video-to-video. noise: level in (0, 1] that the source is noised to (0: the source, 1: pure noise); the student's
    timesteps below it follow. adaptive: lower the level where the source moves fast.
    """

    noise: float = 0.6
    adaptive: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.noise <= 1:
            raise ValueError(f"noise: must lie in (0, 1], got {self.noise:g}")
