"""The worker's side of a pool: the Ray actor around a plain class, and what it says when things go wrong."""

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ItemT_contra = TypeVar("ItemT_contra", contravariant=True)
Row = dict[str, Any]
TAIL_LINES, TAIL_BYTES = 20, 1 << 14  # of a dead worker's log
LAST_WORDS = 3  # lines of it that an error repeats
FETCH_SECONDS = 30.0
MESSAGE_CHARACTERS = 2000  # some exceptions print whole tensors
CAUSES = " Some common causes include"  # begins Ray's general advice on deaths


class Worker(Protocol[ItemT_contra]):
    """What a pool runs: a plain class. Built once per worker process; `process` is called for one item at a time."""

    def process(self, item: ItemT_contra) -> Row: ...


@dataclass(frozen=True)
class Failure:
    """Why an attempt gave no row, as text: an exception itself may not survive the way to the driver."""

    error: str
    message: str
    place: str = ""  # the last line of the traceback: file, line, function, code
    may_retry: bool = False
    log_tail: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ": ".join(" ".join(part.split()) for part in (self.error, self.message, self.place) if part)

    @property
    def with_last_words(self) -> str:
        """The failure and the last lines of its worker's log, if that died: all in one line."""
        return " | ".join([str(self), *(" ".join(line.split()) for line in self.log_tail[-LAST_WORDS:])])


@dataclass(frozen=True)
class Place:
    """Where a worker runs, and the file there that takes its stderr."""

    pid: int
    address: str
    node_id: str
    stderr: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.address}"


class Host:
    """The actor around a plain worker. Exceptions come back as `Failure`s: a raised one is Ray's own."""

    def __init__(self, retry_on: tuple[type[Exception], ...]) -> None:
        self._retry_on = retry_on
        self._worker: Worker[Any] | None = None

    def place(self) -> Place:
        stderr = os.readlink("/proc/self/fd/2") if os.path.exists("/proc/self/fd/2") else ""
        node_id = ray.get_runtime_context().get_node_id()
        return Place(os.getpid(), ray.util.get_node_ip_address(), node_id, stderr)

    def build(self, factory: Callable[[], Worker[Any]]) -> Failure | None:
        try:
            self._worker = factory()
        except Exception as error:  # noqa: BLE001 -- whatever it is, the driver reports it
            return self._failure(error)
        return None

    def process(self, item: Any) -> Row | Failure:
        assert self._worker is not None
        try:
            row = self._worker.process(item)
            if not isinstance(row, dict):
                raise TypeError(f"process must return a dict, got {type(row).__name__}")
        except Exception as error:  # noqa: BLE001 -- whatever it is, the driver retries or quarantines
            return self._failure(error)
        return row

    def _failure(self, error: Exception) -> Failure:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
        return Failure(type(error).__name__, str(error)[:MESSAGE_CHARACTERS], place, isinstance(error, self._retry_on))


def unsent(error: RayTaskError) -> Failure:
    """`Host` raises nothing, so this is a thing that could not be pickled or unpickled on its way."""
    return Failure(type(error.cause).__name__, str(error.cause).strip()[:MESSAGE_CHARACTERS])


def reason_of_death(error: RayError) -> str:
    """Ray's account of a death without its list of identifiers and its general advice."""
    text = " ".join(line for line in str(error).splitlines() if not line.startswith("\t"))
    account, killed, _ = text.partition(CAUSES)
    hint = " (killed, as the system does when memory runs out, or crashed)" if killed else ""
    return account.split("Worker exit detail: ")[-1].strip() + hint


def log_tail(place: Place) -> tuple[str, ...]:
    """The last lines that a dead worker wrote to stderr, fetched from its node if that still stands."""
    here = ray.get_runtime_context().get_node_id()
    return read_tail(place.stderr) if place.node_id == here else fetch_tail(place)


def fetch_tail(place: Place) -> tuple[str, ...]:
    """`read_tail` on the worker's node; a line that says so when the node does not answer."""
    there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    fetch = ray.remote(read_tail).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        tail: tuple[str, ...] = ray.get(fetch.remote(place.stderr), timeout=FETCH_SECONDS)
    except RayError:
        return ("(the log cannot be fetched: its node is gone or does not answer)",)
    return tail


def read_tail(path: str) -> tuple[str, ...]:
    """The last lines of a log file, without Ray's own marks (`:job_id:…`); none when there is no file."""
    if not os.path.isfile(path):
        return ()
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return tuple(line for line in lines if line.strip() and not line.startswith(":"))[-TAIL_LINES:]
