"""The demo's rollouts: the shipped student in all its ways, and the teacher's clip of the same prompt; each graded."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...actors.bench_report import FRAME_RATE
from ...actors.judge import SPRITES, Shot, examine
from ...actors.model_files import latents_shape
from ...actors.modes import CLIP_LATENTS, Redraw
from ...kernels.causal.student import StudentSettings
from ..evaluation.makers import TeacherMaker
from ..evaluation.plan import Asked, Cell, Model, Setting
from ..rollout_order import Order, Plan
from ..rollout_single import run
from ..schedule import Schedule, frames_of
from ..training import write_json
from ..video import VideoFile, VideoWriter
from .runner import Screen
from .settings import DEVICE, Demo

TAKES, PARTIAL = "takes.json", "partial"
CLIP, MINUTE, IMAGE, VIDEO, SWITCH, TEACHER = "clip", "minute", "image", "video", "switch", "teacher"
WARM_UP = 1.0  # seconds of video that are made before the clock matters
SWITCH_AT = 0.4  # of the video
INTERRUPTED = 130
Take = dict[str, Any]


@dataclass(frozen=True)
class _Given:
    """What a rollout is asked for besides its plan."""

    prompts: tuple[str, ...]
    seconds: float
    image: Path | None = None
    video: Path | None = None


def make_rollouts(
    demo: Demo, folder: Path, screen: Screen, captions: dict[str, Any], image: Path, video: Path
) -> dict[str, Take]:
    """Make and grade what is missing; figures and grades of every video `folder/<name>.mp4`, by name.

    KeyboardInterrupt after Ctrl-C: finished videos stay.
    """
    clip = demo.clip_seconds
    asked = {
        CLIP: _Given((captions["clip"],), clip),
        MINUTE: _Given((captions["minute"],), demo.recipe.minute),
        IMAGE: _Given((captions["image"]["caption"],), clip, image=image),
        VIDEO: _Given((captions["redrawn"],), clip, video=video),
        SWITCH: _Given(tuple(captions["switched"]), clip),
    }
    warm = False
    for name, given in asked.items():
        if (folder / f"{name}.json").exists():
            continue
        if not warm:
            _student_video(demo, folder, screen, "warm-up", replace(asked[CLIP], seconds=WARM_UP))
            warm = True
        _keep(demo, folder, name, _student_video(demo, folder, screen, name, given))
    if not (folder / f"{TEACHER}.json").exists():
        with screen.status("the teacher's clip"):
            _keep(demo, folder, TEACHER, _teacher_clip(demo, folder, captions["clip"]))
    takes = {name: _read(folder / f"{name}.json") for name in (*asked, TEACHER)}
    write_json(folder / TAKES, takes)
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    return takes


def _read(path: Path) -> Take:
    content: Take = json.loads(path.read_text())
    return content


def _student_video(demo: Demo, folder: Path, screen: Screen, name: str, given: _Given) -> Take:
    """`reelway rollout` into `folder/partial/<name>.mp4`, from where `_keep` takes it; its figures."""
    clip = demo.base.clip
    plan = Plan(
        student=demo.student,
        settings=StudentSettings.read(demo.student),
        seconds=given.seconds,
        blocks=None,
        seed=demo.recipe.seed,
        samples=1,
        height=clip.height,
        width=clip.width,
        mode="rolling",
        segment=CLIP_LATENTS,
        device=DEVICE,
        dtype=torch.float32,
    )
    times = (0.0, SWITCH_AT * given.seconds)[: len(given.prompts)]
    target = _partial(folder, name)
    figures = target.with_suffix(".json")
    order = Order(
        plan,
        Schedule(tuple(zip(times, given.prompts, strict=True))),
        target,
        image=given.image,
        video=VideoFile(given.video, FRAME_RATE) if given.video else None,
        redraw=Redraw(demo.recipe.noise) if given.video else None,
    )
    if run(order, screen, figures) == INTERRUPTED:
        raise KeyboardInterrupt
    return _read(figures)


def _partial(folder: Path, name: str) -> Path:
    """Where a video stands while it is made."""
    (folder / PARTIAL).mkdir(exist_ok=True)
    return folder / PARTIAL / f"{name}.mp4"


def _teacher_clip(demo: Demo, folder: Path, prompt: str) -> Take:
    """The teacher's clip, on the same threads as the student's, and as `reelway evaluate` makes it: warm, from the
    prompt to frames in host memory.
    """
    clip, recipe = demo.base.clip, demo.recipe
    cell = Cell(
        key=TEACHER,
        model=Model(TEACHER, str(demo.teacher), "teacher", demo.prints["teacher"]),
        setting=Setting(recipe.teacher_steps, "clip", recipe.guidance, ""),
        label="",
        prompt_set="",
        prompt=Asked(prompt, prompt),
        prompts=(prompt,),
        graded=(prompt,),
        level=recipe.level,
        seed=recipe.seed,
        frames=clip.frames,
        latents=latents_shape(demo.teacher, clip.height, clip.width, clip.frames)[0],
        size=(clip.height, clip.width),
        frame_rate=FRAME_RATE,
        device=DEVICE,
        precision="float32",
    )
    made = TeacherMaker(cell).make(cell)
    with VideoWriter(_partial(folder, TEACHER), FRAME_RATE) as writer:
        writer.write(made.video)
    prompts = [{"latent_frame": 0, "prompt": prompt}]
    length = {"frames": len(made.video), "seconds_of_video": len(made.video) / FRAME_RATE}
    return {**made.speed, **length, "prompts": prompts, "steps": recipe.teacher_steps}


def _keep(demo: Demo, folder: Path, name: str, figures: Take) -> None:
    """Grade a finished video and give it its place; the row comes last and says that all is there."""
    target = folder / f"{name}.mp4"
    _partial(folder, name).replace(target)
    shots = [Shot(frames_of(entry["latent_frame"]), entry["prompt"]) for entry in figures["prompts"]]
    video = np.stack(list(VideoFile(target, FRAME_RATE).read(demo.base.clip.height, demo.base.clip.width)))
    found = examine(video, shots, fps=FRAME_RATE, level=demo.recipe.level)
    graded = {"scores": found.scores, "drift": found.drift.get(SPRITES, {}), "seen": found.seen}
    shown = [{"second": shot.start / FRAME_RATE, "prompt": shot.prompt} for shot in shots]
    write_json(folder / f"{name}.json", {"figures": figures, "shots": shown, **graded})
