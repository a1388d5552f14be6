"""The pool: its decisions by themselves, then with workers that are played, then with real ones that are killed."""

import asyncio
import math
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reelway.actors.generator import Student
from reelway.actors.orders import Busy, StreamOrder, TooSlow
from reelway.actors.timeline import Turn
from reelway.cluster.session import Session
from reelway.pipelines.serve import pool as pool_module
from reelway.pipelines.serve.backend import Backend, RayBackend
from reelway.pipelines.serve.placement import (
    HIGH_LOAD,
    Fleet,
    FleetSettings,
    Placed,
    Plan,
    Queue,
    Refused,
    Waiting,
    load_of,
)
from reelway.pipelines.serve.pool import Pool, RayHands, WorkerGone, pool_application
from reelway.pipelines.serve.terms import Moved, WorkerInfo, WorkerSettings

from .serving import Hands, LocalBackend

MODEL = "tiny"
PROMPT = "a small red star drifts left"
LEVEL = 2  # of grey, of 256: what another batch may cost
TOO_FAST = 999  # frames per second that no played worker can keep
LONG = 400.0  # seconds; processes that import everything are started, and the machine may be busy
KILLS = 10


def capacity(sessions: int = 0, most: int | None = None, load: float = 0.0) -> dict[str, Any]:
    return {
        "sessions": sessions,
        "most_sessions": most,
        "most_by_bytes": None,
        "most_by_speed": None,
        "bytes": 0,
        "bytes_budget": None,
        "load": load,
        "load_limit": 1.0,
    }


def info(worker: str = "w", fingerprint: str = "same") -> WorkerInfo:
    return WorkerInfo(worker, "here", 1, MODEL, "cpu", fingerprint, capacity(), (32, 32), 3, 3, 4, 4, 10**6)


def order(stream: str = "one", **changes: Any) -> StreamOrder:
    return StreamOrder(**{"stream": stream, "prompt": PROMPT, "height": 32, "width": 32, "frame_rate": 1.0} | changes)


# --- The queue -------------------------------------------------------------------------------------------------------


def test_who_waits_is_served_in_order_and_who_streamed_before_comes_first() -> None:
    queue = Queue(most=3, ticket_seconds=5.0)
    first, second = (queue.join(None, False, now) for now in (0.0, 1.0))
    assert isinstance(first, Waiting)
    assert isinstance(second, Waiting)
    assert (first.position, second.position) == (0, 1)
    assert queue.position(None, False, 1.0) == 2
    assert queue.position(None, True, 1.0) == 0
    back = queue.join(None, True, 2.0)
    assert isinstance(back, Waiting)
    assert back.position == 0
    assert queue.position(first.ticket, False, 2.0) == 1
    assert queue.join(first.ticket, False, 2.0) == Waiting(first.ticket, 1)
    queue.leave(back.ticket)
    assert queue.position(second.ticket, False, 2.0) == 1


def test_a_full_queue_refuses_all_but_those_who_streamed_before() -> None:
    queue = Queue(most=1, ticket_seconds=5.0)
    queue.join(None, False, 0.0)
    assert queue.join(None, False, 0.0) == Refused("queue: 1 are waiting, which is the most that may", "busy")
    assert isinstance(queue.join(None, True, 0.0), Waiting)


def test_a_ticket_that_is_not_renewed_lapses() -> None:
    queue = Queue(most=9, ticket_seconds=5.0)
    gone, stays = (queue.join(None, False, 0.0) for _ in range(2))
    assert isinstance(gone, Waiting)
    assert isinstance(stays, Waiting)
    assert queue.position(stays.ticket, False, 4.0) == 1
    assert queue.position(stays.ticket, False, 5.5) == 0
    assert len(queue) == 1
    late = queue.join(gone.ticket, False, 6.0)
    assert isinstance(late, Waiting)
    assert (late.position, late.ticket == gone.ticket) == (1, False)


# --- Scaling ---------------------------------------------------------------------------------------------------------


