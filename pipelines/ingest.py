"""`reelway ingest`: videos and captions to latent shards, on a pool of Ray actors; what cannot be used, with reasons.

Two pools, one after the other: one that only reads headers and packets, so that every clip can be planned
(`pipelines.ingest_job` says why), and one that decodes and encodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow
import pyarrow.compute
import typer
from rich.console import Console

from ..actors.sources import VideoFolder
from ..actors.survey import FILTER, Surveyor
from ..cluster.dataset import Claim, claim, create_dataset
from ..cluster.manifest import recorded_rows, write_manifest
from ..cluster.pool import PoolReport, PoolSettings, Quarantined, run_pool
from ..cluster.preflight import Requirements, check_output, counted, in_gib
from ..cluster.session import start_or_join
from ..cluster.storage import Storage, StorageError
from .ingest_job import (
    KIND,
    QUARANTINE,
    SAMPLE_BYTES,
    Job,
    Material,
    Order,
    check_order,
    chunks,
    clip_settings,
    counts,
    encoder_bytes,
    gather,
    ingest_settings,
    keep_sources,
    known_sources,
    plan_job,
    quarantine,
    sources_table,
    surveyed,
    surveyor,
    worker_bytes,
    write_quarantine,
)
from .making import PoolOptions, kind_of_workers, known_kind
from .recipe import TINY, load_recipe

OWNER = "reelway ingest"
LOOKED_AT = 16  # videos that --dry-run surveys
LISTED = 20
RETRIED = (StorageError, ConnectionError)

app = typer.Typer(add_completion=False, help="Make latent shards from real videos and their captions.")


@app.command()
def ingest_command(
    videos: Annotated[str, typer.Option(metavar="DIR", help="Folder of videos: a path, s3:// or gs://.")],
    vae: Annotated[Path, typer.Option(metavar="DIR", help="A VAE's folder, or a whole model's, as workers see it.")],
    out: Annotated[str, typer.Option(metavar="DATASET", help="The data set's folder: a path, s3:// or gs://.")],
    captions: Annotated[
        str | None, typer.Option(metavar="FILE", help="A .csv, .tsv, .jsonl or .parquet table; else .txt beside each.")
    ] = None,
    recipe: Annotated[Path, typer.Option(help="Recipe file; the tiny one ships with the package.")] = TINY,
    override: Annotated[list[str] | None, typer.Option("--set", help="a.b=value: change the recipe.")] = None,
    workers: Annotated[str | None, typer.Option(metavar="N|MIN:MAX", help="As many as fit by default.")] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(help="1 on cuda, 0 on cpu by default.")] = None,
    cpus_per_worker: Annotated[
        int | None, typer.Option(min=1, help="On cuda: one feeds the device, the rest decode; 4 by default. On cpu: 1.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    accelerator_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Of a mixed cluster only these GPUs, by Ray's name: A100, H100.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A Ray to join: host:port or auto. Else one is started.")] = None,
    autoscaling: Annotated[bool, typer.Option(help="The cluster adds nodes on demand: do not count what it has.")] = (
        False
    ),
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first videos, by path.")] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Say what there is to do.")] = False,
) -> None:
    """Encode every clip of every video. Stop it at any time: the same command goes on."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: must be cpu or cuda, got {device!r}")
    cpus = cpus_per_worker or (4 if device == "cuda" else 1)
    threads, lanes = (1, max(1, cpus - 1)) if device == "cuda" else (cpus, 1)
    loaded = load_recipe(recipe, override)
    storage, folder = Storage.open(out), VideoFolder.open(videos)
    order = Order(loaded, folder, captions, vae.absolute(), storage, device, threads, lanes, limit)
    pool = PoolOptions.parse(workers, device, gpus_per_worker, cpus, autoscaling, accelerator_type)
    try:
        status = dry_run(order) if dry else run(order, pool, address, console)
    except KeyboardInterrupt:
        console.print(_stopped(storage))
        raise typer.Exit(130) from None
    raise typer.Exit(status)


# --- The job -------------------------------------------------------------------------------------------------------


