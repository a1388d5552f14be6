"""A worker in this process: what it gives is the bare stream's video, and another one goes on with it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from reelway.actors.generator import Student
from reelway.actors.orders import Busy, Piece, StreamOrder, TooSlow
from reelway.actors.timeline import Turn
from reelway.pipelines.serve import worker as worker_module
from reelway.pipelines.serve.terms import Moved, Moving, WorkerSettings
from reelway.pipelines.serve.worker import StreamWorker

RED, BLUE = "a small red star drifts left", "two blue circles on white"
STREAM = "one"
BLOCK = 12  # frames of every block but the first, which has 9
Frames = dict[int, np.ndarray]


def order(stream: str = STREAM, **changes: Any) -> StreamOrder:
    return StreamOrder(**{"stream": stream, "prompt": RED, "height": 32, "width": 32, "frame_rate": None} | changes)


@pytest.fixture(scope="module")
def student(small_student: Path) -> Student:
    return Student.from_pretrained(small_student)


@pytest.fixture
def settings(small_student: Path, tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(str(small_student), str(tmp_path / "state"), keep_every=1, size=(32, 32), batches=(1,))


def undisturbed(student: Student, blocks: int, turns: Sequence[Turn] = ()) -> Frames:
    """The frames of the bare stream, by index."""
    frames: Frames = {}
    with student.open(RED, 0, height=32, width=32) as stream:
        for block in range(blocks):
            for turn in turns:
                if turn.block == block:
                    stream.switch_prompt(turn.text)
            for frame in stream.next_chunk():
                frames[len(frames)] = frame
    return frames


def check(found: Frames, expected: Frames) -> None:
    assert found
    for index, frame in found.items():
        assert np.array_equal(frame, expected[index]), f"frame {index}"


async def take_until(worker: StreamWorker, frame: int, until: int, frames: Frames) -> int:
    """Take up to frame `until`; returns the next frame."""
    while frame < until:
        taken = await worker.take(STREAM, frame, 10.0)
        assert taken.state == "running" or taken.pieces, taken
        frame = note(taken.pieces, frame, frames)
    return frame


def note(pieces: Sequence[Piece], frame: int, frames: Frames) -> int:
    """Of the first piece a viewer may have some frames, as it goes on in the midst of it; no other comes twice."""
    assert all(earlier.end <= later.first for earlier, later in pairwise(pieces))
    for piece in pieces:
        assert piece.end > frame
        frames.update(zip(range(piece.first, piece.end), piece.frames, strict=True))
        frame = piece.end
    return frame


async def eventually(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not true():
            await asyncio.sleep(0.01)


def with_workers(settings: WorkerSettings, count: int, body: Callable[..., Awaitable[None]]) -> None:
    """Run `body` with so many workers that are ready, and end them."""

    async def run() -> None:
        workers = [StreamWorker(f"worker-{index}", "tiny", settings) for index in range(count)]
        try:
            for worker in workers:
                await worker.ready()
            await asyncio.wait_for(body(*workers), 200)
        finally:
            for worker in workers:
                await worker.stop()

    asyncio.run(run())


# --- One worker ------------------------------------------------------------------------------------------------------


def test_a_worker_gives_the_video_of_the_bare_stream(settings: WorkerSettings, student: Student) -> None:
    async def body(worker: StreamWorker) -> None:
        info = await worker.ready()
        assert (info.size, info.block, info.first_block, info.temporal) == ((32, 32), 3, 3, 4)
        parts = student.bytes_per_stream(32, 32)
        assert (info.keep_every, info.snapshot_bytes) == (1, parts.kv_cache + parts.vae_states + parts.history)
        assert info.fingerprint == student.fingerprint
        frames: Frames = {}
        assert await worker.open(order(frames=45)) == 0
        await take_until(worker, 0, 45, frames)
        check(frames, undisturbed(student, 4))
        assert (await worker.take(STREAM, 45, 5.0)).state == "ended"
        await worker.close(STREAM)
        stats = await worker.stats()
        assert (stats["here"], stats["capacity"]["sessions"], stats["capacity"]["bytes"]) == ([], 0, 0)
        with pytest.raises(ValueError, match=r"^stream one: not on worker worker-0$"):
            await worker.take(STREAM, 45)

    with_workers(settings, 1, body)


def test_a_worker_without_room_says_so(settings: WorkerSettings) -> None:
    async def body(worker: StreamWorker) -> None:
        await worker.open(order())
        with pytest.raises(Busy, match="sessions"):
            await worker.open(order("two"))
        await worker.close(STREAM)
        await worker.open(order("two"))

    with_workers(replace(settings, sessions=1), 1, body)


def test_a_worker_that_was_measured_on_a_busy_machine_looks_again(
    settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else would ever tell it: what it refuses, it does not make."""

    async def body(worker: StreamWorker) -> None:
        live = order(frame_rate=0.1)
        worker.scheduler.speeds.scale(1e6)
        with pytest.raises(TooSlow, match=r"^speed: "):  # it has measured a moment ago
            await worker.open(live)
        monkeypatch.setattr(worker_module, "MEASURE_AGAIN", 0.0)
        await worker.open(live)
        assert (await worker.stats())["here"] == [STREAM]

    with_workers(settings, 1, body)