def fleet_of(loads: list[float], streams: int = 1, **settings: Any) -> Fleet:
    """A fleet whose workers are ready and have these loads."""
    fleet = Fleet(MODEL, FleetSettings(WorkerSettings("nowhere"), **settings))
    for index, load in enumerate(loads):
        member = fleet.add(None, 0.0)
        fleet.started(member, info(member.id), 0.0)
        here = [f"stream-{index}-{number}" for number in range(streams if load else 0)]
        fleet.update(member, {"here": here, "capacity": capacity(len(here), load=load)})
    return fleet


def wait_for(fleet: Fleet, count: int, now: float = 0.0) -> None:
    for _ in range(count):
        fleet.queue.join(None, False, now)


@pytest.mark.parametrize(
    ("loads", "streams", "waiting", "settings", "start"),
    [
        ([], 0, 0, {"min_workers": 2, "max_workers": 4}, 2),
        ([0.1], 1, 0, {"min_workers": 2, "max_workers": 4}, 1),  # one has died
        ([], 0, 0, {"min_workers": 0, "max_workers": 4}, 0),
        ([], 0, 3, {"min_workers": 0, "max_workers": 2}, 2),
        ([0.9], 4, 9, {"max_workers": 9}, 3),  # each takes four
        ([0.9], 4, 1, {"max_workers": 9}, 1),
        ([0.9, 0.9], 4, 9, {"max_workers": 2}, 0),
        ([0.9], 4, 0, {"max_workers": 9}, 1),  # before anybody waits
        ([0.9, 0.5], 4, 0, {"max_workers": 9}, 0),
    ],
)
def test_workers_are_started_for_the_minimum_the_queue_and_the_load(
    loads: list[float], streams: int, waiting: int, settings: dict[str, int], start: int
) -> None:
    fleet = fleet_of(loads, streams, **settings)
    wait_for(fleet, waiting)
    assert fleet.plan(0.0) == Plan(start)
    for _ in range(start):
        fleet.add(None, 0.0)
    assert fleet.plan(0.0).start == 0  # those that start are counted on


def test_a_worker_that_does_not_start_is_tried_again_ever_later() -> None:
    fleet = fleet_of([], min_workers=1)
    pauses = []
    now = 0.0
    for _ in range(9):
        assert fleet.plan(now).start == 1
        fleet.failed_start(fleet.add(None, now), "no such file", now)
        begins = next(later for later in (now + step / 2 for step in range(1000)) if fleet.plan(later).start)
        pauses.append(begins - now)
        now = begins
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert fleet.hopeless() == "model tiny: its workers cannot be started: no such file"
    fleet.started(fleet.add(None, now), info(), now)
    assert fleet.hopeless() is None


@pytest.mark.parametrize(
    ("loads", "settings", "released"),
    [
        ([0.3, 0.0], {}, 1),
        ([0.0], {}, None),  # the minimum
        ([0.0], {"min_workers": 0}, 0),
        ([0.3], {"min_workers": 0}, None),
        ([0.9, 0.0], {}, None),  # without it another one would be started at once
        ([0.3, 0.1], {}, 1),  # its streams move
        ([0.4, 0.2], {}, None),
        ([0.2, 0.1, 0.3], {}, 1),
    ],
)
def test_a_worker_is_let_go_when_the_others_do_for_long(
    loads: list[float], settings: dict[str, int], released: int | None
) -> None:
    fleet = fleet_of(loads, **{"max_workers": 4, "idle_seconds": 10.0} | settings)
    assert fleet.plan(0.0) == Plan()
    assert fleet.plan(9.9) == Plan()
    wanted = None if released is None else list(fleet.members)[released]
    assert fleet.plan(10.0).drain == wanted


def test_who_waits_keeps_a_spare_worker_alive() -> None:
    fleet = fleet_of([0.3, 0.0], max_workers=2, idle_seconds=10.0)
    fleet.plan(0.0)
    wait_for(fleet, 1, now=8.0)
    assert fleet.plan(9.0) == Plan()
    assert fleet.plan(14.0) == Plan()  # its ticket has lapsed, and the time begins anew
    assert fleet.plan(23.9) == Plan()
    assert fleet.plan(24.0).drain is not None


