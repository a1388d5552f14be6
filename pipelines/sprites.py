"""`reelway sprites`: look at the embedded world, grade models and videos in it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import av
import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..actors.judge import Verdict, judge
from ..actors.teacher import Teacher
from ..kernels.diffusion.noise import SampleKey
from ..kernels.diffusion.schedule import timesteps
from ..kernels.sprites.captions import parse
from ..kernels.sprites.oracle import grade
from ..kernels.sprites.render import render
from ..kernels.sprites.scene import FRAMES_PER_SECOND, Scene
from ..kernels.sprites.splits import clip_seed, prompts
from .sheet import contact_sheet
from .video import VideoWriter

SPLITS = ("train", "validation", "heldout")
FRAMES = 81
SIZE = 64
BATCH = 8
SHIPPED_LEVEL = 1  # of the world that the shipped models learned

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The embedded video world: look, render, grade.")

Model = Annotated[Path, typer.Option(help="A teacher in the diffusers layout.")]
Level = Annotated[int, typer.Option(min=0, max=3, help="0 plain, 1 random turns, 2 textures, 3 entrances and exits.")]
Split = Annotated[str, typer.Option(help="train, validation or heldout (combinations never trained on).")]
Steps = Annotated[int, typer.Option(min=1, help="Euler steps of the teacher.")]
Guidance = Annotated[float, typer.Option(help="Guidance scale w: uncond + w (cond - uncond).")]


@app.command("render")
def render_command(
    prompt: Annotated[str, typer.Argument(help='For example "a small red star drifts left over a navy background".')],
    out: Annotated[Path, typer.Option(help="MP4 file.")] = Path("sprites.mp4"),
    seconds: Annotated[float, typer.Option(min=0.1, help="Length; there is no longest.")] = 5.0,
    seed: int = 0,
    level: Level = 0,
) -> None:
    """Render what a caption says."""
    scene = _scene(prompt)
    with VideoWriter(out, FRAMES_PER_SECOND) as writer:
        total = round(seconds * FRAMES_PER_SECOND)
        for start in range(0, total, FRAMES):
            count = min(FRAMES, total - start)
            writer.write(render(scene, seed, count, level=level, size=SIZE, start=start))
    Console().print(f"Wrote {out}: {total} frames of {SIZE}x{SIZE}.")


@app.command("grade")
def grade_command(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    prompt: Annotated[str, typer.Argument(help="The caption that it should show.")],
    level: Level = 0,
) -> None:
    """Grade a video against a caption, dimension by dimension."""
    result = grade(_read_video(video), _scene(prompt), level=level)
    Console().print(_table("score", {**result.scores, "total": result.total}))
    Console().print(f"Seen: {result}")


@app.command()
def sheet(
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("sheet.png"),
    model: Annotated[Path | None, typer.Option(help="Draw this teacher's samples under the renderings.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Captions.")] = 6,
    split: Split = "heldout",
    level: Level = SHIPPED_LEVEL,
    steps: Steps = 50,
    guidance: Guidance = 5.0,
    seed: int = 0,
) -> None:
    """Draw a contact sheet of renderings, and of a teacher's samples, with captions and scores."""
    chosen = _prompts(split, count, seed, level)
    videos = {"rendering": _renderings(chosen, split, seed, level)}
    if model is not None:
        videos["teacher"] = sample(Teacher.from_pretrained(model), chosen, steps=steps, guidance=guidance, seed=seed)
    rows = []
    for index, (text, scene) in enumerate(chosen):
        for kind, clips in videos.items():
            rows.append((f"{kind} {grade(clips[index], scene, level=level).total:.2f}: {text}", clips[index]))
    contact_sheet(rows, out)
    Console().print(f"Wrote {out}.")


@app.command()
def score(
    model: Model = Path("assets/tiny"),
    count: Annotated[int, typer.Option(min=1, help="Prompts.")] = 32,
    split: Split = "heldout",
    level: Level = SHIPPED_LEVEL,
    steps: Steps = 50,
    guidance: Guidance = 5.0,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the table as JSON.")] = None,
) -> None:
    """Grade a teacher, and its VAE's reconstructions, beside the renderings themselves."""
    chosen = _prompts(split, count, seed, level)
    grading = Grading(split, count, level, steps, guidance, seed)
    columns = grade_teacher(Teacher.from_pretrained(model), chosen, grading)
    Console().print(_columns(f"{count} {split} prompts, level {level}", columns))
    if out is not None:
        out.write_text(json.dumps(as_json(columns, grading), indent=2) + "\n")


