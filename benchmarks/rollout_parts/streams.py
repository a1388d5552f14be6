"""Long streams: drift second by second, memory, speed. They are made in a process of their own, by the batch, and can
be stopped: the same command goes on from the last snapshot."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from reelway.actors.generator import Student
from reelway.actors.streams import Snapshot, Stream
from reelway.kernels.clips import Pixels
from reelway.kernels.metrics.measures import slope_per_second
from reelway.kernels.sprites.fidelity import curve
from reelway.kernels.sprites.oracle import grade
from reelway.pipelines.training import write_json
from reelway.pipelines.video import VideoWriter

from .chart import draw_streams
from .common import FRAME_RATE, Bench, Figure, Ledger, Result, Row, Shown, plain, ratio_of_means, singles, told

END = 10  # seconds at the two ends that are held against each other
NOTED = 10  # seconds of video between two notes of the memory
KEPT = 60  # seconds of video between two snapshots
STEADY = 10e6  # bytes that the memory may grow by
WRITTEN = 256  # frames that are put into an .mp4 at once
MADE, MEMORY, STATE = "made", "memory.jsonl", "state.json"


@dataclass(frozen=True)
class Work:
    """What the process is to make: streams of so many frames, `folder/<index>.rgb`."""

    student: Path
    folder: Path
    prompts: tuple[str, ...]
    seed: int
    size: int
    frames: int
    threads: int


def stream(bench: Bench) -> Result:
    """Some streams at once, for minutes."""
    return _long(bench, "stream", bench.minutes, bench.streams)


def hour(bench: Bench) -> Result:
    """One stream, for an hour."""
    return _long(bench, "hour", 60.0, 1)


def _long(bench: Bench, section: str, minutes: float, streams: int) -> Result:
    frames, shown = round(60 * minutes * FRAME_RATE), singles(bench, streams)
    ledger = bench.ledger(section, frames=frames, streams=streams)
    work = Work(
        bench.student,
        bench.out / section / MADE,
        tuple(each.caption for each in shown),
        bench.seed,
        bench.size,
        frames,
        bench.threads,
    )
    speed = ledger.row("made", partial(_make, work, ledger))
    rows = [ledger.row(f"stream-{at}", partial(_grade, bench, work, at, each)) for at, each in enumerate(shown)]
    shutil.rmtree(work.folder, ignore_errors=True)
    draw_streams(bench.out / f"{section}.png", rows, speed["notes"])
    return _figures(minutes, rows, speed)


# --- Making ------------------------------------------------------------------------------------------------------


def _make(work: Work, ledger: Ledger) -> Row:
    """Run the process to its end; its figures of speed and memory."""
    work.folder.mkdir(parents=True, exist_ok=True)
    mark = work.folder / "print.json"
    if not mark.is_file() or json.loads(mark.read_text())["print"] != ledger.print:
        shutil.rmtree(work.folder)
        work.folder.mkdir()
        write_json(mark, {"print": ledger.print})
    process = multiprocessing.get_context("spawn").Process(target=make_streams, args=(work,))
    process.start()
    try:
        process.join()
    finally:
        process.terminate()
        process.join()
    if process.exitcode:
        raise RuntimeError(f"{work.folder}: the process that makes the streams ended with {process.exitcode}")
    notes = [json.loads(line) for line in (work.folder / MEMORY).read_text().splitlines()]
    return {"notes": notes, **_pace(notes, len(work.prompts))}


def _pace(notes: list[Row], streams: int) -> Row:
    """Of the process that made them: frames come in time, and how much memory there was."""
    chunks = [seconds for note in notes for seconds in note["chunks"]]
    rate = sum(note["frames"] for note in notes) / sum(chunks)
    return {
        "frames_per_second": rate,
        "frames_per_second_of_all": rate * streams,
        "chunk_seconds": np.quantile(chunks, (0.5, 0.95, 0.99)).tolist(),
        "longest_chunk": max(chunks),
        "runs": len({note["run"] for note in notes}),
    }


def make_streams(work: Work) -> None:
    """In a process of its own: all streams in one batch, each to a file of raw frames, with a snapshot now and then.

    The one that waits ends it after Ctrl-C; where that one was killed, it ends by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    waiting = os.getppid()
    torch.set_num_threads(work.threads)
    student = Student.from_pretrained(work.student)
    with ExitStack() as files:
        done, run, streams = _begin(student, work)
        targets = [files.enter_context(_opened(work, at, done)) for at in range(len(streams))]
        notes = files.enter_context((work.folder / MEMORY).open("a", buffering=1))
        chunks: list[float] = []
        frames = 0
        while done < work.frames:
            if os.getppid() != waiting:
                sys.exit(1)
            began = time.perf_counter()
            made = student.step(streams)
            chunks.append(time.perf_counter() - began)
            for target, chunk in zip(targets, made, strict=True):
                target.write(chunk.tobytes())
            before, done, frames = done, done + len(made[0]), frames + len(made[0])
            if _passed(before, done, NOTED) or done >= work.frames:
                note = {"seconds": done / FRAME_RATE, "frames": frames, "resident": _resident(), "chunks": chunks}
                notes.write(json.dumps({**note, "run": run}) + "\n")
                chunks, frames = [], 0
            if _passed(before, done, KEPT):
                _keep(work, streams, targets, done, run)


def _passed(before: int, done: int, seconds: int) -> bool:
    return before // (seconds * FRAME_RATE) < done // (seconds * FRAME_RATE)


