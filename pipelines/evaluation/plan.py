"""The plan of a sweep: its prompts, its settings, and one cell per video with a key of all that decides it."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from ...actors import judge, vbench
from ...actors.model_files import check_model, latents_shape, velocity_digest
from ...kernels.causal.student import StudentSettings
from ...kernels.diffusion.schedule import timesteps
from ...kernels.sprites.splits import prompts as sprites_prompts
from ..prompts import read_prompts
from .sweep import SPRITES, VBENCH, Mode, Precision, PromptSet, StudentSweep, Sweep

SPRITES_COUNT = 16
CELL_FORMAT = 2  # raised when the content of a cell's row changes


@dataclass(frozen=True)
class Asked:
    """A prompt: its own words, by which videos are named and graded, and what the models are given."""

    text: str
    given: str

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Model:
    """A model of the sweep. kind: teacher, causal (a causal teacher, of many steps) or student.

    fingerprint: over every file that decides its videos. origin: of a student, where it says it came from: stages,
    their recipes' fingerprints, its teacher.
    """

    name: str
    folder: str
    kind: str
    fingerprint: str
    origin: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Setting:
    """How a model is run. mode: "clip" of a teacher, "blocks" of a causal one. levels: a student's timesteps.

    What does not apply is None.
    """

    steps: int
    mode: Literal["clip", "blocks"] | Mode
    guidance: float | None = None
    negative_prompt: str | None = None
    window: int | None = None
    sink: int | None = None
    levels: tuple[float, ...] | None = None

    @property
    def label(self) -> str:
        """As reports call it; no two settings of a model share one."""
        steps = f"{self.steps} step{'' if self.steps == 1 else 's'}"
        if self.guidance is not None:
            blocks = ", block by block" if self.mode == "blocks" else ""
            return f"{steps}, guidance {self.guidance:g}{blocks}"
        if self.mode == "overlap":
            return f"{steps}, overlapping segments"
        switch = ", prompt switch" if self.mode == "switch" else ""
        return f"{steps}, window {self.window}, sink {self.sink}{switch}"


@dataclass(frozen=True)
class Cell:
    """One video to make and grade. frames: pixel frames; latents: latent frames that are made for them.

    label: the setting as reports call it, with the length where a sweep has several. prompts: what the model is given,
    a second one for a switch; graded: the same in the prompts' own words.
    """

    key: str
    model: Model
    setting: Setting
    label: str
    prompt_set: str
    prompt: Asked
    prompts: tuple[str, ...]
    graded: tuple[str, ...]
    level: int
    seed: int
    frames: int
    latents: int
    size: tuple[int, int]
    frame_rate: int
    device: str
    precision: Precision


@dataclass(frozen=True)
class Plan:
    """Every cell of a sweep, models together, and the prompts of each set."""

    sweep: Sweep
    cells: list[Cell]
    prompts: dict[str, list[Asked]]
    models: list[Model]


def make_plan(sweep: Sweep, device: str, *, vbench_info: Path | None = None, limit: int | None = None) -> Plan:
    """Look at the models and prompts of a sweep and lay out its cells. limit: of prompts per set.

    Raises ValueError or FileNotFoundError, in one line, on a model, a prompt set or a size that will not do.
    """
    prompts = {entry.name: _prompts(entry, vbench_info)[:limit] for entry in sweep.prompts}
    models = [_model(name, folder) for name, folder in sweep.models.items()]
    cells: dict[tuple[str, str, str, str], Cell] = {}
    for model in models:
        lengths = _lengths(model, sweep)
        for setting, seconds, entry in product(settings_of(model, sweep), lengths, sweep.prompts):
            label = setting.label + (f", {seconds:g} s" if len(lengths) > 1 else "")
            for cell in _cells(sweep, device, model, setting, label, seconds, entry, prompts[entry.name]):
                cells[model.name, label, entry.name, cell.key] = cell
    return Plan(sweep, list(cells.values()), prompts, models)


def settings_of(model: Model, sweep: Sweep) -> list[Setting]:
    """The settings under which a model is run. ValueError names the model and what does not fit it."""
    if model.kind != "student":
        section = sweep.teacher
        mode: Literal["clip", "blocks"] = "clip" if model.kind == "teacher" else "blocks"
        pairs = [(steps, guidance) for steps in section.steps for guidance in section.guidance]
        return [Setting(steps, mode, guidance, section.negative_prompt) for steps, guidance in pairs]
    own = StudentSettings.read(Path(model.folder))
    try:
        return _student_settings(own, sweep.student)
    except ValueError as error:
        raise ValueError(f"student {model.name}: {error}") from None


def _student_settings(own: StudentSettings, section: StudentSweep) -> list[Setting]:
    found = {}
    for steps, window, sink, mode in section.combinations():
        levels = few_steps(own, steps)
        if mode == "overlap":
            setting = Setting(len(levels), mode, levels=levels)
        else:
            changed = student_settings(own, window or own.window, own.sink if sink is None else sink, levels)
            setting = Setting(len(levels), mode, window=changed.window, sink=changed.sink, levels=levels)
        found[setting.label] = setting
    return list(found.values())


def few_steps(own: StudentSettings, steps: int | None) -> tuple[float, ...]:
    """A student's own timesteps, or as many as asked for, evenly spread before the shift."""
    if steps is None or steps == len(own.timesteps):
        return own.timesteps
    return tuple(timesteps(steps, own.shift)[:-1])


