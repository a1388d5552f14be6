"""What a viewer gets: fragmented H.264 MP4, or JPEG frames, from pictures as they are made; and what a viewer sends.

The fragments' boxes are written here (ISO/IEC 14496-12, section 8.8): a muxer gives a fragment away only when it has
seen the next one's first frame, which a live viewer would wait for.
"""

import io
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Final, Protocol

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError

from ...kernels.clips import Pixels, fit
from ..video import VideoFile
from .protocol import FRAGMENT, INIT, JPEG, BadMessage, Media

TIMESCALE: Final = 90_000  # units of a second in the media's times
START_CODE: Final = b"\x00\x00\x01"
KEY_SAMPLE: Final = 0x02000000  # depends on no other sample
DELTA_SAMPLE: Final = 0x01010000  # depends on others, is no key frame
IMAGE_FORMATS: Final = ("JPEG", "PNG", "WEBP")
IMAGE_PIXELS: Final = 40_000_000  # of an image that a client sends
# No lookahead and no frames out of order: a picture goes out as it comes in.
LIVE: Final = {
    "preset": "superfast",
    "tune": "zerolatency",
    "forced-idr": "1",
    "x264-params": "keyint=infinite:scenecut=0",
}
BEST_CRF, WORST_CRF = 12, 40
FULL_CHROMA: Final = 90  # from this quality on a JPEG's colours are as sharp as its brightness


@dataclass(frozen=True)
class Part:
    """A binary message's kind and payload. first: index of its first frame."""

    kind: int
    first: int
    payload: bytes


class Encoder(Protocol):
    """One socket's media, in order. Not thread-safe."""

    mime: str

    def begin(self, first: int) -> list[Part]:
        """What comes before any frame."""
        ...

    def encode(self, frames: Pixels, first: int, key: bool) -> list[Part]:
        """The next frames, uint8 [T, H, W, 3]. key: begin with a picture that needs none before it."""
        ...


def encoder(media: Media, height: int, width: int, frame_rate: float, quality: int) -> Encoder:
    """ValueError where the size is odd: H.264 has chroma at half the size."""
    if media == "jpeg":
        return JpegEncoder(quality)
    return Mp4Encoder(height, width, frame_rate, quality)


class JpegEncoder:
    """One JPEG per frame. quality: 1 to 100."""

    mime: str = "image/jpeg"

    def __init__(self, quality: int) -> None:
        self._quality = quality

    def begin(self, first: int) -> list[Part]:
        return []

    def encode(self, frames: Pixels, first: int, key: bool) -> list[Part]:
        return [Part(JPEG, first + index, self._jpeg(frame)) for index, frame in enumerate(frames)]

    def _jpeg(self, frame: Pixels) -> bytes:
        file = io.BytesIO()
        chroma = 0 if self._quality >= FULL_CHROMA else 2  # 4:4:4, or 4:2:0
        Image.fromarray(frame).save(file, "JPEG", quality=self._quality, subsampling=chroma)
        return file.getvalue()


@dataclass(frozen=True)
class _Sample:
    """An encoded picture, its units led by their lengths."""

    data: bytes
    key: bool


class Mp4Encoder:
    """Fragmented MP4 with one H.264 encoder for its whole life. Times count the frames sent, at `frame_rate`."""

    def __init__(self, height: int, width: int, frame_rate: float, quality: int) -> None:
        if height % 2 or width % 2:
            raise ValueError(f"media: mp4 needs an even size, got {width}x{height}")
        self._init, self._codec = _open_codec(height, width, Fraction(frame_rate).limit_denominator(1000), quality)
        self._rate = frame_rate
        self._sent = self._fragments = 0
        self.mime = f'video/mp4; codecs="{_codec_name(self._init)}"'

    def begin(self, first: int) -> list[Part]:
        return [Part(INIT, first, self._init)]

    def encode(self, frames: Pixels, first: int, key: bool) -> list[Part]:
        samples = [self._sample(frame, key and index == 0) for index, frame in enumerate(frames)]
        times = [self._time(self._sent - len(samples) + index) for index in range(len(samples) + 1)]
        self._fragments += 1
        return [Part(FRAGMENT, first, fragment(self._fragments, times, samples))]

    def _time(self, frame: int) -> int:
        return round(frame * TIMESCALE / self._rate)

    def _sample(self, pixels: Pixels, key: bool) -> _Sample:
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts = self._sent
        frame.pict_type = PictureType.I if key or not self._sent else PictureType.NONE
        self._sent += 1
        (packet,) = self._codec.encode(frame)  # zerolatency: one in, one out
        return _Sample(_with_lengths(bytes(packet)), packet.is_keyframe)


