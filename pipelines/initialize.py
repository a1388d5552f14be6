"""`reelway initialize`: a causal student from a teacher's trajectories, or a causal many-step model from its clips."""

import enum
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..actors.engine import Ranks
from ..actors.learning.batch import PromptContexts
from ..actors.learning.regression import CausalTeacherLearner, LearnerSettings, OdeLearner
from ..actors.model_files import check_model, transformer_config, velocity_digest
from ..kernels.causal.student import StudentSettings
from .commands import (
    AddressOption,
    CpusOption,
    DeviceOption,
    DryOption,
    EngineKind,
    EngineOption,
    RecipeOption,
    RunOption,
    SetOption,
    Where,
    WorkersOption,
    carry_out,
)
from .memory import TrainedClips, TrainedNetwork, TrainingMemory, held_parts, text_dtype
from .recipe import TINY, CausalTeacherRecipe, InitializeRecipe, Recipe, ZeroRecipe, load_recipe
from .samples import Batches, Deal, ShardBatches, TrainingData
from .students import (
    Load,
    Parts,
    SheetPrompts,
    StudentSheets,
    export_student,
    has_own_encoder,
    load_network,
    origin_of,
)
from .telemetry import read_curve
from .training import (
    RUN,
    Check,
    EngineFactory,
    Interrupted,
    Report,
    RunRecord,
    Stage,
    StageLearner,
    close_gate,
    optimizer_settings,
    run_stage,
)

STILL_FALLING = 0.95  # the loss of a quarter over that of the quarter before: below this it has not flattened
STEPS_TO_TELL = 40  # fewer say nothing about a curve

app = typer.Typer(add_completion=False, help="Train a causal student on a teacher's trajectories (ODE initialisation).")


class Method(enum.StrEnum):
    ode = "ode"
    causal_teacher = "causal-teacher"


@dataclass(frozen=True)
class InitializeJob:
    """All that one process needs to do its part; plain and picklable.

    recipe: the resolved recipe. start: the model folder whose transformer training begins with.
    """

    recipe: dict[str, Any]
    method: str
    teacher: str
    start: str
    data: str
    run: str
    engine: str = "plain"

    def zero(self, recipe: Recipe) -> ZeroRecipe | None:
        """The recipe's ZeRO, where the engine is that."""
        return recipe.zero if self.engine == "zero" else None

    def settings(self) -> tuple[Recipe, InitializeRecipe | CausalTeacherRecipe, StudentSettings]:
        """The recipe, the section of the method, and the student."""
        recipe = Recipe.model_validate(self.recipe)
        section = recipe.initialize if self.method == Method.ode else recipe.causal_teacher
        return recipe, section, recipe.student.settings()


@app.command()
def initialize_command(
    teacher: Annotated[Path, typer.Option(help="Model folder in the diffusers layout.")],
    data: Annotated[str, typer.Option(help="Trajectories of this teacher; for causal-teacher latents do, too.")],
    run: RunOption,
    method: Annotated[Method, typer.Option(help="ode: the student. causal-teacher: a many-step model.")] = Method.ode,
    start: Annotated[Path | None, typer.Option(help="Begin with this model's weights, not the teacher's.")] = None,
    recipe: RecipeOption = TINY,
    override: SetOption = None,
    device: DeviceOption = "cpu",
    engine: EngineOption = EngineKind.plain,
    workers: WorkersOption = 1,
    cpus_per_worker: CpusOption = 1.0,
    address: AddressOption = None,
    dry: DryOption = False,
) -> None:
    """Train in RUN; the finished model is RUN/model, in the diffusers layout, with student.json."""
    where = Where(device, engine, workers, cpus_per_worker, address)
    resolved = load_recipe(recipe, override).model_dump(mode="json")
    job = InitializeJob(resolved, method.value, str(teacher), str(start or teacher), data, str(run), engine.value)
    carry_out("initialize", job, where, train, memory, dry=dry)