def test_large_snapshots_are_taken_less_often() -> None:
    """At most 100 MB per second of a stream, and no more often than every 4 blocks."""
    assert worker_module.usual_distance(4_200_000, 0.75) == 4
    assert worker_module.usual_distance(300_000_000, 0.75) == 4
    assert worker_module.usual_distance(6_000_000_000, 0.75) == 80
    assert worker_module.usual_distance(6_000_000_001, 0.75) == 81


def test_a_viewer_that_comes_back_goes_on(settings: WorkerSettings, student: Student) -> None:
    async def body(worker: StreamWorker) -> None:
        frames: Frames = {}
        await worker.open(order())
        frame = await take_until(worker, 0, 33, frames)
        await worker.take(STREAM, frame)
        made = (await worker.stats())["scheduler"]["totals"]["made"]
        assert await worker.open(order(), frame=frame) == frame  # the stream that runs still has it
        await take_until(worker, frame, 45, frames)
        assert (await worker.stats())["scheduler"]["totals"]["made"] >= made
        again: Frames = {}
        assert await worker.open(order(), frame=15) <= 15  # acknowledged long ago: opened anew
        await take_until(worker, 15, 33, again)
        assert min(again) == 13  # the piece that holds the frame
        check(frames | again, undisturbed(student, 6))

    with_workers(settings, 1, body)


