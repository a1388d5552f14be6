"""Decoding in processes of its own, ahead of who consumes: whatever a file does to them, every clip has one outcome."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from reelway.actors import decode_lane
from reelway.actors.clips import BadVideo, Broken, Clip, ClipSettings, Skipped, Survey
from reelway.actors.decode_ahead import DecodeAhead, Job, jobs_of
from reelway.actors.decode_lane import DecodeLane
from reelway.actors.decoder import Decoder
from reelway.actors.sources import LocalFolder
from reelway.cluster.dataset import Quarantined
from reelway.cluster.storage import StorageError

sys.path.insert(0, str(Path(__file__).parent))
from media import read_number, write_numbered

# As large as the source: nothing is resized, so a child process need not import torch.
SETTINGS = ClipSettings(12, 128, 96, frames=9, stride=9, minimum_seconds=0.5, minimum_width=64, minimum_height=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.mp4 gives 2 clips, b.mp4 5, c.mp4 1; d.mp4 is too short, e.mp4 is no video."""
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in (("a", 48), ("b", 96), ("c", 24), ("d", 13)):
        write_numbered(folder / f"{name}.mp4", frames=frames)
    (folder / "e.mp4").write_text("no video\n" * 100)
    return folder


@pytest.fixture(scope="module")
def lane() -> Iterator[DecodeLane]:
    with DecodeLane(SETTINGS) as made:
        yield made


def test_a_lane_gives_what_the_decoder_gives(lane: DecodeLane, folder: Path) -> None:
    with Decoder(SETTINGS) as decoder:
        assert lane.survey(folder / "b.mp4") == decoder.survey(folder / "b.mp4") == Survey(4, 128, 96, 24, 5)
        assert lane.survey(folder / "d.mp4") == decoder.survey(folder / "d.mp4")
        found = list(lane.clips(folder / "b.mp4", [1, 3]))
        for ours, theirs in zip(found, decoder.clips(folder / "b.mp4", [1, 3]), strict=True):
            assert isinstance(ours, Clip)
            assert isinstance(theirs, Clip)
            np.testing.assert_array_equal(ours.frames, theirs.frames)
            assert vars(ours).keys() == vars(theirs).keys()
            assert {**vars(ours), "frames": 0} == {**vars(theirs), "frames": 0}


def test_a_bad_video_is_raised_and_the_lane_goes_on(lane: DecodeLane, folder: Path) -> None:
    lane.survey(folder / "a.mp4")
    child = lane.child
    for ask in (lane.survey, lambda path: list(lane.clips(path, [0]))):
        with pytest.raises(BadVideo) as caught:
            ask(folder / "e.mp4")
        assert caught.value.reason == "not-a-video"
        assert caught.value.path == folder / "e.mp4"
    (short,) = lane.clips(folder / "d.mp4", [0])
    assert isinstance(short, Skipped)
    assert lane.child is child


def test_clips_that_nobody_waits_for_do_not_come_later(lane: DecodeLane, folder: Path) -> None:
    stream = lane.clips(folder / "b.mp4", range(5))
    next(stream)
    stream.close()
    assert [clip.index for clip in lane.clips(folder / "a.mp4", [0, 1])] == [0, 1]


def test_with_a_process_that_dies_decord_takes_over_for_one_clip(folder: Path) -> None:
    with DecodeLane(SETTINGS) as lane:
        stream = lane.clips(folder / "b.mp4", range(5))
        found = [next(stream)]
        assert lane.child is not None
        lane.child.process.send_signal(signal.SIGSTOP)
        lane.child.process.send_signal(signal.SIGKILL)
        found += stream
    clips = [outcome for outcome in found if isinstance(outcome, Clip)]
    assert [clip.index for clip in clips] == list(range(5))
    assert [clip.decoder for clip in clips].count("decord") == 1
    assert [read_number(clip.frames[0]) for clip in clips] == [0, 18, 36, 54, 72]


CRASH = (
    "import os, sys; from multiprocessing.connection import Connection; c = Connection(int(sys.argv[1])); c.recv(); "
)


