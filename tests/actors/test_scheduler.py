"""The scheduler with a small student: order of work, room, switches, replays, and many threads at once."""

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reelway.actors.admission import Kind, Speeds
from reelway.actors.generator import Student
from reelway.actors.orders import Busy, Piece, StreamOrder, TooSlow
from reelway.actors.scheduler import Scheduler
from reelway.actors.streams import Redraw, Snapshot
from reelway.actors.timeline import Turn

SIZE = 16  # pixels: the smallest there is
RED, BLUE = "a small red star drifts left", "two blue circles on white"
LEVEL = 2  # of grey: what the batch may change; measured is 1
STARTS = (0, 9, 21, 33, 45, 57, 69, 81, 93)  # first frame of each block


@pytest.fixture(scope="module")
def student(small_student: Path) -> Student:
    torch.set_num_threads(1)
    return Student.from_pretrained(small_student)


@pytest.fixture(autouse=True)
def _all_memory_comes_back(student: Student) -> Iterator[None]:
    """Whatever a test does with streams that it closes."""
    yield
    for stream in list(student.streams):
        stream.close()


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def order(stream: str = "one", prompt: str = RED, **options: Any) -> StreamOrder:
    return StreamOrder(stream, prompt, **{"height": SIZE, "width": SIZE, **options})


def job(stream: str = "one", prompt: str = RED, **options: Any) -> StreamOrder:
    return order(stream, prompt, **{"frame_rate": None, **options})


def watch(scheduler: Scheduler, *streams: str, frame: int = 0) -> dict[str, list[Piece]]:
    """Work until these streams have ended, taking everything as it comes."""
    pieces: dict[str, list[Piece]] = {stream: [] for stream in streams}
    places, running, idle = dict.fromkeys(streams, frame), set(streams), 0
    while running:
        idle = 0 if scheduler.tick() else idle + 1
        assert idle < 3
        for stream in list(running):
            taken = scheduler.take(stream, places[stream])
            pieces[stream].extend(taken.pieces)
            if taken.pieces:
                places[stream] = taken.pieces[-1].end
            if taken.state != "running":
                assert taken.state == "ended", taken.reason
                running.remove(stream)
    return pieces


def work(scheduler: Scheduler) -> None:
    while scheduler.tick():
        pass


def joined(pieces: list[Piece]) -> np.ndarray:
    return np.concatenate([piece.frames for piece in pieces])


def alone(
    student: Student, prompt: str, blocks: int, turns: dict[int, str] | None = None, **options: Any
) -> np.ndarray:
    """The video without any scheduler. turns: prompts by the block from which they hold."""
    size = {} if "image" in options else {"height": SIZE, "width": SIZE}
    with student.open(prompt, **size, **options) as stream:
        chunks = []
        for block in range(blocks):
            if turns and block in turns:
                stream.switch_prompt(turns[block])
            chunks.append(stream.next_chunk())
        return np.concatenate(chunks)


