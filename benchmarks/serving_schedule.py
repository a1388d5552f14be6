"""What batching gives a worker of the pool: streams served together against the same streams served one by one.

    python benchmarks/serving_schedule.py --student assets/tiny-student --streams 4 --json schedule.json

Both ways run the scheduler on the same streams, in this process and in turns, on warmed-up windows; only the largest
batch differs. Counted are the frames of all streams, decoding included, per second, and per second of computing, which
on the CPU says the same on a machine that is busy with other things.
"""

import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from reelway.actors.generator import Student
from reelway.actors.orders import StreamOrder
from reelway.actors.scheduler import Scheduler

PROMPT = "a small red star drifts left"


@dataclass(frozen=True)
class Speed:
    """Frames of all streams per second on the wall's clock, and per second of this process's computing."""

    wall: float
    cpu: float


def main(
    student: Annotated[Path, typer.Option(help="Student's folder.")] = Path("assets/tiny-student"),
    streams: Annotated[int, typer.Option(min=2, help="Served at once.")] = 4,
    chunks: Annotated[int, typer.Option(min=1, help="Timed per stream and turn.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way; the medians count.")] = 5,
    height: Annotated[int | None, typer.Option(help="Pixels; the student's own if not given.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the student's own if not given.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    report: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Print frames per second both ways, and their ratio."""
    torch.set_num_threads(threads)
    model = Student.from_pretrained(student, device)
    ways = {"together": streams, "one_by_one": 1}  # the largest batch
    speeds: dict[str, list[Speed]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, batch in ways.items():
            speeds[way].append(serve_at_full_speed(model, streams, batch, chunks, (height, width)))
    figures: dict[str, Any] = {
        "frames_per_second": medians(speeds, "wall"),
        "frames_per_cpu_second": medians(speeds, "cpu"),
        "ratio": ratio(medians(speeds, "wall")),
        "ratio_of_cpu_time": ratio(medians(speeds, "cpu")),
        "all": {way: [asdict(speed) for speed in each] for way, each in speeds.items()},
        "streams": streams,
        "chunks": chunks,
        "size": [height or model.default_size[0], width or model.default_size[1]],
        "block": model.settings.block,
        "window": model.settings.window,
        "sink": model.settings.sink,
        "steps": len(model.settings.timesteps),
        "dtype": str(model.dtype),
        "device": str(model.device),
        "threads": threads,
        "machine": platform.platform(),
        "torch": torch.__version__,
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if report is not None:
        report.write_text(text + "\n")


def medians(speeds: dict[str, list[Speed]], clock: str) -> dict[str, float]:
    return {way: statistics.median(asdict(speed)[clock] for speed in each) for way, each in speeds.items()}


def ratio(speeds: dict[str, float]) -> float:
    return round(speeds["together"] / speeds["one_by_one"], 3)


def serve_at_full_speed(
    model: Student, streams: int, batch: int, chunks: int, size: tuple[int | None, int | None]
) -> Speed:
    """Streams without deadlines, as fast as they can be made, once all windows are full."""
    scheduler = Scheduler(model, batch=batch)
    names = [str(number) for number in range(streams)]
    for seed, name in enumerate(names):
        scheduler.open(StreamOrder(name, PROMPT, seed, *size, frame_rate=None))
    places = dict.fromkeys(names, 0)
    warm = 1 + model.settings.window // model.settings.block
    serve(scheduler, places, warm)
    began, cpu, before = time.perf_counter(), time.process_time(), sum(places.values())
    serve(scheduler, places, warm + chunks)
    wall, cpu, made = time.perf_counter() - began, time.process_time() - cpu, sum(places.values()) - before
    for name in names:
        scheduler.close_stream(name)
    return Speed(round(made / wall, 3), round(made / cpu, 3))


def serve(scheduler: Scheduler, places: dict[str, int], chunks: int) -> None:
    """Work, and take what comes, until each stream has so many chunks. places: next frame of each, which move on."""
    done = dict.fromkeys(places, False)
    while not all(done.values()):
        scheduler.tick()
        for name, frame in places.items():
            for piece in scheduler.take(name, frame).pieces:
                places[name] = piece.end
                done[name] |= piece.ends_chunk and piece.chunk + 1 >= chunks


if __name__ == "__main__":
    typer.run(main)
