"""Data sets on the command line: look into them, check every byte, and make their manifest anew."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..cluster.dataset import TensorSpec, claim, read_dataset
from ..cluster.manifest import read_manifest
from ..cluster.shards import Finding
from ..cluster.shards import repair as repair_dataset
from ..cluster.shards import verify as verify_dataset
from ..cluster.storage import Storage, StorageError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Inspect, verify and repair data sets of shards.")

Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="A data set's folder: a path, s3:// or gs://.")]


@contextmanager
def _failures_in_one_line() -> Iterator[None]:
    """A store that fails ends the command like a user's mistake: one line, no traceback."""
    try:
        yield
    except StorageError as error:
        raise ValueError(str(error)) from error


@app.command()
def inspect(dataset: Dataset) -> None:
    """Show what a data set holds."""
    with _failures_in_one_line():
        storage = Storage.open(dataset)
        info, rows = read_dataset(storage), read_manifest(storage)
    table = Table("what", "value", title=storage.uri)
    table.add_row("kind", info.kind)
    table.add_row("shards", f"{len(rows):,}")
    table.add_row("samples", f"{sum(row.samples for row in rows):,}")
    table.add_row("quarantined", f"{sum(row.quarantined for row in rows):,}")
    table.add_row("bytes", f"{sum(row.bytes for row in rows):,}")
    for field, tensors in sorted(info.fields.items()):
        table.add_row(field, "\n".join(_describe(name, spec) for name, spec in sorted(tensors.items())) or "-")
    for name, value in sorted(info.made_by.items()):
        table.add_row(f"made by: {name}", str(value))
    table.add_row("fingerprint", info.fingerprint)
    Console().print(table)


@app.command()
def verify(dataset: Dataset) -> None:
    """Read every shard and check hashes, counts, keys and samples; exit code 1 and a list when one is wrong."""
    with _failures_in_one_line():
        storage = Storage.open(dataset)
        problems = verify_dataset(storage)
        rows = read_manifest(storage)
    if problems:
        _list(problems)
        raise typer.Exit(1)
    typer.echo(f"{storage.uri}: sound: {len(rows):,} shards, {sum(row.samples for row in rows):,} samples")


@app.command()
def repair(dataset: Dataset) -> None:
    """Make the manifest anew from the sound shards; exit code 1 and a list when some are damaged or missing."""
    with _failures_in_one_line():
        storage = Storage.open(dataset)
        read_dataset(storage)
        with claim(storage, "reelway shards repair"):
            result = repair_dataset(storage)
    typer.echo(f"{storage.uri}: the manifest lists {len(result.rows):,} sound shards")
    if result.problems:
        _list(result.problems)
        raise typer.Exit(1)


def _describe(name: str, spec: TensorSpec) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in spec.shape)
    return f"{name}: {spec.dtype} \\[{sizes}]"


def _list(problems: Sequence[Finding]) -> None:
    for problem in problems:
        typer.echo(str(problem))
    typer.echo(f"{len(problems)} problems")