def student_settings(own: StudentSettings, window: int, sink: int, levels: tuple[float, ...]) -> StudentSettings:
    """A student's settings with another window, sink and timesteps; ValueError if they do not go together."""
    return replace(own, timesteps=levels, window=window, sink=sink)


def _lengths(model: Model, sweep: Sweep) -> tuple[float, ...]:
    """Seconds of a model's videos."""
    own = sweep.teacher.seconds
    return (own,) if own is not None and model.kind == "teacher" else sweep.seconds


def _cells(
    sweep: Sweep,
    device: str,
    model: Model,
    setting: Setting,
    label: str,
    seconds: float,
    entry: PromptSet,
    prompts: list[Asked],
) -> list[Cell]:
    frames, latents = _length(sweep, model, seconds)
    size = (sweep.clip.height, sweep.clip.width)
    precision: Precision = sweep.precision or ("float32" if device == "cpu" else "bfloat16")
    cells = []
    for index, prompt in enumerate(prompts):
        after = [prompts[(index + 1) % len(prompts)]] if setting.mode == "switch" else []
        given = tuple(each.given for each in (prompt, *after))
        graded = tuple(each.text for each in (prompt, *after))
        for seed in sweep.seeds:
            made = {
                "model": model.fingerprint,
                "setting": asdict(setting),
                "prompts": [given, graded],
                "level": entry.level,
                "seed": seed,
                "clip": [frames, *size, sweep.clip.frame_rate],
                "run": [device, precision, CELL_FORMAT, judge.VERSION],
            }
            cells.append(
                Cell(
                    key=hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:24],
                    model=model,
                    setting=setting,
                    label=label,
                    prompt_set=entry.name,
                    prompt=prompt,
                    prompts=given,
                    graded=graded,
                    level=entry.level,
                    seed=seed,
                    frames=frames,
                    latents=latents,
                    size=size,
                    frame_rate=sweep.clip.frame_rate,
                    device=device,
                    precision=precision,
                )
            )
    return cells


def _length(sweep: Sweep, model: Model, seconds: float) -> tuple[int, int]:
    """Pixel frames of a clip of about so many seconds, and the latent frames that make them."""
    config = json.loads((Path(model.folder) / "vae" / "config.json").read_text())
    factor = config.get("scale_factor_temporal", 4)
    frames = 1 + factor * max(1, round(seconds * sweep.clip.frame_rate / factor))
    latents, *_ = latents_shape(Path(model.folder), sweep.clip.height, sweep.clip.width, frames)
    return frames, latents


def _model(name: str, folder: Path) -> Model:
    folder = folder.absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"models.{name}: no such folder: {folder}")
    check_model(folder)
    if not (folder / "student.json").is_file():
        return Model(name, str(folder), "teacher", model_fingerprint(folder))
    settings = StudentSettings.read(folder)
    kind = "student" if settings.sampling == "few-step" else "causal"
    return Model(name, str(folder), kind, model_fingerprint(folder), settings.origin)


def model_fingerprint(folder: Path) -> str:
    """Sixteen hexadecimal digits over the networks, the VAE, the scheduler and student.json of a model folder."""
    parts = [file for part in ("vae", "scheduler") for file in (folder / part).rglob("*") if file.is_file()]
    parts += [folder / "student.json"] if (folder / "student.json").is_file() else []
    digest = hashlib.sha256(velocity_digest(folder).encode())
    for file in sorted(parts):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def prompts_hash(prompts: list[Asked]) -> str:
    """Sixteen hexadecimal digits over the prompts of a set, in order, and what the models are given for them."""
    content = json.dumps([[each.text, each.given] for each in prompts])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _prompts(entry: PromptSet, vbench_info: Path | None) -> list[Asked]:
    texts = _texts(entry, vbench_info)
    given = texts
    if entry.extended is not None:
        if not entry.extended.is_file():
            raise FileNotFoundError(f"prompts.extended: no such file: {entry.extended}")
        given = [line.strip() for line in entry.extended.read_text().splitlines() if line.strip()]
        if len(given) != len(texts):
            raise ValueError(f"{entry.extended}: needs a line for each of {len(texts)} prompts, has {len(given)}")
    asked = [Asked(text, words) for text, words in zip(texts, given, strict=True)]
    return asked[: entry.count]


def _texts(entry: PromptSet, vbench_info: Path | None) -> list[str]:
    if entry.source in SPRITES:
        found = sprites_prompts(SPRITES[entry.source], entry.count or SPRITES_COUNT, entry.seed, entry.level)
        return list(dict.fromkeys(text for text, _ in found))
    if entry.source == VBENCH:
        if vbench_info is None:
            raise ValueError("prompts: the set vbench needs --vbench-info VBench_full_info.json")
        texts = [prompt.text for prompt in vbench.read_info(vbench_info)]
        for text in texts:
            vbench.video_name(text, 0)  # refuses what VBench could not find again
        return texts
    found_in_file = read_prompts(Path(entry.source))
    if found_in_file.problems:
        raise ValueError(f"{entry.source}: {found_in_file.problems[0]}")
    return list(found_in_file.texts)
