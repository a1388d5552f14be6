"""What a training shows and leaves behind while it runs: a bar, curves, and a clean end at Ctrl-C."""

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .trackers import Tracker

LINE_EVERY_STEPS = 100  # in a log, where a progress bar cannot be drawn


class Curve:
    """Metrics by step, one JSON line each."""

    def __init__(self, path: Path, resume_at: int) -> None:
        self._path = path
        kept = [row for row in read_curve(path) if row["step"] < resume_at]
        self.seconds_before = kept[-1].get("seconds", 0.0) if kept else 0.0
        self.loss_before = kept[-1].get("loss", math.nan) if kept else math.nan
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_curve(path: Path) -> list[dict[str, float]]:
    """Rows of a curve; a last line torn by an interruption is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


class Telemetry:
    """A stage's figures: `curve.jsonl` (every step), `scores.jsonl` (every sheet), TensorBoard, a bar on stderr.

    start: steps done; what is known of later ones, and of the sheet after them, is forgotten: it comes again.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        start: int,
        steps: int,
        console: Console | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import, and only trainings need it

        self._name, self._steps = name, steps
        self._console = console or Console(stderr=True)
        self._curve = Curve(folder / "curve.jsonl", start)
        self._scores = Curve(folder / "scores.jsonl", start)
        self._trackers = trackers
        self._board = SummaryWriter(folder / "tensorboard", purge_step=start)
        self._began = time.monotonic() - self._curve.seconds_before
        self._bar = progress_bar(self._console)
        self._task = self._bar.add_task(name, total=steps, completed=start, loss=self._curve.loss_before)
        self._bar.start()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """The metrics of the step number `step`, counted from 0."""
        seconds = time.monotonic() - self._began
        self._curve.append({"step": step, "seconds": seconds, **metrics})
        self._send(metrics, step)
        done = step + 1
        self._bar.update(self._task, completed=done, loss=metrics["loss"])
        if not self._console.is_terminal and (done % LINE_EVERY_STEPS == 0 or done == self._steps):
            line = f"{self._name}: step {done}/{self._steps}, loss {metrics['loss']:.4f}, {seconds:.0f} s"
            self._console.print(line, highlight=False)

    def sheet(self, done: int, path: Path, scores: dict[str, float]) -> None:
        """A sheet that was drawn after `done` steps, and what it was graded with, if anything grades it."""
        if scores:
            self._scores.append({"step": done, **scores})
            self._send(scores, done)
        for tracker in self._trackers:
            tracker.sheet(path, done)

    def close(self, *, failed: bool = False) -> None:
        self._bar.stop()
        self._board.close()
        for tracker in self._trackers:
            tracker.close(failed=failed)

    def _send(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{self._name}/{name}", value, step)
        for tracker in self._trackers:
            tracker.log(values, step)


class _Rate(ProgressColumn):
    """Steps per second, or seconds per step where it is slow."""

    def render(self, task: Task) -> Text:
        speed = task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f} steps/s" if speed >= 1 else f"{1 / speed:.1f} s/step")


def progress_bar(console: Console) -> Progress:
    """A bar with the loss (a task's field `loss`), the rate, the time gone and the time left."""
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
    )


@contextmanager
def finishing_the_step() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event instead of tearing an update apart; a second one acts as ever."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, request)
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
