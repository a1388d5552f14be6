"""What a server makes of this machine: for one viewer, and for as many as it lets in.

    python benchmarks/serving.py --student assets/tiny-student --minutes 2 --json serving.json

Starts `reelway serve` on loopback, watches as a client does, ends it, and prints a table in Markdown; about six
minutes, of which `--minutes` are one viewer who watches. Frames come as H.264, encoded by the gateway. What is timed
here begins when a message is sent and ends when bytes have come back.
"""

import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from serving_schedule import medians, ratio, serve_at_full_speed
from serving_server import Server
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from reelway.actors.generator import Student
from reelway.pipelines.serve.load import make_crew, make_report, quantiles, stream_address, watch_all
from reelway.pipelines.serve.protocol import FRAGMENT, PATH, SUBPROTOCOL, unpack
from reelway.pipelines.serve.viewers import Plan, Viewer, frames_in

PROMPTS: Final = (
    "a large red circle circling fast on black",
    "a big yellow star bouncing slowly on navy",
    "a large cyan square circling fast on white",
    "a small red star drifts left",
)
STARTS: Final = 10  # streams whose first frames are timed
SWITCHES: Final = 8
WARM_SECONDS: Final = 6.0  # of a stream before it is counted: its window has to be full
PATIENCE: Final = 120.0
EAGER: Final = 1e6  # seconds of lead: media goes out as soon as it is made


@dataclass(frozen=True)
class Figure:
    """A measured value beside its target."""

    name: str
    value: str
    target: str = ""
    met: bool | None = None


@dataclass
class Result:
    """What is printed, and everything that was measured."""

    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: str, target: str = "", met: bool | None = None) -> None:
        self.figures.append(Figure(name, value, target, met))
        print(f"{name}: {value}{f' (target {target})' if target else ''}", flush=True)


# --- A viewer of its own ---------------------------------------------------------------------------------------------


class Watch:
    """One stream, message by message. frames: that have come; chunk: the index of the last whole one."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self.frames, self.chunk = 0, -1

    async def say(self, **message: Any) -> None:
        await self._socket.send(json.dumps(message))

    async def until(self, wanted: Callable[[dict[str, Any] | None], bool]) -> dict[str, Any] | None:
        """Read on until a record is wanted; media that shows something counts as None."""
        async with asyncio.timeout(PATIENCE):
            while True:
                message = await self._socket.recv()
                record = None if isinstance(message, bytes) else json.loads(message)
                if isinstance(message, bytes):
                    kind, _, payload = unpack(message)
                    if kind != FRAGMENT:
                        continue
                    self.frames += frames_in(payload)
                elif record["type"] == "chunk":
                    self.chunk = record["index"]
                    await self.say(type="seen", frame=record["first"] + record["frames"])
                elif record["type"] in ("error", "busy"):
                    raise RuntimeError(f"the server refuses: {record}")
                if wanted(record):
                    return record

    async def chunks(self, until: int) -> None:
        await self.until(lambda _: self.chunk >= until)


@asynccontextmanager
async def watching(url: str, seed: int, **order: Any) -> AsyncIterator[Watch]:
    """A stream that was asked for."""
    address = url.replace("http", "ws", 1) + PATH
    async with connect(address, subprotocols=[SUBPROTOCOL], max_size=None, compression=None) as socket:  # type: ignore[list-item]
        watch = Watch(socket)
        await watch.say(type="start", version=1, prompt=PROMPTS[seed % len(PROMPTS)], seed=seed, **order)
        yield watch
        await watch.say(type="stop")


# --- What is measured ------------------------------------------------------------------------------------------------


async def first_frames(url: str, rate: float, result: Result) -> None:
    """From `start` to the first picture, one stream after the other."""
    seconds = []
    for seed in range(STARTS):
        async with connect(url.replace("http", "ws", 1) + PATH, subprotocols=[SUBPROTOCOL], compression=None) as socket:  # type: ignore[list-item]
            watch = Watch(socket)
            began = time.monotonic()
            await watch.say(type="start", version=1, prompt=PROMPTS[seed % len(PROMPTS)], seed=seed, frame_rate=rate)
            await watch.until(lambda record: record is None)
            seconds.append(time.monotonic() - began)
            await watch.say(type="stop")
        await asyncio.sleep(0.5)
    found = quantiles(seconds)
    result.details["first_frame"] = {**found, "all": seconds}
    result.add(
        f"first frame after the message, median and worst of {STARTS}",
        f"{found['p50']:.3f} and {found['max']:.3f} s",
        "0.5 s",
        max(seconds) <= 0.5,
    )


async def one_viewer(url: str, rate: float, minutes: float, result: Result) -> None:
    """A viewer at the playback's pace."""
    plan = Plan(stream_address(url), 60 * minutes, PROMPTS, frame_rate=rate)
    crew = make_crew(plan, 1, seed=1)
    await watch_all(crew, plan.seconds, lambda _: None)
    report = make_report(plan, crew, seed=1)
    result.details["one_viewer"] = report
    reached, chunks = report["frames_per_second"]["p50"] or 0.0, report["chunks"]
    name = f"one viewer for {minutes:g} min: frames per second"
    result.add(name, f"{reached:.2f}", f"{rate:g}", reached >= 0.99 * rate)
    result.add(
        f"chunks in time, of {chunks['count']}",
        f"{100 * (chunks['in_time'] or 0):.2f} %",
        "99 %",
        (chunks["in_time"] or 0) >= 0.99,
    )
    gap = report["chunk_gap"]
    if gap["count"]:
        result.add("gap between chunks, p50 / p95 / p99", f"{gap['p50']:.3f} / {gap['p95']:.3f} / {gap['p99']:.3f} s")