def test_a_file_that_kills_every_process_is_crashed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_lane, "LANE", CRASH + "c.recv(); os.abort()")
    with DecodeLane(SETTINGS) as lane:
        found = list(lane.clips(folder / "a.mp4", [0, 1]))
        assert [(type(item), item.reason, item.index) for item in found if isinstance(item, Broken)] == [
            (Broken, "crashed", 0),
            (Broken, "crashed", 1),
        ]
        assert found[1].start_seconds == 0.75
        with pytest.raises(BadVideo, match="crashes the decoder") as caught:
            lane.survey(folder / "a.mp4")
        assert caught.value.reason == "crashed"


def test_a_file_that_is_never_done_is_crashed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_lane, "LANE", CRASH + "import time; time.sleep(60)")
    with DecodeLane(SETTINGS, seconds=0.3) as lane, pytest.raises(BadVideo, match=r"busy for more than 0\.3 s"):
        lane.survey(folder / "a.mp4")
    assert lane.child is None


def test_an_error_of_the_decoder_is_that_file_s(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "import reelway.actors.decoder as d; d.Decoder.survey = lambda self, path: 1 // 0; "
    monkeypatch.setattr(decode_lane, "LANE", broken + decode_lane.LANE)
    with DecodeLane(SETTINGS) as lane, pytest.raises(BadVideo, match="ZeroDivisionError") as caught:
        lane.survey(folder / "a.mp4")
    assert caught.value.reason == "crashed"


JOBS = [Job("b.mp4", (0, 2, 4)), Job("e.mp4", (0, 1)), Job("a.mp4", (0, 1, 2)), Job("c.mp4", (0,)), Job("d.mp4", (0,))]


def summary(outcome: Clip | Quarantined) -> object:
    return (
        (outcome.source.name, outcome.index) if isinstance(outcome, Clip) else ": ".join(outcome.reason.split(": ")[:2])
    )


@pytest.mark.parametrize(("lanes", "ahead"), [(1, 1), (3, 2)])
def test_one_outcome_for_every_clip_in_order(folder: Path, lanes: int, ahead: int) -> None:
    decoder = DecodeAhead(LocalFolder(str(folder)), SETTINGS, lanes=lanes, ahead=ahead)
    try:
        for _ in range(2):
            assert [summary(outcome) for outcome in decoder.outcomes(JOBS)] == [
                ("b.mp4", 0),
                ("b.mp4", 2),
                ("b.mp4", 4),
                "decode: not-a-video",
                "decode: not-a-video",
                ("a.mp4", 0),
                ("a.mp4", 1),
                "decode: gone",
                ("c.mp4", 0),
                "filter: too-short",
            ]
    finally:
        decoder.close()


def test_decoding_goes_on_while_the_consumer_is_busy_and_stops_at_the_bound(folder: Path) -> None:
    decoder = DecodeAhead(LocalFolder(str(folder)), SETTINGS, lanes=1, ahead=3)
    try:
        outcomes = decoder.outcomes([Job("b.mp4", (0, 1, 2, 3, 4)), Job("a.mp4", (0, 1))])
        next(outcomes)
        deadline = time.monotonic() + 30
        while decoder.ready < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert decoder.ready == 3  # with nobody asking
        time.sleep(0.3)
        assert decoder.ready == 3
        outcomes.close()  # in the middle: the next round is not disturbed
        assert [summary(outcome) for outcome in decoder.outcomes([Job("c.mp4", (0,))])] == [("c.mp4", 0)]
    finally:
        decoder.close()


def test_a_store_that_fails_is_no_video_s_fault(folder: Path) -> None:
    class Failing(LocalFolder):
        @contextmanager
        def local(self, name: str) -> Iterator[Path]:
            if name == "a.mp4":
                raise StorageError("the store cannot be reached")
            yield folder / name

    decoder = DecodeAhead(Failing(str(folder)), SETTINGS, lanes=1, ahead=2)
    try:
        outcomes = decoder.outcomes([Job("c.mp4", (0,)), Job("a.mp4", (0,)), Job("b.mp4", (0,))])
        assert summary(next(outcomes)) == ("c.mp4", 0)
        with pytest.raises(StorageError, match="cannot be reached"):
            next(outcomes)
    finally:
        decoder.close()


def test_neighbouring_clips_of_a_video_are_one_job() -> None:
    items = [("a", 0), ("a", 3), ("b", 1), ("a", 4)]
    assert jobs_of(items) == [Job("a", (0, 3)), Job("b", (1,)), Job("a", (4,))]
    assert jobs_of([]) == []
