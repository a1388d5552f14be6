"""The loop of every training stage, in one process or as one rank of many: it knows neither engines nor Ray."""

import json
import os
import shutil
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from ..actors.engine import Engine, OptimizerSettings, Ranks
from ..actors.learning.batch import Batch
from ..actors.learning.causality import CausalityError
from .recipe import TelemetryRecipe, TrainingOptimizerRecipe, TrainingRecipe, fingerprint
from .samples import Batches
from .telemetry import Telemetry, finishing_the_step
from .trackers import open_trackers

RUN, RECIPE, MARK = "run.json", "recipe.json", "complete.json"
# Fields of a recipe that say how a stage is run and not what it makes: they may change when it goes on.
HOW = ("micro_batch", "checkpoint_every", "keep", "sheet_every", "activation_checkpointing", "diverged")
LATER = {"teacher_forcing": False}  # fields that recipes did not always have, and what runs without them are
MEMORY, ENOUGH = 50, 20  # losses of which the median is taken, and how many it takes to say anything

EngineFactory = Callable[[Any, OptimizerSettings], Engine]  # a network (nn.Module) and how it is trained
Report = Callable[[dict[str, float]], None]  # of a step's metrics
Interrupted = Callable[[], bool]  # whether the host of this process wants an end


class Sheet(Protocol):
    """Draws what the student makes."""

    def __call__(self, done: int) -> dict[str, float]:
        """The sheet after so many steps; its mean scores by name, where something grades it. Every rank calls."""
        ...

    def path(self, done: int) -> Path:
        """Its file."""
        ...


class StageLearner(Protocol):
    """What the loop needs of a learner. Every rank makes the same calls."""

    @property
    def updates(self) -> int:
        """Steps done."""
        ...

    def step(self, batch: Batch) -> dict[str, float]:
        """One update; the metrics are the same on every rank, `loss` among them. FloatingPointError if not finite."""
        ...

    def check_causality(self, batch: Batch) -> None:
        """CausalityError where the forward pass that trains sees the future."""
        ...

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Stage:
    """A stage of training in a folder that every rank sees.

    identity: all that decides what comes out; a run goes on only under the same.
    """

    name: str
    folder: Path
    recipe: TrainingRecipe
    identity: dict[str, Any] = field(default_factory=dict)

    def full_identity(self) -> dict[str, Any]:
        fields = self.recipe.model_dump(mode="json", exclude=set(HOW))
        recipe = {name: value for name, value in fields.items() if name not in LATER or value != LATER[name]}
        return {"stage": self.name, "recipe": recipe, **self.identity}

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.full_identity())


def run_stage(
    stage: Stage,
    learner: StageLearner,
    batches: Batches,
    ranks: Ranks,
    *,
    report: Report | None = None,
    sheet: Sheet | None = None,
    interrupted: Interrupted | None = None,
    console: Console | None = None,
    telemetry: TelemetryRecipe | None = None,
) -> None:
    """Train to the stage's last step, going on from its newest checkpoint.

    Before the first step the causality self-test runs. Ctrl-C (or `interrupted`), on any rank, ends the step, saves a
    checkpoint and raises KeyboardInterrupt on every rank. A loss or gradient that is not finite, or a loss that has
    run away, raises FloatingPointError with the step and the samples; a sample that cannot be used, where that is
    fatal, ShardError. run.json says what happened. ValueError, with what differs, where the folder holds another run.
    """
    claim(stage, ranks)
    checkpoints = Checkpoints(stage.folder / "checkpoints", stage.recipe.keep, ranks)
    start = checkpoints.restore(learner, batches)
    record = RunRecord(stage.folder / RUN, ranks)
    record.write(stage=stage.name, fingerprint=stage.fingerprint, status="running")
    loop = _Loop(stage, learner, batches, ranks, checkpoints, report, sheet)
    try:
        with finishing_the_step() as signalled, _shown(stage, start, ranks, console, telemetry) as shown:
            loop.run(start, shown, lambda: signalled.is_set() or (interrupted is not None and interrupted()))
    except KeyboardInterrupt:
        record.write(status="interrupted", step=learner.updates, left_out=_left_out(batches, ranks))
        raise
    except (ValueError, OSError, ArithmeticError, CausalityError) as error:
        # What stops a run may have happened on one rank alone, while the first waits for it.
        record.write_here(status="stopped", reason=str(error), step=learner.updates, left_out=batches.left_out)
        raise
    record.write(status="trained", step=learner.updates, left_out=_left_out(batches, ranks), causality="passed")


