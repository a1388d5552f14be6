"""Benchmarks of the data plane, run by hand: `python benchmarks/data_plane.py [section ...]`.

Prints a table, then JSON. Each section runs in a process of its own, so that none sees another's memory. The whole
takes about three minutes on two idle cores; the load of the machine before each section stands beside its figures.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reelway.cluster.dataset import Sample
    from reelway.cluster.manifest import ShardPlan
    from reelway.cluster.storage import Storage

TINY = Path(__file__).parents[1] / "assets" / "tiny"
PROMPTS, PER_SHARD = 1_000_000, 64
SHARDS = 20_000
POOL_WORKERS = (1, 16, 64)
LATENCY, WINDOW = 1.0, 8.0  # seconds: of a stand-in worker's item, and of the stretch in which items are counted
STATES, CLIP = 5, (21, 16, 8, 8)  # a trajectory of the tiny model: 81 frames of 64x64 pixels
WAN_CLIP = (21, 16, 60, 104)  # 81 frames of 832x480
BATCH = 8
MMAP_THRESHOLD = 1 << 16  # bytes; every larger allocation of the process that counts copies is fresh memory
PAGE = resource.getpagesize()


@dataclass(frozen=True)
class Figure:
    """One measured value; `target` in words and whether it was met, for those that have one."""

    section: str
    name: str
    value: float
    unit: str
    target: str = ""
    met: bool | None = None


def at_most(section: str, name: str, value: float, unit: str, limit: float) -> Figure:
    return Figure(section, name, value, unit, f"at most {limit:g}", value <= limit)


def at_least(section: str, name: str, value: float, unit: str, limit: float) -> Figure:
    return Figure(section, name, value, unit, f"at least {limit:g}", value >= limit)


# --- Planning ----------------------------------------------------------------------------------------------------


def planning() -> Iterator[Figure]:
    """A table of a million prompts dealt out to shards, each with its fingerprint."""
    import pyarrow

    from reelway.cluster.manifest import plan

    words = "a small red star drifts slowly to the left over a navy background while a large green ring waits"
    keys = pyarrow.array([f"{index:08d}-0000" for index in range(PROMPTS)])
    texts = pyarrow.array([f"{words}, take {index}" for index in range(PROMPTS)])
    table = pyarrow.table({"key": keys, "prompt": texts})
    yield from timed("planning", f"plan {PROMPTS:,} prompts", partial(plan, table, PER_SHARD, "0123456789abcdef"), 20)
    yield at_most("planning", "peak memory of the process", peak_memory() / 1e9, "GB", 1)


def peak_memory(pid: int | str = "self") -> int:
    """Bytes; of this program alone, whatever process it was started from."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def command() -> Iterator[Figure]:
    """The driver of `reelway trajectories` with a million prompts, from its start to its first shard's."""
    words = "a small red star drifts slowly to the left over a navy background while a large green ring waits"
    with tempfile.TemporaryDirectory() as folder:
        prompts, out = Path(folder, "prompts.txt"), Path(folder, "set")
        with prompts.open("w") as file:
            file.writelines(f"{words}, take {index}\n" for index in range(PROMPTS))
        line = [sys.executable, "-m", "reelway.pipelines.cli", "trajectories", "--teacher", str(TINY)]
        line += ["--set", "clip.frames=9"]  # a million whole clips would not fit on most disks, which is checked first
        began = time.perf_counter()
        with subprocess.Popen([*line, "--prompts", prompts, "--out", out, "--workers", "1"]) as driver:
            while not list(out.glob(".partial-*-shard-*")):
                assert driver.poll() is None, "the command ended"
                time.sleep(0.1)
            seconds, processor, peak = time.perf_counter() - began, _processor_of(driver.pid), peak_memory(driver.pid)
            driver.send_signal(signal.SIGINT)
            time.sleep(1)
            driver.send_signal(signal.SIGINT)  # the second one does not wait for the shard's end
    name = f"`reelway trajectories`, {PROMPTS:,} prompts, to its first shard"
    yield Figure("command", f"{name}, Ray and the worker's start included", seconds, "s")
    yield at_most("command", f"{name}, the driver's processor", processor, "s", 20)
    yield at_most("command", f"{name}, the driver's peak memory", peak / 1e9, "GB", 1)