async def prompt_switches(url: str, rate: float, result: Result) -> None:
    """From a new prompt to the first frame under it: in blocks after the one that was being shown, and in seconds."""
    blocks, seconds, dice = [], [], random.Random(0)
    async with watching(url, 2, frame_rate=rate) as watch:
        await watch.chunks(2)
        for turn in range(SWITCHES):
            text, showing = (
                f"{PROMPTS[turn % len(PROMPTS)]} {'again ' * (turn // len(PROMPTS))}".strip(),
                watch.chunk + 1,
            )
            began = time.monotonic()
            await watch.say(type="prompt", text=text)
            shown = await watch.until(lambda record: record is not None and record["type"] == "prompt")
            assert shown is not None
            await watch.until(lambda record: record is None)
            seconds.append(time.monotonic() - began)
            blocks.append(shown["block"] - showing)
            await watch.chunks(watch.chunk + 2)
            await asyncio.sleep(dice.random() * 0.7)
    found = quantiles(seconds)
    result.details["prompt_switch"] = {"blocks": blocks, "seconds": {**found, "all": seconds}}
    result.add(
        f"new prompt to first changed frame, worst of {SWITCHES}: blocks", str(max(blocks)), "2", max(blocks) <= 2
    )
    result.add("new prompt to first changed frame, median and worst", f"{found['p50']:.3f} and {found['max']:.3f} s")


