"""Everything that rollouts must show, measured on a teacher and its student: a table, its data, and the videos.

    python benchmarks/rollouts.py --teacher assets/tiny --student assets/tiny-student --out runs/rollouts
    python benchmarks/rollouts.py --section switches --section video --cases 20 --out runs/rollouts

Sections, and the minutes they take on two idle cores with the tiny models (40 cases, 4 streams of 10 minutes):

    speed     2   student against teacher in one run; real time
    switches  2   prompt switches: seen within two blocks, without a flash
    image     2   image to video: subject consistency against text to video
    video     4   video to video: motion kept, colour taken, speed and latency, at four noise levels
    seams     3   change at block edges against change inside blocks
    stream   12   streams of --minutes: drift, memory, speed
    hour     17   the same for one stream of an hour; only where it is asked for

Stop it at any time: the same command goes on. What is done is kept in OUT, a row a file, and made again only for
another model, world or judge. OUT/rollouts.json and OUT/rollouts.md hold the sections that are done, also those of
earlier runs. For figures of speed leave the machine alone meanwhile.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rollout_parts.common import Bench, Result
from rollout_parts.edges import seams
from rollout_parts.speed import speed
from rollout_parts.starts import image, video
from rollout_parts.streams import hour, stream
from rollout_parts.switches import switches

from reelway.actors.bench_device import describe_device, versions
from reelway.actors.model_files import check_model
from reelway.kernels.causal.student import StudentSettings
from reelway.pipelines.training import write_json

SECTIONS: dict[str, Callable[[Bench], Result]] = {
    "speed": speed,
    "switches": switches,
    "image": image,
    "video": video,
    "seams": seams,
    "stream": stream,
    "hour": hour,
}
USUAL = tuple(name for name in SECTIONS if name != "hour")


def main(
    out: Annotated[Path, typer.Option(help="Folder of all that is made.")],
    teacher: Annotated[Path, typer.Option(help="The teacher's folder.")] = Path("assets/tiny"),
    student: Annotated[Path, typer.Option(help="The student's folder.")] = Path("assets/tiny-student"),
    section: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SECTIONS)}; all but hour if none.")] = None,
    cases: Annotated[int, typer.Option(min=2, help="Of the sections that count cases.")] = 40,
    minutes: Annotated[float, typer.Option(min=0.1, help="Length of the streams.")] = 10.0,
    streams: Annotated[int, typer.Option(min=1, help="How many of them, in one batch.")] = 4,
    seed: Annotated[int, typer.Option(help="Of scenes and noise.")] = 0,
    level: Annotated[int, typer.Option(min=0, max=3, help="Of the sprites world.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; all cores by default.")] = None,
) -> None:
    """Measure the sections and print the table."""
    wanted = tuple(section or USUAL)
    unknown = [name for name in wanted if name not in SECTIONS]
    if unknown:
        raise typer.BadParameter(f"must be of {', '.join(SECTIONS)}, got {unknown[0]}", param_hint="--section")
    for folder in (teacher, student):
        check_model(folder)
    size = StudentSettings.read(student).height or 64
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    bench = Bench(
        teacher.absolute(), student.absolute(), out.absolute(), cases, seed, level, size, threads, minutes, streams
    )
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    for name in (name for name in SECTIONS if name in wanted):
        began, load = time.monotonic(), os.getloadavg()[0]
        console.print(f"{name} ...")
        result = SECTIONS[name](bench)
        spent = time.monotonic() - began
        _keep(bench, name, result, {"seconds": spent, "load_before": load})
        console.print(f"{name}: {spent:.0f} s")
    _show(bench)


def _keep(bench: Bench, name: str, result: Result, run: dict[str, Any]) -> None:
    """Put a section into rollouts.json, and write the table anew. `seconds` are of this run: 0 where all was there."""
    path = bench.out / "rollouts.json"
    report = json.loads(path.read_text()) if path.is_file() else {"sections": {}}
    report["sections"][name] = {
        "figures": [asdict(figure) for figure in result.figures],
        "setting": {"models": bench.prints, "cases": bench.cases, "minutes": bench.minutes, "streams": bench.streams},
        "device": describe_device(torch.device("cpu")),
        "versions": versions(),
        **run,
        "details": result.details,
    }
    write_json(path, report)
    (bench.out / "rollouts.md").write_text(_markdown(report))


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    words = {None: "", True: "yes", False: "no"}
    return [
        (name, figure["name"], figure["value"], figure["target"], words[figure["met"]])
        for name in SECTIONS
        if name in report["sections"]
        for figure in report["sections"][name]["figures"]
    ]


def _markdown(report: dict[str, Any]) -> str:
    """The table for docs/performance.md."""
    lines = ["| | what | measured | target | met |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in _rows(report)]
    return "\n".join(lines) + "\n"


def _show(bench: Bench) -> None:
    table = Table("section", "what", "measured", "target", "met", title="rollouts")
    for row in _rows(json.loads((bench.out / "rollouts.json").read_text())):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    typer.echo(f"{bench.out / 'rollouts.json'}, {bench.out / 'rollouts.md'}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"rollouts: {error}", err=True)
        sys.exit(2)
