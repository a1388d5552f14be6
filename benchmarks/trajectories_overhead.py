"""What planning, Ray, shards and hashes cost: `reelway trajectories` against a bare loop of the same teacher calls.

    python benchmarks/trajectories_overhead.py --teacher assets/tiny --prompts 64 --json overhead.json

Both make the same batches with the same number of threads, each in a fresh process, on this machine and in this run:
the loop, the job, the loop again. The loop stores nothing. Of the job, what counts is the time from the first shard's
beginning to the last one's end; its start (Ray, imports, weights) is shown apart, as it does not grow with the data.
"""

import json
import multiprocessing
import platform
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from reelway.actors.trajectories import TrajectoryWorker, batches
from reelway.cluster.dataset import create_dataset
from reelway.cluster.manifest import merge_manifest
from reelway.cluster.pool import PoolSettings, run_pool
from reelway.cluster.preflight import Requirements
from reelway.cluster.session import start_or_join
from reelway.cluster.storage import Storage
from reelway.kernels.diffusion.sampler import euler_trajectory
from reelway.kernels.sprites.splits import prompts as sprites_prompts
from reelway.pipelines.making import known_kind
from reelway.pipelines.prompts import unique
from reelway.pipelines.recipe import TINY, load_recipe
from reelway.pipelines.trajectory_job import Job, Order, plan_job, worker_bytes


def main(
    teacher: Annotated[Path, typer.Option(help="Model folder.")] = Path("assets/tiny"),
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of the embedded world.")] = 64,
    recipe: Annotated[Path, typer.Option(help="Recipe file.")] = TINY,
    override: Annotated[list[str] | None, typer.Option("--set", help="a.b=value: change the recipe.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    report: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Print the overhead of the job over the loop."""
    texts = unique(("", text) for text, _ in sprites_prompts("train", prompts)).texts
    with tempfile.TemporaryDirectory() as folder:
        order = Order(load_recipe(recipe, override), teacher.absolute(), texts, Storage.open(folder), device, threads)
        kind = known_kind(order.out, order.device)
        if kind is None:
            raise ValueError(f"--device {device}: no such device here")
        job = plan_job(order, kind)
        first = in_fresh_process(job)
        figures = time_job(job)
        loops = [first, in_fresh_process(job)]
    loop = sum(loops) / len(loops)
    figures |= {
        "loop_seconds": loops,
        "overhead": figures["job_seconds"] / loop - 1,
        "loop_spread": abs(loops[0] - loops[1]) / loop,
        "samples": job.samples,
        "shards": len(job.shards),
        "batch": job.settings.batch,
        "steps": len(job.settings.grid) - 1,
        "latents": list(job.settings.shape),
        "device": kind,
        "threads": threads,
        "machine": platform.platform(),
        "torch": job.settings.torch_version,
    }
    Console().print(table(figures))
    if report is not None:
        report.write_text(json.dumps(figures, indent=2) + "\n")


def in_fresh_process(job: Job) -> float:
    """Seconds of the bare loop in a process of its own, as the job's worker has one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(time_loop, (job,))


def time_loop(job: Job) -> float:
    """Seconds of the teacher's calls alone: noise, text, Euler steps, for every batch of every shard."""
    worker, settings = TrajectoryWorker(job.order.teacher, job.order.out, job.settings), job.settings
    began = time.perf_counter()
    for shard in job.shards:
        for items in batches(shard, settings.batch):
            velocity = worker.teacher.velocity([item["prompt"] for item in items], settings.guidance)
            noise = settings.noise(items).to(worker.teacher.device)
            euler_trajectory(velocity, noise, settings.grid, settings.record).cpu()
    return time.perf_counter() - began


def time_job(job: Job) -> dict[str, Any]:
    """Seconds of the job on one worker: of its work, of its start, and in all."""
    need = Requirements(cpus=job.order.threads, gpus=float(job.order.device == "cuda"), memory=worker_bytes(job.order))
    rows: list[dict[str, Any]] = []
    began = time.time()
    with start_or_join("local", requirements=need, output=job.order.out.uri):
        create_dataset(job.order.out, job.info)
        run_pool(job.worker(), job.pending(), PoolSettings(need), lambda _, row: rows.append(row))
        merge_manifest(job.order.out)
        ended = time.time()
    assert len(rows) == len(job.shards)
    working = max(row["ended"] for row in rows) - min(row["began"] for row in rows)
    return {
        "job_seconds": working,
        "start_seconds": min(row["began"] for row in rows) - began,
        "total_seconds": ended - began,
        "bytes": sum(row["bytes"] for row in rows),
    }


def table(figures: dict[str, Any]) -> Table:
    """The figures for people."""
    loops = figures["loop_seconds"]
    title = f"{figures['samples']} samples in {figures['shards']} shards, {figures['steps']} steps, {figures['device']}"
    result = Table("what", "value", title=title)
    result.add_row("bare loop, before and after", ", ".join(f"{seconds:.3f} s" for seconds in loops))
    result.add_row("job, from the first shard to the last", f"{figures['job_seconds']:.3f} s")
    result.add_row("overhead", f"{figures['overhead']:+.1%} (the two loops differ by {figures['loop_spread']:.1%})")
    result.add_row("start of Ray and the worker", f"{figures['start_seconds']:.1f} s")
    result.add_row("in all", f"{figures['total_seconds']:.1f} s")
    return result


if __name__ == "__main__":
    typer.run(main)