def _begin(student: Student, work: Work) -> tuple[int, int, list[Stream]]:
    """Frames that are there, the number of this run, and the streams that go on from them."""
    state, memory = work.folder / STATE, work.folder / MEMORY
    if not state.is_file():
        memory.unlink(missing_ok=True)
        size = {"height": work.size, "width": work.size}
        return 0, 0, [student.open(prompt, work.seed, **size) for prompt in work.prompts]
    kept = json.loads(state.read_text())
    notes = [json.loads(line) for line in memory.read_text().splitlines()]
    sound = [note for note in notes if round(note["seconds"] * FRAME_RATE) <= kept["frames"]]
    memory.write_text("".join(json.dumps(note) + "\n" for note in sound))
    snapshots = [Snapshot.read(work.folder / kept["name"] / f"{at}.safetensors") for at in range(len(work.prompts))]
    return kept["frames"], kept["run"] + 1, [student.restore(snapshot) for snapshot in snapshots]


def _opened(work: Work, at: int, frames: int) -> BinaryIO:
    """The file of a stream's raw frames, cut to those that count."""
    path = work.folder / f"{at}.rgb"
    path.touch()
    file = path.open("r+b")
    file.truncate(frames * 3 * work.size**2)
    file.seek(0, os.SEEK_END)
    return file


def _keep(work: Work, streams: list[Stream], targets: list[BinaryIO], done: int, run: int) -> None:
    """Snapshots of all streams; then the note that says that they are there; then the ones before go."""
    folder = work.folder / f"at-{done}"
    folder.mkdir(exist_ok=True)
    for at, (stream, target) in enumerate(zip(streams, targets, strict=True)):
        target.flush()
        stream.snapshot().write(folder / f"{at}.safetensors")
    write_json(work.folder / STATE, {"frames": done, "run": run, "name": folder.name})
    for other in work.folder.glob("at-*"):
        if other != folder:
            shutil.rmtree(other)


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- Judging -----------------------------------------------------------------------------------------------------


def _grade(bench: Bench, work: Work, at: int, shown: Shown) -> Row:
    """The oracle's total second by second and of the two ends, each as a clip of its own; and the video as a file."""
    path = work.folder / f"{at}.rgb"
    video: Pixels = np.memmap(path, np.uint8, "r").reshape(-1, work.size, work.size, 3)[: work.frames]
    asked = replace(shown.scene, relation=None)
    length = min(END * FRAME_RATE, len(video) // 2)
    first = grade(video[:length], asked, level=bench.level)
    last = grade(video[-length:], asked, level=bench.level, may_have_left=True)
    seconds = track(
        _seconds(video), f"stream {at}: grading", len(video) // FRAME_RATE, transient=True, console=Console(stderr=True)
    )
    points = curve(seconds, shown.scene, 1.0, level=bench.level)
    target = bench.out / work.folder.parent.name / f"stream-{at}.mp4"
    with VideoWriter(target, FRAME_RATE) as writer:
        for begin in range(0, len(video), WRITTEN):
            writer.write(np.asarray(video[begin : begin + WRITTEN]))
    return {
        "caption": shown.caption,
        "seconds": len(video) / FRAME_RATE,
        "first": {"total": first.total, "semantic": first.semantic, **first.scores},
        "last": {"total": last.total, "semantic": last.semantic, **last.scores},
        "total": [point.grade.total for point in points],
        "semantic": [point.grade.semantic for point in points],
        "video": target.relative_to(bench.out).as_posix(),
    }


def _seconds(video: Pixels) -> Iterator[Pixels]:
    for begin in range(0, len(video) - FRAME_RATE + 1, FRAME_RATE):
        yield np.asarray(video[begin : begin + FRAME_RATE])


def _figures(minutes: float, rows: list[Row], made: Row) -> Result:
    ratio = ratio_of_means([(row["first"]["total"], row["last"]["total"]) for row in rows])
    semantic = ratio_of_means([(row["first"]["semantic"], row["last"]["semantic"]) for row in rows])
    curves = np.array([row["total"] for row in rows])
    mean = curves.mean(axis=0)
    slope = slope_per_second(mean.astype(np.float32), 1.0) * len(mean)
    growth, resident = _growth(made["notes"])
    many = f"{len(rows)} stream{'s' if len(rows) > 1 else ''} of {minutes:g} min"
    wait = made["chunk_seconds"]
    figures = [
        Figure(
            f"Total of the last {END} s over that of the first {END} s, {many}",
            f"{told(ratio)}; Semantic {told(semantic)}",
            ">= 0.95",
            ratio.mean >= 0.95,
        ),
        Figure(
            "drift curve of Total, second by second",
            f"straight line through it: {slope:+.3f} from end to end; seconds between {mean.min():.3f} and "
            f"{mean.max():.3f}, at the start {mean[0]:.3f}",
            "flat",
        ),
        Figure(
            "memory of the process, last tenth less second tenth of the time",
            f"{growth / 1e6:+.1f} MB of {resident / 1e6:.0f} MB",
            f"within {STEADY / 1e6:.0f} MB",
            abs(growth) <= STEADY,
        ),
        Figure(
            "speed, VAE decoding in, all streams in one batch",
            f"{made['frames_per_second']:.1f} frames per second each, {made['frames_per_second_of_all']:.1f} together; "
            f"a chunk takes {wait[0]:.3f} / {wait[1]:.3f} / {wait[2]:.3f} s (p50 / p95 / p99)",
        ),
    ]
    details = {"ratio": plain(ratio), "semantic_ratio": plain(semantic), "slope": slope, "growth": growth}
    return Result(figures, {**details, "made": made, "streams": rows})


def _growth(notes: list[Row]) -> tuple[float, float]:
    """By how many bytes the memory of the last run grew after its first tenth, and what it was at the end."""
    held = [note["resident"] for note in notes if note["run"] == notes[-1]["run"]]
    tenth = max(1, len(held) // 10)
    return float(np.median(held[-tenth:]) - np.median(held[tenth : 2 * tenth] or held)), float(held[-1])
