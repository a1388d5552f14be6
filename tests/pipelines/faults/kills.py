"""Kills processes of a running command: its workers on Ray, or its driver. Only ones that this process started."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from reelway.cluster.manifest import tar_names
from reelway.cluster.storage import Storage

LOOK = 0.02  # seconds between two looks


def wait_until(true: Callable[[], object], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(LOOK)
    return bool(true())


def descendants(title: bytes) -> list[int]:
    """Processes whose command line begins so, and which descend from this one."""
    pids = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return sorted(pid for pid in pids if is_worker_of_ours(pid, title))


def is_worker_of_ours(pid: int, title: bytes = b"ray::Host") -> bool:
    """Whether a worker on Ray, a pool's by default, has this number, and descends from this process."""
    with suppress(OSError):
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title):
            while pid > 1:
                if pid == os.getpid():
                    return True
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def in_mid_shard(staging: Path) -> list[int]:
    """The workers that have a tar half written in a folder: a temporary's name begins with its writer's number."""
    writers = {int(path.name.split("-")[1]) for path in staging.glob(".partial-*-shard-*.tar")}
    return sorted(filter(is_worker_of_ours, writers))


def marked(mark: str) -> set[int]:
    """Processes that live and were started with this text in their environment."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.add(int(path.parent.name))
    return found


def is_agent(pid: int) -> bool:
    """Whether it is one of Ray's two agents on a node: they miss their raylet only after a minute or so."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith((b"ray::DashboardAgent", b"ray::RuntimeEnvAgent"))
    return False


@dataclass(frozen=True)
class Strike:
    """When to do it: `pause` seconds after `standing` shards are there and `busy` workers are in mid-shard."""

    standing: int = 0
    busy: int = 0
    pause: float = 0.0

    def wait(self, out: Storage, staging: Path, over: threading.Event) -> list[int] | None:
        """The workers that were in mid-shard when its time had come; None when it does not come any more.

        Until as many are in mid-shard as it needs, those that are stand still: a worker that starts long after the
        other would find nothing left to do.
        """
        held: set[int] = set()
        try:
            while not over.is_set():
                workers = in_mid_shard(staging)
                _signal(held - set(workers), signal.SIGCONT)
                held &= set(workers)
                if len(workers) >= self.busy and len(tar_names(out)) >= self.standing:
                    _signal(held, signal.SIGCONT)
                    over.wait(self.pause)
                    return workers
                if 0 < len(workers) < self.busy and len(tar_names(out)) >= self.standing:
                    _signal(workers, signal.SIGSTOP)
                    held |= set(workers)
                over.wait(LOOK)
            return None
        finally:
            _signal(held, signal.SIGCONT)


def _signal(workers: Iterable[int], what: signal.Signals) -> None:
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, what)


Deed = Callable[[list[int]], None]


@contextmanager
def when(strike: Strike, out: Storage, staging: Path, do: Deed) -> Iterator[list[int]]:
    """Do something to the workers in mid-shard, once, while the block runs; gives those that it was done to."""
    with in_turn([(strike, do)], out, staging) as (struck,):
        yield struck


@contextmanager
def in_turn(strikes: Sequence[tuple[Strike, Deed]], out: Storage, staging: Path) -> Iterator[list[list[int]]]:
    """Several, each waiting for the one before; gives what each was done to."""
    over, struck = threading.Event(), [list[int]() for _ in strikes]

    def act() -> None:
        for (strike, do), done in zip(strikes, struck, strict=True):
            workers = strike.wait(out, staging, over)
            if workers is not None:
                do(workers)
                done.extend(workers)

    with ThreadPoolExecutor(1) as thread:
        acting = thread.submit(act)
        try:
            yield struck
        finally:
            over.set()
    acting.result()


def kill_workers(count: int) -> Deed:
    """Kill the first ones, all at the same moment, and see them gone."""

    def kill(workers: list[int]) -> None:
        doomed = list(filter(is_worker_of_ours, workers[:count]))
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not any(map(is_worker_of_ours, doomed)), 30)

    return kill
