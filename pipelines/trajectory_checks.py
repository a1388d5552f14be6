"""Before and after a trajectory job: what it would cost, and whether what it made is what it should be."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from ..actors.trajectories import (
    TRAJECTORY,
    TrajectoryWorker,
    batches,
    decode_end,
    device_kind,
    equal_ends,
    sample_problems,
)
from ..cluster.dataset import Sample, ShardError, decode_sample, read_samples
from ..cluster.manifest import ShardPlan, read_sound_record
from ..cluster.preflight import counted, in_gib
from .making import known_kind
from .prompts import packed
from .sheet import contact_sheet
from .trajectory_job import Job, Order, plan_job

if TYPE_CHECKING:
    from ..kernels.wan.vae import StreamingVAE

SHEET: Final = "validate.png"
CHECKED: Final = 64  # samples that are read, evenly spread over the set
DRAWN: Final = 6  # of them on the sheet


@dataclass(frozen=True)
class DryRun:
    """What a job holds and what is left of it. seconds: of one device for what is left; None without a device here."""

    prompts: int
    samples: int
    shards: int
    shards_done: int
    bytes: int
    bytes_left: int
    exact: bool
    device: str
    workers: int
    devices_per_worker: float
    seconds: float | None

    @property
    def device_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.devices_per_worker / 3600

    def lines(self, cost_per_hour: float | None) -> Iterator[str]:
        """The report."""
        yield f"prompts: {self.prompts:,}; samples: {self.samples:,}"
        yield f"shards: {self.shards:,}; done already: {self.shards_done:,}"
        most = "" if self.exact else "at most "
        yield f"bytes: {most}{self.bytes:,} ({in_gib(self.bytes)}); still to write: {most}{self.bytes_left:,}"
        if self.device_hours is None or self.seconds is None:
            yield f"time: not estimated, this process sees no {self.device} device"
            return
        wall = f"{self.seconds / self.workers / 3600:.3g} hours on {counted(self.workers, 'worker')}"
        yield f"time: {self.device_hours:.3g} device-hours ({self.device}), {wall}, without their start"
        if cost_per_hour is not None:
            yield f"cost: {self.device_hours * cost_per_hour:.2f} at {cost_per_hour:g} per device-hour"


def dry_run(order: Order, workers: int | None, gpus_per_worker: float) -> DryRun:
    """Plan an order and time a few steps of its first batch here. Writes nothing."""
    kind = known_kind(order.out, order.device)
    job = plan_job(order, kind or order.device)
    left = job.pending()
    here = order.device == "cpu" or torch.cuda.is_available()
    seconds, text_rows = _calibrate(job, left or job.shards) if here else (None, None)
    return DryRun(
        prompts=len(order.prompts),
        samples=job.samples,
        shards=len(job.shards),
        shards_done=len(job.shards) - len(left),
        bytes=job.bytes(job.shards, text_rows),
        bytes_left=job.bytes(left, text_rows),
        exact=job.settings.text_dim is None or text_rows is not None,
        device=job.settings.device_kind,
        workers=max(1, min(workers or len(left), len(left))),
        devices_per_worker=gpus_per_worker or 1.0,
        seconds=None if seconds is None else seconds * _batches(job, left),
    )


def _calibrate(job: Job, shards: Sequence[ShardPlan]) -> tuple[float, dict[str, int]]:
    """Seconds of a full batch on this machine, and the rows of each prompt's text embedding."""
    settings = replace(job.settings, device_kind=device_kind(job.settings.device))
    worker = TrajectoryWorker(job.order.teacher, job.order.out, settings)
    first = next(batches(shards[0], settings.batch))
    seconds = worker.seconds_per_batch(first) * settings.batch / len(first)
    if settings.text_dim is None:
        return seconds, {}
    prompts = packed(job.order.prompts).to_pylist()
    return seconds, dict(zip(prompts, worker.text_rows(prompts), strict=True))


