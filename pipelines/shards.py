"""Data sets on the command line: look into them, check every byte, make their manifest anew, import foreign ones."""

import enum
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from ..cluster.dataset import (
    INFO,
    DatasetInfo,
    ShardError,
    TensorSpec,
    claim,
    decode_sample,
    read_dataset,
    read_samples,
)
from ..cluster.manifest import ManifestRow, read_manifest
from ..cluster.preflight import counted
from ..cluster.shards import Finding
from ..cluster.shards import repair as repair_dataset
from ..cluster.shards import verify as verify_dataset
from ..cluster.storage import Storage, StorageError
from .lmdb_import import LmdbSet, import_lmdb, parse_timesteps
from .sheet import COLUMNS, contact_sheet

# Its files call them 757 and 522; a trainer compares the numbers to a thousandth.
TIMESTEPS_HELP = "Of a trajectory's states, which the LMDB does not hold; 1000,756.757,521.739,0 for CausVid's own."
SMALL_SIDE = 128  # pixels; frames up to this size are drawn twice as large

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
    samples = sum(row.samples for row in rows)
    typer.echo(f"{storage.uri}: sound: {counted(len(rows), 'shard')}, {counted(samples, 'sample')}")


@app.command()
def repair(
    dataset: Dataset,
    drop: Annotated[bool, typer.Option("--drop", help="Remove damaged shards, so that they are made again.")] = False,
) -> None:
    """Make the manifest anew from the sound shards; exit code 1 and a list when some are damaged or missing.

    The command that made the data set, run again, makes what is missing.
    """
    with _failures_in_one_line():
        storage = Storage.open(dataset)
        read_dataset(storage)
        with claim(storage, "reelway shards repair"):
            storage.remove_stale(older_than=0.0)
            result = repair_dataset(storage, drop)
    typer.echo(f"{storage.uri}: the manifest lists {counted(len(result.rows), 'sound shard')}")
    if result.problems:
        _list(result.problems)
        damaged = "damaged ones were removed" if drop else "repair --drop removes damaged ones first"
        typer.echo(f"the command that made the set makes again what is missing ({damaged})")
        raise typer.Exit(1)


@app.command()
def sample(
    dataset: Dataset,
    count: Annotated[int, typer.Argument(metavar="N", min=1, help="How many samples.")],
    vae: Annotated[Path, typer.Option(help="A VAE in the diffusers layout, or the model that it belongs to.")],
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("sheet.png"),
    seed: Annotated[int, typer.Option(help="Which samples.")] = 0,
) -> None:
    """Decode random samples to a contact sheet, for a person to look at, and print their keys and shards."""
    if out.suffix.lower() != ".png" or out.is_dir():
        raise ValueError(f"--out: must be a .png file, got {out}")
    with _failures_in_one_line():
        storage = Storage.open(dataset)
        info = read_dataset(storage)
        tensors, _ = _fields(storage, info)
        places = _draw(read_manifest(storage), count, seed)
        if not places:
            raise ValueError(f"{storage.uri}: holds no samples")
        decode = _decoder(vae)
        rows = []
        for shard, key, fields in _read(storage, places):
            clips = _clips(info, key, fields)
            rows += [(text, decode(latents)) for text, latents in clips]
            typer.echo(f"{key} {shard}")
    frames, height, width = rows[0][1].shape[:3]
    contact_sheet(rows, out, columns=min(COLUMNS, frames), scale=2 if max(height, width) <= SMALL_SIDE else 1)
    Console(stderr=True).print(f"Wrote {out}: {len(rows)} rows of {tensors}.")


class Damaged(enum.StrEnum):
    fatal = "fatal"
    skip = "skip"


