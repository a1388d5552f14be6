"""`reelway ablation`: which part of the method does what. Trains every row that is missing, then grades all alike."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..actors.model_files import check_model
from ..cluster.storage import Storage
from ..kernels.causal.student import StudentSettings
from .ablation_rows import (
    BY_NAME,
    ROWS,
    TEACHER,
    Ablation,
    CarryOut,
    Job,
    carry_out_here,
    chosen_rows,
    record_of,
    train_rows,
    why_missing,
    with_needs,
)
from .ablation_table import FIGURES, SHEET, SHEET_PROMPTS, TABLE, build, markdown, strips_of
from .commands import (
    AddressOption,
    CpusOption,
    DeviceOption,
    EngineKind,
    EngineOption,
    RecipeOption,
    SetOption,
    Where,
    check_device,
    train_zero,
)
from .evaluate import make_here, make_missing, missing_cells, requirements, sheet_cells, write_report
from .evaluation.examiner import STRIP_FRAMES
from .evaluation.plan import make_plan
from .evaluation.sweep import ClipSettings, PromptSet, Sweep, TeacherSweep
from .evaluation.tables import read_rows
from .initialize import InitializeJob
from .recipe import TINY, Recipe, load_recipe
from .samples import SPRITES
from .sheet import contact_sheet
from .training import write_json

HELD_OUT = "sprites:heldout"
CLIPS, LONG = "clips", "rollouts"  # folders of the two evaluations

app = typer.Typer(add_completion=False, help="Train and grade every row of the method's ablation.")


@dataclass(frozen=True)
class Examination:
    """How the rows are graded. prompts, seeds: of the clips. steps: of the teachers.

    long_prompts: how many of the prompts are rolled out for long_seconds by the students, under the first seed.
    """

    prompts: int = 64
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 50
    long_prompts: int = 8
    long_seconds: float = 60.0
    device: str = "cpu"


@app.command()
def ablation_command(
    teacher: Annotated[Path, typer.Option(help="Model folder of the bidirectional teacher.")],
    data: Annotated[str, typer.Option(help="Trajectories of this teacher.")],
    run: Annotated[Path, typer.Option(help="Folder of everything; what is finished there is left as it is.")],
    latents: Annotated[
        str | None, typer.Option(help="Latents for the causal teacher and for DMD; by default the trajectories' ends.")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Of the rows without data: a file, a data set, or sprites:train.")] = (
        SPRITES
    ),
    rows: Annotated[str | None, typer.Option(help=f"Only these, with what they need: {', '.join(BY_NAME)}.")] = None,
    use: Annotated[list[str] | None, typer.Option(metavar="ROW=MODEL", help="A row trained elsewhere.")] = None,
    recipe: RecipeOption = TINY,
    override: SetOption = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = Examination.prompts,
    seeds: Annotated[int, typer.Option(min=1, help="Videos of each prompt; diversity needs two.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Of the teachers.")] = Examination.steps,
    long_count: Annotated[int, typer.Option(min=0, help="Prompts of the long rollouts.")] = Examination.long_prompts,
    long_seconds: Annotated[float, typer.Option(min=10, help="Their length.")] = Examination.long_seconds,
    device: DeviceOption = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of torch in the evaluation.")] = 1,
    engine: EngineOption = EngineKind.plain,
    workers: Annotated[int, typer.Option(min=1, help="Processes of a training with zero; videos at once.")] = 1,
    cpus_per_worker: CpusOption = 1.0,
    address: AddressOption = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Say what there is to do.")] = False,
) -> None:
    """Train what is missing, make what is missing, write RUN/ablation.md, .json and .png. Stop it at any time."""
    check_device(device)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    given, wanted = _given(use or []), chosen_rows(rows)
    loaded = load_recipe(recipe, override)
    _check(loaded, teacher)
    options = [*(["--recipe", str(recipe)] if recipe != TINY else []), *_flat("--set", override or [])]
    table = loaded.model_dump(mode="json")
    ablation = Ablation(table, teacher, data, latents or data, prompts, run, engine.value, given, tuple(options))
    examination = Examination(count, tuple(range(seeds)), steps, long_count, long_seconds, device)
    if dry:
        for line in plan_lines(ablation, examination, wanted):
            typer.echo(line)
        return
    carry_out = partial(carry_out_here, device=device)
    if engine == EngineKind.zero:
        carry_out = partial(_on_ray, where=Where(device, engine, workers, cpus_per_worker, address))
    hosting = Hosts(threads, workers, address)
    try:
        figures = run_ablation(ablation, examination, wanted, carry_out, hosting, console)
    except KeyboardInterrupt:
        console.print(f"Stopped; what was done is kept in {run}. The same command goes on from there.")
        raise typer.Exit(130) from None
    typer.echo(markdown(figures))
    typer.echo(f"{run / TABLE} (figures: {run / FIGURES}, pictures: {run / SHEET})")
    raise typer.Exit(0 if all(row["missing"] is None for row in figures["rows"] if row["name"] in wanted) else 1)


@dataclass(frozen=True)
class Hosts:
    """Where videos are made: in this process, or with several workers or a cluster's address on Ray."""

    threads: int = 1
    workers: int = 1
    address: str | None = None


