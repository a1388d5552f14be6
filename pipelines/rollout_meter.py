"""How far a rollout is, and how fast: a bar on a terminal, a line now and then elsewhere, and figures."""

import math
import time
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..actors.bench_report import FRAME_RATE

PROGRESS_SECONDS: Final = 10.0  # between two lines where no terminal shows a bar


class Meter:
    """Counts the frames of one video against the clock, from the request (`start`) on.

    total: frames to be made. first, later: frames of the first chunk and of the others.
    """

    def __init__(self, console: Console, total: int, first: int, later: int) -> None:
        self._console, self._bar = console, _bar(console, total)
        self.total, self.first, self.later = total, first, later
        self.frames = 0
        self.seconds = 0.0
        self.first_after: float | None = None
        self._ends: list[float] = []  # when each chunk was there
        self._shown = time.monotonic()

    @property
    def chunks(self) -> int:
        """Chunks to be made; the last one may be cut short."""
        return 1 + max(0, math.ceil((self.total - self.first) / self.later))

    @property
    def left(self) -> int:
        return self.total - self.frames

    @property
    def rate(self) -> float:
        """Frames per second so far."""
        return self.frames / self.seconds if self.seconds else 0.0

    def start(self) -> None:
        self._began = time.perf_counter()
        if self._bar:
            self._bar.start()

    def count(self, frames: int) -> None:
        """Frames that were just written."""
        self.frames += frames
        self.seconds = time.perf_counter() - self._began
        if self.first_after is None:
            self.first_after = self.seconds
        if self.frames >= self.first and (self.frames - self.first) % self.later == 0:
            self._ends.append(self.seconds)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.frames, description=str(self))
        elif time.monotonic() - self._shown > PROGRESS_SECONDS:
            self._shown = time.monotonic()
            self._console.print(f"rollout: {self}")

    def close(self) -> None:
        """Take the bar away and show the last counts."""
        if self._bar:
            self._bar.stop()
        self._console.print(f"rollout: {self}")

    def figures(self, samples: int) -> dict[str, Any]:
        """samples: videos that were made together; the frames are those of one."""
        gaps = np.diff(self._ends)
        quantiles = np.quantile(gaps, (0.5, 0.95, 0.99)).tolist() if len(gaps) else [None] * 3
        return {
            "frames": self.frames,
            "seconds_of_video": self.frames / FRAME_RATE,
            "interrupted": self.left > 0,
            "seconds": self.seconds,
            "frames_per_second": self.rate,
            "frames_per_second_of_all_samples": self.rate * samples,
            "time_to_first_frame": self.first_after,
            "chunk_gap": {"count": len(gaps), **dict(zip(("p50", "p95", "p99"), quantiles, strict=True))},
        }

    def __str__(self) -> str:
        first = "-" if self.first_after is None else f"{self.first_after:.2f} s"
        minutes, seconds = divmod(round(self.left / self.rate) if self.rate else 0, 60)
        left = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        return f"{self.frames}/{self.total} frames, {self.rate:.1f} frames/s, first frame after {first}, {left}"


def _bar(console: Console, total: int) -> Progress | None:
    if not console.is_terminal:
        return None
    bar = Progress(
        BarColumn(), TextColumn("{task.description}", markup=False), console=console, transient=True, auto_refresh=True
    )
    bar.add_task("loading", total=total)
    return bar
