"""Videos to and from files: written frame by frame as they are made, read frame by frame as they are needed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import av
import numpy as np
from av.filter import Graph
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError

from ..actors.decoder import ClipSettings, decode_pyav, probe
from ..kernels.clips import Pixels, fit, shown_frames
from .places import check_folder


@dataclass(frozen=True)
class _Format:
    """What a kind of file is written with. even: whether the sides must be, for chroma at half the size."""

    codec: str
    pixels: str
    even: bool
    codec_options: dict[str, str]
    container_options: dict[str, str] = field(default_factory=dict)


# Without cpu-independent x264's vector code gives other bytes now and then, for the same pictures on the same machine.
H264: Final = {"crf": "16", "x264-params": "cpu-independent=1"}
FORMATS: Final = {
    ".mp4": _Format("libx264", "yuv420p", True, H264, {"movflags": "faststart", "fflags": "+bitexact"}),
    ".gif": _Format("gif", "pal8", False, {}),
    ".webp": _Format("libwebp_anim", "yuv420p", True, {"quality": "90"}, {"loop": "0"}),
}


class Writer(Protocol):
    """Where frames go, as they are made: a context manager. What an interruption leaves behind can be played."""

    def write(self, frames: np.ndarray) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_target(path: Path) -> None:
    """ValueError unless `open_writer` can write there."""
    if path.suffix.lower() in FORMATS:
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, a video is to be written there")
    elif path.suffix:
        raise ValueError(f"{path}: a video is written to {', '.join(FORMATS)}, or to a folder of .png frames")
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: frames are written to a new or empty folder")
    check_folder(path.absolute().parent, str(path))


def open_writer(path: Path, frames_per_second: int) -> Writer:
    """A writer by the path's ending: .mp4, .gif, .webp, or no ending for a folder of .png frames."""
    check_target(path)
    return VideoWriter(path, frames_per_second) if path.suffix else FrameFolder(path)


class VideoWriter:
    """A context manager; `write` takes frames as they are made. The file appears under its name when it is whole.

    .mp4 is H.264, yuv420p, faststart: plays in every browser. .gif has a palette for each frame. After Ctrl-C the file
    is closed properly and kept, after an error it is removed. threads: of the encoder, 0 for its own choice; the same
    frames give the same .mp4, byte for byte, on the same number of threads. ValueError if a frame's size is odd (not
    for .gif) or changes.
    """

    def __init__(self, path: Path, frames_per_second: int, *, threads: int = 0) -> None:
        self._path = path
        self._rate = frames_per_second
        if path.suffix.lower() not in FORMATS:
            raise ValueError(f"{path}: a video is written to {', '.join(FORMATS)}, got {path.suffix or 'no ending'}")
        self._format = FORMATS[path.suffix.lower()]
        self._threads = threads
        self._temporary = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        options = dict(self._format.container_options)
        self._container = av.open(str(self._temporary), "w", format=path.suffix[1:].lower(), container_options=options)
        self._stream: VideoStream | None = None
        self._palette: Graph | None = None
        self._written = 0

    def write(self, frames: np.ndarray) -> None:
        """Append frames: uint8 [T, H, W, 3]."""
        height, width = frames.shape[1:3]
        stream = self._stream or self._begin(height, width)
        if (stream.height, stream.width) != (height, width):
            raise ValueError(f"{self._path}: frames of {width}x{height} in a video of {stream.width}x{stream.height}")
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = self._written, Fraction(1, self._rate)
            self._written += 1
            self._encode(frame)

    def _begin(self, height: int, width: int) -> VideoStream:
        if self._format.even and (height % 2 or width % 2):
            raise ValueError(f"{self._path}: {self._format.codec} needs an even size, got {width}x{height}")
        stream = self._container.add_stream(self._format.codec, rate=self._rate, options=self._format.codec_options)
        assert isinstance(stream, VideoStream)
        stream.pix_fmt = self._format.pixels
        stream.height, stream.width = height, width
        stream.codec_context.thread_count = self._threads
        if self._format.pixels == "pal8":
            self._palette = _palette_graph(height, width, self._rate)
        self._stream = stream
        return stream

    def _encode(self, frame: av.VideoFrame | None) -> None:
        """Encode a frame; None for what is still inside."""
        assert self._stream is not None
        if self._palette is None:
            self._container.mux(self._stream.encode(frame))
            return
        self._palette.push(frame)
        for coloured in _ready(self._palette):
            self._container.mux(self._stream.encode(coloured))
        if frame is None:
            self._container.mux(self._stream.encode(None))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(keep=kind is None or issubclass(kind, KeyboardInterrupt))

    def close(self, *, keep: bool) -> None:
        """End the file, and give it its name or remove it; there is none where nothing was written."""
        keep = keep and self._written > 0
        if keep:
            self._encode(None)
        self._container.close()
        if keep:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink(missing_ok=True)  # there is none before the first frame


def _palette_graph(height: int, width: int, rate: int) -> Graph:
    """Frames in, frames of 256 colours out, each with its own palette: so nothing has to be held."""
    graph = Graph()
    size: dict[str, Any] = {"width": width, "height": height, "time_base": Fraction(1, rate)}
    source = graph.add_buffer(format=av.VideoFormat("rgb24"), **size)
    split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single")
    use, sink = graph.add("paletteuse", "new=1"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


def _ready(graph: Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        assert isinstance(frame, av.VideoFrame)
        yield frame


class FrameFolder:
    """A folder of `frame-000000.png`, ...; there is none before the first frame."""

    def __init__(self, path: Path) -> None:
        self._path, self._written = path, 0

    def write(self, frames: np.ndarray) -> None:
        """Append frames: uint8 [T, H, W, 3]."""
        self._path.mkdir(parents=True, exist_ok=True)
        for frame in frames:
            target = self._path / f"frame-{self._written:06d}.png"
            Image.fromarray(frame).save(target)
            self._written += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


# --- Reading -----------------------------------------------------------------------------------------------------


def read_image(path: Path, height: int, width: int) -> Pixels:
    """An image, turned upright, resized and cropped to uint8 [height, width, 3]."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image")
    try:
        with Image.open(path) as image:
            return fit(np.array(ImageOps.exif_transpose(image).convert("RGB")), height, width)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None


class VideoFile:
    """A video file, resampled to `rate` frames per second. `frames` is how many that gives.

    ValueError or FileNotFoundError, in one line, where headers and packets show that it cannot be read.
    """

    def __init__(self, path: Path, rate: int) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such video")
        self._settings = ClipSettings(frames_per_second=rate, width=2, height=2, frames=1, stride=1)
        self._video = probe(path, self._settings)
        self._plan = shown_frames(self._video.times, self._video.end, rate, self._video.slack)

    @property
    def frames(self) -> int:
        return len(self._plan)

    def read(self, height: int, width: int, first: int = 0, stop: int | None = None) -> Iterator[Pixels]:
        """Frames [first, stop) one by one, resized and cropped to uint8 [height, width, 3]; memory holds one."""
        plan = self._plan[first:stop]
        pictures = decode_pyav(self._video, np.unique(plan), self._settings)
        shown = -1
        for source in plan:
            if source != shown:
                shown, frame = source, fit(next(pictures), height, width, self._video.pixel_aspect)
            yield frame
