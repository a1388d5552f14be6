"""The rows of the ablation: which stages there are, what each needs, and the training job of each."""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ..actors.learning.causality import CausalityError
from ..cluster.training import TrainingFailed
from . import distill, initialize
from .distill import DistillJob
from .initialize import InitializeJob
from .training import RECIPE, RUN

TEACHER = "teacher"
Job = InitializeJob | DistillJob
CarryOut = Callable[[Job], bool]


@dataclass(frozen=True)
class Row:
    """A row of the table. name: also of its folder. needs: rows whose models its training begins with or uses."""

    name: str
    title: str
    needs: tuple[str, ...] = ()


# In the order of training, which is that of the table. The first six are those of CausVid (arXiv 2412.07772, table 4).
ROWS = (
    Row(TEACHER, "teacher, bidirectional"),
    Row("causal-teacher", "causal, many steps (diffusion forcing)"),
    Row("ode", "ODE initialisation only"),
    Row("dmd-without-ode", "DMD without ODE initialisation"),
    Row("dmd-causal-teacher", "ODE initialisation, DMD with a causal teacher", ("causal-teacher", "ode")),
    Row("causvid", "CausVid: ODE initialisation, DMD with the bidirectional teacher", ("ode",)),
    Row("self-forcing", "+ Self-Forcing", ("causvid",)),
    Row("long", "+ long rollouts", ("self-forcing",)),
)
BY_NAME = {row.name: row for row in ROWS}


@dataclass(frozen=True)
class Ablation:
    """What is asked for, all but the evaluation.

    recipe: resolved. data: trajectories of the teacher. latents: clips for the causal teacher and for DMD, the ends of
    the trajectories by default. prompts: of the methods without data. given: {row: model folder} of rows that were
    trained elsewhere. recipe_options: how the recipe was given on the command line.
    """

    recipe: dict[str, Any]
    teacher: Path
    data: str
    latents: str
    prompts: str
    run: Path
    engine: str = "plain"
    given: Mapping[str, Path] = field(default_factory=dict)
    recipe_options: tuple[str, ...] = ()

    def model(self, row: str) -> Path:
        """The model folder of a row, whether it is there or not."""
        if row == TEACHER:
            return self.teacher
        return self.given.get(row) or self.run / row / "model"

    def is_there(self, row: str) -> bool:
        """Whether the row has a model. A run that goes on has none yet, even if an earlier one left its folder."""
        if row == TEACHER or row in self.given:
            return True
        return record_of(self.run / row).get("status") == "finished" and self.model(row).is_dir()

    def job(self, row: str) -> Job:
        """The training of a row."""
        run, teacher = str(self.run / row), str(self.teacher)
        if row in ("ode", "causal-teacher"):
            data = self.data if row == "ode" else self.latents
            return InitializeJob(self.recipe, row, teacher, teacher, data, run, self.engine)
        starts = {
            "dmd-without-ode": TEACHER,
            "dmd-causal-teacher": "ode",
            "causvid": "ode",
            "self-forcing": "causvid",
            "long": "self-forcing",
        }
        start = str(self.model(starts[row]))
        if row == "dmd-causal-teacher":
            teacher = str(self.model("causal-teacher"))
        method = row if row in ("self-forcing", "long") else "causvid"
        data, prompts = (self.latents, None) if method == "causvid" else (None, self.prompts)
        return DistillJob(self.recipe, method, start, teacher, data, prompts, run, self.engine)

    def command(self, row: str) -> str:
        """The command that carries out the training of a row by itself."""
        job = self.job(row)
        common = ["--teacher", job.teacher, "--run", job.run, *self.recipe_options]
        if isinstance(job, InitializeJob):
            words = ["initialize", "--method", job.method, *common, "--data", job.data]
        else:
            source = ["--data", job.data] if job.data else ["--prompts", str(job.prompts)]
            start = [] if job.student == job.teacher else ["--student", job.student]
            words = ["distill", "--method", job.method, *common, *start, *source]
        return "reelway " + shlex.join(words)


def chosen_rows(names: str | None) -> list[str]:
    """The rows of a comma-separated list, all without one; ValueError for a name that is none."""
    if names is None:
        return [row.name for row in ROWS]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in BY_NAME:
            raise ValueError(f"--rows: must be of {', '.join(BY_NAME)}, got {name!r}")
    return [row.name for row in ROWS if row.name in wanted]


def with_needs(wanted: Iterable[str], given: Iterable[str] = ()) -> list[str]:
    """The rows that have to be trained for these, in order; what is given needs nothing."""
    given, needed = set(given), set(wanted)
    for row in reversed(ROWS):
        if row.name in needed - given:
            needed |= set(row.needs)
    return [row.name for row in ROWS if row.name in needed - given - {TEACHER}]


def train_rows(ablation: Ablation, wanted: list[str], carry_out: CarryOut, console: Console) -> dict[str, str]:
    """Train what these rows need; {row: reason} of the rows that could not be.

    A finished stage is left as it is, an interrupted one goes on. A stage that breaks down takes only those along
    that begin with it. KeyboardInterrupt after Ctrl-C, ValueError on what was asked for wrongly.
    """
    reasons: dict[str, str] = {}
    for name in with_needs(wanted, ablation.given):
        lacking = [need for need in BY_NAME[name].needs if need in reasons]
        if lacking:
            reasons[name] = f"needs {lacking[0]}, which is not there"
            continue
        console.print(f"{name}: {ablation.command(name)}")
        try:
            passed = carry_out(ablation.job(name))
        except (FloatingPointError, CausalityError, TrainingFailed) as error:
            reasons[name] = f"its training stopped: {error}"
            console.print(f"{name}: {reasons[name]}")
            continue
        if not passed:
            console.print(f"{name}: made, but did not pass its gate, see {ablation.run / name / RUN}")
    return reasons


def carry_out_here(job: Job, device: str) -> bool:
    """A training in this process, with the plain engine."""
    from ..actors.engine import OneRank
    from .commands import plain_engines

    if isinstance(job, InitializeJob):
        return initialize.train(job, plain_engines(device), OneRank())
    return distill.train(job, plain_engines(device), OneRank())


def record_of(run: Path) -> dict[str, Any]:
    """run.json of a training, empty where there is none."""
    path = run / RUN
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def recipe_of(run: Path) -> dict[str, Any]:
    """recipe.json of a training, empty where there is none."""
    path = run / RECIPE
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def why_missing(ablation: Ablation, row: str) -> str:
    """Why a row has no model, as its folder tells it."""
    record = record_of(ablation.run / row)
    status = record.get("status")
    if status is None:
        return "not trained"
    if status == "stopped":
        return f"its training stopped: {record.get('reason', 'no reason was written')}"
    return f"its training is not finished ({status}, step {record.get('step', 0)})"