def test_who_is_far_behind_in_the_queue_does_not_ask_the_workers() -> None:
    fleet = fleet_of([0.5], streams=2)
    member = next(iter(fleet.members.values()))
    fleet.update(member, {"here": ["a", "b"], "capacity": capacity(2, most=4)})
    assert [fleet.may_try(position) for position in range(4)] == [True, True, False, False]
    fleet.update(member, {"here": ["a", "b"], "capacity": capacity(2, most=2)})
    assert [fleet.may_try(position) for position in range(2)] == [True, False]


def test_load_is_the_scarcest_of_speed_sessions_and_bytes() -> None:
    assert load_of(capacity(load=0.45) | {"load_limit": 0.9}) == 0.5
    assert load_of(capacity(3, most=4, load=0.1)) == 0.75
    assert load_of(capacity(load=0.1) | {"bytes": 6, "bytes_budget": 10}) == 0.6
    assert HIGH_LOAD < 1


@pytest.mark.parametrize(("least", "most"), [(2, 1), (-1, 1), (0, 0)])
def test_settings_that_contradict_themselves_are_refused(least: int, most: int) -> None:
    with pytest.raises(ValueError, match=r"^min_workers, max_workers: .* got"):
        FleetSettings(WorkerSettings("nowhere"), min_workers=least, max_workers=most)


# --- With workers that are played ------------------------------------------------------------------------------------


@dataclass
class Played:
    """A worker with room for `sessions` streams and no student. path: its fingerprint, or "broken"."""

    id: str
    settings: WorkerSettings
    here: dict[str, int] = field(default_factory=dict)
    draining: bool = False
    dead: bool = False
    hangs: bool = False

    async def ready(self) -> WorkerInfo:
        if self.settings.path == "broken":
            raise FileNotFoundError("broken: no such file")
        return info(self.id, self.settings.path)

    async def open(self, order: StreamOrder, turns: tuple[Turn, ...], frame: int) -> int:
        await asyncio.sleep(0)
        if self.draining:
            raise Moved("it is draining")
        if order.frame_rate == TOO_FAST and not self.here:
            raise TooSlow("speed: the load would be 9.000 of 0.9")
        if order.frame_rate == 1000 or len(self.here) >= (self.settings.sessions or 1):
            raise Busy(f"sessions: {len(self.here)} are open")
        if order.prompt == "":
            raise ValueError("prompt: it is empty")
        self.here[order.stream] = frame
        return frame

    async def stats(self) -> dict[str, Any]:
        if self.hangs:
            await asyncio.Event().wait()
        most = self.settings.sessions or 1
        return {"here": list(self.here), "capacity": capacity(len(self.here), most), "broken": ""}

    async def close(self, stream: str) -> None:
        self.here.pop(stream, None)

    async def drain(self) -> int:
        self.draining = True
        asyncio.get_running_loop().call_later(0.05, self.here.clear)
        return len(self.here)

    async def stop(self) -> None:
        self.draining = True


