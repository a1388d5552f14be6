"""The training loop of every pretraining stage: progress, curve, checkpoints, resume."""

import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console

from ..telemetry import LINE_EVERY_STEPS, Curve, finishing_the_step, progress_bar, read_curve

__all__ = ["Curve", "read_curve", "train"]

SAVE_EVERY_SECONDS = 120.0

Batch = TypeVar("Batch", contravariant=True)


class Learner(Protocol[Batch]):
    def step(self, batch: Batch) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def train(
    name: str,
    folder: Path,
    learner: Learner[Any],
    batch_at: Callable[[int], Any],
    steps: int,
    *,
    every: tuple[int, Callable[[int], None]] | None = None,
    ahead: bool = False,
    console: Console | None = None,
) -> None:
    """Run `steps` updates in `folder`, going on from its checkpoint.

    batch_at: the batch of a step, a function of the step alone, so that a resumed run sees what it would have seen.
    every: (N, report): `report(step)` is called after every N steps and after the last.
    ahead: make the next batch while a step runs, in a thread; not for batches that change what a checkpoint holds.
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
    reported = {step for step in range(start, steps) if every and ((step + 1) % every[0] == 0 or step + 1 == steps)}
    plain = set(range(start, steps)) if not ahead else reported
    batches = _ahead(batch_at, range(start, steps), plain)
    with closing(batches), progress_bar(console) as progress, finishing_the_step() as interrupted:
        task = progress.add_task(name, total=steps, completed=start, loss=curve.loss_before)
        for step, batch in zip(range(start, steps), batches, strict=True):
            metrics = learner.step(batch)
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
            if every and step in reported:
                every[1](done)


def _ahead(batch_at: Callable[[int], Any], steps: range, alone: set[int]) -> Generator[Any]:
    """The batches of these steps, each made by a thread while the learner is busy with the one before.

    alone: steps beside which nothing is made. Reports tokenize, and a tokenizer serves one thread at a time.
    """
    with ThreadPoolExecutor(1) as thread:
        coming: Future[Any] | None = None
        for step in steps:
            batch = batch_at(step) if coming is None else coming.result()
            has_next = step + 1 < steps.stop and step not in alone
            coming = thread.submit(batch_at, step + 1) if has_next else None
            yield batch


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