@dataclass(frozen=True)
class Evaluated:
    """The report of an evaluation, and the cells that its sheets show."""

    report: dict[str, Any]
    pictures: list[dict[str, Any]]


def run_ablation(
    ablation: Ablation,
    examination: Examination,
    wanted: list[str],
    carry_out: CarryOut,
    hosts: Hosts,
    console: Console,
) -> dict[str, Any]:
    """Train, evaluate, write the results; the figures. A row that is not asked for shows what it has by now."""
    reasons = train_rows(ablation, wanted, carry_out, console)
    for row in ROWS:
        if row.name not in reasons and not ablation.is_there(row.name):
            reasons[row.name] = why_missing(ablation, row.name)
    there = [row.name for row in ROWS if row.name not in reasons]
    clips = evaluate(ablation, examination, there, wanted, CLIPS, hosts, console)
    rollouts = evaluate(ablation, examination, few_step(ablation, there), wanted, LONG, hosts, console)
    reports = [found.report if found else None for found in (clips, rollouts)]
    figures = build(ablation, reasons, *reports, clips.pictures if clips else [])
    ablation.run.mkdir(parents=True, exist_ok=True)
    write_json(ablation.run / FIGURES, figures)
    (ablation.run / TABLE).write_text(markdown(figures))
    strips = strips_of(figures, _storage(ablation, CLIPS), there, SHEET_PROMPTS)
    if strips:
        contact_sheet(strips, ablation.run / SHEET, columns=STRIP_FRAMES, scale=1)
    return figures


def few_step(ablation: Ablation, rows: Sequence[str]) -> list[str]:
    """The rows that are students."""
    folders = {row: ablation.model(row) for row in rows if row != TEACHER}
    return [row for row, folder in folders.items() if StudentSettings.read(folder).sampling == "few-step"]


def sweep_of(ablation: Ablation, examination: Examination, rows: Sequence[str], kind: str) -> Sweep:
    """The evaluation of these rows: of clips of the training's length, or of long rollouts."""
    recipe = Recipe.model_validate(ablation.recipe)
    assert recipe.pretrain is not None
    count = examination.prompts if kind == CLIPS else examination.long_prompts
    world, clip = recipe.pretrain.world, recipe.clip
    guidance, negative = recipe.trajectories.guidance, recipe.trajectories.negative_prompt
    return Sweep(
        models={row: ablation.model(row) for row in rows},
        prompts=[PromptSet(source=HELD_OUT, count=count, level=world.level, seed=recipe.pretrain.seed)],
        clip=ClipSettings(height=clip.height, width=clip.width, frame_rate=round(clip.frame_rate)),
        seeds=examination.seeds if kind == CLIPS else examination.seeds[:1],
        seconds=(clip.frames - 1) / clip.frame_rate if kind == CLIPS else examination.long_seconds,
        teacher=TeacherSweep(steps=(examination.steps,), guidance=(guidance,), negative_prompt=negative),
        baseline=TEACHER if TEACHER in rows else None,
    )