async def full_house(url: str, rate: float, hold: float, result: Result) -> None:
    """Viewers come one after the other until one has to wait; then all watch. At the end one leaves."""
    plan = Plan(stream_address(url), 3600.0, PROMPTS, frame_rate=rate)
    viewers: list[Viewer] = []
    tasks: list[asyncio.Task[None]] = []
    try:
        while not viewers or await _is_let_in(viewers[-1]):
            one = Viewer(plan, "steady", random.Random(len(viewers)))
            viewers.append(one)
            tasks.append(asyncio.create_task(one.run()))
        *inside, last = viewers
        if not inside:
            raise RuntimeError(f"not one viewer is let in: {last.ledger.refused or last.ledger.failures}")
        before = [(one.ledger.chunks, one.ledger.late_chunks) for one in inside]
        await asyncio.sleep(hold)
        after = [(one.ledger.chunks, one.ledger.late_chunks) for one in inside]
        asked = time.monotonic()
        state, refused = last.ledger.state, last.ledger.refused
        tasks[0].cancel()
        while not last.ledger.frames and time.monotonic() - asked < PATIENCE and state == "queued":
            await asyncio.sleep(0.05)
        moved_up, waited = last.ledger.frames > 0, time.monotonic() - asked
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    chunks = sum(one[0] for one in after) - sum(one[0] for one in before)
    late = sum(one[1] for one in after) - sum(one[1] for one in before)
    share = 1 - late / max(1, chunks)
    each = [1 - (b[1] - a[1]) / max(1, b[0] - a[0]) for a, b in zip(before, after, strict=True)]
    result.details["full_house"] = {
        "let_in": len(inside), "seconds": hold, "chunks": chunks, "late": late, "each_in_time": each,
        "one_more": state if refused is None else refused, "moved_up": moved_up, "moved_up_seconds": waited,
    }  # fmt: skip
    result.add("viewers let in at once", str(len(inside)), "what was measured")
    result.add(
        f"their chunks in time, {hold:.0f} s, all and the worst viewer's",
        f"{100 * share:.2f} and {100 * min(each):.2f} %",
        "99 %",
        share >= 0.99,
    )
    words = f"{state}, and let in {waited:.1f} s after another left" if moved_up else str(refused or state)
    result.add("one viewer more", words, "queued or refused", state == "queued" or refused is not None)


