"""Sessions and snapshots in a store: what is kept, what is found again, and what of it is believed."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reelway.actors.generator import Student
from reelway.actors.streams import Snapshot
from reelway.actors.timeline import Layout, Turn
from reelway.pipelines.serve.snapshots import Keeper, Snapshots, block_of, prompts_agree
from reelway.pipelines.serve.state import KEPT, Kept, SessionRecord

SIZE = {"height": 32, "width": 32}
LAYOUT = Layout(first=2, block=3, factor=4)


def snapshot(frames_out: int, block: int = 0, **info: Any) -> Snapshot:
    tensors = {
        "generator.origin": torch.tensor([0]),
        "generator.cache.next_position": torch.tensor([2 + 3 * (block - 1) if block else 0]),
        "generator.history": torch.full((2, 3), float(frames_out)),
    }
    return Snapshot(tensors, {"frames_out": frames_out, "prompts": [[0, "red"]], **info})


def record(stream: str = "one", **changes: Any) -> SessionRecord:
    return SessionRecord(**{"stream": stream, "model": "tiny", "order": {"seed": 3}, "begun": 1.5} | changes)


@pytest.fixture
def state(tmp_path: Path) -> Snapshots:
    return Snapshots(tmp_path / "state")


# --- Sessions --------------------------------------------------------------------------------------------------------


def test_a_session_comes_back_with_its_image(state: Snapshots) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    state.write_session(record(), image)
    changed = record(turns=(Turn(4, "blue", index=1, frame=29, flushed=7),), frames_taken=12)
    state.write_session(changed)
    assert Snapshots(state.storage.uri).read_session("one") == changed
    found = state.read_image("one")
    assert found is not None
    assert np.array_equal(found, image)
    state.write_session(record("two"))
    assert state.read_image("two") is None


def test_a_source_video_is_kept_with_its_session_and_forgotten_with_it(state: Snapshots) -> None:
    state.write_session(record(), video=b"a file of a video")
    state.write_session(record(frames_taken=12))
    assert Snapshots(state.storage.uri).read_video("one") == b"a file of a video"
    assert state.read_video("two") is None
    state.forget("one")
    assert state.read_video("one") is None


def test_a_session_that_is_not_there_or_broken_is_said_in_one_line(state: Snapshots) -> None:
    with pytest.raises(FileNotFoundError, match=r"sessions/one\.json: no such file"):
        state.read_session("one")
    state.storage.publish("sessions/one.json", b'{"stream": "one"')
    with pytest.raises(ValueError, match=r"sessions/one\.json: not a session"):
        state.read_session("one")


@pytest.mark.parametrize("stream", ["../../etc/passwd", "", "a/b", "a.b", "x" * 65, "ä"])
def test_an_id_that_could_leave_the_folder_is_refused(state: Snapshots, stream: str) -> None:
    for call in (state.read_session, state.read_image, state.kept, state.forget):
        with pytest.raises(ValueError, match=r"^stream: an id has 1 to 64 letters"):
            call(stream)


# --- Snapshots -------------------------------------------------------------------------------------------------------


def test_the_newest_three_stay_and_the_newest_that_fits_is_found(state: Snapshots) -> None:
    for block in range(1, 6):
        state.keep("one", block, snapshot(10 * block, block))
    state.keep("two", 1, snapshot(7))
    assert [kept.block for kept in state.kept("one")] == [3, 4, 5]
    assert len(list(Path(state.storage.uri, "snapshots").iterdir())) == KEPT + 1
    found = {frame: state.newest("one", frame) for frame in (29, 30, 49, 1000)}
    assert found[29] is None
    assert [found[frame].info["frames_out"] for frame in (30, 49, 1000)] == [30, 40, 50]  # type: ignore[union-attr]
    assert found[49].tensors["generator.history"].unique().item() == 40.0  # type: ignore[union-attr]
    older = state.newest("one", 1000, lambda kept: kept.block != 5)
    assert older is not None
    assert older.info["frames_out"] == 40


def test_another_worker_goes_on_where_the_first_one_stopped_keeping(state: Snapshots) -> None:
    for block in range(1, 5):
        state.keep("one", block, snapshot(10 * block, block))
    other = Snapshots(state.storage.uri)
    other.keep("one", 5, snapshot(50, 5))
    assert [kept.block for kept in other.kept("one")] == [3, 4, 5]


def test_a_torn_snapshot_is_passed_over(state: Snapshots) -> None:
    for block in (1, 2):
        state.keep("one", block, snapshot(10 * block, block))
    newest = Path(state.storage.where(state.kept("one")[-1].name))
    whole = newest.read_bytes()
    for torn in (whole[:-4], whole[:20], b"", b"\xff" * 64):
        newest.write_bytes(torn)
        found = state.newest("one", 1000)
        assert found is not None
        assert found.info["frames_out"] == 10


def test_a_stream_from_the_store_goes_on_bit_for_bit(state: Snapshots, small_student: Path) -> None:
    student = Student.from_pretrained(small_student)
    with student.open("a small red star", 1, **SIZE) as stream:
        stream.next_chunk()
        stream.next_chunk()
        taken = stream.snapshot()
        assert block_of(taken, Layout.of(student.settings, student.vae.temporal_factor)) == 2
        state.keep("one", 2, taken)
        expected = [stream.next_chunk() for _ in range(2)]
    found = Snapshots(state.storage.uri).newest("one", 21)
    assert found is not None
    with student.restore(found) as stream:
        for chunk in expected:
            assert np.array_equal(stream.next_chunk(), chunk)


@pytest.mark.parametrize(
    ("held", "block", "turns", "agree"),
    [
        ([[0, "red"]], 4, [], True),
        ([[0, "blue"]], 4, [], False),
        ([[0, "red"], [5, "blue"]], 4, [Turn(2, "blue")], True),
        ([[0, "red"]], 4, [Turn(2, "blue")], False),  # made by a worker that did not hear of the turn
        ([[0, "red"], [5, "blue"]], 4, [], False),  # its turn was heard of by nobody else
        ([[0, "red"]], 4, [Turn(4, "blue")], True),  # at its own edge: it is yet to be made
        ([[0, "red"], [5, "blue"]], 4, [Turn(2, "blue"), Turn(6, "red")], True),
        ([[0, "red"], [5, "blue"]], 4, [Turn(3, "blue")], False),
        ([[0, "red"]], 4, [Turn(5, "blue")], True),
        ([[0, "blue"]], 0, [], False),
        ([[0, "red"], [0, "blue"]], 3, [Turn(0, "blue")], True),
    ],
)
def test_only_a_snapshot_of_the_same_prompts_is_believed(
    held: list[Any], block: int, turns: list[Turn], agree: bool
) -> None:
    kept = Kept("", 0, block, {"prompts": held})
    assert prompts_agree(kept, "red", turns, LAYOUT) is agree


# --- Forgetting ------------------------------------------------------------------------------------------------------


def test_a_forgotten_stream_leaves_nothing(state: Snapshots) -> None:
    state.write_session(record(), np.zeros((4, 4, 3), np.uint8))
    for block in range(1, 6):
        state.keep("one", block, snapshot(10 * block))
    state.forget("one")
    assert [path for path in Path(state.storage.uri).rglob("*") if path.is_file()] == []
    state.forget("one")


def test_the_sweep_takes_what_nobody_wrote_to_for_long(state: Snapshots) -> None:
    for stream in ("gone", "quiet", "paused", "fresh"):
        state.write_session(record(stream))
        state.keep(stream, 1, snapshot(10))
    state.keep("orphan", 1, snapshot(10))
    old = time.time() - 1000
    for path in Path(state.storage.uri).rglob("*"):
        if path.is_file() and path.name.startswith(("gone", "orphan", "quiet.json", "paused.0")):
            os.utime(path, (old, old))
    half_written = Path(state.storage.uri, "snapshots", ".partial-1-000000000000-one")
    half_written.write_bytes(b"half")
    os.utime(half_written, (old, old))
    assert sorted(state.sweep(500)) == ["gone", "orphan"]
    left = {path.name.split(".")[0] for path in Path(state.storage.uri).rglob("*") if path.is_file()}
    assert left == {"quiet", "paused", "fresh"}


def test_the_same_on_an_object_store(s3_query: str) -> None:
    state = Snapshots(f"s3://testing:testing@bucket/serve?{s3_query}")
    state.write_session(record())
    for block in range(1, 6):
        state.keep("one", block, snapshot(10 * block, block))
    assert state.read_session("one") == record()
    found = state.newest("one", 49)
    assert found is not None
    assert found.info["frames_out"] == 40
    assert state.newest("two", 49) is None
    assert state.sweep(500) == []
    state.forget("one")
    assert state.kept("one") == []


# --- The keeper ------------------------------------------------------------------------------------------------------


def test_the_keeper_writes_the_newest_and_makes_nobody_wait(state: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, gate, keep = threading.Event(), threading.Event(), Snapshots.keep

    def slow(self: Snapshots, stream: str, block: int, snapshot: Snapshot) -> int:
        entered.set()
        assert gate.wait(100)
        return keep(self, stream, block, snapshot)

    monkeypatch.setattr(Snapshots, "keep", slow)
    keeper = Keeper(state, LAYOUT)
    began = time.monotonic()
    for block in range(1, 8):
        keeper.put("one", snapshot(10 * block, block))
        assert entered.wait(100)  # the first is in the store's hands
    keeper.put("dropped", snapshot(10, 1))
    keeper.drop("dropped")
    assert time.monotonic() - began < 90  # nobody waited for the gate
    gate.set()
    keeper.stop()
    assert [kept.block for kept in state.kept("one")] == [1, 7]
    assert state.kept("dropped") == []
    assert (keeper.stats()["written"], keeper.stats()["passed_over"]) == (2, 5)


def test_a_store_that_fails_is_told_and_ends_nothing(
    state: Snapshots, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> bool:
        raise OSError("state: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(state.storage, "publish", full)
        keeper = Keeper(state, LAYOUT)
        assert keeper.write("one", snapshot(10, 1)) is False
    assert keeper.write("one", snapshot(20, 2)) is True
    keeper.stop()
    assert "stream one: a snapshot could not be kept: state: the disk is full" in capsys.readouterr().err
    assert (keeper.stats()["failed"], keeper.stats()["error"]) == (1, "state: the disk is full")