def _batches(job: Job, shards: Sequence[ShardPlan]) -> float:
    """Batches of these shards; a short one counts as its share of a full one."""
    return sum(shard.items.num_rows for shard in shards) / job.settings.batch


# --- Afterwards ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Validation:
    """How many samples were read, and what is wrong with them."""

    samples: int
    problems: tuple[str, ...]


def validate(job: Job) -> Validation:
    """Check samples from all over the set, and draw some of their clean ends into `validate.png` beside the shards."""
    planned = [(shard, item) for shard in job.shards for item in shard.items.to_pylist()]
    problems: list[str] = []
    ends: list[tuple[str, str, torch.Tensor]] = []
    for shard, items in _grouped(_spread(planned, CHECKED)):
        stored = _read(job, shard, set(items), problems)
        for key, sample in stored.items():
            found = _problems(job, items[key], sample)
            problems += [f"{shard.name}: {key}: {problem}" for problem in found]
            if not found:
                ends.append((key, items[key]["prompt"], sample[TRAJECTORY]["latents"][-1].float()))
    if not ends and not problems:
        problems.append("no sample in the shards that were read")
    _draw(job, _spread(ends, DRAWN))
    return Validation(len(ends), (*problems, *equal_ends(ends)))


def _problems(job: Job, item: Mapping[str, Any], sample: Sample) -> list[str]:
    try:
        job.info.check(sample)
    except ValueError as error:
        return [str(error)]
    return sample_problems(job.settings, item, sample)


def _read(job: Job, shard: ShardPlan, keys: set[str], problems: list[str]) -> dict[str, Sample]:
    """The samples of these keys; what is damaged or missing, and not quarantined, is added to `problems`."""
    out = job.order.out
    record = read_sound_record(out, shard.name)
    quarantined = record.reasons.keys() if record else set()
    stored = [key for key in shard.keys if key not in quarantined]
    wanted = {place for place, key in enumerate(stored) if key in keys}
    samples: dict[str, Sample] = {}
    if not wanted:
        return samples
    try:
        with out.open_input(shard.name) as file:
            for _, key, fields in read_samples(file, out.where(shard.name), wanted):
                if key in keys:
                    samples[key] = decode_sample(out.where(shard.name), key, fields)
    except (ShardError, FileNotFoundError) as error:
        problems.append(f"{shard.name}: {error}")
        return samples
    missing = sorted(keys - samples.keys() - quarantined)
    problems += [f"{shard.name}: {key}: not in the shard" for key in missing]
    return samples


def _draw(job: Job, ends: Sequence[tuple[str, str, torch.Tensor]]) -> None:
    if not ends:
        return
    from ..kernels.wan.vae import StreamingVAE  # seconds to import

    vae = StreamingVAE.from_pretrained(job.order.teacher / "vae").to(job.order.device).eval()
    rows = [(f"{key}: {prompt}", _video(vae, end, job.order.device)) for key, prompt, end in ends]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SHEET
        contact_sheet(rows, path, scale=2 if rows[0][1].shape[1] <= 128 else 1)
        job.order.out.publish(SHEET, path, replace=True)


def _video(vae: "StreamingVAE", end: torch.Tensor, device: str) -> np.ndarray:
    return decode_end(vae, end.to(device))


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, evenly spread, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[math.floor(place * (len(values) - 1) / (count - 1))] for place in range(count)]


def _grouped(
    chosen: Sequence[tuple[ShardPlan, Mapping[str, Any]]],
) -> Iterator[tuple[ShardPlan, dict[str, Mapping[str, Any]]]]:
    """The chosen items of each shard by key."""
    groups: dict[int, tuple[ShardPlan, dict[str, Mapping[str, Any]]]] = {}
    for shard, item in chosen:
        groups.setdefault(shard.index, (shard, {}))[1][item["key"]] = item
    yield from groups.values()