@contextmanager
def _shown(
    stage: Stage, start: int, ranks: Ranks, console: Console | None, recipe: TelemetryRecipe | None
) -> Iterator[Telemetry | None]:
    """Rank 0's telemetry, closed with the block."""
    if ranks.rank:
        yield None
        return
    trackers = open_trackers(recipe, stage.name, stage.folder, stage.full_identity()) if recipe else []
    telemetry = Telemetry(stage.name, stage.folder, start, stage.recipe.steps, console, trackers)
    failed = True
    try:
        yield telemetry
        failed = False
    finally:
        telemetry.close(failed=failed)


def _left_out(batches: Batches, ranks: Ranks) -> int:
    """Of all ranks."""
    return round(ranks.mean({"left_out": float(batches.left_out)})["left_out"] * ranks.size)


@dataclass
class _Loop:
    stage: Stage
    learner: StageLearner
    batches: Batches
    ranks: Ranks
    checkpoints: "Checkpoints"
    report: Report | None
    sheet: Sheet | None
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY))

    def run(self, start: int, telemetry: Telemetry | None, is_interrupted: Callable[[], bool]) -> None:
        steps = self.stage.recipe.steps
        # A checkpoint stands before its sheet is drawn: a run that went on from there may lack it.
        self._draw(start, telemetry)
        for step in range(start, steps):
            batch = self.batches.take(step)
            if step == start:
                self.learner.check_causality(batch)
            metrics = self._step(batch)
            if telemetry:
                telemetry.step(step, metrics)
            done = step + 1
            stops = self.ranks.mean({"stops": float(is_interrupted())})["stops"] > 0
            saves = stops or done == steps or done % self.stage.recipe.checkpoint_every == 0
            if saves:
                self.checkpoints.save(done, self.learner, self.batches)
            if self.report:
                self.report({"step": float(done), **metrics})
            if stops:
                raise KeyboardInterrupt
            self._draw(done, telemetry)

    def _step(self, batch: Batch) -> dict[str, float]:
        try:
            metrics = self.learner.step(batch)
            self._must_not_diverge(metrics["loss"])
        except FloatingPointError as error:
            # Every rank comes here: the norm of the gradients, and the loss, are those of all.
            keys = ", ".join(self.ranks.gather(", ".join(batch.keys)))
            kept = self.checkpoints.newest()
            where = f"step {batch.step} of {self.stage.name}"
            saved = f"the newest checkpoint is that of step {kept}" if kept else "there is no checkpoint yet"
            raise FloatingPointError(f"{where}: {error}; samples {keys}; {saved}") from None
        return metrics

    def _must_not_diverge(self, loss: float) -> None:
        """FloatingPointError where a loss is far from the last ones; it is then not saved in a checkpoint."""
        if len(self.losses) >= ENOUGH:
            usual, limit = statistics.median(self.losses), self.stage.recipe.diverged
            if loss > limit * usual:
                raise FloatingPointError(f"diverged: loss {loss:.4g}, above {limit:g} times the usual {usual:.4g}")
        self.losses.append(loss)

    def _draw(self, done: int, telemetry: Telemetry | None) -> None:
        """A sheet, if one is due; every rank makes its calls, rank 0 keeps it."""
        recipe = self.stage.recipe
        if self.sheet is None or not (done == recipe.steps or done % recipe.sheet_every == 0):
            return
        scores = self.sheet(done)
        if telemetry:
            telemetry.sheet(done, self.sheet.path(done), scores)


