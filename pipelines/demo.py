"""`reelway demo`: the whole method on this machine, from prompts to a page, in some minutes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..actors.learning.causality import CausalityError
from ..cluster.training import TrainingFailed
from .demonstration.figures import Figures, headlines
from .demonstration.page import PAGE_STAGE
from .demonstration.runner import StageFailed, run_stages
from .demonstration.settings import LOG, PAGE, STUDENT, TEACHER, Demo, read_demo_recipe
from .demonstration.stages import STAGES

app = typer.Typer(
    add_completion=False, help="The whole method on this machine, in some minutes, with a page to look at."
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of all that is made; the same command goes on there.")] = Path(
        "demo"
    ),
    teacher: Annotated[Path, typer.Option(help="The teacher's folder; one ships with the code.")] = TEACHER,
    student: Annotated[Path, typer.Option(help="The finished student's folder; one ships with the code.")] = STUDENT,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with other sizes of the demo.")] = None,
) -> None:
    """Distil a student on two Ray workers, stream and grade the shipped one, and write OUT/index.html."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        wanted = Demo.open(out, teacher, student, read_demo_recipe(recipe))
        records = run_stages(wanted, [*STAGES, PAGE_STAGE])
    except KeyboardInterrupt:
        console.print(f"Stopped; what was done is kept in {out}. The same command goes on from there.")
        raise typer.Exit(130) from None
    except (StageFailed, TrainingFailed, FloatingPointError, CausalityError) as error:
        console.print(
            f"{out}: stopped: {' '.join(str(error).split())} (more in {out / LOG}). The same command goes on."
        )
        raise typer.Exit(1) from None
    for name, (figure, meaning) in headlines(Figures.gather(wanted, records)).items():
        typer.echo(f"{name + ':':<13}{figure} {meaning}")
    typer.echo(f"{out / PAGE}: open it in a browser")
