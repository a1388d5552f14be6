"""Writing videos: H.264 in MP4, frame by frame as they come, whole at its end or not there."""

from pathlib import Path
from types import TracebackType

import av
import numpy as np


class VideoWriter:
    """A context manager; `write` takes frames as they are made. The file appears under its name when it is whole.

    H.264, yuv420p, faststart: plays in every browser. ValueError if a frame's size is odd or changes.
    """

    def __init__(self, path: Path, frames_per_second: int) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._temporary), "w", format="mp4", container_options={"movflags": "faststart"})
        self._stream = self._container.add_stream("libx264", rate=frames_per_second, options={"crf": "16"})
        self._stream.pix_fmt = "yuv420p"
        self._size: tuple[int, int] | None = None

    def write(self, frames: np.ndarray) -> None:
        """Append frames: uint8 [T, H, W, 3]."""
        height, width = frames.shape[1:3]
        if self._size is None:
            if height % 2 or width % 2:
                raise ValueError(f"{self._path}: H.264 needs an even size, got {width}x{height}")
            self._size = self._stream.height, self._stream.width = height, width
        if self._size != (height, width):
            raise ValueError(f"{self._path}: frames of {width}x{height} in a video of {self._size[1]}x{self._size[0]}")
        for frame in frames:
            self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._size is not None:
            self._container.mux(self._stream.encode())
        self._container.close()
        if kind is None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink(missing_ok=True)  # there is none before the first frame