@app.command()
def card(
    run: Annotated[Path, typer.Argument(help="The folder of a finished `reelway pretrain`.")],
    count: Annotated[int, typer.Option(min=1, help="Held-out prompts to grade.")] = 64,
    pictures: Annotated[int, typer.Option(min=1, help="Prompts of the sheet of samples.")] = 6,
    steps: Steps = 50,
    guidance: Guidance = 5.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Grade a trained teacher and write its model card: RUN/model/README.md and RUN/model/card/."""
    from .pretraining.card import write_card  # here only: it imports this module

    write_card(run, count=count, pictures=pictures, steps=steps, guidance=guidance, device=device)
    Console().print(f"Wrote {run / 'model' / 'README.md'}.")


@dataclass(frozen=True)
class Grading:
    """How a teacher is graded: on `count` prompts of a split of the world's level, with so many Euler steps."""

    split: str
    count: int
    level: int
    steps: int
    guidance: float
    seed: int


def grade_teacher(teacher: Teacher, chosen: list[tuple[str, Scene]], grading: Grading) -> dict[str, Verdict]:
    """Verdicts of the prompts' renderings, of these after the VAE, and of the teacher's own videos."""
    scenes, level = [scene for _, scene in chosen], grading.level
    renderings = _renderings(chosen, grading.split, grading.seed, level)
    samples = sample(teacher, chosen, steps=grading.steps, guidance=grading.guidance, seed=grading.seed)
    return {
        "rendering": judge(renderings, scenes, level=level),
        "reconstruction": judge(teacher.reconstruct(renderings), scenes, level=level),
        "teacher": judge(samples, scenes, level=level),
    }


def as_json(columns: dict[str, Verdict], grading: Grading) -> dict[str, Any]:
    """The settings and the table, for a file."""
    return {"settings": asdict(grading), "scores": {name: verdict.table for name, verdict in columns.items()}}


def sample(
    teacher: Teacher, chosen: list[tuple[str, Scene]], *, steps: int, guidance: float, seed: int
) -> list[np.ndarray]:
    """The teacher's videos of the prompts, uint8 [T, H, W, 3]; each prompt's noise is its own."""
    frames = 1 + (FRAMES - 1) // teacher.vae.temporal_factor
    side = SIZE // teacher.vae.spatial_factor
    videos: list[np.ndarray] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("teacher", total=len(chosen))
        for start in range(0, len(chosen), BATCH):
            texts = [text for text, _ in chosen[start : start + BATCH]]
            keys = [SampleKey(seed, text, 0) for text in texts]
            noise = teacher.noise(keys, (frames, side, side))
            latents = teacher.sample(texts, noise, timesteps(steps, teacher.shift), guidance)
            videos.extend(teacher.decode(latents).numpy())
            progress.advance(task, len(texts))
    return videos


def _renderings(chosen: list[tuple[str, Scene]], split: str, seed: int, level: int) -> list[np.ndarray]:
    return [
        render(scene, clip_seed(split, index, seed), FRAMES, level=level, size=SIZE)
        for index, (_, scene) in enumerate(chosen)
    ]


def _prompts(split: str, count: int, seed: int, level: int) -> list[tuple[str, Scene]]:
    if split not in SPLITS:
        raise ValueError(f"--split: must be one of {', '.join(SPLITS)}, got {split!r}")
    return prompts(split, count, seed, level)


def _scene(prompt: str) -> Scene:
    """What the caption says; unknown words are named on stderr."""
    scene, unknown = parse(prompt)
    if unknown:
        Console(stderr=True).print(f"[yellow]The sprites world does not know: {', '.join(unknown)}[/yellow]")
    return scene


def _read_video(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a video ({error})") from None


def _table(title: str, scores: dict[str, float]) -> Table:
    table = Table("dimension", title)
    for name, value in scores.items():
        table.add_row(name, f"{value:.3f}")
    return table


def _columns(title: str, verdicts: dict[str, Verdict]) -> Table:
    table = Table("dimension", *verdicts, title=title)
    tables = [verdict.table for verdict in verdicts.values()]
    for name in tables[0]:
        table.add_row(name, *(f"{scores[name]:.3f}" for scores in tables))
    return table
