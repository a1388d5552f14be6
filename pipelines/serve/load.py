"""`reelway load`: many viewers of a server, and what they saw."""

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit, urlunsplit

import typer
from rich.console import Console
from rich.table import Table

from .protocol import PATH
from .viewers import Kind, Ledger, Plan, Troll, Viewer

PROGRESS_SECONDS: Final = 10.0  # between two lines where no terminal shows one that changes
GRACE: Final = 10.0  # seconds after the end for viewers to say goodbye
REPORT_VERSION: Final = 1
QUANTILES: Final = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
SCHEMES: Final = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}

Report = dict[str, Any]
app = typer.Typer(add_completion=False)


@app.command()
def load(
    url: Annotated[str, typer.Argument(help="Of the server: ws://host:port, or http://host:port.")],
    viewers: Annotated[int, typer.Option(min=1, help="How many, of all kinds.")] = 4,
    seconds: Annotated[float, typer.Option(min=1, help="How long.")] = 60.0,
    prompt_switch_every: Annotated[float, typer.Option(min=0, help="Seconds between new prompts; 0: none.")] = 10.0,
    slow: Annotated[int, typer.Option(min=0, help="Of the viewers, so many read far too slowly.")] = 0,
    vanish: Annotated[int, typer.Option(min=0, help="So many cut their socket without a word, and come back.")] = 0,
    garbage: Annotated[int, typer.Option(min=0, help="So many send what no server wants.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the streams, the prompts and the moments.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the server has several.")] = None,
    key: Annotated[str | None, typer.Option(envvar="REELWAY_KEY", help="The server's access key.")] = None,
    media: Annotated[str, typer.Option(help="mp4 or jpeg.")] = "mp4",
    frame_rate: Annotated[float, typer.Option(min=1, max=60, help="Frames per second of the playback.")] = 16.0,
    start_buffer: Annotated[float, typer.Option(min=0, help="Seconds between first frame and playing.")] = 0.25,
    ramp: Annotated[float, typer.Option(min=0, help="Seconds over which the viewers come.")] = 1.0,
    prompts: Annotated[Path | None, typer.Option(help="A text file, one prompt per line; else of the sprites.")] = None,
) -> None:
    """Open streams and watch them in real time; print and write what the viewers saw.

    A viewer begins to play some time after its first frame and then needs each frame at its moment: a piece that comes
    later counts as late, and the viewer's clock waits for it. Slow, vanishing and garbage viewers are there for the
    others' sake: gaps and deadlines are those of the steady ones. Exit code 1 if a frame was lost or came twice.
    """
    if slow + vanish + garbage > viewers:
        raise ValueError(f"--viewers: {viewers} cannot be {slow} slow, {vanish} vanishing and {garbage} with garbage")
    if media not in ("mp4", "jpeg"):
        raise ValueError(f"--media: must be mp4 or jpeg, got {media!r}")
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json: no such folder: {json_path.absolute().parent}")
    plan = Plan(
        url=stream_address(url),
        seconds=seconds,
        prompts=_read_prompts(prompts, seed),
        switch_every=prompt_switch_every,
        media=media,
        frame_rate=frame_rate,
        start_buffer=start_buffer,
        model=model,
        key=key,
    )
    crew = make_crew(plan, viewers, slow=slow, vanish=vanish, garbage=garbage, seed=seed, ramp=ramp)
    interrupted = _watch(crew, seconds)
    report = make_report(plan, crew, seed=seed, interrupted=interrupted)
    _finish(report, crew, json_path, interrupted)


