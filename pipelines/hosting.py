"""The `--engine zero` side of the training commands: DeepSpeed ZeRO on several processes under Ray Train."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from ..actors.engine import OptimizerSettings
from ..cluster.preflight import Requirements
from ..cluster.session import start_or_join
from ..cluster.training import TrainingHost, TrainingSettings, run_training
from ..cluster.zero import ZeroEngine, ZeroSettings, shard_frozen
from .recipe import ZeroRecipe
from .telemetry import LINE_EVERY_STEPS, progress_bar


@dataclass(frozen=True)
class Hosting:
    """Where a training runs. workers: processes, one engine each. address: a Ray to join; None starts one."""

    workers: int
    device: str
    cpus: float
    gpus: float
    address: str | None

    def resources(self) -> Requirements:
        """All workers at once, or none."""
        return Requirements(self.cpus, self.gpus, 0, self.workers, self.workers)


def train_on_ray(module: str, job: Any, zero: ZeroRecipe, steps: int, hosting: Hosting, console: Console) -> bool:
    """Carry out `reelway.pipelines.<module>.train` for a job on all workers; whether the gate passed.

    Lost workers are started again from the last checkpoint. Raises what `run_training` raises; KeyboardInterrupt
    after Ctrl-C, when what was done is saved.
    """
    run = Path(job.run).absolute()
    settings = TrainingSettings(hosting.workers, run.parent, run.name, hosting.resources())
    given = {"module": module, "job": replace(job, run=str(run)), "zero": zero, "frozen": zero.stage == 3}
    session = start_or_join(
        hosting.address, requirements=hosting.resources(), output=str(run.parent), dashboard=hosting.address is None
    )
    with session as found, _shown(module, steps, console) as show:
        for line in found.preflight:
            console.print(line)
        report = run_training(_work, given, settings, on_metrics=show, on_note=console.print)
    return bool(report.value)


def _work(given: dict[str, Any], host: TrainingHost) -> bool:
    """One rank's part; runs in a worker's process."""
    train = importlib.import_module(f".{given['module']}", __package__).train
    zero: ZeroRecipe = given["zero"]
    named = {"freeze": _frozen} if given["frozen"] and given["module"] == "distill" else {}
    passed: bool = train(
        given["job"],
        partial(_engine, zero),
        host.ranks,
        report=host.report,
        interrupted=host.interrupted,
        console=Console(quiet=True),  # the driver draws the bar
        **named,
    )
    return passed


def _engine(zero: ZeroRecipe, network: nn.Module, optimizer: OptimizerSettings) -> ZeroEngine:
    settings = ZeroSettings(
        rate=optimizer.rate,
        stage=zero.stage,
        precision=zero.precision,
        offload_optimizer=_place(zero.offload_optimizer),
        offload_parameters=_place(zero.offload_parameters),
        betas=optimizer.betas,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm,
        ema_decay=optimizer.ema_decay,
    )
    return ZeroEngine(network, settings)


def _place(offloaded: bool) -> Literal["none", "cpu"]:
    return "cpu" if offloaded else "none"


def _frozen(network: nn.Module, device: torch.device) -> nn.Module:
    """The teacher divided among the ranks, as the student is in stage 3."""
    return shard_frozen(network)


@contextmanager
def _shown(name: str, steps: int, console: Console) -> Iterator[Any]:
    """A bar in the driver, fed by rank 0's metrics; in a log, a line now and then."""
    with progress_bar(console) as bar:
        task = bar.add_task(name, total=steps, loss=float("nan"))

        def show(metrics: dict[str, float]) -> None:
            done = int(metrics["step"])
            bar.update(task, completed=done, loss=metrics["loss"])
            if not console.is_terminal and (done % LINE_EVERY_STEPS == 0 or done == steps):
                console.print(f"{name}: step {done}/{steps}, loss {metrics['loss']:.4f}")

        yield show
