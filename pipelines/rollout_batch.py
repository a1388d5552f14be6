"""Videos of many prompts, made by a pool of Ray workers: .mp4 files in shards, or as files with names."""

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow
import pyarrow.parquet
import torch
import typer
from rich.console import Console

from ..actors.bench_report import FRAME_RATE
from ..actors.model_files import velocity_digest
from ..cluster.dataset import INFO, DatasetInfo, claim, create_dataset, read_samples
from ..cluster.dataset import Quarantined as NoSample
from ..cluster.manifest import ManifestRow, ShardPlan, pending, plan, read_sound_record, seal
from ..cluster.pool import PoolReport, PoolSettings, run_pool
from ..cluster.preflight import Requirements, counted
from ..cluster.session import start_or_join
from ..cluster.shards import write_shard
from ..cluster.storage import Storage, StorageError
from .prompts import read_prompts
from .recipe import fingerprint
from .rollout_order import Plan
from .schedule import length_of
from .video import VideoWriter

if TYPE_CHECKING:
    from ..actors.streams import Stream

KIND: Final = "rollouts"
OWNER: Final = "reelway rollout"
VIDEO, PROMPT, META = "video.mp4", "prompt.txt", "meta.json"
INDEX: Final = "videos.parquet"  # beside extracted files
SAMPLE_FORMAT: Final = 1  # raised when what a sample is changes
SLUG: Final = 40  # characters of the prompt in a key
LISTED: Final = 20  # problems that are printed