def _processor_of(pid: int) -> float:
    """Seconds, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- What is done -------------------------------------------------------------------------------------------------


def pending() -> Iterator[Figure]:
    """What is left to do in a data set of 20,000 shards: by its manifest, by its records alone, and to merge them."""
    from reelway.cluster.manifest import merge_manifest, plan
    from reelway.cluster.manifest import pending as left_to_do
    from reelway.cluster.storage import Storage

    shards = plan([f"{index:08d}" for index in range(SHARDS)], 1, "0123456789abcdef")
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage.open(folder)
        _write_stand_ins(Path(folder), shards)
        name = f"find what is done in {SHARDS:,} shards"
        yield from timed("pending", f"{name}, records alone", partial(left_to_do, storage, shards), 5)
        yield from timed("pending", f"merge {SHARDS:,} records", partial(merge_manifest, storage), 5)
        yield from timed("pending", f"{name}, by the manifest", partial(left_to_do, storage, shards), 5)
        assert left_to_do(storage, shards) == []


def _write_stand_ins(folder: Path, shards: "list[ShardPlan]") -> None:
    """Tars of the right size, without content, and their records, without the syncs that a real writer waits for."""
    from reelway.cluster.manifest import ShardRecord, record_name

    for shard in shards:
        (key,) = shard.keys
        row = {"name": shard.name, "samples": 1, "bytes": 1 << 20, "sha256": "0" * 64, "first_key": key}
        record = ShardRecord(**row, last_key=key, fingerprint=shard.fingerprint)
        (folder / record_name(shard.name)).write_bytes(record.to_json())
        with (folder / shard.name).open("wb") as tar:
            tar.truncate(record.bytes)


def timed(section: str, name: str, work: Callable[[], object], limit: float) -> Iterator[Figure]:
    """Seconds by the clock, which have the limit, and of the processor, which a busy machine stretches less."""
    processor = time.process_time()
    yield at_most(section, name, seconds_of(work), "s", limit)
    yield Figure(section, f"{name}, processor", time.process_time() - processor, "s")


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- The pool -----------------------------------------------------------------------------------------------------


class Sleeper:
    """A stand-in worker: every item takes the same time and no processor."""

    def process(self, item: int) -> dict[str, int]:
        time.sleep(LATENCY)
        return {"worker": os.getpid()}


def pool() -> Iterator[Figure]:
    """Items a second of n stand-in workers, against n over their latency: the pool's own cost."""
    from reelway.cluster.session import start_or_join

    with start_or_join("local", cpus=2, gpus=0, object_store_bytes=100 << 20):
        for workers in POOL_WORKERS:
            share, cpu = _share_of_linear(workers)
            name = f"{workers} workers of {LATENCY:g} s, share of linear"
            yield at_least("pool", name, 100 * share, "%", 95)
            yield Figure("pool", f"{workers} workers, the driver's processor", 100 * cpu, "% of a core")


def _share_of_linear(count: int) -> tuple[float, float]:
    """Of the ideal rate, from each worker's first and last result once all are at work; and the driver's CPU share."""
    from reelway.cluster.pool import PoolSettings, run_pool
    from reelway.cluster.preflight import Requirements

    arrivals: dict[int, list[float]] = {}
    all_at_work: list[tuple[float, float]] = []

    def note(item: int, row: dict[str, int]) -> None:
        now = time.monotonic()
        arrivals.setdefault(row["worker"], []).append(now)
        if not all_at_work and len(arrivals) == count:
            all_at_work.append((now, time.process_time()))

    def items() -> Iterator[int]:
        number = 0
        while not all_at_work or time.monotonic() < all_at_work[0][0] + WINDOW:
            yield number
            number += 1

    need = Requirements(cpus=2 / (2 * max(POOL_WORKERS)), min_workers=count, max_workers=count)
    run_pool(Sleeper, items(), PoolSettings(need, name=f"{count} sleepers"), note)
    (began, cpu), ended = all_at_work[0], time.monotonic()
    inside = [[at for at in times if at >= began] for times in arrivals.values()]
    rate = sum((len(times) - 1) / (times[-1] - times[0]) for times in inside if len(times) > 1)
    return rate * LATENCY / count, (time.process_time() - cpu) / (ended - began)


# --- The reader ---------------------------------------------------------------------------------------------------


def reader() -> Iterator[Figure]:
    """Samples of the tiny model's trajectories a second, against those that its training step takes."""
    with tempfile.TemporaryDirectory() as folder:
        storage = write_trajectories(folder, 8, PER_SHARD, CLIP)
        seconds = min(_seconds_per_sample(storage) for _ in range(3))
    learner = BATCH / _seconds_per_step()
    yield Figure("reader", "samples", 1 / seconds, "samples/s")
    yield Figure("reader", "bytes", 2 * STATES * prod(CLIP) / seconds / 1e6, "MB/s")
    yield Figure("reader", f"the tiny student's training step, batch {BATCH}", learner, "samples/s")
    yield at_least("reader", "the reader's rate over the learner's", 1 / seconds / learner, "times", 1)


def write_trajectories(folder: str, shards: int, per_shard: int, clip: tuple[int, ...]) -> "Storage":
    """A data set of random trajectories, as the writer writes it."""
    import torch

    from reelway.cluster.dataset import DatasetInfo, TensorSpec, create_dataset
    from reelway.cluster.manifest import merge_manifest, plan
    from reelway.cluster.shards import write_shard
    from reelway.cluster.storage import Storage

    latents = TensorSpec(shape=(STATES, *clip), dtype="float16")
    fields = {"trajectory.safetensors": {"latents": latents}, "prompt.txt": {}}
    info = DatasetInfo(kind="trajectories", fields=fields, made_by={"command": "benchmark"}, fingerprint="0")
    storage = Storage.open(folder)
    create_dataset(storage, info)
    path = torch.randn(STATES, *clip).half()
    sample: Sample = {"trajectory.safetensors": {"latents": path}, "prompt.txt": "a small red star"}
    for shard in plan([f"{index:08d}" for index in range(shards * per_shard)], per_shard, "0"):
        write_shard(storage, shard, ((key, sample) for key in shard.keys))
    merge_manifest(storage)
    return storage