async def _is_let_in(viewer: Viewer) -> bool:
    """True once it plays; False where it has to wait, or is refused."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        ledger = viewer.ledger
        if ledger.chunks >= 2:
            return True
        waits = ledger.state == "queued" and time.monotonic() - ledger.asked > 3.0  # longer than a place takes
        if ledger.refused is not None or ledger.failures or waits:
            return False
        await asyncio.sleep(0.05)
    raise RuntimeError("a viewer neither plays nor waits")


# --- Against the bare loop -------------------------------------------------------------------------------------------


def bare_rate(student: Student, seconds: float) -> float:
    """Frames per second of one stream without any server."""
    with student.open(PROMPTS[0], 3) as stream:
        for _ in range(1 + student.settings.window // student.settings.block):
            stream.next_chunk()
        began, frames = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            frames += len(stream.next_chunk())
        return frames / (time.perf_counter() - began)


async def served_rate(url: str, rate: float, seconds: float) -> float:
    """Frames per second of one stream that is not paced, as they come out of the socket."""
    async with watching(url, 3, frame_rate=rate) as watch:
        warm = time.monotonic() + WARM_SECONDS
        await watch.until(lambda _: time.monotonic() > warm and watch.chunk >= 6)
        chunk = watch.chunk
        await watch.chunks(chunk + 1)  # counted from an edge to an edge
        began, frames = time.monotonic(), watch.frames
        while time.monotonic() - began < seconds:
            await watch.chunks(watch.chunk + 1)
        return (watch.frames - frames) / (time.monotonic() - began)


def overhead(url: str, folder: Path, threads: int, rate: float, seconds: float, result: Result) -> None:
    """In turns, so that a machine whose speed drifts does so for both."""
    torch.set_num_threads(threads)
    student = Student.from_pretrained(folder)
    bare, served = [], []
    for _ in range(3):
        bare.append(bare_rate(student, seconds / 3))
        served.append(asyncio.run(served_rate(url, rate, seconds / 3)))
    lost = 1 - statistics.median(served) / statistics.median(bare)
    result.details["overhead"] = {"bare": bare, "served": served, "lost": lost, "threads": threads}
    result.add("bare loop, frames per second, median of 3", f"{statistics.median(bare):.1f}")
    result.add("through the server, frames per second, median of 3", f"{statistics.median(served):.1f}")
    result.add("overhead of the server", f"{100 * lost:.1f} %", "15 %", lost <= 0.15)


def batching(folder: Path, threads: int, result: Result) -> None:
    """The scheduler alone, four streams, with batches and one by one, in turns."""
    torch.set_num_threads(threads)
    student = Student.from_pretrained(folder)
    ways: dict[str, list[Any]] = {"together": [], "one_by_one": []}
    for _ in range(3):
        for way, batch in (("together", 4), ("one_by_one", 1)):
            ways[way].append(serve_at_full_speed(student, 4, batch, 3, (None, None)))
    wall = medians(ways, "wall")
    result.details["batching"] = {"frames_per_second": wall, "ratio": ratio(wall)}
    words = f"{wall['together']:.1f} against {wall['one_by_one']:.1f} frames per second, ratio {ratio(wall)}"
    result.add("4 streams, batched against one by one", words)


def attempt(name: str, measure: Callable[[], None], result: Result) -> None:
    """What cannot be measured, for whatever reason, is told as missed; the other figures are not lost with it."""
    try:
        measure()
    except (RuntimeError, TimeoutError, ConnectionClosed, AssertionError) as error:
        result.add(name, f"not measured: {error or type(error).__name__}", "", False)


# --- The whole -------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def table(result: Result) -> str:
    marks = {None: "", True: "", False: ": missed"}
    rows = [f"| {row.name} | {row.value} | {row.target}{marks[row.met]} |" for row in result.figures]
    return "\n".join(["| what | measured | target |", "|---|---|---|", *rows])


def main(
    student: Annotated[Path, typer.Option(help="Student's folder.")] = Path("assets/tiny-student"),
    minutes: Annotated[float, typer.Option(min=0.1, help="That one viewer watches.")] = 2.0,
    hold: Annotated[float, typer.Option(min=5, help="Seconds that a full house watches.")] = 30.0,
    full_speed: Annotated[float, typer.Option(min=3, help="Seconds of each way of the overhead.")] = 24.0,
    frame_rate: Annotated[float, typer.Option(min=1, max=60, help="Of the playback; lower on a busy machine.")] = 16.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the worker; all cores but the gateway's by default.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--json", help="Also write all figures here.")] = None,
) -> None:
    """Measure, print a table, and write the figures."""
    threads = threads or max(1, (os.cpu_count() or 1) - 1)  # as `reelway serve` has it
    model = {"path": str(student.absolute()), "threads": threads, "cpus": float(threads)}
    result = Result(
        details={
            "machine": machine(),
            "student": str(student),
            "minutes": minutes,
            "frame_rate": frame_rate,
            "threads": threads,
        }
    )
    with Server({"models": {"student": model}}) as server:
        result.add("from the command to the open page", f"{server.starting:.1f} s")
        attempt("first frame", lambda: asyncio.run(first_frames(server.url, frame_rate, result)), result)
        attempt("one viewer", lambda: asyncio.run(one_viewer(server.url, frame_rate, minutes, result)), result)
        attempt("new prompts", lambda: asyncio.run(prompt_switches(server.url, frame_rate, result)), result)
        attempt("full house", lambda: asyncio.run(full_house(server.url, frame_rate, hold, result)), result)
        result.details["status"] = server.status()
    with Server({"models": {"student": {**model, "load": 1.0}}, "lead_seconds": EAGER}) as server:
        attempt("overhead", lambda: overhead(server.url, student, threads, frame_rate, full_speed, result), result)
    attempt("batching", lambda: batching(student, threads, result), result)
    print(f"\n{table(result)}")
    if report is not None:
        details = result.details | {"figures": [asdict(figure) for figure in result.figures]}
        report.write_text(json.dumps(details, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
