"""The demo's stages: each calls what the command of the same name calls, on this machine."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from ...actors import bench, judge
from ...cluster.manifest import read_manifest
from ...cluster.storage import Storage
from ...kernels.sprites.render import render
from ..distill import DistillJob
from ..evaluate import DRIFT, RESULTS, make_missing, requirements, write_report
from ..evaluation.plan import Plan, make_plan
from ..evaluation.sweep import ClipSettings, PromptSet, Sweep, TeacherSweep
from ..evaluation.tables import read_rows
from ..initialize import InitializeJob
from ..making import PoolOptions
from ..prompts import read_prompts
from ..telemetry import read_curve
from ..training import RUN, write_json
from ..trajectories import run as make_trajectories
from ..trajectory_job import Order, shard_count, worker_bytes
from ..video import VideoWriter
from .rollouts import TAKES, make_rollouts
from .runner import Done, Screen, Stage, StageFailed
from .scenes import choose, distinct
from .settings import DEVICE, Demo

PROMPTS, TRAJECTORIES, INITIALIZE, DISTILL = "prompts", "trajectories", "initialize", "distill"
EVALUATE, SPEED, ROLLOUTS = "evaluate", "speed", "rollouts"
TRAIN_FILE, HELDOUT_FILE, CAPTIONS_FILE = "train.txt", "heldout.txt", "rollouts.json"
IMAGE, SOURCE = "image.png", "source.mp4"
SPEED_FILE, REPORT_FILE, CELLS_FILE = "bench.json", "report.json", "cells.json"
TEACHER_NAME, FRESH_NAME, STUDENT_NAME = "teacher", "fresh-student", "shipped-student"
INTERRUPTED = 130


# --- Prompts ---------------------------------------------------------------------------------------------------


def write_prompts(demo: Demo, folder: Path, screen: Screen) -> Done:
    """Captions to train on and held-out ones, an image and a video to begin with."""
    recipe, clip = demo.recipe, demo.base.clip
    train = distinct("train", recipe.train_prompts, recipe.seed, recipe.level)
    heldout = distinct("heldout", recipe.heldout_prompts, recipe.seed, recipe.level)
    for name, texts in ((TRAIN_FILE, train), (HELDOUT_FILE, heldout)):
        (folder / name).write_text("\n".join(texts) + "\n")
    captions = choose(heldout, recipe.seed, recipe.level)
    world: dict[str, Any] = {"level": recipe.level, "size": clip.height}
    first = render(captions.image.scene, captions.image.clip, 1, **world)[0]
    Image.fromarray(first).save(folder / IMAGE)
    with VideoWriter(folder / SOURCE, round(clip.frame_rate)) as writer:
        writer.write(render(captions.video.scene, captions.video.clip, clip.frames, **world))
    write_json(folder / CAPTIONS_FILE, captions.plain())
    names = (TRAIN_FILE, HELDOUT_FILE, IMAGE, SOURCE, CAPTIONS_FILE)
    summary = f"{len(train)} captions to train on, {len(heldout)} of combinations that training never shows"
    return Done(summary, [folder / name for name in names])


# --- Trajectories and training ---------------------------------------------------------------------------------


def trajectories(demo: Demo, folder: Path, screen: Screen) -> Done:
    """`reelway trajectories`: the teacher's denoising paths, in shards."""
    texts = read_prompts(demo.work(PROMPTS) / TRAIN_FILE).texts
    order = Order(demo.base, demo.teacher, texts, Storage.open(folder / "data"), DEVICE, 1)
    pool = PoolOptions.parse(str(demo.recipe.workers), DEVICE, None, 1.0, False)
    need = pool.requirements(worker_bytes(order), shard_count(order))
    status = make_trajectories(order, need, None, screen)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        raise StageFailed("some trajectories could not be made")
    rows = read_manifest(order.out)
    samples, size = sum(row.samples for row in rows), sum(row.bytes for row in rows)
    summary = f"{samples} trajectories in {len(rows)} shards, {size / 1e6:.1f} MB"
    figures = {"samples": samples, "shards": len(rows), "bytes": size}
    files = [folder / "data" / row.name for row in rows] + [folder / "data" / "manifest.parquet"]
    return Done(summary, files, figures)


