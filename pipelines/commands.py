"""What the commands that train have in common: devices, engines, and how a training ends on the command line."""

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ..actors.engine import TorchEngine
from ..actors.learning.causality import CausalityError
from ..cluster.storage import StorageError
from ..cluster.training import TrainingFailed
from .training import RUN, EngineFactory


class EngineKind(enum.StrEnum):
    plain = "plain"
    zero = "zero"


EngineOption = Annotated[EngineKind, typer.Option(help="plain: this process. zero: DeepSpeed ZeRO on Ray workers.")]
WorkersOption = Annotated[int, typer.Option(min=1, help="zero: processes, one device each.")]
CpusOption = Annotated[float, typer.Option(min=0.1, help="zero: CPUs of a worker.")]
AddressOption = Annotated[str | None, typer.Option(help="zero: a Ray to join: host:port or auto. Else one is started.")]


def check_device(device: str) -> None:
    """ValueError unless torch can use it here."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here")


def plain_engines(device: str) -> EngineFactory:
    """Engines of one process."""
    return lambda network, settings: TorchEngine(network, settings, device)


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
