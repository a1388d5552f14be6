"""A pool of workers on Ray: a plain class, many work items, as many workers as there is work and room for.

This is a small loop over actors and not Ray Data's `ActorPoolStrategy`, because each item must have exactly one
outcome here: a row, or a quarantine record with the reason, the attempts and the dead worker's last words, where Ray
Data retries or drops whole blocks. Every worker holds one item at a time, so a death has one culprit, nothing is held
beyond what is in flight, and an idle worker can be let go at once.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from .pool_host import Failure, Host, Place, Row, Worker, log_tail, reason_of_death, unsent
from .preflight import Requirements, check_placement, cluster_nodes
from .progress import Counts, RunMetrics, RunProgress

ItemT = TypeVar("ItemT")
TICK = 0.2  # seconds between two looks at the clock
PENDING_NOTE_SECONDS = 20.0
LONGEST_RETRY_SECONDS = 60.0


class WorkerStartError(ValueError):
    """A worker of the pool could not be built; the message has the reason in one line."""


@dataclass(frozen=True)
class PoolSettings:
    """How a pool runs. Times are seconds.

    An item whose worker dies, or whose exception is one of `retry_on`, is tried again up to `max_retries` times,
    after `retry_seconds`, twice that, and so on. A worker that sits on an item for longer than `item_seconds` counts
    as dead. Workers beyond the minimum are let go after `idle_seconds` without work. After a first Ctrl-C or SIGTERM,
    running items have `grace_seconds` to end.
    """

    workers: Requirements = field(default_factory=Requirements)
    name: str = "pool"
    max_retries: int = 2
    retry_on: tuple[type[Exception], ...] = ()
    retry_seconds: float = 1.0
    item_seconds: float = math.inf
    idle_seconds: float = 30.0
    grace_seconds: float = 30.0
    progress_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and not value >= 0:
                raise ValueError(f"{name}: must be at least 0, got {value}")


@dataclass(frozen=True)
class Quarantined(Generic[ItemT]):
    """An item that was given up: which (its place in the source counts from 0), why, and after how many attempts."""

    index: int
    item: ItemT
    failure: Failure
    attempts: int
    worker: str

    def __str__(self) -> str:
        """`ValueError: not a video (attempts: 1, pid 7 on 10.0.0.1)`; of a dead worker also its last words."""
        return f"{self.failure.with_last_words} (attempts: {self.attempts}, {self.worker})"


@dataclass
class PoolReport(Generic[ItemT]):
    """How a run ended. `unfinished` items were taken from the source and have no outcome (after an interruption);
    `left` counts these and the ones never taken, None when the source does not say how many it has. `quarantined`
    is empty when `on_quarantine` took the records.
    """

    done: int = 0
    failed: int = 0
    retried: int = 0
    left: int | None = None
    unfinished: int = 0
    interrupted: bool = False
    seconds: float = 0.0
    workers_started: int = 0
    workers_died: int = 0
    workers_released: int = 0
    most_workers: int = 0
    quarantined: list[Quarantined[ItemT]] = field(default_factory=list)


def run_pool(
    worker: Callable[[], Worker[ItemT]],
    items: Iterable[ItemT],
    pool: PoolSettings,
    on_result: Callable[[ItemT, Row], None],
    *,
    on_quarantine: Callable[[Quarantined[ItemT]], None] | None = None,
    total: int | None = None,
) -> PoolReport[ItemT]:
    """Run every item through a worker and hand each row to `on_result`, here and in the order of arrival.

    `worker` builds one in its process: a class, or `functools.partial(Class, ...)`; it, the items and the rows travel
    by pickle, so they should be small: paths, keys, figures. `items` is read as workers fall free, in this thread, at
    most `max_workers` + 1 ahead of the outcomes. An item may run more than once (its worker may die after the work
    was done), so what `process` writes must bear being written again. Needs a Ray session.

    Raises ValueError when the cluster cannot hold the pool, WorkerStartError when workers cannot be built, and what
    `items`, `on_result` or `on_quarantine` raise; the workers are ended in every case. The first Ctrl-C or SIGTERM
    ends the run cleanly (the report says `interrupted`), the second cancels running items, a third raises.
    """
    assert ray.is_initialized(), "run_pool needs a session: see start_or_join"
    if total is None and isinstance(items, Sized):
        total = len(items)
    limit = check_placement(cluster_nodes(), pool.workers)
    if total is not None:
        limit = max(1, min(limit, total))
    report = PoolReport[ItemT]()
    quarantine = on_quarantine or report.quarantined.append
    return _Run(worker, iter(items), pool, limit, Counts(total=total), report, on_result, quarantine).run()


@dataclass
class _Task(Generic[ItemT]):
    index: int
    item: ItemT
    attempts: int = 0
    not_before: float = 0.0


@dataclass(eq=False)
class _Slot(Generic[ItemT]):
    """A worker as the driver knows it. It starts (no place, then not built), then holds a task or is idle."""

    actor: Any
    place: Place | None = None
    built: bool = False
    task: _Task[ItemT] | None = None
    since: float = 0.0  # when the present state began

    @property
    def idle(self) -> bool:
        return self.built and self.task is None


@dataclass(eq=False)
class _Run(Generic[ItemT]):
    """One call of `run_pool`; all of it runs in the caller's thread."""

    worker: Callable[[], Worker[ItemT]]
    source: Iterator[ItemT]
    pool: PoolSettings
    limit: int
    counts: Counts
    report: PoolReport[ItemT]
    on_result: Callable[[ItemT, Row], None]
    on_quarantine: Callable[[Quarantined[ItemT]], None]
    taken: int = 0  # items read from the source
    exhausted: bool = False
    failed_starts: int = 0  # since a worker was last built
    signals: int = 0
    told_pending: bool = False
    waiting: list[_Task[ItemT]] = field(default_factory=list)  # retries, and at most one fresh item
    slots: list[_Slot[ItemT]] = field(default_factory=list)
    # The one answer that each worker owes; an idle worker owes none.
    pending: dict["ray.ObjectRef[Any]", _Slot[ItemT]] = field(default_factory=dict)

    def run(self) -> PoolReport[ItemT]:
        self.began = time.monotonic()
        self.factory = ray.put(self.worker)
        self.metrics = RunMetrics(self.pool.name)
        self.progress = RunProgress(self.pool.name, self.counts, self.pool.progress_seconds)
        try:
            with self._signals_counted():
                while not self.signals and self._work_remains():
                    self._hand_out()
                    self._grow()
                    self._shrink()
                    self._collect()
                if self.signals:
                    self._stop()
        finally:
            self._close()
        return self.report

    # --- Items -------------------------------------------------------------------------------------------------

    def _work_remains(self) -> bool:
        self._read_ahead()
        return bool(self.waiting) or any(slot.task for slot in self.slots)

    def _read_ahead(self) -> None:
        """Have one item at hand that could start now, unless as many as the pool can work on are out already."""
        due = any(task.not_before <= time.monotonic() for task in self.waiting)
        held = len(self.waiting) + sum(slot.task is not None for slot in self.slots)
        if due or self.exhausted or held > self.limit:
            return
        try:
            self.waiting.append(_Task(self.taken, next(self.source)))
            self.taken += 1
        except StopIteration:
            self.exhausted = True

    def _hand_out(self) -> None:
        for slot in self.slots:
            if not slot.idle:
                continue
            now = time.monotonic()
            task = next((task for task in self.waiting if task.not_before <= now), None)
            if task is None:
                return
            self.waiting.remove(task)
            task.attempts += 1
            slot.task, slot.since = task, now
            self.pending[slot.actor.process.remote(task.item)] = slot
            self._read_ahead()

    # --- Workers -----------------------------------------------------------------------------------------------

    def _grow(self) -> None:
        """At least the minimum while work waits; twice as many when all are busy and another item is ready."""
        now = time.monotonic()
        if not any(task.not_before <= now for task in self.waiting):
            return
        wanted = self.pool.workers.min_workers
        if all(slot.task for slot in self.slots):
            wanted = max(wanted, min(2 * len(self.slots), len(self.slots) + self._items_to_come()))
        for _ in range(min(self.limit, wanted) - len(self.slots)):
            self._start_worker()

    def _items_to_come(self) -> int:
        return len(self.waiting) + (self.limit if self.counts.total is None else self.counts.total - self.taken)

    def _start_worker(self) -> None:
        need = self.pool.workers
        actor = ray.remote(Host).options(
            num_cpus=need.cpus,
            num_gpus=need.gpus,
            accelerator_type=need.accelerator or None,
            memory=need.memory or None,
            max_restarts=0,
            max_task_retries=0,
        )
        slot = _Slot[ItemT](actor.remote(self.pool.retry_on), since=time.monotonic())
        self.slots.append(slot)
        self.pending[slot.actor.place.remote()] = slot
        self.report.workers_started += 1
        self.report.most_workers = max(self.report.most_workers, len(self.slots))

    def _shrink(self) -> None:
        patience = time.monotonic() - self.pool.idle_seconds
        spare = [slot for slot in self.slots if slot.idle and slot.since < patience]
        for slot in spare[: max(0, len(self.slots) - self.pool.workers.min_workers)]:
            self._end_worker(slot)
            self.report.workers_released += 1

    def _end_worker(self, slot: _Slot[ItemT]) -> None:
        ray.kill(slot.actor)
        self.slots.remove(slot)
        self.pending = {ref: other for ref, other in self.pending.items() if other is not slot}

    # --- What comes back ---------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Wait a moment for answers and deal with all that are there."""
        if self.pending:
            ray.wait(list(self.pending), num_returns=1, timeout=TICK)
            ready, _ = ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0)
            for ref in ready:
                self._answer(self.pending.pop(ref), ref)
        else:
            time.sleep(TICK)
        self._end_overdue()
        self._tell()

    def _answer(self, slot: _Slot[ItemT], ref: "ray.ObjectRef[Any]") -> None:
        try:
            answer = ray.get(ref)
        except RayTaskError as error:
            answer = unsent(error)
        except RayError as error:
            self._died(slot, reason_of_death(error))
            return
        if slot.built:
            self._finished(slot, answer)
        elif isinstance(answer, Failure):
            self._end_worker(slot)
            self._start_failed(answer)
        elif slot.place is None:
            slot.place = answer
            self.pending[slot.actor.build.remote(self.factory)] = slot
        else:
            slot.built, slot.since, self.failed_starts = True, time.monotonic(), 0

    def _finished(self, slot: _Slot[ItemT], outcome: Row | Failure) -> None:
        task, seconds = slot.task, time.monotonic() - slot.since
        assert task is not None
        slot.task, slot.since = None, time.monotonic()
        if isinstance(outcome, Failure):
            self._failed(task, outcome, str(slot.place))
            return
        self.on_result(task.item, outcome)
        self.counts.done += 1
        self.metrics.done(seconds)

    def _died(self, slot: _Slot[ItemT], reason: str) -> None:
        tail = log_tail(slot.place) if slot.place else ()
        self._end_worker(slot)
        self.report.workers_died += 1
        failure = Failure("WorkerDied", reason, may_retry=True, log_tail=tail)
        if slot.task is None:
            self._start_failed(failure)
        else:
            self._failed(slot.task, failure, str(slot.place))

    def _start_failed(self, failure: Failure) -> None:
        self.failed_starts += 1
        if not failure.may_retry or self.failed_starts > self.pool.max_retries:
            raise WorkerStartError(f"{self.pool.name}: a worker could not be built: {failure.with_last_words}")

    def _failed(self, task: _Task[ItemT], failure: Failure, worker: str) -> None:
        if failure.may_retry and task.attempts <= self.pool.max_retries:
            pause = min(self.pool.retry_seconds * 2 ** (task.attempts - 1), LONGEST_RETRY_SECONDS)
            task.not_before = time.monotonic() + pause
            self.waiting.append(task)
            self.counts.retried += 1
            self.metrics.retried()
        else:
            self.on_quarantine(Quarantined(task.index, task.item, failure, task.attempts, worker))
            self.counts.failed += 1
            self.metrics.failed()
            told = failure.with_last_words
            self.progress.note(f"item {task.index} quarantined after {task.attempts} attempts: {told}")

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for slot in [slot for slot in self.slots if slot.task and now - slot.since > self.pool.item_seconds]:
            self._died(slot, f"the item took longer than {self.pool.item_seconds:g} s")

    # --- Telling, stopping -------------------------------------------------------------------------------------

    def _tell(self) -> None:
        self.counts.workers = sum(slot.built for slot in self.slots)
        self.counts.starting = len(self.slots) - self.counts.workers
        self.metrics.workers(self.counts.workers)
        self.progress.update()
        waits = [slot.since for slot in self.slots if slot.place is None]
        if waits and not self.told_pending and time.monotonic() - waits[0] > PENDING_NOTE_SECONDS:
            self.told_pending = True
            free = ray.available_resources()
            room = f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"
            self.progress.note(f"still waiting for a worker with {self.pool.workers} to start; free now: {room}")

    @contextmanager
    def _signals_counted(self) -> Iterator[None]:
        """Count Ctrl-C and SIGTERM instead of raising anywhere: no item is lost between two lines of this file."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets only the main thread set handlers; signals are the caller's affair then
            return

        def count(number: int, frame: FrameType | None) -> None:
            self.signals += 1
            if self.signals > 2:
                raise KeyboardInterrupt

        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        """Let running items end, for the grace period or until a second signal."""
        running = sum(slot.task is not None for slot in self.slots)
        self.progress.note(f"stopping: {running} items may run for up to {self.pool.grace_seconds:g} s more")
        self.report.interrupted = True
        for slot in [slot for slot in self.slots if slot.task is None]:
            self._end_worker(slot)
        deadline = time.monotonic() + self.pool.grace_seconds
        while self.signals < 2 and time.monotonic() < deadline and any(slot.task for slot in self.slots):
            self._collect()

    def _close(self) -> None:
        report, counts = self.report, self.counts
        report.done, report.failed = counts.done, counts.failed
        report.retried, report.left = counts.retried, counts.left
        report.unfinished = self.taken - counts.done - counts.failed
        report.seconds = time.monotonic() - self.began
        for slot in list(self.slots):
            self._end_worker(slot)
        counts.workers = counts.starting = 0
        self.metrics.workers(0)
        self.progress.close()
