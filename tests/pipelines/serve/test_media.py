"""Media: what a player decodes, when it can decode it; and what clients send."""

import io
from itertools import pairwise

import av
import numpy as np
import pytest
from PIL import Image

from reelway.kernels.clips import Pixels
from reelway.pipelines.serve.media import IMAGE_PIXELS, Mp4Encoder, SourceVideo, encoder, read_picture
from reelway.pipelines.serve.protocol import FRAGMENT, INIT, JPEG, BadMessage
from reelway.pipelines.video import VideoWriter

HEIGHT, WIDTH = 32, 48


def picture(index: int) -> Pixels:
    """A bright bar that moves, on a ramp: no two frames are alike."""
    frame = np.broadcast_to(np.linspace(20, 120, WIDTH, dtype=np.uint8)[None, :, None], (HEIGHT, WIDTH, 3)).copy()
    frame[:, (3 * index) % WIDTH : (3 * index) % WIDTH + 6] = 235
    return frame


def clip(first: int, count: int) -> Pixels:
    return np.stack([picture(index) for index in range(first, first + count)])


def decoded(content: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(content)) as container:
        return list(container.decode(video=0))


def test_fragments_decode_to_what_was_sent() -> None:
    made = encoder("mp4", HEIGHT, WIDTH, 16.0, 90)
    content = made.begin(0)[0].payload
    sent: list[Pixels] = []
    # Pieces of a first block and a second one; then a flush: frame indices jump by 24, times do not.
    for first, count, key in ((0, 1, True), (1, 4, False), (5, 4, False), (9, 4, True), (13, 4, False), (41, 4, True)):
        (part,) = made.encode(clip(first, count), first, key)
        assert (part.kind, part.first) == (FRAGMENT, first)
        content += part.payload
        sent += list(clip(first, count))
        # Everything that was sent can be shown at once: no frame is kept back for the next fragment.
        assert len(decoded(content)) == len(sent)
    frames = decoded(content)
    assert [frame.pts * frame.time_base for frame in frames] == [index / 16 for index in range(len(sent))]
    assert [index for index, frame in enumerate(frames) if frame.key_frame] == [0, 9, 17]
    for frame, expected in zip(frames, sent, strict=True):
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - expected).mean() < 6


@pytest.mark.parametrize("rate", [7.5, 23.976, 30.0, 60.0])
def test_times_rise_at_any_frame_rate(rate: float) -> None:
    made = encoder("mp4", HEIGHT, WIDTH, rate, 50)
    parts = [made.encode(clip(first, 4), first, first % 12 == 0)[0].payload for first in range(0, 48, 4)]
    times = [float(frame.pts * frame.time_base) for frame in decoded(made.begin(0)[0].payload + b"".join(parts))]
    assert len(times) == 48
    assert times == pytest.approx([index / rate for index in range(48)], abs=1e-4)
    assert all(later > earlier for earlier, later in pairwise(times))


def test_the_codec_is_named_as_the_decoder_finds_it() -> None:
    made = Mp4Encoder(HEIGHT, WIDTH, 16.0, 80)
    (init,) = made.begin(7)
    assert (init.kind, init.first) == (INIT, 7)
    assert init.payload[4:8] == b"ftyp"
    with av.open(io.BytesIO(init.payload + made.encode(clip(0, 1), 0, True)[0].payload)) as container:
        codec = container.streams.video[0].codec_context
        extra = codec.extradata
        assert extra is not None
        assert made.mime == f'video/mp4; codecs="avc1.{extra[1:4].hex()}"'
        assert (codec.height, codec.width) == (HEIGHT, WIDTH)


def test_better_quality_is_more_bytes() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (8, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for media in ("mp4", "jpeg"):
        sizes = []
        for quality in (10, 50, 95):
            made = encoder(media, HEIGHT, WIDTH, 16.0, quality)  # type: ignore[arg-type]
            sizes.append(sum(len(part.payload) for part in made.encode(noise, 0, True)))
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[-1] / 2


def test_an_odd_size_has_no_mp4() -> None:
    with pytest.raises(ValueError, match="even size, got 33x32"):
        encoder("mp4", 32, 33, 16.0, 80)


def test_jpeg_is_one_message_per_frame() -> None:
    made = encoder("jpeg", HEIGHT, WIDTH, 16.0, 95)
    assert made.begin(0) == []
    parts = made.encode(clip(9, 4), 9, True)
    assert [(part.kind, part.first) for part in parts] == [(JPEG, first) for first in range(9, 13)]
    for part in parts:
        shown = np.array(Image.open(io.BytesIO(part.payload)))
        assert np.abs(shown.astype(int) - picture(part.first)).mean() < 4


# --- What clients send -----------------------------------------------------------------------------------------------


def file_of(pixels: Pixels, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_a_picture_is_fitted(kind: str) -> None:
    content = file_of(picture(3), kind, **({} if kind == "PNG" else {"quality": 95}))
    assert read_picture("image", content, 32, 32).shape == (32, 32, 3)
    same = read_picture("image", content, HEIGHT, WIDTH)
    assert np.abs(same.astype(int) - picture(3)).mean() < 6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a JPEG, PNG or WebP"),
        (b"GIF89a" + bytes(50), "not a JPEG, PNG or WebP"),
        (file_of(picture(0), "GIF"), "not a JPEG, PNG or WebP"),
        (file_of(picture(0), "PNG")[:-40], "broken"),
        (file_of(picture(0), "JPEG")[:200], "broken|not a JPEG"),
    ],
)
def test_what_is_no_picture_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(BadMessage, match=words) as caught:
        read_picture("image", content, 32, 32)
    assert caught.value.code == "bad_media"


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file whose header promises more pixels than may be: refused before they are decoded."""
    content = file_of(np.zeros((64, 64, 3), np.uint8), "PNG")
    side = int(IMAGE_PIXELS**0.5) + 1
    forged = content[:16] + side.to_bytes(4, "big") * 2 + content[24:]
    import zlib

    forged = forged[:29] + zlib.crc32(forged[12:29]).to_bytes(4, "big") + forged[33:]
    with pytest.raises(BadMessage, match=f"{side}x{side}"):
        read_picture("image", forged, 32, 32)


def test_a_source_video_gives_its_frames_again(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "source.mp4"
    with VideoWriter(path, 16) as writer:
        writer.write(clip(0, 20))
    source = SourceVideo(path.read_bytes(), 16, HEIGHT, WIDTH)
    try:
        for first, count in ((0, 9), (9, 4), (4, 6)):  # the last as after a worker was lost
            frames = source.read(first, count)
            assert frames is not None
            assert np.abs(frames.astype(int) - clip(first, count)).mean() < 6
        assert source.read(17, 4) is None
    finally:
        source.close()
    with pytest.raises(BadMessage, match="not a video"):
        SourceVideo(b"nothing", 16, HEIGHT, WIDTH)