@dataclass
class _Made:
    """What came back in this run."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    report: PoolReport[Any] | None = None

    @property
    def interrupted(self) -> bool:
        return self.report is not None and self.report.interrupted


def run(order: Order, pool: PoolOptions, address: str | None, console: Console) -> int:
    """Make what is missing of an order; the exit code. 0: something could be used. 1: nothing could, or shards are
    missing because workers failed. 130: interrupted.
    """
    clip_settings(order.recipe)
    kind = known_kind(order.out, order.device, pool.accelerator)
    ingest_settings(order, kind or order.device)
    material = gather(order)
    check_order(order, material, kind)
    console.print(_intake(material))
    sources = known_sources(order, material)
    if sources is not None and kind is not None:
        job = plan_job(order, material, sources, kind)
        if not job.pending():
            typer.echo(f"{order.out.uri}: all shards are there already")
            with claim(order.out, OWNER):
                return _finish(job, _Made(), console)
    need = _encoding(order, pool, max(1, len(material.videos)))
    with start_or_join(address, requirements=need, output=order.out.uri) as session, claim(order.out, OWNER) as held:
        for line in session.preflight:
            console.print(line)
        if sources is None:
            looked = _survey(order, material, pool, held)
            if looked.interrupted or looked.failed:
                return _fail(order, looked, "chunks of videos could not be surveyed", console)
            sources = keep_sources(order, material)
        job = plan_job(order, material, sources, kind or kind_of_workers(order.device, need))
        made = _make(job, pool, held)
        if made.interrupted or made.failed:
            return _fail(order, made, f"of {counted(len(job.shards), 'shard')} could not be made", console)
        return _finish(job, made, console)


def _encoding(order: Order, pool: PoolOptions, work: int) -> Requirements:
    return pool.requirements(worker_bytes(order), work, encoder_bytes(order))


def _surveying(pool: PoolOptions, work: int) -> Requirements:
    """As many processors as the encoding pool has, without its GPUs."""
    return Requirements(1, 0, 0, 1, max(1, work if pool.most is None else round(pool.most * pool.cpus)))


def _survey(order: Order, material: Material, pool: PoolOptions, held: Claim) -> _Made:
    done = surveyed(order.out)
    left = [chunk for chunk in chunks(order, material) if chunk.name not in done]
    return _pool(surveyor(order), left, _surveying(pool, len(left)), "survey", held) if left else _Made()


def _make(job: Job, pool: PoolOptions, held: Claim) -> _Made:
    """Run the encoding pool over what is missing."""
    order = job.order
    create_dataset(order.out, job.info)
    order.out.remove_stale(older_than=0.0)
    left = job.pending()
    check_output(order.out.uri, sum(shard.items.num_rows for shard in left) * _sample_bytes(job))
    return _pool(job.worker(), left, _encoding(order, pool, len(left)), KIND, held) if left else _Made()


def _pool(worker: Any, work: Sequence[Any], need: Requirements, name: str, held: Claim) -> _Made:
    made = _Made()

    def keep(_: Any, row: dict[str, Any]) -> None:
        held.check()
        made.rows.append(row)

    def note(record: Quarantined[Any]) -> None:
        made.failed.append(f"{record.item.name}: {record}")

    made.report = run_pool(worker, work, PoolSettings(need, name, retry_on=RETRIED), keep, on_quarantine=note)
    return made


def _sample_bytes(job: Job) -> int:
    frames, channels, height, width = job.settings.shape
    return SAMPLE_BYTES + 2 * frames * channels * height * width


# --- What is said --------------------------------------------------------------------------------------------------


def _finish(job: Job, made: _Made, console: Console) -> int:
    """Every shard is there: write the quarantine and, last, the manifest, and say what is in them."""
    order = job.order
    order.out.remove_stale(older_than=0.0)
    rows = recorded_rows(order.out)
    problems = quarantine(job, rows)
    write_quarantine(order.out, problems)
    write_manifest(order.out, rows)
    samples, size = sum(row.samples for row in rows), sum(row.bytes for row in rows)
    typer.echo(
        f"{order.out.uri}: {counted(len(rows), 'shard')}, {counted(samples, 'clip')} of "
        f"{counted(len(job.material.videos), 'video')}, {size:,} bytes ({in_gib(size)})"
    )
    if made.report and made.rows:
        console.print(_pace(made))
    found = counts(problems)
    for title, filtered in (("filtered", True), ("unusable", False)):
        part = {key: count for key, count in found.items() if (key[0] == FILTER) == filtered}
        if part:
            reasons = ", ".join(_reason(key, count) for key, count in sorted(part.items()))
            typer.echo(f"{title}: {sum(part.values()):,}: {reasons}")
    if problems:
        typer.echo(f"quarantine: {order.out.where(QUARANTINE)} ({counted(len(problems), 'row')})")
    if not samples:
        console.print(f"{order.out.uri}: not one clip could be used")
        return 1
    return 0


def _reason(key: tuple[str, str], count: int) -> str:
    stage, reason = key
    return f"{reason} {count:,}" if stage == FILTER else f"{stage} {reason} {count:,}"


def _pace(made: _Made) -> str:
    report = made.report
    assert report is not None
    clips, waited = sum(row["samples"] for row in made.rows), sum(row["waited"] for row in made.rows)
    busy = waited + sum(row["encoded"] for row in made.rows)
    share = waited / busy if busy else 0.0
    return (
        f"made now: {counted(len(made.rows), 'shard')}, {counted(clips, 'clip')} in {report.seconds:.1f} s with up to "
        f"{counted(report.most_workers, 'worker')}; encoders waited {share:.0%} of their time for decoded clips"
    )


def _fail(order: Order, made: _Made, what: str, console: Console) -> int:
    if made.interrupted:
        console.print(_stopped(order.out))
        return 130
    typer.echo(f"{order.out.uri}: {len(made.failed)} {what}; no manifest is written; the same command tries again")
    for line in made.failed[:LISTED]:
        typer.echo(line)
    return 1


def _intake(material: Material) -> str:
    parts = [f"{counted(len(material.videos), 'video')} with a caption"]
    if material.problems:
        parts.append(f"{counted(len(material.problems), 'problem')} with names and captions")
    if material.ignored:
        parts.append(f"{counted(material.ignored, 'other file')} ignored")
    return ", ".join(parts)


def _stopped(out: Storage) -> str:
    return f"Stopped. Whole shards are kept in {out.uri}; the same command goes on from there."


# --- Before a run --------------------------------------------------------------------------------------------------


def dry_run(order: Order) -> int:
    """Say what there is, from the survey if it was made, else from some of the videos. Nothing is written."""
    kind = known_kind(order.out, order.device) or order.device
    ingest_settings(order, kind)
    material = gather(order)
    check_order(order, material, None)
    typer.echo(_intake(material))
    sources = known_sources(order, material)
    about = ""
    if sources is None:
        sources, about = _sample(order, material), "about "
    job = plan_job(order, material, sources, kind)
    scale = len(material.videos) / max(1, sources.num_rows)
    clips = round(job.clips * scale)
    shards = -(-clips // order.recipe.ingest.per_shard)
    typer.echo(f"clips: {about}{clips:,}; shards: {about}{shards:,}")
    typer.echo(f"bytes: {about}{clips * _sample_bytes(job):,} ({in_gib(clips * _sample_bytes(job))})")
    if not about:
        typer.echo(f"shards done already: {len(job.shards) - len(job.pending()):,}")
    refused = pyarrow.compute.value_counts(sources.column("reason").drop_null()).to_pylist()
    for entry in sorted(refused, key=lambda entry: str(entry["values"])):
        typer.echo(f"left out: {about}{counted(round(entry['counts'] * scale), 'video')}: {entry['values']}")
    return 0


def _sample(order: Order, material: Material) -> pyarrow.Table:
    """The survey of some videos, evenly spread."""
    step = max(1, len(material.videos) // LOOKED_AT)
    surveyor = Surveyor(order.videos, order.out, clip_settings(order.recipe))
    try:
        return sources_table([surveyor.survey(video) for video in material.videos[::step]])
    finally:
        surveyor.close()
