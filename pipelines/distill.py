"""`reelway distill`: match a student to its teacher in distribution: CausVid, Self-Forcing, long rollouts."""

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import Tensor, nn

from ..actors.engine import Engine, Ranks, computed_dtype
from ..actors.learning.batch import Draws, PromptContexts
from ..actors.learning.distillation import DmdLearner, DmdSettings
from ..actors.learning.long_rollouts import LongRollouts
from ..actors.learning.regression import student_mask
from ..actors.learning.sources import ClipSource, NoisedClips, Rollouts, RolloutShape, StudentRollout
from ..actors.model_files import check_model, latents_shape, transformer_config, velocity_digest
from ..kernels.causal.masks import FrameMask
from ..kernels.causal.student import StudentSettings
from ..kernels.wan.transformer import VideoTransformer
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
from .recipe import TINY, DistillRecipe, Recipe, TrainingOptimizerRecipe, ZeroRecipe, load_recipe
from .samples import SPRITES, Batches, Deal, PromptBatches, ShardBatches, TrainingData, training_prompts
from .students import (
    Load,
    Parts,
    Scores,
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
    close_gate,
    optimizer_settings,
    run_stage,
)

SCORE_TOLERANCE = 0.02  # of a sheet's mean score, which is a mean over few clips
VIEWED_TIMESTEP = 500.0  # at which sheets show the score networks' view

Freeze = Callable[[nn.Module, Engine], nn.Module]  # a network for forward passes only, held beside an engine

app = typer.Typer(add_completion=False, help="Distil an initialised student from its bidirectional teacher.")


class Method(enum.StrEnum):
    causvid = "causvid"
    self_forcing = "self-forcing"
    long = "long"


@dataclass(frozen=True)
class DistillJob:
    """All that one process needs to do its part; plain and picklable.

    recipe: the resolved recipe. student: the model to begin with; the teacher's own folder begins without any
    initialisation. data: the data set of `causvid`. prompts: of the methods without data. critic: the model that the
    fake score begins with, None for the teacher: a small one beside a large teacher.
    """

    recipe: dict[str, Any]
    method: str
    student: str
    teacher: str
    data: str | None
    prompts: str | None
    run: str
    engine: str = "plain"
    critic: str | None = None

    def zero(self, recipe: Recipe) -> ZeroRecipe | None:
        """The recipe's ZeRO, where the engine is that."""
        return recipe.zero if self.engine == "zero" else None

    def settings(self) -> tuple[Recipe, DistillRecipe]:
        """The recipe and its section of the method."""
        recipe = Recipe.model_validate(self.recipe)
        sections = {
            Method.causvid: recipe.distill.causvid,
            Method.self_forcing: recipe.distill.self_forcing,
            Method.long: recipe.distill.long,
        }
        return recipe, sections[Method(self.method)]

    def student_settings(self) -> StudentSettings:
        """The recipe's student; ValueError where the model that is given is another one in what it has learned."""
        wanted = self.settings()[0].student.settings()
        if self.student == self.teacher and not _is_causal(Path(self.teacher)):
            return wanted
        found = StudentSettings.read(Path(self.student))
        for name in ("block", "first_block", "timesteps"):
            have, want = vars(found)[name], vars(wanted)[name]
            if have != want:
                raise ValueError(f"{self.student}: student.json: {name} is {have}, the recipe's student has {want}")
        return wanted

    def shape(self) -> tuple[int, int, int, int]:
        """[F, C, H, W] of the clips."""
        clip = self.settings()[0].clip
        return latents_shape(Path(self.teacher), clip.height, clip.width, clip.frames)