@dataclass(frozen=True)
class BatchOrder:
    """What a user asked for. out: the data set's folder. batch: videos made together; per_shard: videos of a shard."""

    plan: Plan
    prompts: Path
    out: str
    batch: int
    per_shard: int
    workers: int

    @property
    def frames(self) -> int:
        """Of a video."""
        return length_of(self.plan.settings, self.plan.seconds, self.plan.blocks)

    def made_by(self) -> dict[str, Any]:
        """Everything but the prompts that decides the bytes. No paths: a copy is the same student."""
        plan, settings = self.plan, self.plan.settings
        return {
            "command": OWNER,
            "sample_format": SAMPLE_FORMAT,
            "student": _digest(plan.student),
            "frames": self.frames,
            "height": plan.height,
            "width": plan.width,
            "block": settings.block,
            "first_block": settings.first_block,
            "timesteps": list(settings.timesteps),
            "window": settings.window,
            "sink": settings.sink,
            "mode": plan.mode,
            "segment": plan.segment,
            "seed": plan.seed,
            "batch": self.batch,
            "device": plan.device.partition(":")[0],
            "precision": str(plan.dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }


def _digest(student: Path) -> str:
    """Of every file that decides a video; student.json counts by the settings that are used."""
    vae = sorted(file for file in (student / "vae").glob("*") if file.is_file())
    return fingerprint({"velocity": velocity_digest(student), "vae": [_sha256(file) for file in vae]})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RolloutWorker:
    """Makes shards of videos with a student that is loaded once."""

    def __init__(self, out: Storage, order: BatchOrder) -> None:
        self._out, self._order = out, order
        self._student = order.plan.load()

    def process(self, shard: ShardPlan) -> dict[str, Any]:
        """Write one shard, unless it is there."""
        row = write_shard(self._out, shard, self.samples(shard))
        return {"samples": row.samples, "quarantined": row.quarantined, "bytes": row.bytes}

    def samples(self, shard: ShardPlan) -> Iterator[tuple[str, dict[str, Any] | NoSample]]:
        """The shard's videos, in batches as they were planned."""
        items, size = shard.items.to_pylist(), self._order.batch
        for start in range(0, len(items), size):
            group = items[start : start + size]
            for item, made in zip(group, self._videos(group), strict=True):
                yield item["key"], made if isinstance(made, NoSample) else self._sample(item, made)

    def _sample(self, item: dict[str, Any], video: bytes) -> dict[str, Any]:
        meta = {"seed": self._order.plan.seed, "sample": item["sample"], "frames": self._order.frames}
        return {VIDEO: video, PROMPT: item["prompt"], META: {**meta, "frame_rate": FRAME_RATE}}

    def _videos(self, group: Sequence[dict[str, Any]]) -> list[bytes | NoSample]:
        """For each item the file's bytes, or why there is none."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            takes = [
                _Take(stack.enter_context(self._stream(item)), folder / f"{index}.mp4", self._order.frames)
                for index, item in enumerate(group)
            ]
            while going := [take for take in takes if take.going]:
                self._student.make([take.stream for take in going])
                for take in going:
                    take.advance()
            return [NoSample(take.problem) if take.problem else take.path.read_bytes() for take in takes]

    def _stream(self, item: dict[str, Any]) -> "Stream":
        plan, (height, width) = self._order.plan, self._order.plan.size(self._student)
        how: dict[str, Any] = {"height": height, "width": width, "mode": plan.mode, "segment": plan.segment}
        return self._student.open(item["prompt"], plan.seed, item["sample"], **how)


class _Take:
    """One stream and the file that it goes into, until it is long enough or cannot go on."""

    def __init__(self, stream: "Stream", path: Path, frames: int) -> None:
        self.stream, self.path, self.problem = stream, path, ""
        self._left = frames
        self._writer = VideoWriter(path, FRAME_RATE, threads=1)  # more threads, other bytes

    @property
    def going(self) -> bool:
        return self._left > 0 and not self.problem

    def advance(self) -> None:
        """Take the next chunk, which was made."""
        try:
            frames = self.stream.next_chunk()[: self._left]
        except ArithmeticError as error:
            self.problem = str(error)
        else:
            self._writer.write(frames)
            self._left -= len(frames)
        if not self.going:
            self._writer.close(keep=not self.problem)


# --- The job -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """An order with its prompts: exactly which bytes shall be made."""

    order: BatchOrder
    out: Storage
    info: DatasetInfo
    shards: list[ShardPlan]

    @property
    def videos(self) -> int:
        return sum(shard.items.num_rows for shard in self.shards)

    def pending(self) -> list[ShardPlan]:
        """The shards still to be made. ValueError when the folder holds another data set."""
        if self.out.exists(INFO):
            create_dataset(self.out, self.info)  # writes nothing: the same one is there, or it refuses
        return pending(self.out, self.shards)


def run_batch(
    order: BatchOrder, console: Console, *, address: str | None, limit: int | None, dry: bool, files: Path | None
) -> int:
    """Make what is missing; the exit code: 0, 1 where shards could not be made, 130 when interrupted."""
    job = _plan(order, limit, console)
    left = job.pending()
    typer.echo(
        f"{job.out.uri}: {counted(job.videos, 'video')} of {order.frames} frames in "
        f"{counted(len(job.shards), 'shard')}; {len(left)} to be made"
    )
    if dry:
        return 0
    if left:
        report = _make(job, left, address, console)
        if report.interrupted:
            console.print(f"Stopped. Whole shards are kept in {job.out.uri}; the same command goes on from there.")
            return 130
        if report.quarantined:
            for record in report.quarantined[:LISTED]:
                console.print(f"{record.item.name}: {record}")
            typer.echo(f"{job.out.uri}: {counted(len(report.quarantined), 'shard')} could not be made; run it again")
            return 1
    with claim(job.out, OWNER):
        rows = seal(job.out)
    _tell(job, rows, console)
    if files is not None:
        _extract(job, rows, files)
    return 0


def _plan(order: BatchOrder, limit: int | None, console: Console) -> _Job:
    found = read_prompts(order.prompts)
    if found.duplicates:
        console.print(f"prompts: {found.duplicates:,} left out, each stands there already (--samples makes more)")
    for problem in found.problems[:LISTED]:
        console.print(f"prompts: left out: {problem}")
    made_by = order.made_by()
    fields: dict[str, Any] = {VIDEO: {}, PROMPT: {}, META: {}}
    info = DatasetInfo(kind=KIND, fields=fields, made_by=made_by, fingerprint=fingerprint(made_by))
    shards = plan(_items(found.texts[:limit], order.plan.samples), order.per_shard, info.fingerprint)
    return _Job(order, Storage.open(order.out), info, shards)


def _items(prompts: Sequence[str], samples: int) -> pyarrow.Table:
    rows = [(index, prompt, sample) for index, prompt in enumerate(prompts) for sample in range(samples)]
    return pyarrow.table(
        {
            "key": [_key(index, prompt, sample) for index, prompt, sample in rows],
            "prompt": [prompt for _, prompt, _ in rows],
            "sample": [sample for _, _, sample in rows],
        }
    )


def _key(index: int, prompt: str, sample: int) -> str:
    """A name that sorts and can be read: 000012-003-a-small-red-star."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:SLUG].strip("-")
    return f"{index:06d}-{sample:03d}" + (f"-{slug}" if slug else "")


def _make(job: _Job, left: list[ShardPlan], address: str | None, console: Console) -> PoolReport[ShardPlan]:
    gpus = 1.0 if job.order.plan.device.startswith("cuda") else 0.0
    need = Requirements(cpus=1.0, gpus=gpus, min_workers=1, max_workers=min(job.order.workers, len(left)))
    with start_or_join(address, requirements=need, output=job.out.uri) as session:
        for line in session.preflight:
            console.print(line)
        with claim(job.out, OWNER) as held:
            create_dataset(job.out, job.info)
            job.out.remove_stale(older_than=0.0)
            pool = PoolSettings(need, KIND, retry_on=(StorageError, ConnectionError))
            return run_pool(partial(RolloutWorker, job.out, job.order), left, pool, lambda *_: held.check())


def _tell(job: _Job, rows: Sequence[ManifestRow], console: Console) -> None:
    quarantined = sum(row.quarantined for row in rows)
    made, size = sum(row.samples for row in rows), sum(row.bytes for row in rows)
    typer.echo(f"{job.out.uri}: {counted(made, 'video')}, {quarantined} quarantined, {size:,} bytes")
    records = [read_sound_record(job.out, row.name) for row in rows if row.quarantined]
    reasons = [f"{key}: {reason}" for record in records if record for key, reason in record.reasons.items()]
    for reason in reasons[:LISTED]:
        console.print(f"quarantined: {reason}")


def _extract(job: _Job, rows: Sequence[ManifestRow], folder: Path) -> None:
    """Write every video as a file of its own, and a table of their prompts that other commands read."""
    folder.mkdir(parents=True, exist_ok=True)
    table: list[dict[str, Any]] = []
    prompts = {item["key"]: item for shard in job.shards for item in shard.items.to_pylist()}
    for row in rows:
        with job.out.open_input(row.name) as file:
            for _, key, fields in read_samples(file, job.out.where(row.name)):
                (folder / f"{key}.mp4").write_bytes(fields[VIDEO])
                item = prompts[key]
                table.append({"file": f"{key}.mp4", "prompt": item["prompt"], "sample": item["sample"]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / INDEX)
    typer.echo(f"{folder}: {counted(len(table), 'file')} and {INDEX}")