def test_an_abandoned_stream_is_freed_and_a_held_one_is_not(
    settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(worker_module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(worker_module, "JANITOR_SECONDS", 0.01)

    async def body(worker: StreamWorker) -> None:
        nonlocal now
        await worker.open(order("gone"))
        await worker.open(order("held"))
        for _ in range(4):
            now += 25.0
            await worker.hold("held")
        await asyncio.sleep(0.1)  # the janitor comes by
        assert (await worker.stats())["here"] == ["gone", "held"]
        now += 2.0
        await eventually(lambda: list(worker.scheduler.stats()["streams"]) == ["held"])
        assert (await worker.stats())["here"] == ["held"]

    with_workers(replace(settings, abandoned_seconds=101.0), 1, body)


def test_a_student_that_is_not_there_is_said_in_one_line(settings: WorkerSettings, tmp_path: Path) -> None:
    worker = StreamWorker("worker", "tiny", replace(settings, path=str(tmp_path / "nothing")))
    with pytest.raises(FileNotFoundError, match="nothing"):
        asyncio.run(worker.ready())


# --- From worker to worker -------------------------------------------------------------------------------------------


def test_a_stream_goes_on_after_its_worker_bit_for_bit(settings: WorkerSettings, student: Student) -> None:
    """The second worker finds the newest snapshot that fits, and makes again what lies between."""

    async def body(first: StreamWorker, second: StreamWorker) -> None:
        frames: Frames = {}
        await first.open(order())
        frame = await take_until(first, 0, 37, frames)
        turn = await first.prompt(STREAM, BLUE)
        await take_until(first, turn.frame, turn.frame + 2 * BLOCK, frames)
        frame = turn.frame + BLOCK + 4  # in the midst of a block
        await first.close(STREAM)  # the first one is never asked again
        begins = await second.open(order(), (turn,), frame)
        assert turn.frame <= begins <= frame
        again: Frames = {}
        await take_until(second, frame, frame + 2 * BLOCK, again)
        assert frame - 4 < min(again) <= frame  # the piece that holds the frame
        expected = undisturbed(student, 10, [turn])
        check(frames, expected)
        check(again, expected)
        assert not np.array_equal(expected[turn.frame], undisturbed(student, 8)[turn.frame])

    with_workers(settings, 2, body)


def test_without_a_store_a_stream_is_made_again_from_its_beginning(settings: WorkerSettings, student: Student) -> None:
    async def body(worker: StreamWorker) -> None:
        frames: Frames = {}
        assert await worker.open(order(), (), 34) == 0
        await take_until(worker, 34, 45, frames)
        assert min(frames) > 30
        check(frames, undisturbed(student, 5))

    with_workers(replace(settings, state=None), 1, body)


def test_a_snapshot_under_a_prompt_that_nobody_else_heard_of_is_not_used(
    settings: WorkerSettings, student: Student
) -> None:
    async def body(first: StreamWorker, second: StreamWorker) -> None:
        await first.open(order())
        await take_until(first, 0, 21, {})
        turn = await first.prompt(STREAM, BLUE)
        frame = await take_until(first, turn.frame, turn.frame + 2 * BLOCK, {})
        await eventually(lambda: len(first.state.kept(STREAM)) == 3)  # type: ignore[union-attr]
        await first.close(STREAM)
        frames: Frames = {}
        await second.open(order(), (), frame)
        await take_until(second, frame, frame + BLOCK, frames)
        check(frames, undisturbed(student, turn.block + 4))

    with_workers(settings, 2, body)


def test_a_drained_worker_hands_over_every_frame_once(settings: WorkerSettings, student: Student) -> None:
    async def body(first: StreamWorker, second: StreamWorker) -> None:
        frames: Frames = {}
        await first.open(order())
        frame = await take_until(first, 0, 21, frames)
        await eventually(lambda: first.scheduler.stats()["streams"][STREAM]["waiting"] >= 3)
        assert await first.drain() == 1
        with pytest.raises(Moved):
            await first.open(order("two"))
        with pytest.raises(Moved):
            await first.prompt(STREAM, BLUE)
        while (taken := await first.take(STREAM, frame, 5.0)).state == "running":
            frame = note(taken.pieces, frame, frames)
        assert isinstance(taken, Moving)
        assert frame > 21  # what was made and not taken was handed out
        assert (await first.take(STREAM, frame)).state == "moved"
        assert (await first.stats())["here"] == []
        assert await second.open(order(), (), frame) == frame  # nothing is made again
        await take_until(second, frame, frame + 2 * BLOCK, frames)
        assert sorted(frames) == list(range(len(frames)))
        check(frames, undisturbed(student, 9))

    with_workers(replace(settings, keep_every=1000), 2, body)


def test_who_waits_for_a_piece_hears_of_a_drain_at_once(
    settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "LONGEST_WAIT", 100.0)

    async def body(worker: StreamWorker) -> None:
        await worker.open(order())
        await worker.pause(STREAM)
        frame = 0
        while (taken := await worker.take(STREAM, frame, 0.5)).pieces:
            frame = note(taken.pieces, frame, {})
        waits = asyncio.create_task(worker.take(STREAM, frame, 100.0))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await worker.drain()
        assert (await waits).state == "moved"
        assert time.monotonic() - began < 90

    with_workers(settings, 1, body)


def test_a_video_that_has_ended_is_handed_out_by_a_drained_worker(settings: WorkerSettings) -> None:
    async def body(worker: StreamWorker) -> None:
        await worker.open(order(frames=20))
        await eventually(lambda: worker.scheduler.stats()["streams"][STREAM]["state"] == "ended")
        await worker.drain()
        taken = await worker.take(STREAM, 0)
        assert (taken.state, sum(len(piece.frames) for piece in taken.pieces)) == ("running", 20)
        assert (await worker.take(STREAM, 20)).state == "ended"

    with_workers(settings, 1, body)


def test_a_scheduler_that_breaks_down_lets_its_streams_move(
    settings: WorkerSettings, student: Student, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def body(first: StreamWorker, second: StreamWorker) -> None:
        frames: Frames = {}
        await first.open(order())
        frame = await take_until(first, 0, 21, frames)
        with monkeypatch.context() as patch:
            patch.setattr(first.scheduler, "tick", lambda: 1 / 0)
            began = time.monotonic()
            while (taken := await first.take(STREAM, frame, 5.0)).state == "running" and time.monotonic() < began + 100:
                frame = await take_until(first, frame, frame + 1, frames) if taken.pieces else frame
            assert taken.state == "moved"
            assert (await first.stats())["broken"] == "ZeroDivisionError: division by zero"
            with pytest.raises(Moved):
                await first.open(order("two"))
        await second.open(order(), (), frame)
        await take_until(second, frame, frame + BLOCK, frames)
        check(frames, undisturbed(student, 8))

    with_workers(settings, 2, body)
    assert "ZeroDivisionError" in capsys.readouterr().err
