"""What the commands that train have in common: devices, engines, and how a training ends on the command line."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from rich.console import Console

from ..actors.engine import OneRank, TorchEngine
from ..actors.learning.causality import CausalityError
from ..cluster.storage import StorageError
from ..cluster.training import TrainingFailed
from ..cluster.zero_settings import Division
from .memory import TrainingMemory, division_of, memory_lines
from .recipe import ZeroRecipe
from .trackers import check_trackers
from .training import RUN, EngineFactory

DEVICES = ("cpu", "cuda")


class EngineKind(enum.StrEnum):
    plain = "plain"
    zero = "zero"


RunOption = Annotated[Path, typer.Option(help="Folder of the run; an interrupted run goes on there.")]
RecipeOption = Annotated[Path, typer.Option(help="Recipe file; the tiny one ships with the package.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="a.b=value: change the recipe.")]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.")]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Say what memory the training takes, and start nothing.")]
EngineOption = Annotated[EngineKind, typer.Option(help="plain: this process. zero: DeepSpeed ZeRO on Ray workers.")]
WorkersOption = Annotated[int, typer.Option(min=1, help="zero: processes, one device each.")]
CpusOption = Annotated[float, typer.Option(min=0.1, help="zero: CPUs of a worker.")]
AddressOption = Annotated[str | None, typer.Option(help="zero: a Ray to join: host:port or auto. Else one is started.")]


def check_device(device: str) -> None:
    """ValueError unless torch can use it here."""
    if device not in DEVICES:
        raise ValueError(f"--device: must be {' or '.join(DEVICES)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here")


def plain_engines(device: str) -> EngineFactory:
    """Engines of one process."""
    return lambda network, settings: TorchEngine(network, settings, device)


@dataclass(frozen=True)
class Where:
    """Where a training runs, as the command line says it. ValueError for a device that is not there.

    Of a Ray that is joined only its workers know their devices.
    """

    device: str
    engine: EngineKind
    workers: int
    cpus_per_worker: float
    address: str | None

    def __post_init__(self) -> None:
        if self.engine == EngineKind.plain or self.address is None:
            check_device(self.device)
        elif self.device not in DEVICES:
            raise ValueError(f"--device: must be {' or '.join(DEVICES)}, got {self.device!r}")

    def division(self, zero: ZeroRecipe) -> Division:
        """How what is trained is divided among processes."""
        return division_of(zero if self.engine == EngineKind.zero else None, self.workers, self.device)


class TrainingJob(Protocol):
    """What is trained. `recipe` is resolved, `run` its folder."""

    @property
    def recipe(self) -> dict[str, Any]: ...
    @property
    def run(self) -> str: ...
    def settings(self) -> tuple[Any, ...]:
        """The recipe as a model, and the section of the method, first."""
        ...


def carry_out(
    module: str,
    job: TrainingJob,
    where: Where,
    train: Callable[..., bool],
    memory: Callable[[Any], TrainingMemory],
    *,
    dry: bool,
) -> None:
    """What a training command does once its job is put together: say its memory, or train it. Ends as a command.

    module: of `reelway.pipelines`, whose `train` and `memory` these are.
    """
    recipe, section, *_ = job.settings()
    check_trackers(recipe.telemetry)
    if dry:
        for line in memory_lines(memory(job), where.division(recipe.zero)):
            typer.echo(line)
    elif where.engine == EngineKind.plain:
        finish_command(Path(job.run), lambda: train(job, plain_engines(where.device), OneRank()))
    else:
        finish_command(Path(job.run), lambda: train_zero(module, job, recipe.zero, section.steps, where))


def train_zero(module: str, job: Any, zero: ZeroRecipe, steps: int, where: Where) -> bool:
    """A training on several processes; whether its gate passed."""
    from .hosting import Hosting, train_on_ray  # Ray and DeepSpeed take seconds to import

    gpus = 1.0 if where.device == "cuda" else 0.0
    hosting = Hosting(where.workers, where.device, where.cpus_per_worker, gpus, where.address)
    return train_on_ray(module, job, zero, steps, hosting, Console(stderr=True, highlight=False))


def finish_command(run: Path, work: Callable[[], bool]) -> None:
    """Do the work and say how it ended. Exit code 1: stopped, or the gate refused. 130: interrupted."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        passed = work()
    except KeyboardInterrupt:
        console.print(f"Stopped; what was done is kept in {run}. The same command goes on from there.")
        raise typer.Exit(130) from None
    except (FloatingPointError, CausalityError) as error:
        console.print(f"{run}: stopped: {error}")
        raise typer.Exit(1) from None
    except TrainingFailed as error:
        console.print(f"{run}: stopped: {error}. The same command goes on from the last checkpoint.")
        raise typer.Exit(1) from None
    except StorageError as error:
        raise ValueError(str(error)) from error
    typer.echo(
        f"{run / 'model'}: {'passed its gate' if passed else 'made, but did not pass its gate'}, see {run / RUN}"
    )
    if not passed:
        raise typer.Exit(1)