class PlayedHands:
    """Workers of this process, which can be killed."""

    def __init__(self) -> None:
        self.started: list[Played] = []

    def start(self, worker: str, model: str, settings: FleetSettings) -> Played:
        self.started.append(Played(worker, settings.worker))
        return self.started[-1]

    async def call(self, handle: Any, method: str, *arguments: Any) -> Any:
        if handle.dead:
            raise WorkerGone("killed")
        return await getattr(handle, method)(*arguments)

    def kill(self, handle: Any) -> None:
        handle.dead = True

    @property
    def alive(self) -> list[Played]:
        return [worker for worker in self.started if not worker.dead]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at its workers often; waits long for their answers, for the machine may be busy."""
    monkeypatch.setattr(pool_module, "TICK", 0.01)
    monkeypatch.setattr(pool_module, "ANSWER_SECONDS", 60.0)


def play(body: Callable[[Pool, PlayedHands], Awaitable[None]], sessions: int = 1, **settings: Any) -> None:
    """Run `body` with a pool of played workers; `ticket_seconds` and `idle_seconds` are long unless given."""
    how = FleetSettings(WorkerSettings("same", sessions=sessions), **{"ticket_seconds": 60.0} | settings)

    async def run() -> None:
        hands = PlayedHands()
        pool = Pool({MODEL: how}, hands)
        pool.begin()
        await until(lambda: len(pool.fleets[MODEL].of("ready")) == how.min_workers)
        try:
            await asyncio.wait_for(body(pool, hands), 60)
        finally:
            await pool.stop()
        assert hands.alive == []

    asyncio.run(run())


async def until(true: Callable[[], Any], seconds: float = 120.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)


async def placed(pool: Pool, stream: str, **options: Any) -> Placed:
    answer = await pool.place(MODEL, order(stream), **options)
    assert isinstance(answer, Placed), answer
    return answer


def test_streams_go_to_the_worker_with_the_least_load_then_wait_in_turn(quick: None) -> None:
    async def body(pool: Pool, hands: PlayedHands) -> None:
        await asyncio.gather(*(placed(pool, f"stream-{number}") for number in range(4)))
        assert [len(worker.here) for worker in hands.started] == [2, 2]
        answers = [await pool.place(MODEL, order(f"late-{number}")) for number in range(3)]
        assert [getattr(answer, "position", None) for answer in answers] == [0, 1, None]
        assert answers[2] == Refused("queue: 2 are waiting, which is the most that may", "busy")
        tickets = [answer.ticket for answer in answers[:2]]  # type: ignore[union-attr]
        await pool.left("stream-0")
        assert isinstance(await pool.place(MODEL, order("late-1"), tickets[1]), Waiting)
        await placed(pool, "late-0", ticket=tickets[0])
        assert await pool.place(MODEL, order("late-1"), tickets[1]) == Waiting(tickets[1], 0)
        status = (await pool.status())[MODEL]
        assert (status["waiting"], status["streams"]) == (1, 4)
        assert (status["counts"]["placed"], status["counts"]["refused"]) == (5, 1)

    play(body, sessions=2, min_workers=2, max_workers=2, queue=2)


def test_what_can_never_be_served_is_refused_with_its_reason(quick: None) -> None:
    async def body(pool: Pool, hands: PlayedHands) -> None:
        assert await pool.place("other", order()) == Refused("model: must be one of tiny, got 'other'")
        assert await pool.place(MODEL, order(prompt="")) == Refused("prompt: it is empty")
        assert await pool.place(MODEL, order(frame_rate=1000)) == Refused("sessions: 0 are open")
        await placed(pool, "one")
        assert isinstance(await pool.place(MODEL, order("two", frame_rate=1000)), Waiting)

    play(body, sessions=2)


def test_workers_that_are_too_slow_for_now_are_no_fault_of_the_order(quick: None) -> None:
    """A machine may be busy: who begins is told so, who streamed before waits."""

    async def body(pool: Pool, hands: PlayedHands) -> None:
        slow = order(frame_rate=TOO_FAST)
        assert await pool.place(MODEL, slow) == Refused("speed: the load would be 9.000 of 0.9", "busy")
        assert isinstance(await pool.place(MODEL, slow, frame=12), Waiting)
        await placed(pool, "one")  # on one of the two, which is no longer asked whether it is slow
        assert isinstance(await pool.place(MODEL, order("two", frame_rate=TOO_FAST)), Waiting)

    play(body, sessions=1, min_workers=2, max_workers=2)


def test_a_worker_that_cannot_say_how_it_is_is_replaced(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(pool: Pool, hands: PlayedHands) -> None:
        async def broken() -> dict[str, Any]:
            raise RuntimeError("cannot schedule new futures after shutdown")

        monkeypatch.setattr(hands.started[0], "stats", broken)
        await until(lambda: hands.started[0].dead and pool.fleets[MODEL].of("ready"))
        assert "cannot schedule new futures" in (await pool.status())[MODEL]["error"]

    play(body)


def test_an_answer_from_before_a_stream_came_or_went_changes_nothing_of_it(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker says what it has, a stream is placed or leaves, and only then the worker's words arrive."""

    async def body(pool: Pool, hands: PlayedHands) -> None:
        [worker], [member] = hands.started, pool.fleets[MODEL].of("ready")
        looking, arrives = asyncio.Semaphore(0), asyncio.Semaphore(0)
        stats = worker.stats

        async def slow() -> dict[str, Any]:
            figures = await stats()
            looking.release()
            await arrives.acquire()
            return figures

        async def words_arrive() -> None:
            arrives.release()
            await looking.acquire()  # of the next ones, which are still on their way

        monkeypatch.setattr(worker, "stats", slow)
        await looking.acquire()
        await placed(pool, "one")
        await words_arrive()
        assert member.streams == {"one"}
        await pool.left("one")
        assert worker.here == {}
        await words_arrive()
        assert member.streams == set()
        await words_arrive()
        assert (member.streams, member.took, member.freed) == (set(), {}, {})
        arrives.release()

    play(body, sessions=2)


