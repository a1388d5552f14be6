"""`reelway rollout`: videos of any length from a student, written as they are made."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ..actors.bench_device import DTYPES, find_device
from ..actors.bench_report import FRAME_RATE
from ..actors.modes import CLIP_LATENTS, MODES, Mode, Redraw
from ..kernels.causal.student import StudentSettings
from ..kernels.diffusion.schedule import timesteps
from .rollout_order import Order, Plan
from .schedule import Schedule, read_schedule
from .video import FORMATS, VideoFile

NOISE = Redraw().noise

app = typer.Typer(add_completion=False, help="Stream videos from a student: from text, an image or a video.")


@app.command()
def rollout_command(
    student: Annotated[Path, typer.Option(help="A student's folder: the diffusers layout and student.json.")],
    out: Annotated[str, typer.Option(help=".mp4, .gif, .webp or a folder for .png; with --prompts a data set.")],
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    schedule: Annotated[str | None, typer.Option(help="'0s: a red star; 4s: a blue star', or a file of these.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Many videos: .txt, .csv, .jsonl, .parquet or a folder.")] = None,
    image: Annotated[Path | None, typer.Option(help="Begin with this image.")] = None,
    video: Annotated[Path | None, typer.Option(help="Redraw this video, as --noise says.")] = None,
    noise: Annotated[float | None, typer.Option(help=f"With --video: near 0 keeps, 1 ignores it [{NOISE:g}].")] = None,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="With --video: less noise where it moves fast.")] = False,
    extend: Annotated[Path | None, typer.Option(help="Go on from this video's end; it is written first.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of what is made; 5 s by default.")] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="The same in blocks.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Videos for each prompt.")] = 1,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; what the model was trained on by default.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Latent frames that a block attends to, not the model's.")
    ] = None,
    sink: Annotated[int | None, typer.Option(min=0, help="First latent frames that stay in the window.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps, evenly spread under the shift.")] = None,
    mode: Annotated[str, typer.Option(help="rolling window, or segments that overlap (CausVid's).")] = "rolling",
    segment: Annotated[
        int, typer.Option(min=1, help="With --mode overlap: latent frames of a segment.")
    ] = CLIP_LATENTS,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="fp32 (default on the CPU) or bf16 (default on CUDA).")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="With --prompts: videos made together [1].")] = None,
    per_shard: Annotated[int | None, typer.Option(min=1, help="With --prompts: videos of a shard [16].")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="With --prompts: Ray workers, at most [1].")] = None,
    address: Annotated[str | None, typer.Option(help="With --prompts: a Ray to join; else one is started.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --prompts: only the first ones.")] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="With --prompts: say what there is to do.")] = False,
    files: Annotated[Path | None, typer.Option(help="With --prompts: extract .mp4 files to this folder.")] = None,
) -> None:
    """Stream a video from a student. Ctrl-C ends it: what was made so far is a whole video."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    starts = {"--image": image, "--video": video, "--extend": extend}
    _exactly_one({"--prompt": prompt, "--schedule": schedule, "--prompts": prompts})
    _at_most_one(starts)
    _at_most_one({"--seconds": seconds, "--blocks": blocks})
    plan = Plan(
        student=student,
        settings=_settings(student, window, sink, steps),
        seconds=_length(seconds),
        blocks=blocks,
        seed=seed,
        samples=samples,
        height=height,
        width=width,
        mode=_mode(mode),
        segment=segment,
        device=device,
        dtype=_dtype(dtype, device),
    )
    if prompts is not None:
        _only_with("--prompt or --schedule", {**starts, "--noise": noise, "--adaptive": adaptive, "--json": json_path})
        if Path(out).suffix.lower() in FORMATS:
            raise ValueError(f"--out: with --prompts it is the folder of a data set, got {out}")
        from .rollout_batch import BatchOrder, run_batch  # here only: Ray takes its time to import

        many = BatchOrder(
            replace(plan, student=student.absolute()), prompts, out, batch or 1, per_shard or 16, workers or 1
        )
        raise typer.Exit(run_batch(many, console, address=address, limit=limit, dry=dry, files=files))
    _only_with("--prompts", {"--batch": batch, "--per-shard": per_shard, "--workers": workers, "--address": address})
    _only_with("--prompts", {"--limit": limit, "--files": files, "--dry-run": dry})
    if video is None:
        _only_with("--video", {"--noise": noise, "--adaptive": adaptive})
    find_device(device)
    order = Order(
        plan,
        read_schedule(schedule) if schedule is not None else _constant(prompt or ""),
        Path(out),
        image=image,
        video=VideoFile(video, FRAME_RATE) if video else None,
        extend=VideoFile(extend, FRAME_RATE) if extend else None,
        redraw=Redraw(NOISE if noise is None else noise, adaptive) if video else None,
    )
    order.check(json_path)
    from .rollout_single import run  # here only: networks take seconds to import, mistakes are told at once

    raise typer.Exit(run(order, console, json_path))


def _exactly_one(options: dict[str, Any]) -> None:
    if sum(value is not None for value in options.values()) != 1:
        raise ValueError(f"{', '.join(options)}: exactly one of them is needed")


def _at_most_one(options: dict[str, Any]) -> None:
    if sum(value is not None for value in options.values()) > 1:
        raise ValueError(f"{', '.join(options)}: give at most one of them")


def _only_with(needed: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}: goes with {needed}")


def _length(seconds: float | None) -> float | None:
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"--seconds: must be above 0, got {seconds:g}")
    return seconds


def _settings(folder: Path, window: int | None, sink: int | None, steps: int | None) -> StudentSettings:
    if not folder.is_dir():
        raise FileNotFoundError(f"--student: no such folder: {folder}")
    settings = StudentSettings.read(folder)
    changes: dict[str, Any] = {"window": window, "sink": sink}
    if steps is not None:
        changes["timesteps"] = tuple(timesteps(steps, settings.shift)[:-1])
    return replace(settings, **{name: value for name, value in changes.items() if value is not None})


def _mode(name: str) -> Mode:
    for mode in MODES:
        if mode == name:
            return mode
    raise ValueError(f"--mode: must be one of {', '.join(MODES)}, got {name!r}")


def _dtype(name: str | None, device: str) -> torch.dtype:
    name = name or ("bf16" if device.startswith("cuda") else "fp32")
    if name not in DTYPES:
        raise ValueError(f"--dtype: must be {' or '.join(DTYPES)}, got {name}")
    return DTYPES[name]


def _constant(prompt: str) -> Schedule:
    if not prompt.strip():
        raise ValueError("--prompt: must not be empty")
    return Schedule(((0.0, prompt),))