def _seconds_per_sample(storage: "Storage") -> float:
    from reelway.cluster.shards import ShardReader

    epoch = ShardReader(storage)
    return seconds_of(lambda: sum(1 for _ in epoch)) / len(epoch)


def _seconds_per_step(steps: int = 3) -> float:
    """Forward and backward of the tiny student under its mask, in mixed precision where the CPU is fast in it."""
    import torch

    from reelway.kernels.causal.masks import block_causal
    from reelway.kernels.precision import autocast
    from reelway.kernels.wan.config import CONFIGS
    from reelway.kernels.wan.context import TextContext
    from reelway.kernels.wan.transformer import VideoTransformer

    network = VideoTransformer(CONFIGS["tiny"])
    latents, levels = torch.randn(BATCH, *CLIP), torch.full((BATCH, CLIP[0]), 500.0)
    text = TextContext.fold([torch.randn(16, CONFIGS["tiny"].text_dim)] * BATCH)
    mask = block_causal(CLIP[0], 3, window=12)

    def step() -> None:
        network.zero_grad()
        with autocast("cpu"):
            velocity = network(latents, levels, text, mask)
        velocity.float().square().mean().backward()

    step()
    return min(seconds_of(step) for _ in range(steps))


# --- Copies -------------------------------------------------------------------------------------------------------


def copies() -> Iterator[Figure]:
    """Bytes that a sample costs, in units of its payload, for the tiny model's trajectories and for Wan's.

    Read: what the process asked the kernel for (`rchar`). Written: memory that was touched for the first time, by
    minor page faults; the allocator gives every buffer of this size back to the system when it is freed, so each new
    one faults in whole. A shard's one read buffer is not a sample's and is taken off; a payload smaller than that
    buffer goes through it, so for the tiny model what was read is one move more, and for Wan it is the first of the
    two writes. Buffers are counted in whole pages, hence the slack of the limit: two pages for each of two copies.
    """
    assert os.environ.get("MALLOC_MMAP_THRESHOLD_") == str(MMAP_THRESHOLD), "must be set before the process starts"
    for name, clip, per_shard in (("tiny", CLIP, PER_SHARD), ("Wan", WAN_CLIP, 4)):
        payload = 2 * STATES * prod(clip)
        read, written = _read_and_written(clip, per_shard)
        yield Figure("copies", f"{name}, {payload / 1e6:.2g} MB: read from the file", read / payload, "payloads")
        figure = written / payload
        met = figure <= 2 * (1 + 2 * PAGE / payload)
        yield Figure("copies", f"{name}: written to fresh memory", figure, "payloads", "at most 2, in whole pages", met)


def _read_and_written(clip: tuple[int, ...], per_shard: int, shards: int = 2) -> tuple[float, float]:
    """Bytes a sample."""
    from reelway.cluster.shards import Reading, ShardReader
    from reelway.cluster.storage import BLOCK

    with tempfile.TemporaryDirectory() as folder:
        epoch = ShardReader(write_trajectories(folder, shards, per_shard, clip), None, Reading(window=1))
        for _ in epoch:  # imports, caches and pools are warm after an epoch
            pass
        read, faults = _bytes_read(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in epoch:
            pass
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        return (_bytes_read() - read) / len(epoch), (faults * PAGE - shards * BLOCK) / len(epoch)


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


# --- All of it ----------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[], Iterator[Figure]]] = {
    "planning": planning,
    "command": command,
    "pending": pending,
    "pool": pool,
    "reader": reader,
    "copies": copies,
}


def run_section(name: str) -> dict[str, Any]:
    """A section's figures, from a process of its own, with the load of the machine before it."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)} if name == "copies" else os.environ
    load = os.getloadavg()[0]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--child", name], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    return {"section": name, "load_before": load, "seconds": time.monotonic() - began, "figures": figures}


def show(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("section", "what", "measured", "target", "met", title=f"data plane, {os.cpu_count()} cores")
    for result in results:
        for row in result["figures"]:
            met = {None: "", True: "yes", False: "NO"}[row["met"]]
            table.add_row(row["section"], row["name"], f"{row['value']:.3g} {row['unit']}", row["target"], met)
        table.add_section()
    Console(width=120).print(table)
    for result in results:
        print(f"{result['section']}: {result['seconds']:.0f} s, load average before {result['load_before']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=f"of {', '.join(SECTIONS)}; all if none")
    parser.add_argument("--child", choices=SECTIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - SECTIONS.keys()
    if unknown:
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    if arguments.child:
        print(json.dumps([asdict(figure) for figure in SECTIONS[arguments.child]()]))
        return
    results = [run_section(name) for name in arguments.sections]
    show(results)
    print(json.dumps({"cores": os.cpu_count(), "sections": results}, indent=2))


if __name__ == "__main__":
    main()