class Checkpoints:
    """`step-<N>/` folders that appear whole or not at all; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks) -> None:
        self._folder = folder
        self._keep = keep
        self._ranks = ranks

    def newest(self) -> int:
        """Steps of the newest checkpoint, 0 where there is none."""
        return max(self._steps(), default=0)

    def save(self, done: int, learner: StageLearner, batches: Batches) -> None:
        """Every rank writes its part into a temporary folder; rank 0 gives it its name."""
        target, temporary = self._path(done), self._folder / f"step-{done:06d}.partial"
        if self._ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._ranks.barrier()
        learner.save(temporary)
        batches.save(temporary / "samples")
        self._ranks.barrier()
        if self._ranks.rank == 0:
            (temporary / MARK).write_text(json.dumps({"step": done}) + "\n")
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            for old in sorted(self._steps())[: -self._keep]:
                shutil.rmtree(self._path(old))
        self._ranks.barrier()

    def restore(self, learner: StageLearner, batches: Batches) -> int:
        """Go on from the newest checkpoint; the steps done by then."""
        done = self.newest()
        if done:
            learner.load(self._path(done))
            batches.load(self._path(done) / "samples")
            assert learner.updates == done, f"{self._path(done)} holds {learner.updates} updates"
        return done

    def _path(self, done: int) -> Path:
        return self._folder / f"step-{done:06d}"

    def _steps(self) -> list[int]:
        return [int(path.parent.name.removeprefix("step-")) for path in self._folder.glob(f"step-??????/{MARK}")]


class RunRecord:
    """run.json: what a stage is, how far it came, why it stopped, what its gate says. Written by rank 0."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self._path = path
        self._writes = ranks.rank == 0

    def read(self) -> dict[str, Any]:
        """All that was written so far."""
        content: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}
        return content

    def is_finished(self, stage: "Stage") -> bool:
        """Whether this very stage was carried out to its end."""
        content = self.read()
        return content.get("status") == "finished" and content.get("fingerprint") == stage.fingerprint

    def gate_passed(self) -> bool:
        """The verdict that was written."""
        return bool(self.read()["gate"]["passed"])

    def write(self, **values: Any) -> None:
        """Put values beside, or in place of, those that are there; a new status forgets the last one's reason."""
        if self._writes:
            self.write_here(**values)

    def write_here(self, **values: Any) -> None:
        """`write`, on whatever rank."""
        content = {name: value for name, value in self.read().items() if name != "reason" or "status" not in values}
        write_json(self._path, content | values)


def claim(stage: Stage, ranks: Ranks) -> None:
    """Write the resolved recipe beside the results; ValueError where the folder holds another run's results."""
    path, identity = stage.folder / RECIPE, stage.full_identity()
    if path.exists():
        before = json.loads(path.read_text())
        before.pop("fingerprint")
        if before != json.loads(json.dumps(identity)):
            raise ValueError(f"{stage.folder}: made by another run; {differences(before, identity)}")
    ranks.barrier()
    if ranks.rank == 0:
        stage.folder.mkdir(parents=True, exist_ok=True)
        for torn in stage.folder.glob("*.json.*.partial"):  # of a process that was killed while it wrote
            torn.unlink()
        if not path.exists():
            write_json(path, {"fingerprint": stage.fingerprint, **identity})
    ranks.barrier()


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """What differs between two tables, in words."""
    parts = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            parts.append(differences(old, new, f"{prefix}{key}."))
        elif old != new:
            parts.append(f"{prefix}{key} is {old} there and {new} now")
    return "; ".join(part for part in parts if part)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def optimizer_settings(recipe: TrainingOptimizerRecipe, steps: int) -> OptimizerSettings:
    """The recipe's optimiser for a run of `steps` updates."""
    return OptimizerSettings(total_steps=steps, **recipe.model_dump())


@dataclass(frozen=True)
class Check:
    """One condition of a gate. measured: None where nothing was there to measure, which is no failure."""

    name: str
    rule: str
    measured: float | None
    passed: bool


def close_gate(record: RunRecord, checks: list[Check]) -> bool:
    """Write a stage's verdict to run.json; whether it passed."""
    passed = all(check.passed for check in checks)
    table = {check.name: {"rule": check.rule, "measured": check.measured, "passed": check.passed} for check in checks}
    record.write(gate={"passed": passed, "checks": table})
    return passed