def initialize(demo: Demo, folder: Path, screen: Screen) -> Done:
    """`reelway initialize --engine zero`: the causal student regresses the paths' ends."""
    data = str(demo.work(TRAJECTORIES) / "data")
    recipe, run, teacher = demo.base.model_dump(mode="json"), folder / "run", str(demo.teacher)
    job = InitializeJob(recipe, "ode", teacher, teacher, data, str(run), "zero")
    return _train(demo, "initialize", job, demo.base.initialize.steps, screen)


def distill(demo: Demo, folder: Path, screen: Screen) -> Done:
    """`reelway distill --method causvid --engine zero`: the student matches its teacher in distribution."""
    data, student = str(demo.work(TRAJECTORIES) / "data"), str(demo.work(INITIALIZE) / "run" / "model")
    recipe, run = demo.base.model_dump(mode="json"), folder / "run"
    job = DistillJob(recipe, "causvid", student, str(demo.teacher), data, None, str(run), "zero")
    return _train(demo, "distill", job, demo.base.distill.causvid.steps, screen)


def _train(demo: Demo, module: str, job: InitializeJob | DistillJob, steps: int, screen: Screen) -> Done:
    """The gate's verdict is noted and stops nothing: so short a training may well fail it."""
    os.environ.setdefault("DS_ACCELERATOR", DEVICE)  # else DeepSpeed says on stderr what it looked for
    from ..hosting import Hosting, train_on_ray  # DeepSpeed takes seconds to import

    hosting = Hosting(demo.recipe.workers, DEVICE, 1.0, 0.0, None)
    passed = train_on_ray(module, job, demo.base.zero, steps, hosting, screen)
    run = Path(job.run)
    rows = read_curve(run / "curve.jsonl")
    summary = f"{len(rows)} steps, loss {rows[0]['loss']:.3f} to {rows[-1]['loss']:.3f}"
    model = run / "model"
    files = [run / RUN, *sorted(path for path in model.rglob("*") if path.is_file())]
    return Done(summary, files, {"steps": len(rows), "gate_passed": passed})


# --- Quality and speed -----------------------------------------------------------------------------------------


def evaluation_plan(demo: Demo) -> Plan:
    """Teacher, fresh student and shipped student on the same held-out prompts."""
    clip, recipe = demo.base.clip, demo.recipe
    models = {
        TEACHER_NAME: demo.teacher,
        FRESH_NAME: demo.work(DISTILL) / "run" / "model",
        STUDENT_NAME: demo.student,
    }
    sweep = Sweep(
        models=models,
        prompts=[PromptSet(source=str(demo.work(PROMPTS) / HELDOUT_FILE), level=recipe.level)],
        clip=ClipSettings(height=clip.height, width=clip.width, frame_rate=round(clip.frame_rate)),
        seeds=(recipe.seed,),
        seconds=demo.clip_seconds,
        teacher=TeacherSweep(steps=(recipe.teacher_steps,), guidance=(recipe.guidance,)),
        baseline=TEACHER_NAME,
    )
    return make_plan(sweep, DEVICE)


def evaluate(demo: Demo, folder: Path, screen: Screen) -> Done:
    """`reelway evaluate`: every model makes the held-out prompts, the oracle grades them."""
    plan, out = evaluation_plan(demo), Storage.open(folder)
    need = requirements(plan, DEVICE, demo.recipe.workers, 1, False)
    made = make_missing(plan, out, need, None, screen)
    if made.interrupted:
        raise KeyboardInterrupt
    if made.failed:
        raise StageFailed(f"{len(made.failed)} videos could not be made; the first: {made.failed[0]}")
    report = write_report(plan, out, [], screen)
    rows = read_rows(out, plan)
    cells = [
        {"key": cell.key, "model": cell.model.name, "prompt": cell.prompt.text, **_marks(rows[cell.key])}
        for cell in plan.cells
    ]
    write_json(folder / CELLS_FILE, {"cells": cells})
    totals = {entry["model"]: entry["mean"] for entry in report["scores"] if entry["dimension"] == "total"}
    told = ", ".join(f"{name} {value:.3f}" for name, value in totals.items())
    names = (REPORT_FILE, CELLS_FILE, RESULTS, DRIFT)
    files = [*(folder / name for name in names), *(folder / "videos" / f"{cell['key']}.mp4" for cell in cells)]
    return Done(f"{len(cells)} videos graded; total: {told}", files)


def _marks(row: dict[str, Any]) -> dict[str, Any]:
    scores = row["scores"].get(judge.SPRITES, {})
    return {"total": scores.get("total"), "semantic": scores.get("semantic"), "seen": row["seen"]}


