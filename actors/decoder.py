"""Videos into clips: decoded frame by frame, resampled by time, framed, filtered.

PyAV reads and decodes every file. decord is the second opinion: it takes over a clip of which PyAV's process has died
(`actors.decode_lane`). It is not the first, by measurement: it needs twice PyAV's processor time (3.2 s against 6.1 s
for 957 frames of 1280x720), and gives out frames that were concealed after damage, which PyAV marks. It may deadlock
inside a native call that holds the interpreter's lock, and aborts on some forged files; so it has a process of its own,
which a timer kills.
"""

import json
import os
import resource
import signal
import stat
import struct
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Literal, Self, cast

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream

from ..kernels.clips import TIME_SLACK, Floats, Integers, Pixels, brightness, fit, motion, shown_frames
from .child import Child
from .clips import BadVideo, Broken, Clip, ClipSettings, Skipped, Survey

FORMATS: Final = ("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "gif")
DECODE_SECONDS: Final = 60.0  # for one frame, or for opening a file, in decord
BATCH: Final = 4  # source frames that the child sends at a time
CHILD_BYTES: Final = 8 << 30  # address space of the child: a forged header may ask for any amount
CHILD: Final = "import sys; from {module} import serve_decord; serve_decord(int(sys.argv[1]), {seconds})"
UNTAGGED: Final = 2  # a frame's colour matrix, "unspecified" in ITU-T H.273
WORTH_A_SEEK: Final = 8  # frames: skipping fewer than these costs less than a seek and a cold decoder

DecoderName = Literal["pyav", "decord"]


@dataclass(frozen=True, eq=False)
class Video:
    """What headers, packets and the first frame say. width and height are as shown, turned upright."""

    path: Path
    stream: int
    videos: int  # video streams in the file
    ticks: Integers  # presentation times [N] in the stream's time base, rising
    keys: Integers  # indices of the frames that decoding can begin at, rising, the first one 0
    times: Floats  # the same in seconds, the first one 0
    end: float  # seconds; when the last frame's time is over
    slack: float  # seconds; how far the container's time base may have moved a frame
    width: int
    height: int
    pixel_aspect: float
    turns: int  # quarters anticlockwise that set the frames upright


class Decoder:
    """Cuts videos into clips. Holds a child process for decord, started when it is asked for; `close` ends it.

    decode_seconds: what decord may take for one frame before its process is killed.
    """

    def __init__(self, settings: ClipSettings, *, decode_seconds: float = DECODE_SECONDS) -> None:
        self.settings = settings
        self._decord = DecordProcess(decode_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child process; the next video that needs it would start another."""
        self._decord.close()

    def survey(self, path: Path) -> Survey | Skipped:
        """Say what a file holds, or which filter leaves all of it out. Reads it whole, and decodes its first frame.

        Raises `BadVideo` for all that headers and packets can tell, a file cut short among it. A Matroska or WebM
        file that ends early is whole to its last packet: it promises no number of frames.
        """
        video = probe(path, self.settings)
        frames = len(self._plan(video))
        seconds, rate = round(video.end, 6), round(len(video.ticks) / video.end, 6)
        found = Survey(seconds, video.width, video.height, rate, len(self.settings.cuts(frames)))
        return self._refused(video, frames) or found

    def clips(
        self, path: Path, only: Sequence[int] | None = None, *, by: DecoderName = "pyav"
    ) -> Iterator[Clip | Skipped | Broken]:
        """Cut one mp4, mov, mkv, webm or gif file into clips, in order of time.

        only: indices of the clips that are wanted, rising; those that the video is too short for do not come.

        Yields a `Clip` or, where a filter says no, a `Skipped`, or, where not all of a clip can be decoded, a
        `Broken`: each clip is judged by itself, decoded from the last key frame before it, so its fate does not
        depend on which others are wanted. A video that is too short or too small gives one `Skipped` in all. Memory
        holds a clip or two and a few source frames, however long the video is. Raises `BadVideo` before the first
        clip, where `survey` does.
        """
        video = probe(path, self.settings)
        plan = self._plan(video)
        refused = self._refused(video, len(plan))
        if refused:
            yield refused
            return
        cuts = self.settings.cuts(len(plan))
        starts = list(cuts) if only is None else [cuts[index] for index in only if index < len(cuts)]
        while starts:
            done = 0
            try:
                for item in self._cut(video, plan, starts, by):
                    yield item
                    done += 1
            except (BadVideo, DecordGaveUp) as error:
                if not done:  # else the same clip is tried again, from a key frame of its own
                    yield self._broken(path, starts[0], error)
                    done = 1
            starts = starts[done:]

    def _plan(self, video: Video) -> Integers:
        return shown_frames(video.times, video.end, self.settings.frames_per_second, video.slack)

    def _broken(self, path: Path, start: int, error: "BadVideo | DecordGaveUp") -> Broken:
        text = error.text if isinstance(error, BadVideo) else "decord cannot decode it"
        return Broken(path, "damaged", text, start / self.settings.frames_per_second, start // self.settings.stride)

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

    def _cut(self, video: Video, plan: Integers, starts: Sequence[int], by: DecoderName) -> Iterator[Clip | Skipped]:
        s = self.settings
        ends = {start + s.frames - 1 for start in starts}
        needed = np.unique(np.add.outer(starts, np.arange(s.frames)))
        sources = np.unique(plan[needed])
        pictures = decode_pyav(video, sources, s) if by == "pyav" else self._decord.frames(video, sources)
        window: deque[Pixels] = deque(maxlen=s.frames)
        shown = -1
        for position in needed.tolist():
            if plan[position] != shown:
                shown = plan[position]
                picture = fit(next(pictures), s.height, s.width, video.pixel_aspect)
            window.append(picture)
            if position in ends:
                start = position - s.frames + 1
                yield self._judged(
                    Clip(np.stack(window), video.path, start / s.frames_per_second, start // s.stride, by)
                )

    def _judged(self, clip: Clip) -> Clip | Skipped:
        light, moved = brightness(clip.frames), motion(clip.frames)
        if light < self.settings.black_below:
            text = f"brightest frame has mean luma {light:.4f}; at least {self.settings.black_below:g} is asked for"
            return Skipped(clip.source, "black", text, clip.start_seconds, clip.index)
        if moved < self.settings.static_below:
            text = f"mean change per frame is {moved:.5f}; at least {self.settings.static_below:g} is asked for"
            return Skipped(clip.source, "near-static", text, clip.start_seconds, clip.index)
        return clip


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
    ticks, keys, last = _packet_times(path, container, stream)
    times = (ticks - ticks[0]) * tick
    end = float(times[-1]) + last * tick
    gap = float(np.diff(times, append=end).max())
    if gap > settings.maximum_gap_seconds:
        raise BadVideo(path, "gap", f"one frame stands for {gap:.1f} s; at most {settings.maximum_gap_seconds:g} s may")
    container.seek(0)
    stream.codec_context.thread_count = 1
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
        keys=keys,
        times=times,
        end=end,
        slack=max(TIME_SLACK, tick / 2 * (1 + 1e-6)),
        width=frame.height if sideways else frame.width,
        height=frame.width if sideways else frame.height,
        pixel_aspect=1 / aspect if sideways else aspect,
        turns=turns,
    )


def _packet_times(path: Path, container: InputContainer, stream: VideoStream) -> tuple[Integers, Integers, int]:
    """The times of all frames, rising, the indices of the key frames among them, and how long the last frame stands.

    Times are in ticks of the stream's time base.
    """
    count, spans, key_ticks = 0, {}, set()
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
            if packet.is_keyframe:
                key_ticks.add(packet.pts)
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
    keys = np.union1d([0], np.searchsorted(ticks, sorted(key_ticks))).astype(np.int64)
    return ticks, keys, spans[int(ticks[-1])] or int(np.median(np.diff(ticks)))


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
    """The decoded frames of a stream from here on. `BadVideo`: damaged, or suddenly too large."""
    decoded = 0
    try:
        for frame in container.decode(stream):
            _check_size(path, frame.width, frame.height, settings)
            if frame.is_corrupt:  # what is missing of it was guessed, and frames after it build on the guess
                raise BadVideo(path, "damaged", f"the frame at tick {frame.pts} is damaged")
            decoded += 1
            yield frame
    except av.FFmpegError as error:
        raise BadVideo(path, "damaged", f"cannot be decoded after frame {decoded} ({error.strerror})") from error


def decode_pyav(video: Video, sources: Integers, settings: ClipSettings) -> Iterator[Pixels]:
    """Decode the frames with these indices, which rise, with PyAV: upright RGB, uint8 [H, W, 3].

    Frames that are not wanted are passed over by a seek where a key frame allows it. Raises `BadVideo`.
    """
    with _open(video.path) as container:
        stream = container.streams[video.stream]
        assert isinstance(stream, VideoStream)
        stream.codec_context.thread_count = 1
        pictures = _pictures(video.path, container, stream, settings)
        last = -1  # index of the frame decoded last
        for source in sources.tolist():
            key = int(video.keys[np.searchsorted(video.keys, source, side="right") - 1])
            frame = None
            if key - last > WORTH_A_SEEK:
                container.seek(int(video.ticks[key]), stream=stream)
                pictures = _pictures(video.path, container, stream, settings)
                frame = _frame_at(video, source, pictures)
                if frame is None:  # the seek went too far
                    container.seek(0)
                    pictures = _pictures(video.path, container, stream, settings)
            frame = frame or _frame_at(video, source, pictures)
            if frame is None:
                raise BadVideo(video.path, "damaged", f"the frame at {video.times[source]:.3f} s cannot be decoded")
            last = source
            yield np.rot90(_rgb(frame), video.turns)


def _rgb(frame: av.VideoFrame) -> Pixels:
    """uint8 [H, W, 3]. Where a file does not name the matrix of its colours, its size decides, as in players."""
    is_untagged_hd = frame.colorspace == UNTAGGED and max(frame.width / 16, frame.height / 9) >= 80
    pixels = frame.to_ndarray(format="rgb24", src_colorspace=Colorspace.ITU709 if is_untagged_hd else None)
    assert pixels.dtype == np.uint8
    return cast(Pixels, pixels)


def _frame_at(video: Video, source: int, pictures: Iterator[av.VideoFrame]) -> av.VideoFrame | None:
    """Decode on to a frame; None when it does not come."""
    due = int(video.ticks[source])
    frame = next((frame for frame in pictures if frame.pts is not None and frame.pts >= due), None)
    return frame if frame is not None and frame.pts == due else None


class DecordGaveUp(Exception):
    """decord cannot read a file, reads it otherwise than its packets say, or has died of it."""


class DecordProcess:
    """decord in a child process. Requests name their file, so that several videos may be read in turns.

    The child lets a timer end it when one step takes longer than decode_seconds: the interpreter could not.
    """

    def __init__(self, decode_seconds: float) -> None:
        self._seconds = decode_seconds
        self._missing = False
        self.child: Child | None = None

    def close(self) -> None:
        """End the child, if there is one."""
        if self.child:
            self.child.close()
        self.child = None

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
        link = (self.child or self._start()).link
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

    def _start(self) -> Child:
        if self._missing:
            raise DecordGaveUp("decord cannot be loaded")
        self.child = Child(CHILD.format(module=__name__, seconds=self._seconds))
        try:
            self.child.link.recv_bytes()
        except (EOFError, OSError) as error:
            self.close()
            self._missing = True
            warnings.warn("decord cannot be loaded", RuntimeWarning, stacklevel=2)
            raise DecordGaveUp("decord cannot be loaded") from error
        return self.child


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
