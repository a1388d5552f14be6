"""The command with one worker in this process, and its steps on the storage, at each of which it can fail."""

import errno
import importlib
import io
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from reelway.cluster.pool import PoolReport, Quarantined
from reelway.cluster.pool_host import Failure, Host
from reelway.cluster.session import Session
from reelway.cluster.storage import LocalStorage, ObjectStorage, Storage
from reelway.pipelines import trajectories
from reelway.pipelines.cli import main

PROMPTS = ("a red star", "a blue circle", "two shapes", "a green square", "a grey ring", "nothing", "all", "a moon")
SMALL = ("clip.height=32", "clip.width=32", "clip.frames=9", "student.window=6", "trajectories.batch=2")


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass(frozen=True)
class Order:
    """A data set to be made: prompts, samples of each, samples of a shard, and the least number of a path's steps."""

    teacher: Path
    source: Path
    prompts: int = 4
    samples: int = 2
    per_shard: int = 3
    steps: int = 4

    @property
    def shards(self) -> int:
        return -(-self.prompts * self.samples // self.per_shard)

    def command(self, out: str | Path, *more: object) -> list[str]:
        """What comes after `reelway`."""
        changes = (*SMALL, f"trajectories.per_shard={self.per_shard}", f"trajectories.minimum_steps={self.steps}")
        self.source.write_text("\n".join(PROMPTS))
        parts = ["--teacher", self.teacher, "--prompts", self.source, "--out", out, "--limit", self.prompts]
        parts += ["--samples", self.samples, *more, *(part for change in changes for part in ("--set", change))]
        return ["trajectories", *map(str, parts)]


def call(command: list[str]) -> Outcome:
    """Run a command in this process, as the command line does."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["reelway", *command])
        with pytest.raises(SystemExit) as end:
            main()
    return Outcome(int(end.value.code or 0), out.getvalue(), err.getvalue())


# --- A pool of one worker, in this process -----------------------------------------------------------------------


@contextmanager
def worker_here(order: random.Random | None = None, job: ModuleType = trajectories) -> Iterator[None]:
    """No Ray in the block: shards are made one after the other, with the pool's retries, in a random order if asked.

    job: the command's module.
    """

    def run_here(worker: Any, items: Any, pool: Any, on_result: Any, *, on_quarantine: Any) -> PoolReport[Any]:
        report, host = PoolReport[Any](workers_started=1, most_workers=1), Host(pool.retry_on)
        failure = host.build(worker)
        assert failure is None, failure
        for index, item in enumerate(shuffled(items, order)):
            outcome, attempts = _attempts(host, item, pool.max_retries)
            if isinstance(outcome, Failure):
                on_quarantine(Quarantined(index, item, outcome, attempts, "here"))
                report.failed += 1
            else:
                on_result(item, outcome)
                report.done += 1
        if hasattr(host._worker, "close"):
            host._worker.close()
        return report

    @contextmanager
    def session(address: str | None, **_: Any) -> Iterator[Session]:
        yield Session("nowhere", True, ())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "run_pool", run_here)
        patch.setattr(job, "start_or_join", session)
        yield


def _attempts(host: Host, item: Any, retries: int) -> tuple[Any, int]:
    for attempt in itertools.count(1):
        outcome = host.process(item)
        if not isinstance(outcome, Failure) or not outcome.may_retry or attempt > retries:
            return outcome, attempt
    raise AssertionError


def shuffled(items: Any, order: random.Random | None) -> list[Any]:
    return order.sample(list(items), len(items)) if order else list(items)


# --- Steps -------------------------------------------------------------------------------------------------------

SEEN = ((LocalStorage, "_put"), (ObjectStorage, "_put"), (Storage, "delete"))  # by others, when they are done
Act = Callable[[int, str], None]


class _Watched(io.BufferedWriter):
    """A temporary that calls `before` with the name of what will be done to it."""

    def __init__(self, path: Path, before: Callable[[str], None]) -> None:
        super().__init__(io.FileIO(path, "x"))
        self._before = before

    def write(self, data: Any) -> int:
        self._before("before write")
        return super().write(data)

    def flush(self) -> None:
        if not self.closed:
            self._before("before flush")
        super().flush()


@contextmanager
def at_every_step(act: Act) -> Iterator[None]:
    """Call `act(number, name)` before every step on a storage, and after those that others can see.

    The steps: a write to a temporary, its flush, its appearance under its name (a rename or a PUT), a removal.
    """
    numbers = itertools.count()

    def tell(name: str) -> None:
        act(next(numbers), name)

    def watched(step: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            tell(f"before {name}")
            result = step(*arguments)
            tell(f"after {name}")
            return result

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "_create", lambda _, path: _Watched(path, tell))
        for owner, name in SEEN:
            patch.setattr(owner, name, watched(getattr(owner, name), name))
        yield


def job_of(command: list[str]) -> ModuleType:
    """The module of a command's job."""
    return importlib.import_module(f"reelway.pipelines.{command[0]}")


def steps_of(command: list[str]) -> list[str]:
    """The steps of an undisturbed command."""
    names: list[str] = []
    with worker_here(job=job_of(command)), at_every_step(lambda _, name: names.append(name)):
        assert call(command).code == 0
    return names


@dataclass(frozen=True)
class Fault:
    """What goes wrong from a step on: for good, or `once`. `words`: those of the line that the user shall see."""

    error: OSError
    words: str
    where: tuple[str, ...]
    once: bool = False

    def act(self, at: int) -> Act:
        def fail(number: int, name: str) -> None:
            if name in self.where and (number == at if self.once else number >= at):
                raise self.error

        return fail


_BEFORE = ("before write", "before flush", "before _put")
_UNREACHABLE = "AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 28, Timeout was reached"
FULL, NO_ANSWER = OSError(errno.ENOSPC, "No space left on device"), OSError(_UNREACHABLE)
FAULTS = {
    "full": Fault(FULL, "the disk is full, or its quota used up", _BEFORE),
    "full for a moment": Fault(FULL, "the disk is full, or its quota used up", _BEFORE, once=True),
    "time-out": Fault(NO_ANSWER, "the store cannot be reached", ("before _put",)),
    "answer lost": Fault(NO_ANSWER, "the store cannot be reached", ("after _put",)),
    "answer lost once": Fault(NO_ANSWER, "the store cannot be reached", ("after _put",), once=True),
}
