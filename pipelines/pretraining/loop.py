"""The training loop of every pretraining stage: progress, curve, checkpoints, resume."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SAVE_EVERY_SECONDS = 120.0
LINE_EVERY_STEPS = 100  # in a log, where a progress bar cannot be drawn

Batch = TypeVar("Batch", contravariant=True)


class Learner(Protocol[Batch]):
    def step(self, batch: Batch) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Curve:
    """Metrics by step, one JSON line each, in `curve.jsonl`."""

    def __init__(self, path: Path, resume_at: int) -> None:
        self._path = path
        kept = [row for row in read_curve(path) if row["step"] < resume_at]
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_curve(path: Path) -> list[dict[str, float]]:
    """Rows of a `curve.jsonl`; a last line torn by an interruption is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def train(
    name: str,
    folder: Path,
    learner: Learner[Any],
    batch_at: Callable[[int], Any],
    steps: int,
    *,
    every: tuple[int, Callable[[int], None]] | None = None,
    console: Console | None = None,
) -> None:
    """Run `steps` updates in `folder`, going on from its checkpoint.

    batch_at: the batch of a step, a function of the step alone, so that a resumed run sees what it would have seen.
    every: (N, report): `report(step)` is called after every N steps and after the last.
    Ctrl-C ends the step, saves a checkpoint and raises KeyboardInterrupt; the same call goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = _restore(folder / "checkpoint.pt", learner)
    if start >= steps:
        return
    curve = Curve(folder / "curve.jsonl", start)
    saved = time.monotonic()
    began = saved - curve.seconds_before
    console = console or Console(stderr=True)
    with _progress(console) as progress, _finishing_the_step() as interrupted:
        task = progress.add_task(name, total=steps, completed=start, loss=float("nan"))
        for step in range(start, steps):
            metrics = learner.step(batch_at(step))
            done = step + 1
            curve.append({"step": step, "seconds": time.monotonic() - began, **metrics})
            progress.update(task, completed=done, loss=metrics["loss"])
            if not console.is_terminal and (done % LINE_EVERY_STEPS == 0 or done == steps):
                seconds = time.monotonic() - began
                console.print(f"{name}: step {done}/{steps}, loss {metrics['loss']:.4f}, {seconds:.0f} s")
            if done == steps or interrupted.is_set() or time.monotonic() - saved > SAVE_EVERY_SECONDS:
                _save(folder / "checkpoint.pt", learner, done)
                saved = time.monotonic()
            if interrupted.is_set():
                raise KeyboardInterrupt
            if every and (done % every[0] == 0 or done == steps):
                every[1](done)


@contextmanager
def _finishing_the_step() -> Iterator[threading.Event]:
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


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
    )


def _save(path: Path, learner: Learner[Any], step: int) -> None:
    """Write the checkpoint whole or not at all."""
    temporary = path.with_suffix(".tmp")
    torch.save({"step": step, "learner": learner.state_dict()}, temporary)
    temporary.replace(path)


def _restore(path: Path, learner: Learner[Any]) -> int:
    """Steps done so far."""
    if not path.exists():
        return 0
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    learner.load_state_dict(checkpoint["learner"])
    return int(checkpoint["step"])