def stream_address(url: str) -> str:
    """The address of a server's streams. ValueError unless it is one of ws, wss, http, https with a host."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise ValueError(f"{url}: must be the address of a server, as ws://127.0.0.1:8000")
    path = parts.path if parts.path.endswith(PATH) else parts.path.rstrip("/") + PATH
    return urlunsplit((SCHEMES[parts.scheme], parts.netloc, path, "", ""))


def _read_prompts(path: Path | None, seed: int) -> tuple[str, ...]:
    if path is None:
        from ...kernels.sprites.splits import prompts

        return tuple(text for text, _ in prompts("validation", 64, seed))
    if not path.is_file():
        raise FileNotFoundError(f"--prompts: no such file: {path}")
    lines = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    if not lines:
        raise ValueError(f"--prompts: no prompt in {path}")
    return lines


# --- The run -----------------------------------------------------------------------------------------------------


def make_crew(
    plan: Plan, viewers: int, *, slow: int = 0, vanish: int = 0, garbage: int = 0, seed: int = 0, ramp: float = 0.0
) -> list[Viewer | Troll]:
    """Viewers with seeds of their own, spread over `ramp` seconds; the kinds are mixed by the seed."""
    steady = viewers - slow - vanish - garbage
    kinds: list[Kind] = ["slow"] * slow + ["vanishing"] * vanish + ["garbage"] * garbage + ["steady"] * steady
    random.Random(f"kinds {seed}").shuffle(kinds)
    crew: list[Viewer | Troll] = []
    for index, kind in enumerate(kinds):
        dice = random.Random(f"viewer {seed} {index}")
        delay = ramp * index / viewers
        crew.append(Troll(plan, dice, delay) if kind == "garbage" else Viewer(plan, kind, dice, delay))
    return crew


def _watch(crew: list[Viewer | Troll], seconds: float) -> bool:
    """Let them all watch. True if the user ended it before its time."""
    try:
        asyncio.run(watch_all(crew, seconds, _progress(crew, seconds)))
    except KeyboardInterrupt:
        return True
    return False


async def watch_all(crew: list[Viewer | Troll], seconds: float, tell: Callable[[float], None]) -> None:
    """tell(seconds since the beginning) is called twice a second."""
    began = time.monotonic()
    work = {asyncio.ensure_future(one.run()) for one in crew}
    try:
        pending = work
        while pending and time.monotonic() - began < seconds + GRACE:
            done, pending = await asyncio.wait(pending, timeout=0.5)
            for one in done:
                one.result()
            tell(time.monotonic() - began)
    finally:
        for one in work:
            one.cancel()
        await asyncio.gather(*work, return_exceptions=True)


def _progress(crew: list[Viewer | Troll], seconds: float) -> Callable[[float], None]:
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    last = 0.0

    def tell(passed: float) -> None:
        nonlocal last
        if console.is_terminal:
            sys.stderr.write(f"\r\x1b[K{_line(crew, passed, seconds)}")
            sys.stderr.flush()
        elif passed - last >= PROGRESS_SECONDS:
            last = passed
            console.print(_line(crew, passed, seconds))

    return tell


def _line(crew: list[Viewer | Troll], passed: float, seconds: float) -> str:
    ledgers = [one.ledger for one in crew if isinstance(one, Viewer)]
    now = time.monotonic()
    playing = [ledger for ledger in ledgers if ledger.state == "playing"]
    queued = sum(ledger.state == "queued" for ledger in ledgers)
    rates = [ledger.rate(now) for ledger in playing]
    pieces, late = sum(ledger.pieces for ledger in ledgers), sum(ledger.late for ledger in ledgers)
    each = f"{sum(rates) / len(rates):.1f} fps each, " if rates else ""
    in_time = f"{100 * (1 - late / pieces):.1f} % in time" if pieces else "nothing yet"
    return (
        f"load: {min(passed, seconds):.0f} of {seconds:.0f} s, {len(playing)} playing, {queued} queued, {each}{in_time}"
    )


# --- The report --------------------------------------------------------------------------------------------------


def make_report(plan: Plan, crew: list[Viewer | Troll], *, seed: int, interrupted: bool = False) -> Report:
    """What the viewers saw. Times are in seconds."""
    ledgers = [one.ledger for one in crew if isinstance(one, Viewer)]
    steady = [ledger for ledger in ledgers if ledger.kind == "steady"]
    kinds = [one.ledger.kind if isinstance(one, Viewer) else "garbage" for one in crew]
    return {
        "version": REPORT_VERSION,
        "url": plan.url,
        "viewers": {kind: kinds.count(kind) for kind in ("steady", "slow", "vanishing", "garbage")},
        "seconds": plan.seconds,
        "prompt_switch_every": plan.switch_every,
        "frame_rate": plan.frame_rate,
        "start_buffer": plan.start_buffer,
        "media": plan.media,
        "seed": seed,
        "interrupted": interrupted,
        "time_to_first_frame": quantiles([ledger.first for ledger in ledgers if ledger.first is not None]),
        "chunk_gap": quantiles([gap for ledger in steady for gap in ledger.gaps]),
        "chunks": _share(sum(ledger.chunks for ledger in steady), sum(ledger.late_chunks for ledger in steady)),
        "pieces": _share(sum(ledger.pieces for ledger in steady), sum(ledger.late for ledger in steady)),
        "stalled_seconds": sum(ledger.stalled for ledger in steady),
        "prompt_to_frame": quantiles([taken for ledger in steady for taken in ledger.switches]),
        "frames": {
            "received": sum(ledger.frames for ledger in ledgers),
            "lost": sum(ledger.lost for ledger in ledgers),
            "doubled": sum(ledger.doubled for ledger in ledgers),
        },
        "frames_per_second": quantiles([ledger.rate() for ledger in steady if ledger.frames]),
        "queued": quantiles([ledger.waited for ledger in ledgers if ledger.waited is not None]),
        "refused": [ledger.refused for ledger in ledgers if ledger.refused is not None],
        "reconnects": quantiles([taken for ledger in ledgers for taken in ledger.returns]),
        "failures": [failure for ledger in ledgers for failure in ledger.failures],
        "garbage": _garbage([one for one in crew if isinstance(one, Troll)]),
        "each": [_one(ledger) for ledger in ledgers],
    }


def quantiles(values: list[float]) -> dict[str, float | int | None]:
    """Nearest-rank quantiles, the largest, and of how many."""
    ordered = sorted(values)
    ranks = {name: max(0, -int(-share * len(ordered) // 1) - 1) for name, share in QUANTILES.items()}
    found = {name: ordered[rank] if ordered else None for name, rank in ranks.items()}
    return {"count": len(ordered), **found, "max": ordered[-1] if ordered else None}


def _share(count: int, late: int) -> Report:
    return {"count": count, "late": late, "in_time": 1 - late / count if count else None}


def _garbage(trolls: list[Troll]) -> Report:
    return {
        "sent": sum(troll.sent for troll in trolls),
        "answered": sum(troll.answered for troll in trolls),
        "unanswered": [name for troll in trolls for name in troll.unanswered],
    }


def _one(ledger: Ledger) -> Report:
    return {
        "kind": ledger.kind,
        "stream": ledger.stream,
        "first_frame": ledger.first,
        "frames": ledger.frames,
        "frames_per_second": ledger.rate(),
        "late": ledger.late,
        "reconnects": len(ledger.returns),
        "lost": ledger.lost,
        "doubled": ledger.doubled,
    }


def _finish(report: Report, crew: list[Viewer | Troll], json_path: Path | None, interrupted: bool) -> None:
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    if not interrupted:
        _check_reached(report, crew)
    Console(highlight=False).print(make_table(report))
    if interrupted:
        sys.stderr.write(
            f"Stopped. {f'The report so far is in {json_path}.' if json_path else 'No report was kept.'}\n"
        )
        raise typer.Exit(130)
    if report["frames"]["lost"] or report["frames"]["doubled"]:
        sys.stderr.write("load: frames were lost or came twice\n")
        raise typer.Exit(1)


def _check_reached(report: Report, crew: list[Viewer | Troll]) -> None:
    """ValueError, with the first reason, where no viewer saw anything and none was told that there is no room."""
    viewers = [one for one in crew if isinstance(one, Viewer)]
    refused = report["refused"] or report["queued"]["count"]
    if viewers and not report["frames"]["received"] and not refused and report["failures"]:
        raise ValueError(f"{report['url']}: {report['failures'][0]}")


def make_table(report: Report) -> Table:
    """The report for the eye."""
    table = Table(title=f"{report['url']}, {report['seconds']:.0f} s", title_justify="left", show_header=True)
    for column in ("", "count", "p50", "p95", "p99", "max"):
        table.add_column(column, justify="left" if not column else "right")
    timed = ("time_to_first_frame", "chunk_gap", "prompt_to_frame", "queued", "reconnects", "frames_per_second")
    for name in timed:
        row, unit = report[name], "" if name == "frames_per_second" else " s"
        figures = ["-" if row[place] is None else f"{row[place]:.3f}{unit}" for place in (*QUANTILES, "max")]
        table.add_row(name.replace("_", " "), str(row["count"]), *figures)
    for name in ("chunks", "pieces"):
        row = report[name]
        in_time = "-" if row["in_time"] is None else f"{100 * row['in_time']:.2f} %"
        table.add_row(f"{name} in time", str(row["count"]), in_time)
    frames, garbage = report["frames"], report["garbage"]
    table.add_row("frames", str(frames["received"]), f"lost {frames['lost']}", f"twice {frames['doubled']}")
    table.add_row("refused", str(len(report["refused"])))
    if garbage["sent"]:
        table.add_row("garbage", str(garbage["sent"]), f"answered {garbage['answered']}")
    return table