def speed(demo: Demo, folder: Path, screen: Screen) -> Done:
    """`reelway bench`: the student's stream and a clip of the teacher's passes, one after the other."""
    clip, recipe = demo.base.clip, demo.recipe
    request = bench.BenchRequest(
        model=demo.student,
        device=DEVICE,
        height=clip.height,
        width=clip.width,
        blocks=recipe.blocks,
        teacher_steps=recipe.teacher_steps,
    )
    with screen.status("measuring") as status:
        report = bench.run(request, lambda line: status.update(line))
    write_json(folder / SPEED_FILE, report)
    rates = report["student"]["frames_per_second"]
    ratio = report["student_over_teacher"]["frames_per_second"]
    summary = (
        f"{rates['end_to_end']:.1f} frames per second end to end, {rates['denoise_only']:.1f} denoise only; "
        f"{ratio['end_to_end']:.1f} and {ratio['denoise_only']:.1f} times the teacher's"
    )
    return Done(summary, [folder / SPEED_FILE])


def rollouts(demo: Demo, folder: Path, screen: Screen) -> Done:
    """`reelway rollout`, in all its ways, and the teacher's clip of the same prompt."""
    source = demo.work(PROMPTS)
    captions = json.loads((source / CAPTIONS_FILE).read_text())
    takes = make_rollouts(demo, folder, screen, captions, source / IMAGE, source / SOURCE)
    files = [folder / TAKES, *(folder / f"{name}.mp4" for name in takes)]
    seconds = sum(take["figures"]["seconds_of_video"] for take in takes.values())
    return Done(f"{len(takes)} videos, {seconds:.0f} s of video in all", files)


# --- The graph -------------------------------------------------------------------------------------------------

Inputs = Callable[[Demo], dict[str, Any]]


def _inputs(*sections: str, models: tuple[str, ...] = (), sizes: tuple[str, ...] = (), judged: bool = False) -> Inputs:
    """What decides a stage: sections of the recipe, models, sizes of the demo, the machine's kind, and the judge."""

    def inputs(demo: Demo) -> dict[str, Any]:
        base = demo.base.model_dump(mode="json")
        return {
            "base": {name: base[name] for name in ("clip", *sections)},
            "demo": {name: getattr(demo.recipe, name) for name in ("seed", "level", *sizes)},
            "prints": {name: demo.prints[name] for name in (*models, "torch", "device")},
            "judge": judge.VERSION if judged else None,
        }

    return inputs


TEACHER_SIZES = ("teacher_steps", "guidance")
STAGES = (
    Stage(PROMPTS, "captions of the sprites world", write_prompts, _inputs(sizes=("train_prompts", "heldout_prompts"))),
    Stage(
        TRAJECTORIES,
        "the teacher's denoising paths, on Ray workers, into shards",
        trajectories,
        _inputs("trajectories", "student", models=("teacher",)),
        (PROMPTS,),
        on_ray=True,
    ),
    Stage(
        INITIALIZE,
        "ODE initialisation, DeepSpeed ZeRO on Ray Train, shortened",
        initialize,
        _inputs("initialize", "student", "zero", models=("teacher",), sizes=("workers",)),
        (TRAJECTORIES,),
        on_ray=True,
    ),
    Stage(
        DISTILL,
        "distribution matching (DMD), DeepSpeed ZeRO on Ray Train, shortened",
        distill,
        _inputs("distill", "trajectories", "student", "zero", models=("teacher",), sizes=("workers",)),
        (TRAJECTORIES, INITIALIZE),
        on_ray=True,
    ),
    Stage(
        EVALUATE,
        "teacher, fresh student and shipped student on held-out prompts, graded by the oracle",
        evaluate,
        _inputs(models=("teacher", "student"), sizes=TEACHER_SIZES, judged=True),
        (PROMPTS, DISTILL),
        on_ray=True,
    ),
    Stage(
        SPEED,
        "the student's stream against its teacher's clip, one after the other",
        speed,
        _inputs(models=("student",), sizes=("blocks", "teacher_steps")),
    ),
    Stage(
        ROLLOUTS,
        "the shipped student: a clip, a long stream, from an image, from a video, a prompt switch",
        rollouts,
        _inputs(models=("teacher", "student"), sizes=(*TEACHER_SIZES, "minute", "noise"), judged=True),
        (PROMPTS,),
    ),
)
