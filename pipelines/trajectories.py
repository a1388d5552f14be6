"""`reelway trajectories`: a teacher's ODE trajectories for a set of prompts, made by a pool of Ray actors."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow
import typer
from rich.console import Console

from ..actors.model_files import weights_bytes
from ..cluster.dataset import claim, create_dataset
from ..cluster.manifest import ManifestRow, read_manifest, read_sound_record, seal
from ..cluster.pool import PoolReport, PoolSettings, Quarantined, run_pool
from ..cluster.preflight import Requirements, counted, in_gib
from ..cluster.session import start_or_join
from ..cluster.storage import Storage, StorageError
from ..kernels.sprites.splits import prompts as sprites_prompts
from .making import PoolOptions, kind_of_workers, known_kind
from .prompts import Prompts, packed, read_prompts, unique
from .recipe import TINY, Recipe, WorldRecipe, load_recipe
from .trajectory_checks import SHEET, dry_run, validate
from .trajectory_job import KIND, Job, Order, plan_job, shard_count, worker_bytes

OWNER = "reelway trajectories"
LISTED = 20  # problems and reasons that are printed

app = typer.Typer(add_completion=False, help="Make a teacher's ODE trajectories for a set of prompts.")


@app.command()
def trajectories_command(
    teacher: Annotated[Path, typer.Option(help="Model folder in the diffusers layout, on a path that workers see.")],
    out: Annotated[str, typer.Option(help="The data set's folder: a path, s3:// or gs://.")],
    prompts: Annotated[Path | None, typer.Option(help="A .txt, .csv, .jsonl or .parquet file, or a folder.")] = None,
    sprites: Annotated[int | None, typer.Option(min=1, help="Or: this many prompts of the embedded world.")] = None,
    recipe: Annotated[Path, typer.Option(help="Recipe file; the tiny one ships with the package.")] = TINY,
    override: Annotated[list[str] | None, typer.Option("--set", help="a.b=value: change the recipe.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples per prompt, instead of the recipe's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    workers: Annotated[str | None, typer.Option(metavar="N|MIN:MAX", help="As many as fit by default.")] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(help="1 on cuda, 0 on cpu by default.")] = None,
    cpus_per_worker: Annotated[float | None, typer.Option(help="As many as --threads by default.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of torch in a worker; decides the last bits.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    accelerator_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Of a mixed cluster only these GPUs, by Ray's name: A100, H100.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A Ray to join: host:port or auto. Else one is started.")] = None,
    autoscaling: Annotated[bool, typer.Option(help="The cluster adds nodes on demand: do not count what it has.")] = (
        False
    ),
    dry: Annotated[bool, typer.Option("--dry-run", help="Say what there is to do and what it costs.")] = False,
    check: Annotated[bool, typer.Option("--validate", help="Check samples of the finished set, draw a sheet.")] = False,
    cost_per_hour: Annotated[float | None, typer.Option(min=0, help="Price of a device-hour, for --dry-run.")] = None,
) -> None:
    """Make the trajectories of every prompt. Stop it at any time: the same command goes on."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: must be cpu or cuda, got {device!r}")
    changes = [*(override or []), *([f"trajectories.samples={samples}"] if samples else [])]
    loaded = load_recipe(recipe, changes)
    chosen = choose_prompts(loaded, prompts, sprites, limit, console)
    order = Order(loaded, teacher.absolute(), chosen, Storage.open(out), device, threads)
    pool = PoolOptions.parse(
        workers, device, gpus_per_worker, cpus_per_worker or threads, autoscaling, accelerator_type
    )
    try:
        if dry:
            for line in dry_run(order, pool.most, pool.gpus).lines(cost_per_hour):
                typer.echo(line)
            return
        need = pool.requirements(worker_bytes(order), shard_count(order), weights_bytes(order.teacher))
        status = run(order, need, address, console, check=check)
    except KeyboardInterrupt:
        console.print(_stopped(order.out))
        raise typer.Exit(130) from None
    raise typer.Exit(status)


def choose_prompts(
    recipe: Recipe, source: Path | None, sprites: int | None, limit: int | None, console: Console
) -> pyarrow.Array:
    """The prompts of a source, or of the embedded world's train split. Says on the console what was left out."""
    if (source is None) == (sprites is None):
        raise ValueError("--prompts, --sprites: exactly one of them is needed")
    found = read_prompts(source) if source is not None else _sprites(recipe, sprites or 0)
    if found.duplicates:
        console.print(f"prompts: {found.duplicates:,} dropped, each stands there already (noise belongs to the prompt)")
    if found.problems:
        console.print(f"prompts: {len(found.problems):,} cannot be used and are left out:")
        _list(console, found.problems)
    return packed(found.texts[:limit])


def _sprites(recipe: Recipe, count: int) -> Prompts:
    world = recipe.pretrain.world if recipe.pretrain else WorldRecipe()
    captions = sprites_prompts("train", count, recipe.trajectories.seed, world.level)
    return unique((f"caption {index}", text) for index, (text, _) in enumerate(captions))


# --- The job ---------------------------------------------------------------------------------------------------