def test_a_dead_worker_is_replaced_and_its_streams_come_before_those_who_wait(quick: None) -> None:
    async def body(pool: Pool, hands: PlayedHands) -> None:
        await placed(pool, "one")
        waits = await pool.place(MODEL, order("late"))
        assert isinstance(waits, Waiting)
        hands.started[0].dead = True
        back = await pool.place(MODEL, order(), frame=12)
        assert isinstance(back, Waiting)
        assert back.position == 0
        await until(lambda: pool.fleets[MODEL].of("ready"))
        assert await pool.place(MODEL, order("late"), waits.ticket) == Waiting(waits.ticket, 1)
        again = await placed(pool, "one", ticket=back.ticket, frame=12)
        assert (again.begins, again.id) == (12, hands.started[1].id)
        status = (await pool.status())[MODEL]
        assert (status["counts"]["died"], status["counts"]["moved"]) == (1, 1)
        assert status["error"] == f"worker {hands.started[0].id}: killed"

    play(body)


def test_a_worker_that_does_not_answer_is_replaced(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(pool: Pool, hands: PlayedHands) -> None:
        hands.started[0].hangs = True
        monkeypatch.setattr(pool_module, "ANSWER_SECONDS", 0.1)
        await until(lambda: len(hands.started) == 2 and pool.fleets[MODEL].of("ready"))
        assert hands.started[0].dead

    play(body)


def test_workers_are_started_while_streams_wait_and_let_go_when_idle(quick: None) -> None:
    async def body(pool: Pool, hands: PlayedHands) -> None:
        await placed(pool, "one")
        await placed(pool, "two")
        waits = await pool.place(MODEL, order("three"))
        assert isinstance(waits, Waiting)
        await until(lambda: len(pool.fleets[MODEL].of("ready")) == 2)
        second = await placed(pool, "three", ticket=waits.ticket)
        await pool.left("two")
        await pool.left("three")
        await until(lambda: len(hands.alive) == 1)
        assert [worker.id for worker in hands.started if worker.dead] == [second.id]
        assert (await pool.status())[MODEL]["counts"]["drained"] == 1

    play(body, sessions=2, max_workers=2, idle_seconds=0.1)


def test_a_model_that_cannot_be_loaded_is_told_to_those_who_wait(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reelway.pipelines.serve.placement.LONGEST_BACKOFF", 0.0)

    async def body(pool: Pool, hands: PlayedHands) -> None:
        fleet = pool.fleets[MODEL]
        fleet.settings = replace(fleet.settings, min_workers=1, worker=WorkerSettings("broken"))
        await until(lambda: fleet.counts["failed_starts"] >= 3)
        answer = await pool.place(MODEL, order())
        reason = "model tiny: its workers cannot be started: broken: no such file"
        assert answer == Refused(reason, "unavailable")
        fleet.settings = replace(fleet.settings, worker=WorkerSettings("same"))
        await until(lambda: fleet.of("ready"))
        await placed(pool, "one")

    play(body, min_workers=0)


def test_the_only_worker_is_drained_once_another_is_there(quick: None) -> None:
    async def body(pool: Pool, hands: PlayedHands) -> None:
        await placed(pool, "one")
        [first] = hands.started
        draining = asyncio.create_task(pool.drain(first.id))
        await until(lambda: first.draining)
        moved = await placed(pool, "one", frame=9)  # the viewer may hear of it before the worker has let go
        assert moved.id == hands.started[1].id
        await draining
        assert hands.alive == [hands.started[1]]
        with pytest.raises(ValueError, match=r"^worker: there is no 'nobody'$"):
            await pool.drain("nobody")

    play(body, max_workers=2)


@pytest.mark.parametrize("moves", [True, False])
def test_an_upgrade_replaces_the_workers_one_by_one(quick: None, moves: bool) -> None:
    """Streams of another student cannot move: their workers stay until they end."""

    async def body(pool: Pool, hands: PlayedHands) -> None:
        fleet, least = pool.fleets[MODEL], 9
        for stream in ("one", "two"):
            await placed(pool, stream)
        old = list(hands.started)
        new = WorkerSettings("same" if moves else "other", sessions=9)
        upgrade = asyncio.create_task(pool.upgrade(MODEL, new))
        while not upgrade.done():
            least = min(least, len(fleet.of("ready")))
            await asyncio.sleep(0.001)
        assert upgrade.result() == 2
        assert least >= (2 if moves else 1)
        assert [worker.dead for worker in old] == [moves, moves]
        assert [worker.settings for worker in hands.alive if worker not in old] == [new, new]
        if not moves:
            assert {member.state for member in fleet.members.values()} == {"ready", "retiring"}
            assert (await placed(pool, "three")).id not in {worker.id for worker in old}
            await pool.left("one")
            await pool.left("two")
        await until(lambda: all(worker.dead for worker in old))

    play(body, sessions=1, min_workers=2, max_workers=2)


def test_an_upgrade_to_what_does_not_start_leaves_the_old_workers(quick: None) -> None:
    async def body(pool: Pool, hands: PlayedHands) -> None:
        await placed(pool, "one")
        with pytest.raises(ValueError, match=r"^model tiny: a new worker could not be started: broken: no such file; "):
            await pool.upgrade(MODEL, WorkerSettings("broken"))
        assert hands.alive == hands.started[:1]
        assert hands.alive[0].here == {"one": 0}
        assert pool.fleets[MODEL].settings.worker.path == "same"
        with pytest.raises(ValueError, match=r"^model: must be one of tiny, got 'other'$"):
            await pool.upgrade("other")

    play(body)


# --- With real workers -----------------------------------------------------------------------------------------------


@dataclass
class Viewer:
    """Takes a stream's frames as a gateway does, and checks that none is lost and none comes twice."""

    backend: Backend
    order: StreamOrder
    goal: float = math.inf
    frames: list[np.ndarray] = field(default_factory=list)
    places: list[Placed] = field(default_factory=list)
    longest: float = 0.0  # seconds from one piece to the next
    _last: float | None = None

    async def watch(self) -> None:
        stream, here = self.order.stream, await self._place()
        while len(self.frames) < self.goal:
            try:
                taken = await self.backend.call(here.worker, "take", stream, len(self.frames), 5.0)
            except WorkerGone:
                here = await self._place()
                continue
            if taken.state == "moved":
                here = await self._place()
                continue
            assert taken.state == "running", taken
            for piece in taken.pieces:
                self._see(piece)
        await self.backend.left(stream)

    def _see(self, piece: Any) -> None:
        skip = len(self.frames) - piece.first
        assert 0 <= skip < len(piece.frames), "a frame was lost, or came twice"
        self.frames += list(piece.frames[skip:])
        now = time.monotonic()
        self.longest = max(self.longest, 0.0 if self._last is None else now - self._last)
        self._last = now

    async def _place(self) -> Placed:
        ticket = None
        while True:
            answer = await self.backend.place(MODEL, self.order, ticket, (), len(self.frames))
            if isinstance(answer, Placed):
                self.places.append(answer)
                return answer
            assert isinstance(answer, Waiting), answer
            ticket = answer.ticket
            await asyncio.sleep(0.1)


def settings(folder: Path, state: Path, **changes: Any) -> FleetSettings:
    worker = WorkerSettings(str(folder), str(state), threads=1, keep_every=1, size=(32, 32), batches=(1,))
    return FleetSettings(worker, **{"cpus": 0.5, "idle_seconds": 1e9} | changes)


def greatest_difference(viewers: list[Viewer], folder: Path) -> int:
    """Grey levels between what viewers saw and the undisturbed streams, each made alone."""
    torch.set_num_threads(1)  # as the workers: the number of threads changes the last bits
    student, worst = Student.from_pretrained(folder), 0
    for viewer in viewers:
        size = {"height": viewer.order.height, "width": viewer.order.width}
        with student.open(PROMPT, viewer.order.seed, **size) as stream:
            expected: list[np.ndarray] = []
            while len(expected) < len(viewer.frames):
                expected += list(stream.next_chunk())
        seen = np.stack(viewer.frames).astype(int)
        worst = max(worst, int(np.abs(seen - np.stack(expected[: len(seen)])).max()))
    return worst


def crowd(backend: Backend, count: int) -> list[Viewer]:
    return [Viewer(backend, order(f"stream-{number}", seed=number, frame_rate=0.1)) for number in range(count)]


def four_and_one(backend: Backend) -> list[Viewer]:
    """Four streams that share batches, and one of another size, which is alone in its own."""
    return [*crowd(backend, 4), Viewer(backend, order("alone", height=48, frame_rate=0.1))]


def check_frames(viewers: list[Viewer], folder: Path) -> int:
    """What `four_and_one` saw is what undisturbed streams show. Returns how far batches were off, in grey levels."""
    *together, alone = viewers
    assert greatest_difference([alone], folder) == 0
    difference = greatest_difference(together, folder)
    assert difference <= LEVEL
    return difference


async def seen_by_all(viewers: list[Viewer], tasks: "list[asyncio.Task[None]]", more: int) -> None:
    """Wait until every viewer has so many frames more than now."""
    goals = [len(viewer.frames) + more for viewer in viewers]

    def reached() -> bool:
        for task in tasks:
            assert not task.done(), task
        return all(len(viewer.frames) >= goal for viewer, goal in zip(viewers, goals, strict=True))

    await until(reached, LONG)


async def finish(viewers: list[Viewer], tasks: "list[asyncio.Task[None]]", more: int) -> None:
    for viewer in viewers:
        viewer.goal = len(viewer.frames) + more
    await asyncio.wait_for(asyncio.gather(*tasks), LONG)


@pytest.mark.slow
def test_drain_and_upgrade_under_load_lose_no_frame(small_student: Path, tmp_path: Path) -> None:
    async def run() -> list[Viewer]:
        hands = Hands()
        pool = Pool({MODEL: settings(small_student, tmp_path, min_workers=1, max_workers=2)}, hands)
        pool.begin()
        try:
            viewers = crowd(LocalBackend(pool, hands), 3)
            tasks = [asyncio.create_task(viewer.watch()) for viewer in viewers]
            await seen_by_all(viewers, tasks, 21)
            await pool.drain(viewers[0].places[-1].id)
            await seen_by_all(viewers, tasks, 5)
            old = set(pool.fleets[MODEL].members)
            assert await pool.upgrade(MODEL) >= 1
            assert not old & set(pool.fleets[MODEL].members)  # one that starts for the load meanwhile is a new one
            await finish(viewers, tasks, 21)
            counts = (await pool.status())[MODEL]["counts"]
            assert (counts["moved"], counts["died"]) == (sum(len(viewer.places) - 1 for viewer in viewers), 0)
            assert min(len(viewer.places) for viewer in viewers) >= 3
        finally:
            await pool.stop()
            await hands.end()
        return viewers

    assert greatest_difference(asyncio.run(run()), small_student) <= LEVEL


@pytest.mark.slow
def test_streams_outlive_ten_killed_workers(
    ray_session: Session, small_student: Path, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    """Two workers, one of which is killed again and again; the other one takes over."""

    async def kill(pool: Pool, viewers: list[Viewer], tasks: "list[asyncio.Task[None]]") -> None:
        fleet = pool.fleets[MODEL]
        await until(lambda: len(fleet.of("ready")) == 2, LONG)
        await seen_by_all(viewers, tasks, 15)
        victim = viewers[-1].places[-1]
        os.kill(victim.info.pid, signal.SIGKILL)
        await until(lambda: all(viewer.places[-1].id != victim.id for viewer in viewers), LONG)
        await seen_by_all(viewers, tasks, 1)

    async def run() -> list[Viewer]:
        pool = Pool({MODEL: settings(small_student, tmp_path, min_workers=2, max_workers=2)}, RayHands())
        pool.begin()
        try:
            viewers = four_and_one(LocalBackend(pool, pool.hands))
            tasks = [asyncio.create_task(viewer.watch()) for viewer in viewers]
            for _ in range(KILLS):
                await kill(pool, viewers, tasks)
            await finish(viewers, tasks, 12)
            assert (await pool.status())[MODEL]["counts"]["died"] == KILLS
        finally:
            await pool.stop()
        return viewers

    viewers = asyncio.run(run())
    difference, longest = check_frames(viewers, small_student), max(viewer.longest for viewer in viewers)
    record_property("grey_levels", difference)
    record_property("longest_gap_seconds", longest)
    print(f"{KILLS} kills: greatest difference {difference} of 256, longest gap {longest:.1f} s")
    assert longest <= 15


@pytest.fixture
def deployed(ray_session: Session, small_student: Path, tmp_path: Path) -> Iterator[Any]:
    """A handle to a pool on Ray Serve, with one worker."""
    from ray import serve

    how = settings(small_student, tmp_path, min_workers=1, max_workers=1)
    serve.start(http_options={"host": "127.0.0.1", "port": 8123})
    try:
        yield serve.run(pool_application({MODEL: how}), name="pool", route_prefix=None)
    finally:
        serve.shutdown()


@pytest.mark.timeout(900)  # processes that import everything, one after the other
def test_streams_of_a_pool_on_ray_serve_outlive_its_killed_worker(deployed: Any, small_student: Path) -> None:
    """Gateways call the workers themselves. The pool starts another one for one that dies; all end with the pool."""
    backend = RayBackend(deployed)

    async def run() -> tuple[list[Viewer], int]:
        viewers = four_and_one(backend)
        tasks = [asyncio.create_task(viewer.watch()) for viewer in viewers]
        await seen_by_all(viewers, tasks, 15)
        [first] = {viewer.places[-1].id for viewer in viewers}
        here = viewers[0].places[-1]
        with pytest.raises(ValueError, match=r"^stream nobody: not on worker tiny-"):
            await backend.call(here.worker, "take", "nobody", 0)
        [row] = await backend.models()
        assert (row["id"], row["ready"], row["info"].pid) == (MODEL, 1, here.info.pid)
        os.kill(here.info.pid, signal.SIGKILL)
        await until(lambda: all(viewer.places[-1].id != first for viewer in viewers), LONG)
        await finish(viewers, tasks, 25)  # more than the dead worker had ready
        counts = (await backend.status())[MODEL]["counts"]
        assert (counts["placed"], counts["died"], counts["moved"]) == (5, 1, 5)
        return viewers, viewers[0].places[-1].info.pid

    viewers, pid = asyncio.run(run())
    check_frames(viewers, small_student)
    from ray import serve

    serve.delete("pool")
    deadline = time.monotonic() + LONG
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
