"""`reelway evaluate`: every cell of a sweep made and graded once, on as many workers as there are, then a report."""

import json
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..actors.judge import SPRITES
from ..actors.model_files import loading_bytes
from ..cluster.pool import PoolReport, PoolSettings, Quarantined, run_pool
from ..cluster.preflight import Requirements
from ..cluster.session import start_or_join
from ..cluster.storage import Storage, StorageError
from .evaluation.examiner import SPEED, STRIPS, VIDEOS, Examiner
from .evaluation.page import SHEET_PROMPTS, number, render_page, verdict_of
from .evaluation.plan import Cell, Plan, make_plan
from .evaluation.report import Report, Sources, against, build_report
from .evaluation.sweep import read_sweep
from .evaluation.tables import DRIFT, RESULTS, drift_table, group_of, read_rows, results_table, stored_keys, to_parquet
from .evaluation.vbench_job import grade_with_vbench

REPORT, PAGE = "report.json", "report.html"
VIDEO_BYTES = 1 << 20  # of a video, strip and row together, for the check of free space
WIDTH = 200  # of tables that go to a file
SHOWN = 5  # failures that are listed on the console

app = typer.Typer(add_completion=False, help="Grade models over a sweep of prompts, seeds and settings.")


@app.command()
def evaluate_command(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="Models, prompts, seeds, settings.")],
    out: Annotated[str, typer.Option(help="Folder of the results: a path, s3:// or gs://; shared by all workers.")],
    address: Annotated[str | None, typer.Option(help="A Ray to join: host:port or auto. Else one is started.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="At most so many videos at once.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of torch in a worker, which reserves as many CPUs.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    autoscaling: Annotated[bool, typer.Option(help="The cluster adds nodes on demand: do not count what it has.")] = (
        False
    ),
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts of each set.")] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Say what there is to do.")] = False,
    old: Annotated[Path | None, typer.Option("--against", help="An earlier report.json to compare with.")] = None,
    vbench_info: Annotated[Path | None, typer.Option(help="VBench_full_info.json, for the prompt set vbench.")] = None,
) -> None:
    """Make and grade what is missing of a sweep, then write the report. Stop it at any time: it goes on."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: must be cpu or cuda, got {device!r}")
    if vbench_info is not None and not vbench_info.is_file():
        raise FileNotFoundError(f"--vbench-info: no such file: {vbench_info}")
    try:
        earlier = None if old is None else read_earlier(old)
        plan = make_plan(read_sweep(sweep), device, vbench_info=vbench_info, limit=limit)
        storage = Storage.open(out)
        if dry:
            for line in plan_lines(plan, storage):
                typer.echo(line)
            return
        need = requirements(plan, device, workers, threads, autoscaling)
        made = make_missing(plan, storage, need, address, console)
        if made.interrupted:
            raise KeyboardInterrupt
        report = write_report(plan, storage, made.failed, console, earlier=earlier, vbench_info=vbench_info)
    except KeyboardInterrupt:
        console.print(f"Stopped; the videos that are done are kept in {out}. The same command goes on from there.")
        raise typer.Exit(130) from None
    tell(report, storage)
    raise typer.Exit(1 if made.failed else 0)


# --- Before ----------------------------------------------------------------------------------------------------


def read_earlier(report: Path) -> tuple[pa.Table, str]:
    """The results table that stands beside an earlier report.json, and the report's path."""
    if not report.is_file():
        raise FileNotFoundError(f"--against: no such file: {report}")
    table = report.parent / RESULTS
    if not table.is_file():
        raise FileNotFoundError(f"--against: {table} must stand beside the report: its rows are what is compared")
    try:
        return pq.read_table(table), str(report)
    except pa.ArrowException as error:
        raise ValueError(f"--against: {table}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def missing_cells(plan: Plan, out: Storage) -> list[Cell]:
    """The cells that are not stored yet, each once, models together."""
    done = stored_keys(out)
    return list({cell.key: cell for cell in plan.cells if cell.key not in done}.values())


def plan_lines(plan: Plan, out: Storage) -> list[str]:
    """What there is to do, per model, setting and set of prompts."""
    missing = {cell.key for cell in missing_cells(plan, out)}
    planned = Counter(group_of(cell) for cell in plan.cells)
    left = Counter(group_of(cell) for cell in plan.cells if cell.key in missing)
    lines = [f"{out.uri}: {len(plan.cells):,} videos planned, {len(missing):,} to make"]
    for group, count in planned.items():
        lines.append(f"  {group.label} on {group.prompt_set}: {left[group]:,} of {count:,} to make")
    return lines


def requirements(plan: Plan, device: str, workers: int, threads: int, autoscaling: bool) -> Requirements:
    """What a worker holds: its threads, a GPU if it has one, and the largest model."""
    memory = max(loading_bytes(Path(model.folder)) for model in plan.models)
    gpus = 1.0 if device == "cuda" else 0.0
    return Requirements(threads, gpus, memory, max_workers=workers, cluster_grows=autoscaling)


# --- The work --------------------------------------------------------------------------------------------------


class Made:
    """How making the cells ended. failed: a line per cell that was given up."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.report: PoolReport[Cell] | None = None

    @property
    def interrupted(self) -> bool:
        return self.report is not None and self.report.interrupted

    def give_up(self, record: Quarantined[Cell]) -> None:
        self.failed.append(f"{_whose(record.item)}: {record.failure} (attempts: {record.attempts})")


def _whose(cell: Cell) -> str:
    return f"{cell.model.name}, {cell.label}, seed {cell.seed}, {cell.prompt.text[:60]!r}"


def make_missing(plan: Plan, out: Storage, need: Requirements, address: str | None, console: Console) -> Made:
    """Run the pool over the cells that are not stored; without any, Ray is not started."""
    made, cells = Made(), missing_cells(plan, out)
    console.print(f"{out.uri}: {len(plan.cells):,} videos planned, {len(cells):,} to make")
    if not cells:
        return made
    size = VIDEO_BYTES * len(cells)
    with start_or_join(address, requirements=need, output=out.uri, output_bytes=size) as session:
        for line in session.preflight:
            console.print(line)
        worker = partial(Examiner, out, int(need.cpus), need.max_workers)
        pool = PoolSettings(need, "evaluate", retry_on=(StorageError, ConnectionError))
        made.report = run_pool(worker, cells, pool, lambda *_: None, on_quarantine=made.give_up)
    return made


def make_here(plan: Plan, out: Storage, threads: int, console: Console) -> Made:
    """The same without Ray: one video after the other, in this process. threads: of torch.

    A video that cannot be made is given up and named; Ctrl-C raises KeyboardInterrupt, what is done is kept.
    """
    made, cells = Made(), missing_cells(plan, out)
    console.print(f"{out.uri}: {len(plan.cells):,} videos planned, {len(cells):,} to make")
    examiner = Examiner(out, threads, 1)
    for cell in track(cells, "evaluate", console=console, disable=not console.is_terminal):
        try:
            examiner.process(cell)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            made.failed.append(f"{_whose(cell)}: {error}")
    return made


# --- After -----------------------------------------------------------------------------------------------------


def write_report(
    plan: Plan,
    out: Storage,
    failed: list[str],
    console: Console,
    *,
    earlier: tuple[pa.Table, str] | None = None,
    vbench_info: Path | None = None,
) -> Report:
    """Gather the stored cells into tables, report.json and report.html. ValueError when there is not one."""
    rows = read_rows(out, plan)
    if not rows:
        raise ValueError(
            f"{out.uri}: not one video could be made; the first: {failed[0] if failed else 'none was tried'}"
        )
    graded = grade_with_vbench(plan, rows, out, vbench_info, console.print) if vbench_info else []
    results, drift = results_table(plan, rows), drift_table(plan, rows)
    report = build_report(Sources(plan, rows, results, drift, failed, graded))
    if earlier is not None:
        report["against"] = against(earlier[0], results, earlier[1])
    page = render_page(report, sheet_cells(plan, rows), lambda key: out.read(f"{STRIPS}/{key}.webp"))
    for name, content in (
        (RESULTS, to_parquet(results)),
        (DRIFT, to_parquet(drift)),
        (REPORT, json.dumps(report, indent=1, allow_nan=False).encode()),
        (PAGE, page.encode()),
    ):
        out.publish(name, content, replace=True)
    return report


def sheet_cells(plan: Plan, rows: Mapping[str, Any]) -> list[Report]:
    """The cells whose pictures the page shows: the first prompts of each set under the first seed, in every group."""
    each = -(-SHEET_PROMPTS // len(plan.prompts))
    chosen = {name: [prompt.identity for prompt in prompts[:each]] for name, prompts in plan.prompts.items()}
    cells = [cell for cell in plan.cells if cell.seed == plan.sweep.seeds[0] and cell.key in rows]
    found = []
    for name, identities in chosen.items():
        for identity in identities:
            for cell in cells:
                if (cell.prompt_set, cell.prompt.identity) == (name, identity):
                    whose = {"model": cell.model.name, "setting": cell.label, "prompts": name}
                    found.append({**whose, "prompt": " → ".join(cell.graded), "key": cell.key})
    return found


def tell(report: Report, out: Storage) -> None:
    """The headline figures and where the rest is, on stdout; what failed, on stderr."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, soft_wrap=True, width=WIDTH)
    graded = any(entry["judge"] == SPRITES for entry in report["scores"])
    quality = (SPRITES, "total") if graded else ("pixels", "temporal_flickering")
    table = Table("model", "setting", "prompts", quality[1].replace("_", " "), "frames per second", "first frame, s")
    figures = {
        (entry["model"], entry["setting"], entry["prompts"], entry["judge"], entry["dimension"]): entry
        for entry in report["scores"]
    }
    for place in dict.fromkeys(key[:3] for key in figures):
        shown = [figures.get((*place, *column)) for column in (quality, (SPEED, "frames_per_second"))]
        shown.append(figures.get((*place, SPEED, "time_to_first_frame")))
        table.add_row(*place, *(_with_bounds(entry) for entry in shown))
    console.print(table)
    if report["against"]:
        for line in against_lines(report["against"]["differences"]):
            console.print(line)
    failed = report["cells"]["failed"]
    if failed:
        errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        errors.print(f"{len(failed)} videos could not be made; the same command tries them again:")
        for line in failed[:SHOWN]:
            errors.print(f"  {line}")
    console.print(f"{out.where(PAGE)} (figures: {REPORT}, {RESULTS}, {DRIFT}; videos: {VIDEOS}/)")


def against_lines(differences: list[Report]) -> list[str]:
    """The differences that lie outside the noise, one per line, or that none does."""
    lines = []
    for entry in differences:
        if entry["seen"]:
            bounds = f"{number(entry['low'])} to {number(entry['high'])}"
            whose = f"{entry['model']}, {entry['setting']}: {entry['judge']} {entry['dimension']}"
            lines.append(f"{whose}: {verdict_of(entry)[0]} by {number(abs(entry['mean']))} ({bounds})")
    told = f"{len(lines)} of {len(differences)} differences from the earlier report lie outside the noise"
    return [told + (":" if lines else ""), *lines]


def _with_bounds(entry: Report | None) -> str:
    if entry is None:
        return "-"
    if entry["low"] is None:
        return number(entry["mean"])
    return f"{number(entry['mean'])} ({number(entry['low'])} to {number(entry['high'])})"