def _open_codec(height: int, width: int, rate: Fraction, quality: int) -> tuple[bytes, VideoCodecContext]:
    """The initialisation segment, and the encoder that it describes."""
    file = io.BytesIO()
    options = {
        "movflags": "empty_moov+default_base_moof",
        "video_track_timescale": str(TIMESCALE),
        "fflags": "+bitexact",
    }
    container = av.open(file, "w", format="mp4", options=options)
    crf = WORST_CRF - (WORST_CRF - BEST_CRF) * quality / 100
    stream = container.add_stream("libx264", rate=rate, options={**LIVE, "crf": f"{crf:.1f}"})
    assert isinstance(stream, VideoStream)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    codec = stream.codec_context
    codec.thread_count = 1  # many sessions share a machine
    codec.time_base = 1 / rate
    container.start_encoding()
    return file.getvalue(), codec


def _codec_name(init: bytes) -> str:
    """RFC 6381: profile, constraints and level, as the avcC box has them."""
    place = init.index(b"avcC") + 5  # after its version
    return f"avc1.{init[place : place + 3].hex()}"


def _with_lengths(stream: bytes) -> bytes:
    """H.264 units led by start codes (Annex B) as units led by their lengths. No start code can stand inside a unit."""
    units = [unit.rstrip(b"\x00") for unit in stream.split(START_CODE)]
    return b"".join(struct.pack(">I", len(unit)) + unit for unit in units if unit)


def fragment(sequence: int, times: list[int], samples: list[_Sample]) -> bytes:
    """One moof and mdat. times: of each sample, and of what comes after the last, in units of TIMESCALE."""
    header = box(b"mfhd", struct.pack(">II", 0, sequence))
    track = box(b"tfhd", struct.pack(">II", 0x020000, 1))  # offsets count from the moof
    decode_time = box(b"tfdt", struct.pack(">IQ", 1 << 24, times[0]))
    rows = b"".join(
        struct.pack(">III", after - time, len(sample.data), KEY_SAMPLE if sample.key else DELTA_SAMPLE)
        for (time, after), sample in zip(pairwise(times), samples, strict=True)
    )
    # 16 bytes of a full box with count and offset; 8 of each box around; and the mdat's own 8 before the data.
    size = 8 + len(header) + 8 + len(track) + len(decode_time) + 8 + 12 + len(rows) + 8
    flags = 0x000701  # data offset; duration, size and flags of each sample
    run = box(b"trun", struct.pack(">IIi", flags, len(samples), size) + rows)
    moof = box(b"moof", header + box(b"traf", track + decode_time + run))
    assert len(moof) + 8 == size
    return moof + box(b"mdat", b"".join(sample.data for sample in samples))


def box(kind: bytes, content: bytes) -> bytes:
    """A box of ISO/IEC 14496-12."""
    return struct.pack(">I4s", 8 + len(content), kind) + content


# --- What clients send -------------------------------------------------------------------------------------------


def read_picture(field: str, content: bytes, height: int, width: int) -> Pixels:
    """A client's image, upright, resized and cropped to uint8 [height, width, 3].

    BadMessage where it is not a whole JPEG, PNG or WebP, or has too many pixels.
    """
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > IMAGE_PIXELS:
                raise BadMessage("bad_media", f"{field}: {image.width}x{image.height} is over {IMAGE_PIXELS} pixels")
            picture = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError:
        raise BadMessage("bad_media", f"{field}: not a JPEG, PNG or WebP image") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, BadMessage):
            raise
        raise BadMessage("bad_media", f"{field}: the image is broken") from None
    return fit(picture, height, width)


class SourceVideo:
    """A client's video file, read in order, a few frames at a time; its temporary file goes with it."""

    def __init__(self, content: bytes, rate: int, height: int, width: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="reelway-source-")
        path = Path(self._folder.name) / "source"
        path.write_bytes(content)
        try:
            video = VideoFile(path, rate)
        except (ValueError, OSError):
            self.close()
            raise BadMessage("bad_media", "source.video: not a video that can be read") from None
        self.frames = video.frames
        self._open = lambda first: video.read(height, width, first)
        self._pictures: Iterator[Pixels] = iter(())
        self._next = -1

    def read(self, first: int, count: int) -> Pixels | None:
        """Frames [first, first + count), uint8 [T, H, W, 3]; None where the video has not so many left."""
        if first + count > self.frames:
            return None
        if first != self._next:
            self._pictures = self._open(first)
        self._next = first + count
        try:
            return np.stack([next(self._pictures) for _ in range(count)])
        except (ValueError, OSError):
            raise BadMessage("bad_media", "source.video: the video is broken") from None

    def close(self) -> None:
        self._folder.cleanup()