def distance(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# --- The order of work -----------------------------------------------------------------------------------------------


def arrivals(scheduler: Scheduler, names: str) -> list[str]:
    """Whose pictures come, one after the other, until there is nothing to do."""

    def made() -> dict[str, int]:
        rows = scheduler.stats()["streams"]
        return {name: rows[name]["made"] for name in names}

    came, before = [], made()
    while scheduler.tick():
        after = made()
        came += [name for name in names if after[name] > before[name]]
        before = after
    return came


def test_the_earliest_deadline_comes_first(student: Student) -> None:
    """Two frame rates and a job without any: the pieces come in the order of their deadlines, the job's last."""
    scheduler = Scheduler(student, ahead=2, clock=Clock())
    rates = {"j": None, "a": 16.0, "b": 8.0}
    for name, rate in rates.items():
        scheduler.open(order(name, frame_rate=rate))
    firsts = (0, 1, 5, 9, 13, 17)  # of the pieces of two chunks
    due = [(first / rate, name) for name, rate in rates.items() if rate for first in firsts]
    assert arrivals(scheduler, "jab") == [name for _, name in sorted(due)] + ["j"] * 6


def test_a_new_stream_comes_before_those_that_have_frames_in_hand(student: Student) -> None:
    clock = Clock()
    scheduler = Scheduler(student, clock=clock)
    for name in "ab":
        scheduler.open(order(name))
    work(scheduler)
    for name in "ab":
        scheduler.take(name, 0)  # playback starts
        scheduler.take(name, 21)
    clock.now = 0.5
    scheduler.open(order("new"))
    scheduler.tick()
    scheduler.tick()
    assert {name: row["waiting"] for name, row in scheduler.stats()["streams"].items()} == {"a": 0, "b": 0, "new": 1}


def test_a_batch_grows_only_while_the_first_stream_stays_in_time(student: Student) -> None:
    """Blocks take 0.3 s alone and 0.2 s more for each further stream."""
    for due, expected in ((0.8, 3), (0.6, 2), (0.4, 1)):
        clock = Clock()
        scheduler = Scheduler(student, clock=clock, ahead=2, load=1.0)
        for name, rate in (("a", 20.0), ("b", 2.0), ("c", 2.0)):
            scheduler.open(order(name, frame_rate=rate))
        work(scheduler)
        for name in "abc":
            scheduler.take(name, 0)
        for name in "abc":
            scheduler.take(name, 21)
        scheduler.speeds = Speeds()
        for size, seconds in ((1, 0.3), (2, 0.5), (3, 0.7)):
            scheduler.speeds.saw_made(Kind(SIZE, SIZE, False), size, seconds)
        clock.now = 21 / 20 - due
        before = scheduler.stats()["batches"].get(expected, 0)
        scheduler.tick()
        assert scheduler.stats()["batches"].get(expected, 0) == before + 1
        for name in "abc":
            scheduler.close_stream(name)


def test_streams_of_one_shape_are_made_in_one_batch_and_others_are_not(student: Student) -> None:
    scheduler = Scheduler(student)
    for name in "abc":
        scheduler.open(job(name, frames=33))
    scheduler.open(job("large", width=2 * SIZE, frames=33))
    watch(scheduler, "a", "b", "c", "large")
    assert scheduler.stats()["batches"] == {1: 3, 3: 3}


def test_a_slow_viewer_pauses_only_itself(student: Student) -> None:
    clock = Clock()
    scheduler = Scheduler(student, ahead=2, clock=clock)
    scheduler.open(order("slow", frames=45))
    scheduler.open(order("quick", seed=1, frames=69))
    quick = watch(scheduler, "quick")["quick"]
    assert len(joined(quick)) == 69
    row = scheduler.stats()["streams"]["slow"]
    assert (row["made"], row["waiting"]) == (21, 6)
    scheduler.take("slow", 0)
    clock.now = 1000.0  # it comes back, and nobody has to hurry for it
    rest = watch(scheduler, "slow")["slow"]
    assert scheduler.stats()["streams"]["slow"]["late"] == 0
    assert distance(joined(rest), alone(student, RED, 4)) <= LEVEL


def test_pieces_that_come_late_are_counted_and_playback_waits_for_them(student: Student) -> None:
    clock = Clock()
    scheduler = Scheduler(student, ahead=2, clock=clock)
    scheduler.open(order(frames=45))

    def work_and_take(ticks: int, frame: int) -> list[float]:
        for _ in range(ticks):
            scheduler.tick()
        return [piece.late for piece in scheduler.take("one", frame).pieces]

    assert work_and_take(4, 0) == [0.0, -1 / 16, -5 / 16]  # a block, and its three pieces
    assert work_and_take(0, 9) == []
    clock.now = 2.0
    assert work_and_take(2, 9) == pytest.approx([2.0 - 9 / 16])
    assert work_and_take(2, 13) == [-4 / 16, -8 / 16]
    row = scheduler.stats()["streams"]["one"]
    assert (row["late"], row["underruns"], row["chunks"], row["chunks_late"]) == (4, 1, 2, 1)
    assert scheduler.stats()["in_time"] == 0.5


def test_a_viewer_who_comes_back_late_has_lent_nobody_time(student: Student) -> None:
    """Its next block is due a chunk's length after there was room for it, not when the viewer was away."""
    clock = Clock()
    scheduler = Scheduler(student, ahead=1, clock=clock)
    scheduler.open(order())
    work(scheduler)
    scheduler.take("one", 0)
    clock.now = 1000.0
    scheduler.take("one", 9)
    work(scheduler)
    assert [piece.late for piece in scheduler.take("one", 9).pieces] == pytest.approx([-12 / 16] * 3)


def test_a_paused_stream_makes_nothing_and_its_deadlines_wait(student: Student) -> None:
    clock = Clock()
    scheduler = Scheduler(student, ahead=2, clock=clock)
    scheduler.open(order())
    for _ in range(4):  # a block and its three pieces
        scheduler.tick()
    scheduler.take("one", 0)
    scheduler.pause("one")
    clock.now = 50.0
    assert not scheduler.take("one", 9).pieces
    assert not scheduler.tick()
    scheduler.resume("one")
    work(scheduler)
    late = [piece.late for piece in scheduler.take("one", 9).pieces]
    assert late[:3] == pytest.approx([-9 / 16, -13 / 16, -17 / 16])


# --- Room ------------------------------------------------------------------------------------------------------------


def test_a_stream_is_refused_exactly_when_the_load_would_pass_the_limit(student: Student) -> None:
    """Against the load by hand: streams times 16/12 blocks per second times the best seconds per block."""
    scheduler = Scheduler(student, load=0.9)
    kind = Kind(*student.default_size, False)
    for size, seconds in ((1, 0.10), (2, 0.16), (4, 0.28)):
        scheduler.speeds.saw_made(kind, size, seconds)
    scheduler.speeds.saw_shown(kind, 0.02)
    best = {1: 0.12, 2: 0.20 / 2, 3: 0.28 / 3, **dict.fromkeys((4, 5, 6, 7, 8), 0.36 / 4)}
    for streams in range(1, 9):
        load = streams * 16 / 12 * best[streams]
        wanted = StreamOrder(f"s{streams}", RED)
        if load <= 0.9:
            assert scheduler.refusal(wanted) is None
            scheduler.open(wanted)
            assert scheduler.capacity()["load"] == pytest.approx(load)
            continue
        assert streams == 8
        with pytest.raises(Busy, match=r"with 8 live streams the load would be 0\.960 of 0\.9 \(0\.09 s per block"):
            scheduler.open(wanted)
    assert scheduler.capacity()["most_by_speed"] == 7
    scheduler.open(StreamOrder("job", RED, frame_rate=None))  # takes what is left
    scheduler.close_stream("s3")
    assert scheduler.refusal(StreamOrder("s8", RED)) is None


def test_admission_with_the_real_clock_follows_what_was_measured(student: Student) -> None:
    scheduler = Scheduler(student, load=0.9)
    measured = scheduler.measure(SIZE, SIZE, (1, 2))
    assert student.bytes_open == 0
    assert 0 < measured[1] <= 1.5 * measured[2]
    rate = 0.35 * 12 / measured[1]  # two fit, four at the very best of batching do not always
    for count in range(1, 20):
        share = min(measured[1], measured[2] / 2) if count > 1 else measured[1]
        refusal = scheduler.refusal(order(f"s{count}", frame_rate=rate))
        assert (refusal is not None) == (count * rate / 12 * share > 0.9), (count, refusal)
        if refusal:
            break
        scheduler.open(order(f"s{count}", frame_rate=rate))
    assert count > 1
    assert re.search(r"of 0\.9 \(.* s per block of 12 frames\)", str(refusal))


def test_a_measurement_is_made_again_and_scales_what_is_known(student: Student) -> None:
    """What a busy machine has measured is far too slow: batches and other sizes follow the one that is timed."""
    scheduler = Scheduler(student, size=(SIZE, SIZE))
    usual, other = Kind(SIZE, SIZE, False), Kind(2 * SIZE, SIZE, False)
    for kind, batch, seconds in ((usual, 1, 100.0), (usual, 2, 150.0), (other, 1, 300.0)):
        scheduler.speeds.saw_made(kind, batch, seconds)
    with pytest.raises(TooSlow, match=r"^speed: "):
        scheduler.open(order())
    scheduler.measure_again()
    now = scheduler.speeds.making(usual, 1)
    assert now is not None
    assert now < 20
    assert scheduler.speeds.making(usual, 2) == pytest.approx(1.5 * now)
    assert scheduler.speeds.making(other, 1) == pytest.approx(3 * now)
    assert student.bytes_open == 0


def test_orders_that_name_no_size_have_the_schedulers(student: Student) -> None:
    scheduler = Scheduler(student, size=(2 * SIZE, SIZE))
    scheduler.open(StreamOrder("plain", RED, frames=9))
    scheduler.open(StreamOrder("wide", RED, width=3 * SIZE, frames=9))
    scheduler.open(StreamOrder("image", RED, frames=9, image=np.zeros((SIZE, SIZE, 3), np.uint8)))
    seen = watch(scheduler, "plain", "wide", "image")
    assert [joined(pieces).shape[1:3] for pieces in seen.values()] == [
        (2 * SIZE, SIZE),
        (2 * SIZE, 3 * SIZE),
        (SIZE, SIZE),
    ]
    assert scheduler.capacity()["bytes_per_stream"] == student.bytes_per_stream(2 * SIZE, SIZE).total


def test_memory_and_sessions_have_their_limits(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    each = student.bytes_per_stream(SIZE, SIZE).total
    monkeypatch.setattr(student, "budget", int(2.5 * each))
    scheduler = Scheduler(student, sessions=9)
    for name in "ab":
        scheduler.open(order(name))
    with pytest.raises(Busy, match=rf"needs {each / 1e6:.1f} MB; 2 open streams hold {2 * each / 1e6:.1f} of"):
        scheduler.open(order("c"))
    scheduler.close_stream("a")
    scheduler.open(order("c"))
    assert student.bytes_open == 2 * each
    monkeypatch.setattr(student, "budget", None)
    crowded = Scheduler(student, sessions=1)
    crowded.open(order("d"))
    with pytest.raises(Busy, match="1 of 1 are open"):
        crowded.open(order("e"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 20}, "height: must be a multiple of 16"),
        ({"mode": "sideways"}, "mode: must be one of"),
        ({"frame_rate": 0.0}, "frame_rate: must lie in"),
        ({"frames": 0}, "frames: must be 1 or more"),
    ],
)
def test_an_order_that_cannot_be_made_is_refused_in_one_line(
    student: Student, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Scheduler(student).open(order(**options))
    assert not student.streams


def test_an_order_survives_json() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    for sent in (order(seed=4, frames=9), order(redraw=Redraw(0.5, adaptive=True)), order(image=image)):
        again = StreamOrder.from_json(sent.to_json(), sent.image)
        assert again == sent
        assert again.image is sent.image


# --- Pictures --------------------------------------------------------------------------------------------------------


def test_batched_frames_are_those_made_alone_but_for_a_grey_level(student: Student) -> None:
    scheduler = Scheduler(student)
    prompts = {"a": RED, "b": BLUE, "c": RED}
    for seed, (name, prompt) in enumerate(prompts.items()):
        scheduler.open(job(name, prompt, seed=seed, frames=57))
    seen = watch(scheduler, *prompts)
    assert scheduler.stats()["batches"] == {3: 5}
    for seed, (name, prompt) in enumerate(prompts.items()):
        assert distance(joined(seen[name]), alone(student, prompt, 5, seed=seed)) <= LEVEL


def test_one_stream_gives_the_bytes_of_the_bare_loop_in_pieces(student: Student) -> None:
    scheduler = Scheduler(student)
    scheduler.open(order(seed=3, frames=30))
    pieces = watch(scheduler, "one")["one"]
    assert [piece.first for piece in pieces] == [0, 1, 5, 9, 13, 17, 21, 25, 29]
    assert [piece.chunk for piece in pieces] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [len(piece.frames) for piece in pieces] == [1, 4, 4, 4, 4, 4, 4, 4, 1]  # 30 frames, not one more
    assert [piece.ends_chunk for piece in pieces] == [False, False, True] * 3
    assert np.array_equal(joined(pieces), alone(student, RED, 3, seed=3)[:30])
    assert student.bytes_open == 0  # before it is closed


def test_overlapping_segments_give_the_bytes_of_the_bare_loop(student: Student) -> None:
    scheduler = Scheduler(student)
    scheduler.open(order(mode="overlap", frames=93))
    pieces = watch(scheduler, "one")["one"]
    assert [len(piece.frames) for piece in pieces if piece.chunk == 6] == [3, 1, 4, 4]
    assert np.array_equal(joined(pieces), alone(student, RED, 8, mode="overlap"))


def test_an_image_is_shown_first(student: Student) -> None:
    image = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    scheduler = Scheduler(student)
    scheduler.open(order(image=image, frames=21))
    assert np.array_equal(joined(watch(scheduler, "one")["one"]), alone(student, RED, 2, image=image))


def test_a_fed_video_is_redrawn_as_by_the_bare_loop(student: Student) -> None:
    source = np.random.default_rng(0).integers(0, 255, (33, SIZE, SIZE, 3), np.uint8)
    redraw = Redraw(0.6)
    with student.open(RED, height=SIZE, width=SIZE, redraw=redraw) as stream:
        expected = np.concatenate([stream.redraw(source[a:b]) for a, b in ((0, 9), (9, 21), (21, 33))])
    scheduler = Scheduler(student)
    scheduler.open(order(redraw=redraw, frames=33))
    assert not scheduler.tick()
    assert scheduler.take("one", 0).due == 9
    with pytest.raises(ValueError, match=r"uint8 frames \[T, 16, 16, 3\] are due"):
        scheduler.feed("one", source[:, :8])
    for start in range(0, 33, 3):
        scheduler.feed("one", source[start : start + 3])
    with pytest.raises(ValueError, match="33 frames wait, 36 may, 5 more are too many"):
        scheduler.feed("one", source[:5])
    pieces = watch(scheduler, "one")["one"]
    assert np.array_equal(joined(pieces), expected)


# --- Prompt switches -------------------------------------------------------------------------------------------------


def test_a_switch_flushes_what_waits_and_holds_from_the_next_block_on(student: Student) -> None:
    scheduler = Scheduler(student, ahead=2)
    scheduler.open(order(frames=45))
    for _ in range(6):  # two blocks begun, four pieces there
        scheduler.tick()
    seen = list(scheduler.take("one", 0).pieces)
    assert seen[-1].end == 13
    turn = scheduler.prompt("one", BLUE)
    assert turn == Turn(2, BLUE, index=1, frame=21, flushed=8)
    assert not scheduler.take("one", 13).pieces
    rest = watch(scheduler, "one", frame=13)["one"]
    assert {piece.prompt for piece in seen} == {0}
    assert {piece.prompt for piece in rest} == {1}
    assert rest[0].first == 21
    assert len(joined(seen)) + len(joined(rest)) == 45  # as many as were ordered are shown
    expected = alone(student, RED, 5, {2: BLUE})
    assert np.array_equal(joined(seen), expected[:13])
    assert np.array_equal(joined(rest), expected[21:53])
    assert scheduler.stats()["streams"]["one"]["flushed"] == 8


def test_of_many_prompts_before_an_edge_the_last_one_wins(student: Student) -> None:
    scheduler = Scheduler(student)
    scheduler.open(order(frames=21))
    turns = [scheduler.prompt("one", f"{number} {BLUE}") for number in range(100)]
    turns.append(scheduler.prompt("one", BLUE))
    assert {(turn.block, turn.index, turn.flushed) for turn in turns} == {(0, 1, 0)}
    pieces = watch(scheduler, "one")["one"]
    assert np.array_equal(joined(pieces), alone(student, RED, 2, {0: BLUE}))


def test_a_switch_leaves_pieces_that_were_taken_but_not_acknowledged(student: Student) -> None:
    scheduler = Scheduler(student)
    scheduler.open(order())
    work(scheduler)
    taken = scheduler.take("one", 0).pieces
    assert scheduler.prompt("one", BLUE).flushed == 0
    assert scheduler.take("one", 0).pieces == taken


def test_what_was_taken_ahead_and_not_shown_is_dropped_and_its_time_is_the_new_prompts(student: Student) -> None:
    """A gateway has taken two chunks and shown 5 frames: the new prompt's first frame is due as the sixth would be."""
    clock = Clock()
    scheduler = Scheduler(student, ahead=2, clock=clock)
    scheduler.open(order(frames=45))
    work(scheduler)
    taken = scheduler.take("one", 0).pieces
    assert taken[-1].end == 21
    clock.now = 0.25
    assert scheduler.prompt("one", BLUE, 5) == Turn(2, BLUE, index=1, frame=21, flushed=16)
    assert scheduler.prompt("one", RED, 21) == Turn(2, RED, index=1, frame=21, flushed=16)  # takes its place
    work(scheduler)
    rest = scheduler.take("one", 21).pieces
    assert rest[0].first == 21
    assert rest[0].late == pytest.approx(0.25 - 5 / 16)
    assert len(joined(watch(scheduler, "one", frame=21)["one"])) == 45 - 5


def test_a_text_is_encoded_beside_the_work(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one stream's prompt, and a new stream's, are with a slow encoder, another stream's pictures come."""
    encoder, free, entered = student.encoder, threading.Event(), threading.Semaphore(0)

    def slow(prompts: list[str]) -> Any:
        entered.release()
        assert free.wait(60)
        return encoder(prompts)

    scheduler = Scheduler(student)
    for name in ("one", "two"):
        scheduler.open(job(name))
    monkeypatch.setattr(student, "encoder", slow)
    with running(scheduler), ThreadPoolExecutor(2) as threads:
        turn = threads.submit(scheduler.prompt, "one", "a text that was never seen")
        opened = threads.submit(scheduler.open, job("three", "another such text"))
        try:
            assert entered.acquire(timeout=60)
            frame = 0
            while frame < 45:
                pieces = scheduler.take("two", frame, 60).pieces
                assert pieces, "the work waits for a text"
                frame = pieces[-1].end
            assert not turn.done()
            assert not opened.done()
        finally:
            free.set()
        assert turn.result(60).index == 1
        opened.result(60)
    assert student.context.cache_info().hits >= 2  # the working thread found both


def test_a_switch_while_a_block_is_being_made_holds_from_the_one_after(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reelway.actors import scheduler as room

    scheduler = Scheduler(student)
    turns: list[Turn] = []
    make = room.make_together

    def interrupted(streams: Any) -> None:
        if not turns:
            turns.append(scheduler.prompt("one", BLUE))
        make(streams)

    monkeypatch.setattr(room, "make_together", interrupted)
    scheduler.open(order(frames=12))
    pieces = watch(scheduler, "one")["one"]
    assert turns == [Turn(1, BLUE, index=1, frame=9, flushed=9)]
    assert np.array_equal(joined(pieces), alone(student, RED, 2, {1: BLUE})[9:])


# --- Going on --------------------------------------------------------------------------------------------------------


def run_with_switches(scheduler: Scheduler) -> tuple[list[Piece], list[Turn]]:
    """All pieces of a stream of which two prompts are switched, one of them with a flush."""
    scheduler.open(order(seed=5, frames=57))
    pieces: list[Piece] = []
    turns: list[Turn] = []
    frame, state = 0, "running"
    while state == "running":
        scheduler.tick()
        if len(pieces) >= 5 * (len(turns) + 1) and len(turns) < 2:
            if not turns:
                work(scheduler)  # so that something waits
            turns.append(scheduler.prompt("one", (BLUE, RED)[len(turns)]))
        taken = scheduler.take("one", frame)
        pieces += taken.pieces
        frame, state = taken.pieces[-1].end if taken.pieces else frame, taken.state
    scheduler.close_stream("one")
    return pieces, turns


def test_a_resumed_stream_gives_the_same_bytes_from_any_snapshot_and_frame(student: Student) -> None:
    snapshots: list[Snapshot] = []
    pieces, turns = run_with_switches(Scheduler(student, keep_every=2, keep=lambda _, kept: snapshots.append(kept)))
    assert turns[0].flushed > 0
    assert len(joined(pieces)) == 57
    assert len(snapshots) >= 2
    flushed_from = turns[0].frame - turns[0].flushed
    for snapshot in (None, *snapshots):
        begins = snapshot.info["frames_out"] if snapshot else 0
        for frame in {begins, flushed_from} if snapshot else {pieces[-4].first}:
            if frame < begins:
                continue
            scheduler = Scheduler(student)
            scheduler.open(order(seed=5, frames=57), snapshot=snapshot, turns=turns, frame=frame)
            again = watch(scheduler, "one", frame=frame)["one"]
            expected = [piece for piece in pieces if piece.end > frame]
            assert [piece.first for piece in again] == [piece.first for piece in expected]
            assert [piece.prompt for piece in again] == [piece.prompt for piece in expected]
            assert np.array_equal(joined(again), joined(expected))
            scheduler.close_stream("one")


def test_a_snapshot_on_demand_goes_on_elsewhere(student: Student) -> None:
    scheduler = Scheduler(student)
    scheduler.open(order(frames=33))
    for _ in range(7):
        scheduler.tick()
    snapshot = scheduler.snapshot("one")
    assert snapshot.info["frames_out"] in STARTS
    before = scheduler.take("one", 0).pieces
    frame = before[-1].end
    assert frame == snapshot.info["frames_out"]  # what it had begun is there
    scheduler.close_stream("one")
    other = Scheduler(student)
    other.open(order(frames=33), snapshot=snapshot, frame=frame)
    after = watch(other, "one", frame=frame)["one"]
    assert np.array_equal(joined([*before, *after]), alone(student, RED, 3))


def test_a_prompt_during_a_replay_changes_nothing_that_was_seen(student: Student) -> None:
    scheduler = Scheduler(student)
    scheduler.open(order(frames=45), turns=[Turn(1, BLUE)], frame=25)  # in block 2
    assert scheduler.prompt("one", RED) == Turn(3, RED, index=2, frame=33, flushed=8)
    pieces = watch(scheduler, "one", frame=25)["one"]
    expected = alone(student, RED, 5, {1: BLUE, 3: RED})
    assert np.array_equal(joined(pieces), expected[33:53])


def test_what_does_not_fit_together_is_refused(student: Student) -> None:
    scheduler = Scheduler(student)
    scheduler.open(order())
    snapshot = scheduler.snapshot("one")
    with pytest.raises(ValueError, match="open already"):
        scheduler.open(order())
    with pytest.raises(ValueError, match="another prompt, seed, size or mode"):
        scheduler.open(order("two", seed=1), snapshot=snapshot)
    work(scheduler)
    with pytest.raises(ValueError, match="taken after frame 5, at 21"):
        scheduler.open(order("two"), snapshot=scheduler.snapshot("one"), frame=5)
    scheduler.take("one", 0)
    scheduler.take("one", 9)
    with pytest.raises(ValueError, match="0 is gone, 9 is the first one kept"):
        scheduler.take("one", 0)
    with pytest.raises(ValueError, match="at most 21 can be the next one, got 22"):
        scheduler.take("one", 22)
    for call in (scheduler.pause, scheduler.resume, scheduler.snapshot):
        with pytest.raises(ValueError, match="stream nobody: it is not open here"):
            call("nobody")
    with pytest.raises(ValueError, match="not opened for it"):
        scheduler.feed("one", np.zeros((1, SIZE, SIZE, 3), np.uint8))


# --- Failures --------------------------------------------------------------------------------------------------------


def test_a_stream_whose_pictures_are_not_finite_ends_alone(student: Student) -> None:
    scheduler = Scheduler(student)
    for name in ("good", "bad"):
        scheduler.open(job(name, frames=33))
    scheduler.tick()
    scheduler._sessions["bad"].stream._unshown[0][:, 1] = torch.nan
    pieces = watch(scheduler, "good")["good"]
    failed = scheduler.take("bad", 0)
    assert failed.state == "failed"
    assert failed.reason == "the stream's pictures are not finite after 1 frames"
    assert len(joined(list(failed.pieces))) == 1
    assert distance(joined(pieces), alone(student, RED, 3)) <= LEVEL
    assert student.bytes_open == 0
    with pytest.raises(ValueError, match="it has failed"):
        scheduler.prompt("bad", BLUE)


def test_a_batch_that_fails_is_made_one_by_one(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(student)
    for name in ("a", "bad", "b"):
        scheduler.open(job(name, frames=21))

    def broken(frames: int, step: int) -> torch.Tensor:
        raise RuntimeError("no noise today")

    monkeypatch.setattr(scheduler._sessions["bad"].stream.generator, "_noise", broken)
    seen = watch(scheduler, "a", "b")
    assert scheduler.take("bad", 0).reason == "no noise today"
    for name in "ab":
        assert distance(joined(seen[name]), alone(student, RED, 2)) <= LEVEL


def test_an_error_of_the_scheduler_itself_ends_the_run_and_leaves_nobody_waiting(student: Student) -> None:
    def keep(*_: object) -> None:
        raise TypeError("a wrong callback")

    scheduler = Scheduler(student, keep_every=1, keep=keep)
    scheduler.open(order())
    with ThreadPoolExecutor(2) as threads:
        run = threads.submit(scheduler.run)
        with pytest.raises(TypeError, match="a wrong callback"):
            run.result(60)
        scheduler.prompt("one", BLUE)  # nothing waits any more
        assert threads.submit(scheduler.take, "one", 0, 60.0).result(30).state == "running"
    with pytest.raises(RuntimeError, match="has ended: TypeError: a wrong callback"):
        scheduler.open(order("two"))


# --- Many threads ----------------------------------------------------------------------------------------------------


@contextmanager
def running(scheduler: Scheduler) -> Iterator[None]:
    thread = threading.Thread(target=scheduler.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        scheduler.stop()
        thread.join(60)
        assert not thread.is_alive()


def in_threads(count: int, action: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(count) as threads:
        for done in [threads.submit(action, number) for number in range(count)]:
            done.result()


def test_200_streams_come_and_go(student: Student) -> None:
    """Some are watched, some vanish before their first picture; all memory comes back."""
    scheduler = Scheduler(student, sessions=16)

    def come_and_go(viewer: int) -> None:
        for turn in range(25):
            name = f"{viewer}-{turn}"
            scheduler.open(order(name, seed=viewer))
            if turn % 8 == 0:
                assert scheduler.take(name, 0, timeout=60).pieces
            scheduler.close_stream(name)

    with running(scheduler):
        in_threads(8, come_and_go)
        assert scheduler.stats()["streams"] == {}
    assert student.streams == []
    assert student.bytes_open == 0
    assert scheduler.capacity()["sessions"] == 0


def test_control_calls_from_many_threads_leave_every_stream_whole(student: Student) -> None:
    """Viewers that switch, pause, vanish and ask for figures at random: what each one got is the replay of its log."""
    scheduler = Scheduler(student, keep_every=2, keep=lambda *_: None)
    got: dict[str, tuple[list[Piece], list[Turn]]] = {}

    def view(number: int) -> None:
        dice, name = random.Random(number), f"s{number}"
        scheduler.open(order(name, seed=number, frames=33, frame_rate=200.0))
        pieces: list[Piece] = []
        turns: list[Turn] = []
        frame, state = 0, "running"
        while state == "running":
            chance = dice.random()
            if chance < 0.2 and len(turns) < 3:
                with suppress(ValueError):  # it may have ended meanwhile
                    new = scheduler.prompt(name, (BLUE, RED)[number % 2])
                    turns = [*(turn for turn in turns if turn.block < new.block), new]
            elif chance < 0.3:
                scheduler.pause(name)
                scheduler.stats()
                scheduler.resume(name)
            elif chance < 0.4:
                scheduler.refusal(order("another"))
                scheduler.capacity()
            taken = scheduler.take(name, frame, timeout=dice.choice((0.0, 1.0)))
            pieces += taken.pieces
            frame, state = taken.pieces[-1].end if taken.pieces else frame, taken.state
            assert state != "failed", taken.reason
            if not taken.pieces:
                time.sleep(0.001)
        got[name] = pieces, turns

    with running(scheduler):
        in_threads(4, view)
    assert student.bytes_open == 0
    for number in range(4):
        pieces, turns = got[f"s{number}"]
        flushed = {frame for turn in turns for frame in range(turn.frame - turn.flushed, turn.frame)}
        shown = [piece.first + index for piece in pieces for index in range(len(piece.frames))]
        assert shown == [frame for frame in range(shown[-1] + 1) if frame not in flushed]
        assert len(shown) == 33
        video = alone(student, RED, pieces[-1].chunk + 1, {turn.block: turn.text for turn in turns}, seed=number)
        assert distance(joined(pieces), video[shown]) <= LEVEL
