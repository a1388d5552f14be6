"""Source frames of a live video-to-video stream: from the viewer's camera, message by message, or from a file."""

from collections import deque
from typing import Final, Protocol

import numpy as np

from ...kernels.clips import Pixels
from .media import SourceVideo, read_picture
from .protocol import BadMessage

KEPT_BYTES: Final = 64 << 20  # of encoded frames, for a worker that has to begin at a snapshot
WAITING: Final = 48  # frames that may come before they are due


class SourceLost(ValueError):
    """A frame is needed again that is no longer there."""


class SourceFrames(Protocol):
    """Where frames come from. Blocking."""

    ended: bool

    def read(self, first: int, count: int, height: int, width: int) -> Pixels | None:
        """Frames [first, first + count), uint8 [T, H, W, 3]; None where they are not there, or will never be."""
        ...

    def close(self) -> None: ...


class Camera:
    """Frames that the viewer sends, kept encoded. first: index of the first that will come."""

    ended = False

    def __init__(self, first: int) -> None:
        self._frames: deque[bytes] = deque()
        self._first = self._fed = first
        self._bytes = 0

    def add(self, frame: bytes) -> None:
        """BadMessage where more wait than may: the frame is not kept."""
        if self._first + len(self._frames) - self._fed >= WAITING:
            raise BadMessage("too_many_frames", f"source: {WAITING} frames wait, which is the most that may")
        self._frames.append(frame)
        self._bytes += len(frame)
        while self._bytes > KEPT_BYTES and self._first < self._fed:
            self._bytes -= len(self._frames.popleft())
            self._first += 1

    def read(self, first: int, count: int, height: int, width: int) -> Pixels | None:
        """SourceLost, or BadMessage where a frame cannot be decoded."""
        start = first - self._first
        if start < 0:
            raise SourceLost(f"source frame {first} is no longer there, {self._first} is the first one kept")
        if start + count > len(self._frames):
            return None
        chosen = [self._frames[start + index] for index in range(count)]
        pictures = np.stack([read_picture("source", frame, height, width) for frame in chosen])
        self._fed = max(self._fed, first + count)
        return pictures

    def close(self) -> None:
        self._frames.clear()


class File:
    """Frames of a video file; it ends with its last whole chunk."""

    def __init__(self, content: bytes, rate: float) -> None:
        self._content, self._rate = content, max(1, round(rate))
        self._video: SourceVideo | None = None
        self.ended = False

    def read(self, first: int, count: int, height: int, width: int) -> Pixels | None:
        if self._video is None:
            self._video = SourceVideo(self._content, self._rate, height, width)
            self._content = b""
        pictures = self._video.read(first, count)
        self.ended = pictures is None
        return pictures

    def close(self) -> None:
        if self._video is not None:
            self._video.close()