@app.command()
def distill_command(
    method: Annotated[Method, typer.Option(help="How the student's clips are made.")],
    teacher: Annotated[Path, typer.Option(help="Model folder of the teacher: bidirectional, or causal of many steps.")],
    run: RunOption,
    student: Annotated[
        Path | None, typer.Option(help="Model folder of the student to begin with; the teacher's weights by default.")
    ] = None,
    critic: Annotated[
        Path | None, typer.Option(help="Model folder whose weights the fake score begins with; the teacher by default.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="causvid: a data set of latents or trajectories.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help=f"The others: a file, a data set (its captions), or {SPRITES}.")
    ] = None,
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
    needed, given = ("--data", data) if method == Method.causvid else ("--prompts", prompts)
    if given is None:
        raise ValueError(f"{needed}: --method {method.value} needs it")
    resolved = load_recipe(recipe, override).model_dump(mode="json")
    start, fake = str(student or teacher), str(critic) if critic else None
    job = DistillJob(resolved, method.value, start, str(teacher), data, prompts, str(run), engine.value, fake)
    carry_out("distill", job, where, train, memory, dry=dry)


def hold_whole(network: nn.Module, engine: Engine) -> nn.Module:
    """The plain way to hold a frozen network: whole, in the precision that the engine computes in.

    What autocast would make of float32 weights in every pass, they are once and for all.
    """
    computed = computed_dtype(engine)
    held = network.to_precision(computed) if isinstance(network, VideoTransformer) else network
    return held.to(engine.device)


def train(
    job: DistillJob,
    engine_factory: EngineFactory,
    ranks: Ranks,
    report: Report | None = None,
    interrupted: Interrupted | None = None,
    console: Console | None = None,
    freeze: Freeze = hold_whole,
    load: Load = load_network,
) -> bool:
    """One process's part of the training, in a folder that all see; whether the gate passed.

    A finished run is left as it is. load, freeze: how a network comes into memory, and how the teacher's is held.
    """
    recipe, section = job.settings()
    student = job.student_settings()
    check_model(Path(job.teacher))
    data, batches = _batches(job, recipe, student, ranks)
    stage = Stage(f"distill-{job.method}", Path(job.run), section, _identity(job, recipe, batches))
    record = RunRecord(stage.folder / RUN, ranks)
    if record.is_finished(stage):
        return record.gate_passed()
    teachers = Parts.load(Path(job.teacher), text_dtype(job.zero(recipe)))
    own = teachers.of_student(Path(job.student))
    engines = _engines(job, section, engine_factory, load)
    device = engines[0].device
    teachers, own = teachers.to(device), own.to(device)
    shape = data.shape if data else job.shape()
    source = _source(job, student, engines[0], PromptContexts(own.encoder, device), own, shape, ranks)
    learner = DmdLearner(
        *engines,
        freeze(load(Path(job.teacher)), engines[1]),
        PromptContexts(teachers.encoder, device),
        source,
        _dmd_settings(recipe, section),
        ranks,
        score_mask(Path(job.teacher)),
    )
    prompts = SheetPrompts.choose(recipe, data.some_prompts if data else lambda: batches.take(0).prompts)
    sheet = StudentSheets(
        stage.folder / "sheets",
        engines[0],
        own,
        transformer_config(Path(job.student)),
        student,
        prompts,
        (shape[0], shape[2], shape[3]),
        ranks,
        _scores(learner),
        section.micro_batch,
    )
    run_stage(
        stage,
        learner,
        batches,
        ranks,
        report=report,
        sheet=sheet,
        interrupted=interrupted,
        console=console,
        telemetry=recipe.telemetry,
    )
    passed = close_gate(record, gate(stage.folder))
    _export(job, stage, own, engines[0], student, batches, (shape[2], shape[3]), ranks)
    record.write(status="finished")
    ranks.barrier()
    return passed


def memory(job: DistillJob) -> TrainingMemory:
    """What a device holds."""
    recipe, section = job.settings()
    settings = job.student_settings()
    student, critic, teacher = (
        transformer_config(Path(folder)) for folder in (job.student, job.critic or job.teacher, job.teacher)
    )
    frames, _, height, width = job.shape()
    clips = TrainedClips(
        section.micro_batch or section.batch,
        frames,
        student.tokens_per_frame(height, width),
        section.activation_checkpointing,
        settings.window if job.method != Method.causvid else 0,
    )
    networks = [
        TrainedNetwork("student", student, averages=section.student.ema_decay > 0),
        TrainedNetwork("critic", critic, averages=section.critic.ema_decay > 0),
        TrainedNetwork("teacher", teacher, trained=False),
    ]
    has_two = has_own_encoder(Path(job.student), Path(job.teacher))
    texts = [Path(job.student), Path(job.teacher)] if has_two else [Path(job.teacher)]
    return TrainingMemory(networks, clips, held_parts(Path(job.teacher), texts, text_dtype(job.zero(recipe))))


def gate(folder: Path) -> list[Check]:
    """Whether a distillation can be believed: its gradient was a number throughout, its samples did not get worse."""
    moved = [row for row in read_curve(folder / "curve.jsonl") if "dmd_gradient" in row]
    bad = sum(row["dmd_non_finite"] for row in moved)
    finite = bad == 0 and all(math.isfinite(row["dmd_gradient"]) for row in moved)
    checks = [Check("gradient_finite", "no element of the DMD gradient that is not a number", bad, finite)]
    scores = [row["score"] for row in read_curve(folder / "scores.jsonl") if "score" in row]
    rule = f"the last sheet's mean score at most {SCORE_TOLERANCE} below the first's"
    if len(scores) < 2:
        return [*checks, Check("score_kept", f"{rule}; nothing here grades the prompts", None, True)]
    change = scores[-1] - scores[0]
    return [*checks, Check("score_kept", rule, change, change >= -SCORE_TOLERANCE)]


def _batches(
    job: DistillJob, recipe: Recipe, student: StudentSettings, ranks: Ranks
) -> tuple[TrainingData | None, Batches]:
    deal = Deal.of(job.settings()[1], ranks)
    if job.method == Method.causvid:
        assert job.data is not None
        data = TrainingData.open(job.data, student, clean_only=True)
        return data, ShardBatches(data, deal)
    assert job.prompts is not None
    student.blocks(job.shape()[0])
    return None, PromptBatches(training_prompts(job.prompts, recipe), deal)


def _engines(
    job: DistillJob, section: DistillRecipe, engine_factory: EngineFactory, load: Load
) -> tuple[Engine, Engine]:
    """The student's and the critic's, which begins as the teacher or as the model that is given for it."""

    def engine(folder: str, optimizer: TrainingOptimizerRecipe, updates: int) -> Engine:
        network = load(Path(folder))
        network.gradient_checkpointing = section.activation_checkpointing
        return engine_factory(network, optimizer_settings(optimizer, updates))

    critic = job.critic or job.teacher
    updates = section.steps // section.critic_updates
    return engine(job.student, section.student, updates), engine(critic, section.critic, section.steps)


def _source(
    job: DistillJob,
    student: StudentSettings,
    engine: Engine,
    contexts: PromptContexts,
    parts: Parts,
    shape: Sequence[int],
    ranks: Ranks,
) -> ClipSource:
    _, section = job.settings()
    if job.method == Method.causvid:
        return NoisedClips(engine, contexts, student, section.seed)
    frames, _, height, width = shape
    rolled = RolloutShape(transformer_config(Path(job.student)), frames, height, width)
    rollout = StudentRollout(engine, contexts, student, rolled, ranks, section.seed)
    if job.method == Method.self_forcing:
        return Rollouts(rollout)
    return LongRollouts(rollout, parts.vae, section.rollout_frames or 2 * frames, switch=section.switch)


def _dmd_settings(recipe: Recipe, section: DistillRecipe) -> DmdSettings:
    return DmdSettings(
        guidance=section.guidance,
        shift=section.shift,
        smallest_timestep=section.smallest_timestep,
        largest_timestep=section.largest_timestep,
        critic_updates=section.critic_updates,
        negative_prompt=recipe.trajectories.negative_prompt,
        seed=section.seed,
        micro_batch=section.micro_batch,
    )


def _scores(learner: DmdLearner) -> Scores:
    """The score networks' view of a sheet's clips, always with the same noise."""

    def scores(latents: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        noise = Draws(0, 0).noise_like(latents, range(len(latents)), "sheet")
        return learner.scores(latents, prompts, VIEWED_TIMESTEP, noise)

    return scores


def _is_causal(teacher: Path) -> bool:
    return (teacher / "student.json").is_file()


def score_mask(teacher: Path) -> Callable[[int], FrameMask] | None:
    """The mask under which both score networks see a clip: None for a bidirectional teacher, a causal one's own.

    ValueError for a student of few steps: it has no score.
    """
    if not _is_causal(teacher):
        return None
    settings = StudentSettings.read(teacher)
    if settings.sampling != "many-step":
        raise ValueError(f"{teacher}: a student of few steps cannot teach; a teacher is bidirectional or of many steps")
    return partial(student_mask, settings)


def _identity(job: DistillJob, recipe: Recipe, batches: Batches) -> dict[str, Any]:
    causal = {"teacher_is": "causal"} if _is_causal(Path(job.teacher)) else {}
    critic = {"critic": velocity_digest(Path(job.critic))} if job.critic else {}
    return {
        **causal,
        **critic,
        "engine": job.engine,
        "student": recipe.student.model_dump(mode="json"),
        "clip": recipe.clip.model_dump(mode="json"),
        "negative_prompt": recipe.trajectories.negative_prompt,
        "start": velocity_digest(Path(job.student)),
        "teacher": velocity_digest(Path(job.teacher)),
        "data": batches.origin,
    }


def _export(
    job: DistillJob,
    stage: Stage,
    parts: Parts,
    engine: Engine,
    student: StudentSettings,
    batches: Batches,
    size: tuple[int, int],
    ranks: Ranks,
) -> None:
    """Write the averaged student. size: of its latents. Every rank calls."""
    folder, weights = Path(job.student), engine.averaged_weights()
    origin = {
        "method": stage.name,
        "recipe": stage.fingerprint,
        "steps": stage.recipe.steps,
        "data": batches.origin,
        "teacher": stage.identity["teacher"],
        "parent": {"model": folder.name, "digest": stage.identity["start"], **origin_of(folder)},
    }
    if ranks.rank == 0:
        export_student(stage.folder, parts, transformer_config(folder), weights, student, origin, size)