@app.command("import-lmdb")
def import_lmdb_command(
    lmdb: Annotated[Path, typer.Argument(metavar="LMDB", help="An LMDB of CausVid's layout: its folder.")],
    out: Annotated[str, typer.Option(metavar="DATASET", help="The data set's folder: a path, s3:// or gs://.")],
    timesteps: Annotated[str, typer.Option(help=TIMESTEPS_HELP)] = "",
    per_shard: Annotated[int, typer.Option(min=1, help="Samples of a shard.")] = 64,
    damaged: Annotated[Damaged, typer.Option(help="A damaged row ends the import, or is left out and counted.")] = (
        Damaged.fatal
    ),
) -> None:
    """Write an LMDB of trajectories or latents as shards, and verify them; an interrupted import goes on."""
    console = Console(stderr=True)
    # The bar shows when there is something to do: a refusal is one line and nothing else.
    with _failures_in_one_line(), LmdbSet(lmdb) as source, ExitStack() as stack:
        bar = Progress(console=console)
        task = bar.add_task("shards", total=None)

        def show(done: int, total: int) -> None:
            if not bar.live.is_started:
                stack.enter_context(bar)
            bar.update(task, completed=done, total=total)

        try:
            rows = import_lmdb(
                source,
                Storage.open(out),
                parse_timesteps(timesteps),
                per_shard=per_shard,
                damaged=damaged.value,
                progress=show,
            )
        except KeyboardInterrupt:
            console.print(f"Stopped; the shards that are done are kept in {out}. The same command goes on from there.")
            raise typer.Exit(130) from None
    quarantined = sum(row.quarantined for row in rows)
    found = f"{counted(len(rows), 'shard')}, {counted(sum(row.samples for row in rows), 'sample')}"
    typer.echo(f"{out}: sound: {found}, {quarantined:,} quarantined")


def _describe(name: str, spec: TensorSpec) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in spec.shape)
    return f"{name}: {spec.dtype} \\[{sizes}]"


def _list(problems: Sequence[Finding]) -> None:
    for problem in problems:
        typer.echo(str(problem))
    typer.echo(counted(len(problems), "problem"))


# --- Samples for a person's eyes -----------------------------------------------------------------------------

# What holds the latents, and what the text.
SHOWN = {"latents.safetensors": "caption.txt", "trajectory.safetensors": "prompt.txt"}


def _fields(storage: Storage, info: DatasetInfo) -> tuple[str, str]:
    """The fields with a sample's latents and its text; ValueError for a set that has none."""
    for tensors, text in SHOWN.items():
        if tensors in info.fields and text in info.fields:
            return tensors, text
    known = " or ".join(f"{tensors} with {text}" for tensors, text in SHOWN.items())
    raise ValueError(f"{storage.where(INFO)}: fields: need {known}, has {', '.join(sorted(info.fields))}")


def _draw(rows: Sequence[ManifestRow], count: int, seed: int) -> dict[str, list[int]]:
    """Random samples, none twice, all of them if there are fewer: places in the shard, by the shard's name."""
    ends = np.cumsum([row.samples for row in rows], dtype=np.int64)
    total = int(ends[-1]) if len(rows) else 0
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[:count])
    places: dict[str, list[int]] = {}
    for number in chosen:
        shard = int(np.searchsorted(ends, number, side="right"))
        places.setdefault(rows[shard].name, []).append(int(number - ends[shard] + rows[shard].samples))
    return places


def _read(storage: Storage, places: dict[str, list[int]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(shard, key, fields) of the samples at these places."""
    for shard, wanted in places.items():
        where = storage.where(shard)
        due = set(wanted)
        with storage.open_input(shard) as file:
            for place, key, fields in read_samples(file, where, wanted):
                due.remove(place)
                yield shard, key, decode_sample(where, key, fields)
        if due:
            raise ShardError(where, "", f"holds fewer samples than the manifest says: none at place {min(due)}")


def _clips(info: DatasetInfo, key: str, fields: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """What a sample shows, with a text for each: latents [F, C, H, W]; of a trajectory the clean end comes first."""
    if "latents.safetensors" in fields:
        return [(f"{key}: {fields['caption.txt']}", fields["latents.safetensors"]["latents"])]
    *noisy, clean = fields["trajectory.safetensors"]["latents"]
    names = _state_names(info, len(noisy) + 1)
    first = (f"{key}, {names[-1]}: {fields['prompt.txt']}", clean)
    return [first, *((f"{key}, {name}", state) for name, state in zip(names, noisy, strict=False))]


def _state_names(info: DatasetInfo, states: int) -> list[str]:
    """`t = 1000`, ..., `t = 0`, or the states' numbers where the data set does not say its timesteps."""
    levels = info.made_by.get("timesteps", [])
    if len(levels) != states:
        return [f"state {index}" for index in range(states)]
    return [f"t = {level:g}" for level in levels]


def _decoder(folder: Path) -> Callable[[Tensor], np.ndarray]:
    """Latents [F, C, H, W] to frames, uint8 [T, H, W, 3]. The VAE's library takes seconds to import."""
    from ..actors.encoder import vae_folder
    from ..actors.trajectories import decode_end
    from ..kernels.wan.vae import StreamingVAE

    return partial(decode_end, StreamingVAE.from_pretrained(vae_folder(folder)))
