"""Making the videos of a sweep, on a clock: one maker per kind of model."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from ...actors.causal_teacher import CausalTeacher
from ...actors.generator import Student
from ...actors.judge import Blocks, Shot
from ...actors.streams import Stream
from ...actors.teacher import Teacher
from ...kernels.causal.student import StudentSettings
from ...kernels.diffusion.noise import SampleKey
from ...kernels.diffusion.schedule import timesteps
from .plan import Cell, Setting, student_settings


@dataclass(frozen=True)
class Clip:
    """A video, uint8 [T, H, W, 3], its stretches by prompt, where its blocks begin, and its figures of speed."""

    video: np.ndarray
    shots: tuple[Shot, ...]
    blocks: Blocks
    speed: dict[str, float]


class Maker(Protocol):
    """A loaded model that makes cells' videos."""

    def make(self, cell: Cell) -> Clip: ...


def load_maker(cell: Cell) -> Maker:
    """The maker of a cell's model, on the cell's device. ValueError where there is no such device."""
    if cell.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device at this worker")
    makers = {"teacher": TeacherMaker, "causal": CausalMaker, "student": StudentMaker}
    return makers[cell.model.kind](cell)


class TeacherMaker:
    """Whole clips: every step sees all frames, so the first frame comes with the last."""

    def __init__(self, cell: Cell) -> None:
        self._teachers: dict[str, Teacher] = {}
        self._folder, self._device, self._autocast = Path(cell.model.folder), cell.device, cell.precision == "bfloat16"
        self._warm: set[tuple[int, int, int]] = set()

    def make(self, cell: Cell) -> Clip:
        teacher = self._teacher(cell.setting.negative_prompt or "")
        height, width = (side // teacher.vae.spatial_factor for side in cell.size)
        shape = (cell.latents, height, width)
        if shape not in self._warm:
            self._sample(teacher, cell, shape, 1)
            self._warm.add(shape)
        with measured_passes(teacher.transformer) as passes:
            began = time.perf_counter()
            video = self._sample(teacher, cell, shape, cell.setting.steps)
            seconds = time.perf_counter() - began
        speed = {
            "seconds": seconds,
            "frames_per_second": len(video) / seconds,
            "time_to_first_frame": seconds,
            "denoise_frames_per_second": len(video) / passes.seconds,
            "forwards_per_block": float(passes.count),
            "forwards_per_latent": passes.count / cell.latents,
            "latents_per_block": float(cell.latents),
        }
        blocks = StudentSettings.block
        sizes = [min(blocks, cell.latents - start) for start in range(0, cell.latents, blocks)]
        joints = Blocks.of(
            sizes, teacher.vae.temporal_factor
        )  # where a student's would be: the figure to hold theirs by
        return Clip(video[: cell.frames], (Shot(0, cell.graded[0]),), joints, speed)

    def _teacher(self, negative_prompt: str) -> Teacher:
        if negative_prompt not in self._teachers:
            teacher = next(iter(self._teachers.values()), None)
            if teacher is None:
                teacher = Teacher.from_pretrained(self._folder, self._device, autocast=self._autocast)
            networks = (teacher.transformer, teacher.encoder, teacher.vae)
            self._teachers[negative_prompt] = Teacher(
                *networks, shift=teacher.shift, negative_prompt=negative_prompt, autocast=self._autocast
            )
        return self._teachers[negative_prompt]

    def _sample(self, teacher: Teacher, cell: Cell, shape: tuple[int, int, int], steps: int) -> np.ndarray:
        assert cell.setting.guidance is not None
        noise = teacher.noise([SampleKey(cell.seed, cell.prompts[0], 0)], shape)
        grid = timesteps(steps, teacher.shift)
        return teacher.decode(teacher.sample([cell.prompts[0]], noise, grid, cell.setting.guidance))[0].numpy()


class CausalMaker:
    """A causal model of many steps: block by block, each decoded as it comes."""

    def __init__(self, cell: Cell) -> None:
        self._teachers: dict[str, CausalTeacher] = {}
        self._folder, self._device, self._autocast = Path(cell.model.folder), cell.device, cell.precision == "bfloat16"
        self._warm: set[tuple[int, int]] = set()

    def make(self, cell: Cell) -> Clip:
        teacher = self._teacher(cell.setting.negative_prompt or "")
        if cell.size not in self._warm:
            next(self._stream(teacher, cell, 1))
            self._warm.add(cell.size)
        with measured_passes(teacher.transformer) as passes:
            frames, times, began = [], [], time.perf_counter()
            for chunk in self._stream(teacher, cell, cell.setting.steps):
                frames.append(chunk)
                times.append(time.perf_counter() - began)
                if sum(map(len, frames)) >= cell.frames:
                    break
        video, sizes = np.concatenate(frames), _sizes(teacher.settings, len(frames))
        speed = {
            "seconds": times[-1],
            "frames_per_second": len(video) / times[-1],
            "denoise_frames_per_second": len(video) / passes.seconds,
            "time_to_first_frame": times[0],
            "forwards_per_block": passes.count / len(frames),
            "forwards_per_latent": passes.count / sum(sizes),
            "latents_per_block": float(teacher.settings.block),
        }
        blocks = Blocks.of(sizes, teacher.vae.temporal_factor)
        return Clip(video[: cell.frames], (Shot(0, cell.graded[0]),), blocks, speed)

    def _teacher(self, negative_prompt: str) -> CausalTeacher:
        if negative_prompt not in self._teachers:
            self._teachers = {
                negative_prompt: CausalTeacher.from_pretrained(
                    self._folder, self._device, negative_prompt=negative_prompt, autocast=self._autocast
                )
            }
        return self._teachers[negative_prompt]

    def _stream(self, teacher: CausalTeacher, cell: Cell, steps: int) -> Iterator[np.ndarray]:
        assert cell.setting.guidance is not None
        height, width = (side // teacher.vae.spatial_factor for side in cell.size)
        key, grid = SampleKey(cell.seed, cell.prompts[0], 0), timesteps(steps, teacher.shift)
        return teacher.stream(cell.prompts[0], key, (height, width), grid, cell.setting.guidance)


def _sizes(settings: StudentSettings, blocks: int) -> list[int]:
    """Latent frames of the first blocks of a stream."""
    return [settings.size_of(0), *[settings.block] * (blocks - 1)]


class StudentMaker:
    """Streams: block by block, decoded as they come. Settings share the networks."""

    def __init__(self, cell: Cell) -> None:
        dtype = getattr(torch, cell.precision)
        self._loaded = Student.from_pretrained(Path(cell.model.folder), cell.device, dtype=dtype)
        self._students: dict[Setting, Student] = {}
        self._warm: set[tuple[Setting, tuple[int, int]]] = set()

    def make(self, cell: Cell) -> Clip:
        student = self._student(cell.setting)
        if (cell.setting, cell.size) not in self._warm:
            with _open(student, cell) as stream:
                stream.next_chunk()
            self._warm.add((cell.setting, cell.size))
        student.context.cache_clear()  # so that every video's time holds the encoding of its prompt
        with measured_passes(student.transformer) as passes:
            take = _stream(student, cell)
        seconds, gaps = take.times[-1], np.diff(take.times)
        video = np.concatenate(take.frames)
        speed = {
            "seconds": seconds,
            "frames_per_second": len(video) / seconds,
            "denoise_frames_per_second": len(video) / passes.seconds,
            "time_to_first_frame": take.first,
            "forwards_per_block": passes.count / len(take.times),
            "forwards_per_latent": passes.count / len(take.starts),
            "latents_per_block": float(student.settings.block),
        }
        if len(gaps):
            speed |= {"gap_p50": float(np.quantile(gaps, 0.5)), "gap_p95": float(np.quantile(gaps, 0.95))}
        return Clip(video[: cell.frames], tuple(take.shots), take.blocks(), speed)

    def _student(self, setting: Setting) -> Student:
        if setting not in self._students:
            loaded = self._loaded
            networks = (loaded.transformer, loaded.encoder, loaded.vae)
            settings = _settings(loaded.settings, setting)
            self._students[setting] = Student(*networks, settings, dtype=loaded.dtype)
        return self._students[setting]


@dataclass
class _Take:
    """A stream as it came: groups of frames (one per latent), where blocks begin, and seconds from the prompt.

    starts: for each group, whether it begins a block. times: at the end of each block. first: to the first frame.
    """

    frames: list[np.ndarray]
    starts: list[bool]
    times: list[float]
    shots: list[Shot]
    first: float = 0.0

    @property
    def length(self) -> int:
        return sum(map(len, self.frames))

    def blocks(self) -> Blocks:
        """Where seams may be, and the latents inside the blocks to hold them against."""
        places = np.cumsum([0, *(len(group) for group in self.frames[:-1])])
        marked = [(int(place), start) for place, start in zip(places, self.starts, strict=True) if place]
        edges = tuple(place for place, start in marked if start)
        return Blocks(edges, tuple(place for place, start in marked if not start))


def _stream(student: Student, cell: Cell) -> _Take:
    """As many blocks as fill the cell's frames; in the middle the second prompt, if there is one."""
    take = _Take([], [], [], [Shot(0, cell.graded[0])])
    began = time.perf_counter()
    with _open(student, cell) as stream:
        while take.length < cell.frames:
            if len(cell.prompts) > len(take.shots) and take.length >= cell.frames / 2:
                stream.switch_prompt(cell.prompts[1])
                take.shots.append(Shot(take.length, cell.graded[1]))
            for place, group in enumerate(stream.frames()):
                take.first = take.first or time.perf_counter() - began
                take.frames.append(group)
                take.starts.append(place == 0)
            take.times.append(time.perf_counter() - began)
    return take


def _open(student: Student, cell: Cell) -> Stream:
    mode: Literal["rolling", "overlap"] = "overlap" if cell.setting.mode == "overlap" else "rolling"
    height, width = cell.size
    return student.open(cell.prompts[0], cell.seed, height=height, width=width, mode=mode)


@dataclass
class Passes:
    """Forward passes of a network, and the seconds within them."""

    count: int = 0
    seconds: float = 0.0


@contextmanager
def measured_passes(network: nn.Module) -> Iterator[Passes]:
    """Count and time the network's forward passes; a batch of two (guidance) counts as two."""
    passes, began = Passes(), [0.0]

    def begin(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        _settle(inputs[0].device)
        began[0] = time.perf_counter()

    def end(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        _settle(inputs[0].device)
        passes.count += inputs[0].shape[0]
        passes.seconds += time.perf_counter() - began[0]

    handles = (network.register_forward_pre_hook(begin), network.register_forward_hook(end))
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def _settle(device: torch.device) -> None:
    """Wait until a GPU has done what it was given: the clock should show its work, not the asking."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _settings(own: StudentSettings, setting: Setting) -> StudentSettings:
    assert setting.levels is not None
    window = own.window if setting.window is None else setting.window
    return student_settings(own, window, own.sink if setting.sink is None else setting.sink, setting.levels)
