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

from ..actors.engine import Engine, OneRank, OptimizerSettings
from ..cluster.preflight import Requirements
from ..cluster.session import start_or_join
from ..cluster.training import TrainingFailed, TrainingHost, TrainingSettings, run_training
from ..cluster.zero import ZeroEngine, divided, shard_frozen
from ..cluster.zero_settings import ZeroSettings
from ..kernels.precision import fast_dtype
from ..kernels.wan.weights import StoredTransformer
from .memory import precision_on
from .recipe import ZeroRecipe
from .students import empty_network, load_network
from .telemetry import LINE_EVERY_STEPS, progress_bar
from .training import RUN, RunRecord


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
    settings = TrainingSettings(hosting.workers, run.parent, run.name, hosting.resources(), patience=zero.patience)
    given = {"module": module, "job": replace(job, run=str(run)), "zero": zero}
    session = start_or_join(
        hosting.address, requirements=hosting.resources(), output=str(run.parent), dashboard=hosting.address is None
    )
    with session as found, _shown(module, steps, console) as show:
        for line in found.preflight:
            console.print(line)
        with _failures_recorded(run):
            report = run_training(_work, given, settings, on_metrics=show, on_note=console.print)
    return bool(report.value)


@contextmanager
def _failures_recorded(run: Path) -> Iterator[None]:
    """What ended a run from outside its processes, they could not write into run.json themselves."""
    try:
        yield
    except TrainingFailed as error:
        if (run / RUN).exists():
            RunRecord(run / RUN, OneRank()).write(status="stopped", reason=str(error))
        raise


def _work(given: dict[str, Any], host: TrainingHost) -> bool:
    """One rank's part; runs in a worker's process."""
    train = importlib.import_module(f".{given['module']}", __package__).train
    zero = _affordable(given["zero"], host.device)
    is_frozen = zero.stage == 3 and given["module"] == "distill"
    passed: bool = train(
        given["job"],
        partial(_engine, zero, host.device),
        host.ranks,
        report=host.report,  # no checkpoint: the stage keeps its own, and deletes those that Ray Train would look for
        interrupted=host.interrupted,
        console=Console(quiet=True),  # the driver draws the bar
        load=partial(_load, zero, host.device),
        **({"freeze": partial(_frozen, zero)} if is_frozen else {}),
    )
    return passed


def _affordable(zero: ZeroRecipe, device: torch.device) -> ZeroRecipe:
    """Mixed precision means float32 alone where the device has no fast bfloat16, as in the plain engine."""
    if zero.precision == "autocast" and fast_dtype(device) == torch.float32:
        return zero.model_copy(update={"precision": "fp32"})
    return zero


def _load(zero: ZeroRecipe, device: torch.device, folder: Path) -> nn.Module:
    """A model's transformer: divided among the ranks in stage 3, else whole on each."""
    if zero.stage < 3:
        return load_network(folder, device, torch.bfloat16 if zero.precision == "bf16" else torch.float32)
    stored = StoredTransformer(folder)
    return divided(empty_network(stored.config), stored.read, zero.precision, _place(zero.offload_parameters))


def _engine(zero: ZeroRecipe, device: torch.device, network: nn.Module, optimizer: OptimizerSettings) -> ZeroEngine:
    settings = ZeroSettings(
        rate=optimizer.rate,
        stage=zero.stage,
        precision=precision_on(zero, device),
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


def _frozen(zero: ZeroRecipe, network: nn.Module, engine: Engine) -> nn.Module:
    """The teacher divided among the ranks, as the student is in stage 3."""
    return shard_frozen(network, "bf16" if zero.precision == "bf16" else "fp32")


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