@dataclass
class _Made:
    """What came back in this run."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    report: PoolReport[Any] | None = None

    @property
    def samples(self) -> int:
        return sum(row["samples"] for row in self.rows)


def run(order: Order, need: Requirements, address: str | None, console: Console, *, check: bool = False) -> int:
    """Make what is missing of an order; the exit code. 0: the set is whole. 1: shards or all samples are missing, or
    `check` found something. 130: interrupted.
    """
    kind = known_kind(order.out, order.device, need.accelerator)
    job = plan_job(order, kind or order.device)
    left = job.pending() if kind else job.shards
    made = _Made()
    if left:
        size = job.bytes(left)
        with start_or_join(address, requirements=need, output=order.out.uri, output_bytes=size) as session:
            for line in session.preflight:
                console.print(line)
            if kind is None:
                job = plan_job(order, kind_of_workers(order.device, need))
            made = _make(job, need)
    if made.report and made.report.interrupted:
        console.print(_stopped(order.out))
        return 130
    if made.failed:
        return _fail(job, made, console)
    if made.report is None:
        typer.echo(f"{order.out.uri}: all shards are there already")
    return _finish(job, made, console, check)


def _make(job: Job, need: Requirements) -> _Made:
    """Run the pool over what is missing, as the only writer."""
    made, out = _Made(), job.order.out
    with claim(out, OWNER) as held:

        def keep(_: Any, row: dict[str, Any]) -> None:
            held.check()
            made.rows.append(row)

        def note(record: Quarantined[Any]) -> None:
            made.failed.append(f"{record.item.name}: {record}")

        left = job.pending()
        create_dataset(out, job.info)
        out.remove_stale(older_than=0.0)
        pool = PoolSettings(need, KIND, retry_on=(StorageError, ConnectionError))
        made.report = run_pool(job.worker(), left, pool, keep, on_quarantine=note)
        if not made.failed and not made.report.interrupted:
            seal(out)
    return made


def _finish(job: Job, made: _Made, console: Console, check: bool) -> int:
    """The set is whole: say so, and what is in it."""
    out, rows = job.order.out, _manifest(job)
    samples, quarantined = sum(row.samples for row in rows), sum(row.quarantined for row in rows)
    size = sum(row.bytes for row in rows)
    typer.echo(
        f"{out.uri}: {counted(len(rows), 'shard')}, {counted(samples, 'sample')}, {quarantined} quarantined, "
        f"{size:,} bytes ({in_gib(size)})"
    )
    if made.report:
        typer.echo(_pace(made))
    if quarantined:
        console.print(f"warning: {counted(quarantined, 'sample')} could not be made:")
        _list(console, _reasons(out, rows))
    if not samples:
        console.print(f"{out.uri}: not one sample could be made")
        return 1
    return _validate(job) if check else 0


def _manifest(job: Job) -> list[ManifestRow]:
    """The manifest of a whole set; made now, if an earlier run was killed just before."""
    out = job.order.out
    try:
        rows = read_manifest(out)
    except FileNotFoundError:
        rows = []
    if len(rows) == len(job.shards):
        return rows
    with claim(out, OWNER):
        return seal(out)


def _validate(job: Job) -> int:
    began = time.monotonic()
    result = validate(job)
    for problem in result.problems:
        typer.echo(problem)
    figures = f"{counted(result.samples, 'sample')} sound, {counted(len(result.problems), 'problem')}"
    sheet = f"; some of them: {job.order.out.where(SHEET)}" if result.samples else ""
    typer.echo(f"{job.order.out.uri}: validated in {time.monotonic() - began:.1f} s: {figures}{sheet}")
    return 1 if result.problems else 0


def _fail(job: Job, made: _Made, console: Console) -> int:
    typer.echo(
        f"{job.order.out.uri}: {len(made.failed)} of {counted(len(job.shards), 'shard')} could not be made; "
        "no manifest is written; the same command tries again"
    )
    for line in made.failed:
        typer.echo(line)
    if made.report and made.report.done:
        console.print(_pace(made))
    return 1


def _pace(made: _Made) -> str:
    report = made.report
    assert report is not None
    size = sum(row["bytes"] for row in made.rows)
    rate = made.samples / report.seconds if report.seconds else 0.0
    return (
        f"made now: {counted(len(made.rows), 'shard')}, {counted(made.samples, 'sample')}, {size:,} bytes in "
        f"{report.seconds:.1f} s with up to {counted(report.most_workers, 'worker')}: {rate:.3g} samples per second"
    )


def _reasons(out: Storage, rows: Sequence[ManifestRow]) -> list[str]:
    records = [read_sound_record(out, row.name) for row in rows if row.quarantined]
    return [f"{key}: {reason}" for record in records if record for key, reason in record.reasons.items()]


def _stopped(out: Storage) -> str:
    return f"Stopped. Whole shards are kept in {out.uri}; the same command goes on from there."


def _list(console: Console, lines: Sequence[str]) -> None:
    for line in lines[:LISTED]:
        console.print(f"  {line}")
    if len(lines) > LISTED:
        console.print(f"  and {len(lines) - LISTED:,} more")
