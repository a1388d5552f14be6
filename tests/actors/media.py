"""Makes videos for the tests, whole and broken, with PyAV: every frame carries its number in its picture."""

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

BITS = 8
MILLISECONDS = Fraction(1, 1000)


def numbered(number: int, height: int = 96, width: int = 128) -> Picture:
    """A picture [height, width, 3] whose lower half shows a number below 256 as white and black bars, high bit left.

    The upper half is a pattern that moves with the number; its top left corner is red and its top right one blue.
    """
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2] = (np.arange(width)[:, None] * 3 + number * 12) % 256
    picture[: height // 4, : width // 8] = [255, 0, 0]
    picture[: height // 4, -(width // 8) :] = [0, 0, 255]
    for bit in range(BITS):
        if number >> (BITS - 1 - bit) & 1:
            picture[height // 2 :, bit * width // BITS : (bit + 1) * width // BITS] = 255
    return picture


def read_number(picture: Picture) -> int:
    """The number that `numbered` put into a picture, of any size, that was neither turned nor cropped."""
    height, width = picture.shape[:2]
    bars = [picture[height * 3 // 4, (2 * bit + 1) * width // (2 * BITS)].mean() > 127 for bit in range(BITS)]
    return int("".join(str(int(bar)) for bar in bars), 2)


@contextmanager
def same_scheduling() -> Iterator[None]:
    """SVT-AV1, where it may, makes the calling thread a real-time one for good: all others starve from then on."""
    if not hasattr(os, "sched_getscheduler"):  # Linux alone has it
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def write_video(
    path: Path,
    pictures: Iterable[Picture],
    *,
    times: Sequence[float] | None = None,
    rate: int = 24,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rotation: int = 0,
    aspect: Fraction | None = None,
    muxer: dict[str, str] | None = None,
    encoder: dict[str, str] | None = None,
    keyframes: int = 12,
) -> Path:
    """Encode pictures. times: seconds of each, to the millisecond, instead of a constant rate.

    rotation: degrees anticlockwise that a player turns the picture by. aspect: width of a pixel over its height.
    """
    base = MILLISECONDS if times is not None else Fraction(1, rate)
    with same_scheduling(), av.open(path, "w", options=muxer or {}) as container:
        stream = None
        for index, picture in enumerate(pictures):
            if stream is None:
                stream = container.add_stream(codec, rate=rate)
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], pixels
                stream.codec_context.time_base = base
                stream.codec_context.gop_size = keyframes
                stream.codec_context.options = encoder or {}
                if rotation:
                    stream.set_display_rotation(rotation)
                if aspect:
                    stream.codec_context.sample_aspect_ratio = aspect
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.time_base = base
            frame.pts = round(times[index] * 1000) if times is not None else index
            container.mux(stream.encode(frame))
        assert stream is not None
        container.mux(stream.encode())
    return path


def write_numbered(path: Path, frames: int = 48, height: int = 96, width: int = 128, **more: object) -> Path:
    """A video of `numbered` pictures; two seconds at 24 frames per second unless told otherwise."""
    return write_video(path, (numbered(index, height, width) for index in range(frames)), **more)  # type: ignore[arg-type]


def write_sound(path: Path) -> Path:
    """An mp4 with sound and nothing else."""
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for index in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 44100, index * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_headers_only(path: Path) -> Path:
    """An mp4 with a video stream and not one frame in it."""
    with av.open(path, "w", options={"movflags": "empty_moov"}) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        container.start_encoding()
    return path


def time_table(data: bytes) -> int:
    """Where the first entry of an mp4's table of frame durations (stts) begins: a count and a duration, 32 bits each.

    ISO/IEC 14496-12, section 8.6.1.2.
    """
    return data.index(b"stts") + 12


def with_forged_count(source: Path, path: Path, count: int) -> Path:
    """A copy of an mp4 whose table of frame durations claims so many frames more than there are."""
    data = bytearray(source.read_bytes())
    place = time_table(data)
    struct.pack_into(">I", data, place, struct.unpack_from(">I", data, place)[0] + count)
    path.write_bytes(data)
    return path