def evaluate(
    ablation: Ablation,
    examination: Examination,
    rows: Sequence[str],
    wanted: Sequence[str],
    kind: str,
    hosts: Hosts,
    console: Console,
) -> Evaluated | None:
    """Make and grade what is missing of the wanted rows, then report on all. None where there is not one video."""
    if not rows or (kind == LONG and not examination.long_prompts):
        return None
    plan = make_plan(sweep_of(ablation, examination, rows, kind), examination.device)
    out, asked = _storage(ablation, kind), replace(plan, cells=[c for c in plan.cells if c.model.name in wanted])
    if hosts.workers == 1 and hosts.address is None:
        made = make_here(asked, out, hosts.threads, console)
    else:
        need = requirements(plan, examination.device, hosts.workers, hosts.threads, False)
        made = make_missing(asked, out, need, hosts.address, console)
    if made.interrupted:
        raise KeyboardInterrupt
    for line in made.failed:
        console.print(f"could not be made: {line}")
    found = read_rows(out, plan)
    return Evaluated(write_report(plan, out, made.failed, console), sheet_cells(plan, found)) if found else None


def plan_lines(ablation: Ablation, examination: Examination, wanted: list[str]) -> list[str]:
    """What there is to do: a line per row that is needed, and one per evaluation of what is there by now."""
    lines = []
    for name in with_needs(wanted, ablation.given):
        status = "finished" if ablation.is_there(name) else record_of(ablation.run / name).get("status", "to train")
        lines.append(f"{name}: {status}: {ablation.command(name)}")
    students = [row for row in wanted if row not in (TEACHER, "causal-teacher")]
    clips = len(wanted) * examination.prompts * len(examination.seeds)
    rollouts = len(students) * examination.long_prompts
    told = {CLIPS: f"{clips:,} clips", LONG: f"{rollouts:,} rollouts of {examination.long_seconds:g} s"}
    there = [row for row in wanted if ablation.is_there(row)]
    for kind, rows in ((CLIPS, there), (LONG, few_step(ablation, there))):
        left = ""
        if rows and (kind == CLIPS or examination.long_prompts):
            plan = make_plan(sweep_of(ablation, examination, rows, kind), examination.device)
            missing = len(missing_cells(plan, _storage(ablation, kind)))
            left = f"; of {len(rows)} rows that are there {missing:,} are to make"
        lines.append(f"{kind}: {told[kind]} in all{left}")
    return lines


def _storage(ablation: Ablation, kind: str) -> Storage:
    return Storage.open(str(ablation.run / kind))


def _check(recipe: Recipe, teacher: Path) -> None:
    if recipe.pretrain is None:
        raise ValueError("recipe: the rows are graded by the sprites world's oracle, so it needs a section pretrain")
    if recipe.causal_teacher.context != "noisy":
        raise ValueError("recipe: causal_teacher.context must be noisy: as a score it sees earlier blocks noisy, too")
    check_model(teacher)
    if (teacher / "student.json").is_file():
        raise ValueError(f"--teacher {teacher}: has a student.json, so it is no bidirectional teacher")


def _given(pairs: Sequence[str]) -> dict[str, Path]:
    given = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        if name not in BY_NAME or name == TEACHER or not folder:
            raise ValueError(f"--use: must be ROW=MODEL with a row of {', '.join(BY_NAME)}, got {pair!r}")
        check_model(Path(folder))
        StudentSettings.read(Path(folder))
        given[name] = Path(folder)
    return given


def _flat(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def _on_ray(job: Job, where: Where) -> bool:
    """A training on several processes."""
    recipe, section, *_ = job.settings()
    module = "initialize" if isinstance(job, InitializeJob) else "distill"
    return train_zero(module, job, recipe.zero, section.steps, where)
