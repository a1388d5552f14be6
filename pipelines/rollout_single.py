"""One video from a student, or some samples of it: made chunk by chunk, written as they come."""

import json
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

import numpy as np
import torch
import typer
from rich.console import Console

from ..actors.bench_device import MemoryMeter, describe_device, versions
from ..actors.bench_report import FRAME_RATE
from ..actors.generator import Student
from ..actors.streams import Stream, overlapped
from ..cluster.machine import free_memory
from ..kernels.clips import Pixels
from .rollout_meter import Meter
from .rollout_order import Order
from .schedule import Schedule, chunk_frames, frames_of
from .video import Writer, open_writer, read_image

WRITTEN_AT_ONCE: Final = 16  # frames of a given video


def run(order: Order, console: Console, json_path: Path | None = None) -> int:
    """Make an order's videos; the exit code: 0, or 130 when it was interrupted."""
    order.check(json_path)
    for start in order.unreached():
        console.print(f"--schedule: the video ends before the prompt at {start:g}s")
    memory = MemoryMeter(torch.device(order.plan.device))
    student = order.plan.load()
    student.budget = _room(student.device)
    chunks = chunk_frames(order.plan.settings, continues=order.extend is not None)
    meter = Meter(console, order.frames, *chunks)
    with Interruption() as stop, ExitStack() as files:
        writers = [files.enter_context(open_writer(target, FRAME_RATE)) for target in order.targets]
        clip = _copy(order, student, writers, stop)
        memory.start()
        meter.start()
        streams = [] if stop.asked else _open(order, student, clip)
        try:
            for groups in _rounds(order, streams, meter.chunks):
                meter.count(_write(writers, groups, meter.left))
                if stop.asked or not meter.left:
                    break
        except ArithmeticError as error:
            raise ValueError(f"{order.plan.student}: {error}") from error
        finally:
            meter.close()
    if streams:
        figures = _setting(order, student, streams[0]) | meter.figures(order.plan.samples)
        figures["peak_memory"] = {"bytes": memory.peak(), "means": memory.meaning}
        _tell(figures, json_path)
    if meter.left:
        kept = "is a whole video" if meter.frames or clip is not None else "was not written"
        console.print(f"Stopped. What was made so far {kept}; the same command begins anew.")
        return 130
    return 0


def _room(device: torch.device) -> int:
    """Bytes that streams may take: what the device has free once the networks are there."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def _tell(figures: dict[str, Any], json_path: Path | None) -> None:
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    typer.echo(_summary(figures))


def _copy(order: Order, student: Student, writers: list[Writer], stop: "Interruption") -> Pixels | None:
    """Write a video that is to be extended; returns its last frames, as many as a window can take up."""
    if order.extend is None:
        return None
    last: deque[Pixels] = deque(maxlen=frames_of(order.plan.settings.window))
    frames = order.extend.read(*order.plan.size(student))
    while not stop.asked and (part := list(islice(frames, WRITTEN_AT_ONCE))):
        _write(writers, [np.stack(part)] * len(writers), len(part))
        last.extend(part)
    return np.stack(last) if last else None


def _write(writers: list[Writer], groups: list[Pixels], most: int) -> int:
    """Write a group of frames to each file, at most so many; returns how many."""
    for writer, group in zip(writers, groups, strict=True):
        writer.write(group[:most])
    return min(most, len(groups[0]))


def _open(order: Order, student: Student, clip: Pixels | None) -> list[Stream]:
    plan, (height, width) = order.plan, order.plan.size(student)
    image = None if order.image is None else read_image(order.image, height, width)
    start: dict[str, Any] = {"image": image, "clip": clip, "redraw": order.redraw, "height": height, "width": width}
    prompt = order.schedule.at(0.0)
    return [
        student.open(prompt, plan.seed, sample, mode=plan.mode, segment=plan.segment, **start)
        for sample in range(plan.samples)
    ]


def _rounds(order: Order, streams: list[Stream], chunks: int) -> Iterator[list[Pixels]]:
    """Groups of frames, one for each sample, as they are made."""
    if not streams:
        return
    student, prepare = streams[0].student, _following(order.schedule, streams[0])
    if order.video is not None:
        yield from _redrawn(streams, order.video.read(*order.plan.size(student)), prepare)
    elif len(streams) > 1:
        for _ in range(chunks):
            for stream in streams:
                prepare(stream)
            yield student.step(streams)
    elif student.device.type == "cuda":
        for group in overlapped(streams[0], chunks, prepare):
            yield [group]
    else:
        for _ in range(chunks):
            prepare(streams[0])
            for group in streams[0].frames():
                yield [group]


def _redrawn(
    streams: list[Stream], frames: Iterator[Pixels], prepare: Callable[[Stream], None]
) -> Iterator[list[Pixels]]:
    """Chunk by chunk; the last is filled up with its last frame."""
    while chunk := list(islice(frames, streams[0].frames_due)):
        source = np.stack(chunk + chunk[-1:] * (streams[0].frames_due - len(chunk)))
        for stream in streams:
            prepare(stream)
        yield [stream.redraw(source) for stream in streams]


def _following(schedule: Schedule, stream: Stream) -> Callable[[Stream], None]:
    """Before a block is made: switch to the prompt that is due where it begins. Second 0 is the first frame made."""
    before = 0 if stream.has_unshown else frames_of(stream.latents_done)

    def prepare(stream: Stream) -> None:
        due = schedule.at((frames_of(stream.latents_done) - before) / FRAME_RATE)
        if due != stream.prompt:
            stream.switch_prompt(due)

    return prepare


class Interruption:
    """Ctrl-C and SIGTERM ask the loop to end after what it is at; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _setting(order: Order, student: Student, stream: Stream) -> dict[str, Any]:
    """All that a figure of speed depends on."""
    settings, plan = stream.generator.settings, stream.plan
    return {
        "files": [str(target) for target in order.targets],
        "student": str(order.plan.student),
        "device": describe_device(student.device),
        "precision": str(student.dtype).removeprefix("torch."),
        "resolution": {"width": plan.width, "height": plan.height},
        "frame_rate": FRAME_RATE,
        "frames_per_block": student.vae.temporal_factor * settings.block,
        "latent_frames_per_block": settings.block,
        "steps": len(settings.timesteps),
        "timesteps": list(settings.timesteps),
        "window": settings.window,
        "sink": settings.sink,
        "mode": plan.mode,
        "begins_with": order.begins_with,
        "noise": None if order.redraw is None else {"level": order.redraw.noise, "adaptive": order.redraw.adaptive},
        "prompts": [{"latent_frame": start, "prompt": text} for start, text in stream.prompts],
        "seed": plan.seed,
        "samples": order.plan.samples,
        "includes": {"loading": False, "text_encoding": True, "vae_decoding": True, "video_encoding": True},
        "warm_up_blocks": 0,
        "bytes_per_stream": stream.bytes,
        "versions": versions(),
    }


def _summary(figures: dict[str, Any]) -> str:
    first, size = figures["time_to_first_frame"], figures["resolution"]
    made = f"{figures['frames']} frames ({figures['seconds_of_video']:.2f} s) of {size['width']}x{size['height']}"
    speed = f"{figures['frames_per_second']:.2f} frames per second, first frame after "
    speed += "-" if first is None else f"{first:.2f} s"
    setting = f"{figures['device']['kind']}, {figures['precision']}, {figures['steps']} steps"
    setting += f", window {figures['window']}, sink {figures['sink']}"
    return f"{', '.join(figures['files'])}: {made}, {speed} ({setting})"
