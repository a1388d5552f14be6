"""How far a pool's run is: a bar on a terminal, one line every so often elsewhere, and Prometheus metrics."""

import sys
import time
from dataclasses import dataclass
from typing import TextIO

from ray.util.metrics import Counter, Gauge, Histogram
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .preflight import counted

SECONDS_BUCKETS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]


@dataclass
class Counts:
    """Where a run stands. `total` is None when the source does not say how many items it has."""

    total: int | None = None
    done: int = 0
    failed: int = 0
    retried: int = 0
    workers: int = 0
    starting: int = 0

    @property
    def left(self) -> int | None:
        return None if self.total is None else self.total - self.done - self.failed


class RunProgress:
    """Shows the counts of a run on `stream`: a live bar on a terminal, else a line every `every` seconds."""

    def __init__(self, name: str, counts: Counts, every: float, stream: TextIO | None = None) -> None:
        self.name, self.counts, self.every = name, counts, every
        self._console = Console(file=stream or sys.stderr, highlight=False, markup=False, soft_wrap=True)
        self._began = self._shown = time.monotonic()
        self._working = False
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=self._console, auto_refresh=False)
            self._task = self._bar.add_task(self.line(), total=counts.total)
            self._bar.start()

    def line(self) -> str:
        """`shards: 12/40 done, 1 failed, 2 retried, 4 workers, 1.5 items/s, 0:00:18 left`."""
        counts, seconds = self.counts, time.monotonic() - self._began
        parts = [f"{self.name}: {counts.done}{'' if counts.total is None else f'/{counts.total}'} done"]
        parts += [f"{counts.failed} failed"] if counts.failed else []
        parts += [f"{counts.retried} retried"] if counts.retried else []
        if counts.workers or counts.starting:
            starting = f" ({counts.starting} starting)" if counts.starting else ""
            parts.append(f"{counted(counts.workers, 'worker')}{starting}")
        finished = counts.done + counts.failed
        if finished:
            rate = finished / seconds
            parts.append(f"{rate:.1f} items/s" if rate >= 1 else f"{1 / rate:.1f} s an item")
            if counts.left:
                parts.append(f"{_clock(counts.left / rate)} left")
        return ", ".join(parts)

    def update(self) -> None:
        """Called often; shows as often as a reader can follow."""
        now = time.monotonic()
        if not self._working and self.counts.workers:
            self._working, self._began = True, now  # the rate is that of the work, not of the start
        if now - self._shown >= (0.2 if self._bar else self.every):
            self._shown = now
            self._show()

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        self._console.print(f"{self.name}: {text}")

    def close(self) -> None:
        """Show the last counts and take the bar away."""
        self._show()
        if self._bar:
            self._bar.stop()

    def _show(self) -> None:
        if self._bar:
            finished = self.counts.done + self.counts.failed
            self._bar.update(self._task, completed=finished, description=self.line(), refresh=True)
        else:
            self._console.print(self.line())


class RunMetrics:
    """The counts as Prometheus metrics on Ray's metrics port, labelled with the pool's name.

    `ray_reelway_pool_items_done_total`, `…_items_failed_total`, `…_items_retried_total`,
    `ray_reelway_pool_item_seconds` (a histogram of the attempts that gave a row) and
    `ray_reelway_pool_workers_alive`.
    """

    def __init__(self, name: str) -> None:
        self._tags = {"pool": name}
        keys = tuple(self._tags)
        self._done = Counter("reelway_pool_items_done", "Items that gave a row.", keys)
        self._failed = Counter("reelway_pool_items_failed", "Items that were quarantined.", keys)
        self._retried = Counter("reelway_pool_items_retried", "Attempts that were repeated.", keys)
        self._seconds = Histogram(
            "reelway_pool_item_seconds", "Seconds of an attempt that gave a row.", SECONDS_BUCKETS, keys
        )
        self._workers = Gauge("reelway_pool_workers_alive", "Workers that are built and alive.", keys)

    def done(self, seconds: float) -> None:
        self._done.inc(1, self._tags)
        self._seconds.observe(seconds, self._tags)

    def failed(self) -> None:
        self._failed.inc(1, self._tags)

    def retried(self) -> None:
        self._retried.inc(1, self._tags)

    def workers(self, alive: int) -> None:
        self._workers.set(alive, self._tags)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
