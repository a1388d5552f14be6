"""The pool on a real Ray: every item has one outcome, whatever happens to the workers."""

import io
import os
import signal
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import cloudpickle

from reelway.cluster import pool, pool_host, progress
from reelway.cluster.pool import PoolReport, PoolSettings, WorkerStartError, run_pool
from reelway.cluster.pool_host import Place, fetch_tail
from reelway.cluster.preflight import Requirements
from reelway.cluster.progress import Counts, RunProgress
from reelway.cluster.session import Session

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test module


def settings(count: int = 1, **changes: Any) -> PoolSettings:
    workers = Requirements(cpus=0.5, min_workers=count, max_workers=count)
    return PoolSettings(**{"workers": workers, "retry_seconds": 0.05, "progress_seconds": 1e9} | changes)


def collect(worker: Any, items: Any, how: PoolSettings) -> tuple[list[Any], PoolReport[Any]]:
    rows: list[Any] = []
    report = run_pool(worker, items, how, lambda item, row: rows.append((item, row)))
    return rows, report


def wait_until(true: Any, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(true())


class Square:
    def process(self, item: int) -> dict[str, Any]:
        return {"square": item * item, "cpus": ray.get_runtime_context().get_assigned_resources()["CPU"]}


class Mortal:
    """Item 3 kills its worker once, item 5 always; the folder remembers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def process(self, item: int) -> dict[str, Any]:
        first = not (self.folder / str(item)).exists()
        (self.folder / str(item)).touch()
        if item == 5 or (item == 3 and first):
            print(f"last words of {item}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return {"item": item}


class Fussy:
    """What each item does is its name; the folder remembers which were seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def process(self, item: str) -> dict[str, Any]:
        first = not (self.folder / item).exists()
        (self.folder / item).touch()
        if item == "never connects" or (item == "connects later" and first):
            raise ConnectionResetError("the store hung up")
        if item == "poison":
            raise ValueError("not a video")
        if item == "a list":
            return []  # type: ignore[return-value]
        if item == "cannot travel":
            return {"file": sys.stderr}
        return {"item": item}


class Unbuildable:
    def __init__(self, die: bool) -> None:
        if die:
            print("no memory for the weights", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        raise FileNotFoundError("no weights at nowhere.safetensors")

    def process(self, item: int) -> dict[str, Any]:
        return {}


class Meeting:
    """`meet` ends when two workers are there, `alone` when there is one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / str(os.getpid())).touch()

    def process(self, item: str) -> dict[str, Any]:
        count = {"meet": 2, "alone": 1}.get(item)
        return {"seen": count is None or wait_until(lambda: self._alive() == count)}

    def _alive(self) -> int:
        return sum(Path(f"/proc/{path.name}").exists() for path in self.folder.iterdir())


class SlowStart:
    def __init__(self) -> None:
        time.sleep(2.0)

    def process(self, item: int) -> dict[str, Any]:
        return {"item": item}


class Slow:
    def process(self, item: float) -> dict[str, Any]:
        time.sleep(item)
        return {"slept": item}


# --- Outcomes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_every_item_gives_one_row_on_any_number_of_workers(
    ray_session: Session, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, report = collect(Square, range(40), settings(count))
    assert sorted((item, row["square"]) for item, row in rows) == [(item, item * item) for item in range(40)]
    assert {row["cpus"] for _, row in rows} == {0.5}
    assert (report.done, report.failed, report.left, report.unfinished) == (40, 0, 0, 0)
    assert report.workers_started == count
    assert "pool: 40/40 done, " in capsys.readouterr().err


def test_a_worker_that_is_long_in_starting_is_reported(
    ray_session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pool, "PENDING_NOTE_SECONDS", 0.0)
    rows, _ = collect(SlowStart, [1], settings(1))
    assert len(rows) == 1
    errors = capsys.readouterr().err
    assert "pool: still waiting for a worker with 0.5 CPUs to start; free now: " in errors


def test_a_killed_worker_is_replaced_and_a_deadly_item_quarantined(
    ray_session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[int] = []
    records: list[Any] = []
    report = run_pool(
        partial(Mortal, tmp_path),
        range(8),
        settings(2, max_retries=1),
        lambda item, _: rows.append(item),
        on_quarantine=records.append,
    )
    assert sorted(rows) == [0, 1, 2, 3, 4, 6, 7]
    assert (report.done, report.failed, report.retried, report.workers_died) == (7, 1, 2, 3)
    assert report.quarantined == []  # the caller took the records
    (record,) = records
    assert (record.index, record.item, record.attempts) == (5, 5, 2)
    assert record.failure.error == "WorkerDied"
    assert "killed" in record.failure.message
    assert record.failure.log_tail[-1] == "last words of 5"
    assert " | last words of 5 (attempts: 2, pid " in str(record)
    assert "\n" not in str(record)
    note = next(line for line in capsys.readouterr().err.splitlines() if "item 5 quarantined after 2 attempts" in line)
    assert note.endswith(" | last words of 5")
    assert record.worker.startswith("pid ")


def test_listed_exceptions_are_retried_and_others_quarantined_at_once(ray_session: Session, tmp_path: Path) -> None:
    items = ["fine", "connects later", "never connects", "poison", "a list", "cannot travel"]
    name = f"fussy-{uuid.uuid4().hex[:8]}"
    how = settings(name=name, retry_on=(ConnectionError,), max_retries=2)
    rows, report = collect(partial(Fussy, tmp_path), items, how)
    assert sorted(item for item, _ in rows) == ["connects later", "fine"]
    records = {record.item: record for record in report.quarantined}
    assert {item: record.attempts for item, record in records.items()} == {
        "never connects": 3,
        "poison": 1,
        "a list": 1,
        "cannot travel": 1,
    }
    assert str(records["poison"].failure).startswith("ValueError: not a video: ")
    assert records["poison"].failure.place.endswith('in process: raise ValueError("not a video")')
    assert records["never connects"].failure.error == "ConnectionResetError"
    assert records["a list"].failure.message == "process must return a dict, got list"
    assert "pickle" in records["cannot travel"].failure.message
    assert (report.retried, report.workers_died, report.workers_started) == (3, 0, 1)
    expected = {"items_done_total": 2, "items_failed_total": 4, "items_retried_total": 3, "workers_alive": 0}
    expected["item_seconds_count"] = 2
    wait_until(lambda: metrics_of(name).items() >= expected.items(), 30)
    assert metrics_of(name).items() >= expected.items()


def metrics_of(name: str) -> dict[str, float]:
    """What the node's Prometheus port says of a pool."""
    found = {}
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as page:
        for line in page.read().decode().splitlines():
            if f'pool="{name}"' in line:
                found[line.split("{")[0].removeprefix("ray_reelway_pool_")] = float(line.split()[-1])
    return found


def test_an_item_that_takes_too_long_is_given_up(ray_session: Session) -> None:
    rows, report = collect(Slow, [600.0, 0.0], settings(item_seconds=1.0, max_retries=0))
    assert rows == [(0.0, {"slept": 0.0})]
    assert report.quarantined[0].failure.message == "the item took longer than 1 s"


@pytest.mark.parametrize(
    ("die", "reason"),
    [
        (False, r"FileNotFoundError: no weights at nowhere\.safetensors: .* in __init__: raise"),
        (True, r"WorkerDied: .*killed.* \| no memory for the weights$"),
    ],
)
def test_a_worker_that_cannot_be_built_is_one_clear_error(ray_session: Session, die: bool, reason: str) -> None:
    with pytest.raises(WorkerStartError, match=f"^pool: a worker could not be built: {reason}") as raised:
        collect(partial(Unbuildable, die), range(8), settings(max_retries=0))
    assert "\n" not in str(raised.value)


def test_a_log_is_fetched_from_another_node_while_that_stands(
    ray_session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_host, "FETCH_SECONDS", 120.0)
    log, node_id = tmp_path / "worker.err", ray.get_runtime_context().get_node_id()
    log.write_text(":job_id:01\n" + "".join(f"line {number}\n" for number in range(5000)))
    tail = fetch_tail(Place(1, "127.0.0.1", node_id, str(log)))
    assert tail == tuple(f"line {number}" for number in range(4980, 5000))
    gone = fetch_tail(Place(1, "127.0.0.1", "1" * len(node_id), str(log)))
    assert gone == ("(the log cannot be fetched: its node is gone or does not answer)",)


# --- Size ----------------------------------------------------------------------------------------------------


def test_the_source_is_read_only_as_far_as_workers_can_work(ray_session: Session) -> None:
    read, ahead = 0, []

    def source() -> Iterator[int]:
        nonlocal read
        for item in range(1_000_000):
            read += 1
            yield item

    def on_result(item: int, row: dict[str, Any]) -> None:
        ahead.append(read - len(ahead))
        if len(ahead) == 60:
            signal.raise_signal(signal.SIGINT)

    report = run_pool(Square, source(), settings(2), on_result)
    assert 2 <= max(ahead) <= 3
    assert report.interrupted
    assert report.left is None


def test_a_pool_without_items_starts_no_worker(ray_session: Session) -> None:
    rows, report = collect(Square, [], settings(2))
    assert (rows, report.workers_started, report.left) == ([], 0, 0)


def test_a_pool_that_does_not_fit_is_refused_before_anything_is_read(ray_session: Session) -> None:
    def source() -> Iterator[int]:
        pytest.fail("the source was read")
        yield 0

    need = Requirements(gpus=1, min_workers=8, max_workers=8)
    with pytest.raises(ValueError, match=r"^8 workers with 1 GPU each need 8 GPUs; the cluster has 0$"):
        collect(Square, source(), PoolSettings(workers=need))


def test_the_pool_grows_with_the_work_and_shrinks_with_idleness(ray_session: Session, tmp_path: Path) -> None:
    need = Requirements(cpus=0.5, min_workers=1, max_workers=2)
    how = settings(workers=need, idle_seconds=0.2)
    rows, report = collect(partial(Meeting, tmp_path), ["meet", "pass", "pass", "alone"], how)
    assert all(row["seen"] for _, row in rows)
    assert (report.done, report.most_workers, report.workers_released) == (4, 2, 1)


@pytest.mark.parametrize(("field", "value"), [("max_retries", -1), ("grace_seconds", float("nan"))])
def test_settings_name_the_wrong_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field}: must be at least 0, got {value}"):
        PoolSettings(**{field: value})  # type: ignore[arg-type]


# --- Interruption --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_running_items_are_cancelled_after_the_grace_period(ray_session: Session, number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    signalled: list[float] = []

    def interrupt() -> None:
        signalled.append(time.monotonic())
        os.kill(os.getpid(), number)

    timer = threading.Timer(1.0, interrupt)  # by then the second item runs
    items = [0.0, *[600.0] * 9]
    report = run_pool(Slow, items, settings(grace_seconds=0.5), lambda *_: timer.start())
    assert 0.5 <= time.monotonic() - signalled[0] < 30
    assert (report.done, report.failed, report.left, report.interrupted) == (1, 0, 9, True)
    assert report.unfinished == 2  # one was running, one was at hand
    assert signal.getsignal(number) is handler


# --- What is told --------------------------------------------------------------------------------------------


def test_progress_says_rate_and_time_left_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    stream, counts = io.StringIO(), Counts(total=40)
    shown = RunProgress("shards", counts, every=0.0, stream=stream)
    now += 60  # the start, which the rate leaves out
    counts.workers = 3
    shown.update()
    now += 5
    counts.done, counts.failed, counts.retried, counts.starting = 9, 1, 2, 1
    shown.note("item 4 quarantined")
    shown.close()
    first, note, last = stream.getvalue().splitlines()
    assert first == "shards: 0/40 done, 3 workers"
    assert note == "shards: item 4 quarantined"
    counted = "shards: 9/40 done, 1 failed, 2 retried, 3 workers (1 starting)"
    assert last == f"{counted}, 2.0 items/s, 0:00:15 left"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_is_drawn_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream, counts = Terminal(), Counts(total=4, workers=1)
    shown = RunProgress("shards", counts, every=3600.0, stream=stream)
    shown.update()
    counts.done = 3
    shown.note("item 2 quarantined")
    shown.close()
    drawn = stream.getvalue()
    assert "\x1b[2K" in drawn  # a line is wiped before it is drawn again
    assert "━" in drawn
    assert "shards: item 2 quarantined" in drawn
    last = drawn.rpartition("shards: ")[2]
    assert last.startswith("3/4 done, 1 worker, ")
    assert " left" in last


def test_progress_is_quiet_between_its_times() -> None:
    stream = io.StringIO()
    shown = RunProgress("shards", Counts(), every=3600.0, stream=stream)
    for _ in range(100):
        shown.update()
    assert stream.getvalue() == ""
