"""Videos into clips: decoded frame by frame, resampled by time, framed, filtered.

Two decoders. decord reads what it can: H.264, HEVC, VP9 and the like. It is known to deadlock inside a native call
that holds the interpreter's lock, and to abort on damaged streams; so it runs in a child process that a timer kills.
PyAV, in this process, reads every file's headers and packets first, and decodes what decord gives up on: GIF, AV1,
files whose frames must be turned, that decord counts otherwise than their packets say, or that stopped the child.
"""

import json
import os
import resource
import signal
import stat
import struct
import subprocess
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Final, Self

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from ..kernels.clips import TIME_SLACK, Floats, Integers, Pixels, brightness, fit, motion, shown_frames

FORMATS: Final = ("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "gif")
DECODE_SECONDS: Final = 60.0  # for one frame, or for opening a file, in decord
BATCH: Final = 4  # source frames that the child sends at a time
CHILD_BYTES: Final = 8 << 30  # address space of the child: a forged header may ask for any amount
CHILD: Final = "from {module} import serve_decord; serve_decord({link}, {seconds})"


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


@dataclass(frozen=True, eq=False)
class Clip:
    """frames: uint8 [T, H, W, 3], RGB. index: place among the cuts of its source, those left out counted too."""

    frames: Pixels
    source: Path
    start_seconds: float
    index: int
    decoder: str  # "decord" or "pyav"


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


class BadVideo(ValueError):
    """A file that is not a whole, readable video. One line: the file, the rule, the value.

    reason: unreadable, empty, truncated, not-a-video, no-video-stream, no-duration, single-frame, too-large, gap or
    damaged.
    """

    def __init__(self, path: Path, reason: str, text: str) -> None:
        # repr() keeps the line one line: line ends and undecodable bytes of a file name come out escaped.
        super().__init__(f"{repr(os.fspath(path))[1:-1]}: {text}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Video:
    """What headers, packets and the first frame say. width and height are as shown, turned upright."""

    path: Path
    stream: int
    videos: int  # video streams in the file
    ticks: Integers  # presentation times [N] in the stream's time base, rising
    times: Floats  # the same in seconds, the first one 0
    end: float  # seconds; when the last frame's time is over
    slack: float  # seconds; how far the container's time base may have moved a frame
    width: int
    height: int
    pixel_aspect: float
    turns: int  # quarters anticlockwise that set the frames upright


class Decoder:
    """Cuts videos into clips. Holds one child process, started when the first video is decoded; `close` ends it.

    decode_seconds: what the child may take for one frame before it is killed and PyAV takes over.
    """

    def __init__(self, settings: ClipSettings, *, decode_seconds: float = DECODE_SECONDS) -> None:
        self.settings = settings
        self._decord = DecordProcess(decode_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child process; the next video would start another."""
        self._decord.close()

    def clips(self, path: Path) -> Iterator[Clip | Skipped]:
        """Cut one mp4, mov, mkv, webm or gif file into clips, in order of time.

        Yields a `Clip` or, where a filter says no, a `Skipped`; a video that is too short or too small gives one
        `Skipped` in all. What is left after the last whole clip is dropped. Memory holds a clip or two and a few
        source frames, however long the video is. Raises `BadVideo` before the first clip for all that headers and
        packets can tell, a file cut short among it: of such a file nothing is used. Pictures that cannot be decoded
        show only when they are reached: then the clips before have been yielded. A Matroska or WebM file that ends
        early is whole to its last packet: it promises no number of frames.
        """
        video = probe(path, self.settings)
        plan = shown_frames(video.times, video.end, self.settings.frames_per_second, video.slack)
        refused = self._refused(video, len(plan))
        if refused:
            yield refused
            return
        cuts = range(0, len(plan) - self.settings.frames + 1, self.settings.stride)
        done = 0
        try:
            for item in self._cut(video, plan, cuts, "decord"):
                yield item
                done += 1
        except DecordGaveUp:
            yield from self._cut(video, plan, cuts[done:], "pyav")

    def _refused(self, video: Video, frames: int) -> Skipped | None:
        s = self.settings
        if video.width < s.minimum_width or video.height < s.minimum_height:
            text = f"{video.width}x{video.height} pixels; at least {s.minimum_width}x{s.minimum_height} is asked for"
            return Skipped(video.path, "too-small", text)
        if video.end < s.minimum_seconds:
            text = f"{video.end:.3f} s long; at least {s.minimum_seconds:g} s is asked for"
            return Skipped(video.path, "too-short", text)
        if frames < s.frames:
            text = f"{video.end:.3f} s give {frames} frames at {s.frames_per_second:g} per s; a clip has {s.frames}"
            return Skipped(video.path, "too-short", text)
        return None

    def _cut(self, video: Video, plan: Integers, cuts: range, decoder: str) -> Iterator[Clip | Skipped]:
        s = self.settings
        needed = _needed(cuts, s.frames)
        sources = np.unique(plan[needed])
        pictures = decode_pyav(video, sources, s) if decoder == "pyav" else self._decord.frames(video, sources)
        window: deque[Pixels] = deque(maxlen=s.frames)
        shown = -1
        for position in needed:
            if plan[position] != shown:
                shown = plan[position]
                picture = fit(next(pictures), s.height, s.width, video.pixel_aspect)
            window.append(picture)
            start = position - s.frames + 1
            if start in cuts:
                # Cuts are equally spaced from 0, so a start tells its index whichever decoder came first.
                clip = Clip(np.stack(window), video.path, start / s.frames_per_second, start // s.stride, decoder)
                yield self._judged(clip)

    def _judged(self, clip: Clip) -> Clip | Skipped:
        light, moved = brightness(clip.frames), motion(clip.frames)
        if light < self.settings.black_below:
            text = f"brightest frame has mean luma {light:.4f}; at least {self.settings.black_below:g} is asked for"
            return Skipped(clip.source, "black", text, clip.start_seconds, clip.index)
        if moved < self.settings.static_below:
            text = f"mean change per frame is {moved:.5f}; at least {self.settings.static_below:g} is asked for"
            return Skipped(clip.source, "near-static", text, clip.start_seconds, clip.index)
        return clip


def _needed(cuts: range, frames: int) -> Sequence[int]:
    """The positions on the clips' time grid that belong to any of the cuts, of which there is one at least, rising."""
    if cuts.step <= frames:
        return range(cuts[0], cuts[-1] + frames)
    return list(chain.from_iterable(range(start, start + frames) for start in cuts))


def probe(path: Path, settings: ClipSettings) -> Video:
    """Read a file's headers, all its packets (undecoded) and its first frame. `BadVideo` says what is wrong."""
    _check_file(path)
    try:
        with _open(path) as container:
            found = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
            if not found:
                kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
                raise BadVideo(path, "no-video-stream", f"no video stream in it; kinds of stream: {kinds}")
            return _probe_stream(path, container, found[0], settings)
    except av.FFmpegError as error:
        raise _unreadable(path, error) from error


def _open(path: Path) -> InputContainer:
    # An allowed list: a file whose content names other files or addresses (a playlist) must not make us open them.
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    return av.open(os.path.abspath(path), container_options=options, metadata_errors="replace")


def _probe_stream(path: Path, container: InputContainer, stream: VideoStream, settings: ClipSettings) -> Video:
    if not stream.codec_context:
        raise BadVideo(path, "damaged", "the codec of its video stream is not known")
    _check_size(path, stream.codec_context.width, stream.codec_context.height, settings)
    tick = float(stream.time_base or 0)
    ticks, last = _packet_times(path, container, stream)
    times = (ticks - ticks[0]) * tick
    end = float(times[-1]) + last * tick
    gap = float(np.diff(times, append=end).max())
    if gap > settings.maximum_gap_seconds:
        raise BadVideo(path, "gap", f"one frame stands for {gap:.1f} s; at most {settings.maximum_gap_seconds:g} s may")
    container.seek(0)
    frame = next(_pictures(path, container, stream, settings), None)
    if frame is None:
        raise BadVideo(path, "damaged", "not one of its frames can be decoded")
    turns = round(frame.rotation / 90) % 4
    sideways = turns % 2 == 1
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 0.1 <= aspect <= 10:  # no camera's and no disc's: a forged one would ask for pictures of any size
        aspect = 1.0
    return Video(
        path=path,
        stream=stream.index,
        videos=len(container.streams.video),
        ticks=ticks,
        times=times,
        end=end,
        slack=max(TIME_SLACK, tick / 2 * (1 + 1e-6)),
        width=frame.height if sideways else frame.width,
        height=frame.width if sideways else frame.height,
        pixel_aspect=1 / aspect if sideways else aspect,
        turns=turns,
    )


def _packet_times(path: Path, container: InputContainer, stream: VideoStream) -> tuple[Integers, int]:
    """The presentation times of all frames, rising, and how long the last one stands, in ticks."""
    count, spans = 0, {}
    for packet in container.demux(stream):
        if not packet.size:
            continue
        count += 1
        if packet.is_corrupt:
            raise BadVideo(path, "truncated", f"its data ends within frame {count}: cut short")
        if packet.pts is None:
            raise BadVideo(path, "damaged", f"frame {count} has no presentation time")
        if not packet.is_discard:
            spans[packet.pts] = packet.duration or 0
    promised = len(stream.index_entries)
    if promised > count:
        raise BadVideo(path, "truncated", f"its index lists {promised} frames, its data holds {count}: cut short")
    ticks = np.array(sorted(spans), dtype=np.int64)
    if count == 0:
        raise BadVideo(path, "no-duration", "its video stream holds no frames: zero duration")
    if count == 1:
        raise BadVideo(path, "single-frame", "holds 1 frame; a video has at least 2")
    if len(ticks) < 2:
        raise BadVideo(path, "no-duration", f"its {count} frames all stand at one time: zero duration")
    return ticks, spans[int(ticks[-1])] or int(np.median(np.diff(ticks)))


def _check_file(path: Path) -> None:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadVideo(path, "unreadable", "not a regular file")
        open(path, "rb").close()
    except OSError as error:
        raise BadVideo(path, "unreadable", f"cannot be opened ({error.strerror})") from error
    if status.st_size == 0:
        raise BadVideo(path, "empty", "the file is empty (0 bytes)")


def _check_size(path: Path, width: int, height: int, settings: ClipSettings) -> None:
    if width <= 0 or height <= 0:
        raise BadVideo(path, "damaged", f"its header gives a picture of {width}x{height} pixels")
    if width * height > settings.maximum_pixels or max(width, height) > settings.maximum_side:
        rule = f"at most {settings.maximum_pixels} pixels, {settings.maximum_side} a side, are allowed"
        raise BadVideo(path, "too-large", f"{width}x{height} pixels; {rule}")


def _unreadable(path: Path, error: av.FFmpegError) -> BadVideo:
    """Why a file that is there cannot be read, from its first bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        if head[4:8] != b"ftyp":
            if head.startswith((b"\x1a\x45\xdf\xa3", b"GIF8")):
                return BadVideo(path, "damaged", f"its container cannot be read ({error.strerror})")
            return BadVideo(path, "not-a-video", f"neither mp4, mov, mkv, webm nor gif ({error.strerror})")
        place = 0
        while place + 8 <= size:
            file.seek(place)
            length, kind = struct.unpack(">I4s", file.read(8))
            if kind == b"moov" and place + length <= size:
                return BadVideo(path, "damaged", f"its container cannot be read ({error.strerror})")
            if length == 1:  # the length follows in 64 bits
                length = int.from_bytes(file.read(8))
            place = place + length if length >= 8 else size  # 0 means: to the file's end
    return BadVideo(path, "truncated", f"no whole moov box (the index of an mp4) in its {size} bytes: cut short")


def _pictures(
    path: Path, container: InputContainer, stream: VideoStream, settings: ClipSettings
) -> Iterator[av.VideoFrame]:
    """The decoded frames of a stream, on one thread. `BadVideo`: damaged, or suddenly too large."""
    stream.codec_context.thread_count = 1
    decoded = 0
    try:
        for frame in container.decode(stream):
            _check_size(path, frame.width, frame.height, settings)
            decoded += 1
            yield frame
    except av.FFmpegError as error:
        raise BadVideo(path, "damaged", f"cannot be decoded after frame {decoded} ({error.strerror})") from error


def decode_pyav(video: Video, sources: Integers, settings: ClipSettings) -> Iterator[Pixels]:
    """Decode the frames with these indices, which rise, with PyAV: upright RGB, uint8 [H, W, 3]."""
    with _open(video.path) as container:
        stream = container.streams[video.stream]
        assert isinstance(stream, VideoStream)
        pictures = _pictures(video.path, container, stream, settings)
        for source in sources:
            due = int(video.ticks[source])
            frame = next((frame for frame in pictures if frame.pts is not None and frame.pts >= due), None)
            if frame is None or frame.pts != due:
                raise BadVideo(video.path, "damaged", f"the frame at {video.times[source]:.3f} s cannot be decoded")
            yield np.rot90(frame.to_ndarray(format="rgb24"), video.turns)


class DecordGaveUp(Exception):
    """decord cannot read a file, reads it otherwise than its packets say, or has died of it."""


class DecordProcess:
    """decord in a child process. Requests name their file, so that several videos may be read in turns.

    The child lets a timer end it when one step takes longer than decode_seconds: the interpreter could not.
    """

    def __init__(self, decode_seconds: float) -> None:
        self._seconds = decode_seconds
        self._missing = False
        self.process: subprocess.Popen[bytes] | None = None
        self._link: Connection | None = None
        self._stop: Callable[[], object] = int  # nothing to end yet

    def close(self) -> None:
        """End the child, if there is one."""
        self._stop()
        self.process = self._link = None

    def frames(self, video: Video, sources: Integers) -> Iterator[Pixels]:
        """Decode the frames with these indices, which rise: upright RGB, uint8 [H, W, 3]. Raises `DecordGaveUp`."""
        if video.videos > 1 or video.turns:
            # decord would choose the stream by itself, and turns the frames of some containers only.
            raise DecordGaveUp("several video streams, or frames to be turned")
        path = os.path.abspath(video.path)
        for start in range(0, len(sources), BATCH):
            indices = sources[start : start + BATCH].tolist()
            reply, pictures = self._request({"path": path, "open": start == 0, "indices": indices})
            if "error" in reply:
                raise DecordGaveUp(reply["error"])
            if reply["frames"] != len(video.ticks):
                raise DecordGaveUp(f"{reply['frames']} frames counted, {len(video.ticks)} in the packets")
            if any(picture.shape[:2] != (video.height, video.width) for picture in pictures):
                raise DecordGaveUp(f"pictures of {pictures[0].shape[:2]}, not {(video.height, video.width)}")
            yield from pictures

    def _request(self, message: dict[str, Any]) -> tuple[dict[str, Any], list[Pixels]]:
        link = self._link or self._start()
        try:
            link.send_bytes(json.dumps(message).encode())
            reply = json.loads(link.recv_bytes())
            pictures = [np.empty(shape, np.uint8) for shape in reply.get("shapes", [])]
            for picture in pictures:
                link.recv_bytes_into(picture.data.cast("B"))
        except (EOFError, OSError) as error:
            self.close()
            raise DecordGaveUp("the process that decodes has died") from error
        return reply, pictures

    def _start(self) -> Connection:
        if self._missing:
            raise DecordGaveUp("decord cannot be loaded")
        ours, theirs = Pipe()
        code = CHILD.format(module=__name__, link=theirs.fileno(), seconds=self._seconds)
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        theirs.close()
        self._stop = weakref.finalize(self, _end_child, self.process, ours)
        try:
            ours.recv_bytes()
        except (EOFError, OSError) as error:
            self.close()
            self._missing = True
            warnings.warn("decord cannot be loaded; PyAV decodes in its place", RuntimeWarning, stacklevel=2)
            raise DecordGaveUp("decord cannot be loaded") from error
        self._link = ours
        return ours


def _end_child(process: "subprocess.Popen[bytes]", link: Connection) -> None:
    link.close()
    process.kill()
    process.wait()


def serve_decord(descriptor: int, seconds: float) -> None:
    """What the child runs: answer requests on an inherited socket until its other end closes."""
    import decord  # here only: its FFmpeg of 2021 stays out of the process that holds models

    decord.logging.set_level(decord.logging.QUIET)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, native code or not
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_BYTES, CHILD_BYTES))
    link = Connection(descriptor)
    link.send_bytes(b"ready")
    reader: Any = None
    path = ""
    while True:
        try:
            request = json.loads(link.recv_bytes())
        except EOFError:
            return
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            if request["open"] or request["path"] != path:
                # A frame that decord would replace by a copy of another one is an error, not a frame.
                path, reader = request["path"], decord.VideoReader(request["path"], num_threads=1, fault_tol=0.0001)
            pictures = [_decord_frame(reader, index, seconds) for index in request["indices"]]
            reply = {"frames": len(reader), "shapes": [picture.shape for picture in pictures]}
        except (decord.DECORDError, RuntimeError, AssertionError, ValueError) as error:
            reply, pictures, path = {"error": str(error)}, [], ""
        signal.setitimer(signal.ITIMER_REAL, 0)
        link.send_bytes(json.dumps(reply).encode())
        for picture in pictures:
            link.send_bytes(picture.data.cast("B"))


def _decord_frame(reader: Any, index: int, seconds: float) -> Pixels:
    # One by one: decord's get_batch() is where most of its deadlocks have been seen.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    frame: Pixels = reader[index].asnumpy()
    return frame