def train(
    job: InitializeJob,
    engine_factory: EngineFactory,
    ranks: Ranks,
    report: Report | None = None,
    interrupted: Interrupted | None = None,
    console: Console | None = None,
    load: Load = load_network,
) -> bool:
    """One process's part of the training, in a folder that all see; whether the gate passed.

    A finished run is left as it is. load: how a network comes into memory.
    """
    recipe, section, student = job.settings()
    data = TrainingData.open(job.data, student, clean_only=job.method != Method.ode)
    check_model(Path(job.teacher))
    stage = Stage(f"initialize-{job.method}", Path(job.run), section, _identity(job, recipe, data))
    record = RunRecord(stage.folder / RUN, ranks)
    if record.is_finished(stage):
        return record.gate_passed()
    parts = Parts.load(Path(job.teacher), text_dtype(job.zero(recipe))).of_student(Path(job.start))
    network = load(Path(job.start))
    network.gradient_checkpointing = section.activation_checkpointing
    engine = engine_factory(network, optimizer_settings(section.optimizer, section.steps))
    parts = parts.to(engine.device)
    contexts = PromptContexts(parts.encoder, engine.device)
    learner = _learner(job, recipe, engine, contexts, parts.shift, ranks)
    batches = ShardBatches(data, Deal.of(section, ranks))
    prompts = SheetPrompts.choose(recipe, data.some_prompts)
    frames, _, height, width = data.shape
    size, config = (frames, height, width), transformer_config(Path(job.start))
    folder, at_once = stage.folder / "sheets", section.micro_batch
    sheet = StudentSheets(folder, engine, parts, config, student, prompts, size, ranks, at_once=at_once)
    run_stage(
        stage,
        learner,
        batches,
        ranks,
        report=report,
        # The chunk generator takes few steps: of a many-step model it would show noise.
        sheet=sheet if job.method == Method.ode else None,
        interrupted=interrupted,
        console=console,
        telemetry=recipe.telemetry,
    )
    passed = close_gate(record, [_causality_check(), _flattened(stage.folder)])
    weights = engine.averaged_weights()
    if ranks.rank == 0:
        made = student if job.method == Method.ode else replace(student, sampling="many-step")
        export_student(stage.folder, parts, config, weights, made, _origin(job, stage, batches), (height, width))
    record.write(status="finished")
    ranks.barrier()
    return passed


def memory(job: InitializeJob) -> TrainingMemory:
    """What a device holds."""
    recipe, section, student = job.settings()
    data = TrainingData.open(job.data, student, clean_only=job.method != Method.ode)
    config = transformer_config(Path(job.start))
    averages = section.optimizer.ema_decay > 0
    frames, _, height, width = data.shape
    is_ode, tuned = job.method == Method.ode, recipe.causal_teacher
    twice = recipe.initialize.teacher_forcing if is_ode else tuned.context == "clean"
    tokens = config.tokens_per_frame(height, width)
    clips = TrainedClips(
        section.micro_batch or section.batch, (1 + twice) * frames, tokens, section.activation_checkpointing
    )
    text = job.start if has_own_encoder(Path(job.start), Path(job.teacher)) else job.teacher
    others = held_parts(Path(job.teacher), [Path(text)], text_dtype(job.zero(recipe)))
    return TrainingMemory([TrainedNetwork("student", config, averages=averages)], clips, others)


def _learner(
    job: InitializeJob, recipe: Recipe, engine: Any, contexts: PromptContexts, shift: float, ranks: Ranks
) -> StageLearner:
    _, section, student = job.settings()
    settings = LearnerSettings(section.seed, section.micro_batch)
    if job.method == Method.ode:
        forcing = recipe.initialize.teacher_forcing
        return OdeLearner(engine, contexts, student, settings, ranks, teacher_forcing=forcing)
    tuned = recipe.causal_teacher
    return CausalTeacherLearner(
        engine,
        contexts,
        student,
        tuned.context,
        shift=shift,
        prompt_drop=tuned.prompt_drop,
        settings=settings,
        ranks=ranks,
    )


def _identity(job: InitializeJob, recipe: Recipe, data: TrainingData) -> dict[str, Any]:
    return {
        "engine": job.engine,
        "student": recipe.student.model_dump(mode="json"),
        "teacher": velocity_digest(Path(job.teacher)),
        "start": velocity_digest(Path(job.start)),
        "data": data.info.fingerprint,
    }


def _origin(job: InitializeJob, stage: Stage, batches: Batches) -> dict[str, Any]:
    """What student.json says of where the student came from."""
    return {
        "method": stage.name,
        "recipe": stage.fingerprint,
        "steps": stage.recipe.steps,
        "data": batches.origin,
        "parent": {"model": Path(job.start).name, "digest": stage.identity["start"], **origin_of(Path(job.start))},
    }


def _causality_check() -> Check:
    """`run_stage` refuses to train without it, so what was trained has passed it."""
    return Check("causality", "no frame's output may depend on later blocks, bit by bit", 0.0, True)


def _flattened(folder: Path) -> Check:
    """Whether the loss has stopped falling: the last quarter against the one before."""
    losses = [row["loss"] for row in read_curve(folder / "curve.jsonl")]
    rule = f"mean loss of the last quarter at least {STILL_FALLING} of the quarter's before"
    if len(losses) < STEPS_TO_TELL:
        return Check("loss_flattened", f"{rule}; needs {STEPS_TO_TELL} steps to tell", None, True)
    quarter = len(losses) // 4
    last, before = (sum(part) / quarter for part in (losses[-quarter:], losses[-2 * quarter : -quarter]))
    return Check("loss_flattened", rule, last / before, last >= STILL_FALLING * before)
