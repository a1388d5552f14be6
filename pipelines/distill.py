"""`reelway distill`: match a student to its teacher in distribution: CausVid, Self-Forcing, long rollouts."""

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from ..actors.engine import Engine, OneRank, Ranks
from ..actors.learning.batch import Draws, PromptContexts
from ..actors.learning.distillation import DmdLearner, DmdSettings
from ..actors.learning.long_rollouts import LongRollouts
from ..actors.learning.regression import student_mask
from ..actors.learning.sources import ClipSource, NoisedClips, Rollouts, RolloutShape, StudentRollout
from ..actors.model_files import check_model, latents_shape, transformer_config, velocity_digest
from ..kernels.causal.masks import FrameMask
from ..kernels.causal.student import StudentSettings
from .commands import (
    AddressOption,
    CpusOption,
    EngineKind,
    EngineOption,
    WorkersOption,
    check_device,
    finish_command,
    plain_engines,
)
from .memory import TrainedClips, TrainedNetwork, memory_lines
from .recipe import TINY, DistillRecipe, Recipe, load_recipe
from .samples import SPRITES, Batches, Deal, PromptBatches, ShardBatches, TrainingData, training_prompts
from .students import Parts, Scores, SheetPrompts, StudentSheets, export_student, load_network, origin_of
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

Freeze = Callable[[nn.Module, torch.device], nn.Module]  # a network for forward passes only, brought to a device

app = typer.Typer(add_completion=False, help="Distil an initialised student from its bidirectional teacher.")


class Method(enum.StrEnum):
    causvid = "causvid"
    self_forcing = "self-forcing"
    long = "long"


@dataclass(frozen=True)
class DistillJob:
    """All that one process needs to do its part; plain and picklable.

    recipe: the resolved recipe. student: the model to begin with; the teacher's own folder begins without any
    initialisation. data: the data set of `causvid`. prompts: of the methods without data.
    """

    recipe: dict[str, Any]
    method: str
    student: str
    teacher: str
    data: str | None
    prompts: str | None
    run: str
    engine: str = "plain"

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
    run: Annotated[Path, typer.Option(help="Folder of the run; an interrupted run goes on there.")],
    student: Annotated[
        Path | None, typer.Option(help="Model folder of the student to begin with; the teacher's weights by default.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="causvid: a data set of latents or trajectories.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help=f"The others: a file, a data set (its captions), or {SPRITES}.")
    ] = None,
    recipe: Annotated[Path, typer.Option(help="Recipe file; the tiny one ships with the package.")] = TINY,
    override: Annotated[list[str] | None, typer.Option("--set", help="a.b=value: change the recipe.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    engine: EngineOption = EngineKind.plain,
    workers: WorkersOption = 1,
    cpus_per_worker: CpusOption = 1.0,
    address: AddressOption = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Say what memory the training takes.")] = False,
) -> None:
    """Train in RUN; the finished model is RUN/model, in the diffusers layout, with student.json."""
    check_device(device)
    needed, given = ("--data", data) if method == Method.causvid else ("--prompts", prompts)
    if given is None:
        raise ValueError(f"{needed}: --method {method.value} needs it")
    resolved = load_recipe(recipe, override).model_dump(mode="json")
    start = str(student or teacher)
    job = DistillJob(resolved, method.value, start, str(teacher), data, prompts, str(run), engine.value)
    if dry:
        for line in memory(job):
            typer.echo(line)
        return
    if engine == EngineKind.plain:
        finish_command(run, lambda: train(job, plain_engines(device), OneRank()))
        return
    from .hosting import Hosting, train_on_ray  # Ray and DeepSpeed take seconds to import

    hosting = Hosting(workers, device, cpus_per_worker, 1.0 if device == "cuda" else 0.0, address)
    recipe_used, section, *_ = job.settings()
    console = Console(stderr=True, highlight=False)
    finish_command(run, lambda: train_on_ray("distill", job, recipe_used.zero, section.steps, hosting, console))


def to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """The plain way to hold a frozen network: whole."""
    return network.to(device)


def train(
    job: DistillJob,
    engine_factory: EngineFactory,
    ranks: Ranks,
    report: Report | None = None,
    interrupted: Interrupted | None = None,
    console: Console | None = None,
    freeze: Freeze = to_device,
) -> bool:
    """One process's part of the training, in a folder that all see; whether the gate passed.

    A finished run is left as it is. freeze: how the teacher's transformer is held.
    """
    recipe, section = job.settings()
    student = job.student_settings()
    check_model(Path(job.teacher))
    data, batches = _batches(job, recipe, student, ranks)
    stage = Stage(f"distill-{job.method}", Path(job.run), section, _identity(job, recipe, batches))
    record = RunRecord(stage.folder / RUN, ranks)
    if record.is_finished(stage):
        return record.gate_passed()
    parts = Parts.load(Path(job.teacher))
    engines = _engines(job, section, engine_factory)
    parts = parts.to(engines[0].device)
    contexts = PromptContexts(parts.encoder, engines[0].device)
    shape = data.shape if data else job.shape()
    source = _source(job, student, engines[0], contexts, parts, shape, ranks)
    real = freeze(load_network(Path(job.teacher)), engines[0].device)
    mask = score_mask(Path(job.teacher))
    learner = DmdLearner(*engines, real, contexts, source, _dmd_settings(recipe, section), ranks, mask)
    prompts = SheetPrompts.choose(recipe, data.some_prompts if data else lambda: batches.take(0).prompts)
    sheet = StudentSheets(
        stage.folder / "sheets",
        engines[0],
        parts,
        transformer_config(Path(job.student)),
        student,
        prompts,
        (shape[0], shape[2], shape[3]),
        ranks,
        _scores(learner) if ranks.size == 1 else None,
    )
    run_stage(stage, learner, batches, ranks, report=report, sheet=sheet, interrupted=interrupted, console=console)
    passed = close_gate(record, gate(stage.folder))
    _export(job, stage, parts, engines[0], student, batches, (shape[2], shape[3]), ranks)
    record.write(status="finished")
    ranks.barrier()
    return passed


def memory(job: DistillJob) -> list[str]:
    """What a device holds with the plain engine, in lines."""
    _, section = job.settings()
    student = job.student_settings()
    configs = [transformer_config(Path(folder)) for folder in (job.student, job.teacher)]
    frames, _, height, width = job.shape()
    is_rollout = job.method != Method.causvid
    clips = TrainedClips(
        section.micro_batch or section.batch,
        frames,
        configs[0].tokens_per_frame(height, width),
        section.activation_checkpointing,
        student.window if is_rollout else 0,
    )
    networks = [
        TrainedNetwork("student", configs[0], averages=section.student.ema_decay > 0),
        TrainedNetwork("critic", configs[1], averages=section.critic.ema_decay > 0),
        TrainedNetwork("teacher", configs[1], trained=False),
    ]
    return memory_lines(networks, clips)


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


def _engines(job: DistillJob, section: DistillRecipe, engine_factory: EngineFactory) -> tuple[Engine, Engine]:
    """The student's and the critic's, which begins as the teacher."""
    checkpointing = section.activation_checkpointing
    student = load_network(Path(job.student), checkpointing=checkpointing)
    critic = load_network(Path(job.teacher), checkpointing=checkpointing)
    student_engine = engine_factory(student, optimizer_settings(section.student, section.steps))
    return student_engine, engine_factory(critic, optimizer_settings(section.critic, section.steps))


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
    return {
        **causal,
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
