"""Fine-tuning: a given teacher trained further on the latent shards of one's own videos."""

import shutil
from pathlib import Path
from typing import Any

import torch

from ...actors.encoder import vae_digest
from ...actors.engine import OptimizerSettings
from ...actors.model_files import check_model, transformer_config, velocity_digest
from ...actors.pretraining import TeacherBatch, TeacherLearner
from ...actors.teacher import Teacher
from ...cluster.dataset import INFO, DatasetInfo, read_dataset
from ...cluster.manifest import read_manifest
from ...cluster.storage import Storage
from ...kernels.wan.config import TransformerConfig
from ...kernels.wan.weights import write_transformer
from ..recipe import FineTuneRecipe
from ..samples import Deal, Lane, TrainingData
from .curves import plot_curve
from .latents import LatentSet
from .loop import train
from .teacher import noised, step_generator

REPORT_EVERY = 500
COPIED = ("vae", "text_encoder", "tokenizer", "scheduler", "model_index.json")  # what tuning leaves as it is


def fine_tune(
    recipe: FineTuneRecipe, run: Path, latents: Storage, init: Path, device: str = "cpu", *, compiled: bool = False
) -> None:
    """Train in `run/teacher`, going on from its checkpoint; the finished model is `run/model`.

    init: a teacher's folder in the diffusers layout: its weights, its shift, and the VAE that made `latents`.
    compiled: torch.compile its blocks.
    """
    teacher = Teacher.from_pretrained(init, device)
    settings = OptimizerSettings(total_steps=recipe.steps, **recipe.optimizer.model_dump())
    tuner = TeacherLearner(teacher.transformer, teacher.encoder, settings, device, compiled=compiled)
    clips = _open_clips(latents, recipe)
    folder = run / "teacher"

    def batch_at(step: int) -> TeacherBatch:
        _, captions, values = zip(*(clips.take() for _ in range(recipe.batch)), strict=True)
        taken, generator = LatentSet(torch.stack(values), list(captions)), step_generator(recipe.seed, step)
        return noised(taken, tuner.tokenize, generator, ("uniform", teacher.shift), recipe.prompt_drop)

    def report(step: int) -> None:
        plot_curve(folder)

    train("teacher", folder, TuningRun(tuner, clips), batch_at, recipe.steps, every=(REPORT_EVERY, report))
    export(init, run / "model", tuner)


def _open_clips(latents: Storage, recipe: FineTuneRecipe) -> Lane:
    """The set's samples, epoch after epoch, in one stream. A damaged one ends the run: its clip was one's own."""
    data = TrainingData(latents, read_dataset(latents), tuple(read_manifest(latents)), clean_only=True)
    return Lane(data, Deal(recipe.batch, 1, recipe.seed, "fatal"), 0)


class TuningRun:
    """A learner and its data, in one checkpoint: what was learned and what was read never come apart."""

    def __init__(self, tuner: TeacherLearner, clips: Lane) -> None:
        self._tuner, self._clips = tuner, clips

    def step(self, batch: TeacherBatch) -> dict[str, float]:
        return self._tuner.step(batch)

    def state_dict(self) -> dict[str, Any]:
        return {"tuner": self._tuner.state_dict(), "clips": self._clips.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._tuner.load_state_dict(state["tuner"])
        self._clips.load_state(state["clips"])


def check_teacher(init: Path) -> None:
    """ValueError where `init` is no teacher."""
    if (init / "student.json").exists():
        raise ValueError(f"--init {init}: is a student; training takes the bidirectional teacher it came from")
    check_model(init)


def check_inputs(latents: Storage, init: Path) -> None:
    """ValueError where `init` is no teacher, or the data set holds no latents that it takes."""
    check_teacher(init)
    info = read_dataset(latents)
    _check_latents(latents, info, transformer_config(init))
    vae = info.made_by.get("vae")  # of a set that was imported nothing is known
    if vae is not None and vae != vae_digest(init):
        raise ValueError(f"{latents.where(INFO)}: vae: the latents were made with another VAE than that of {init}")


def _check_latents(storage: Storage, info: DatasetInfo, config: TransformerConfig) -> None:
    """Every sample must be a clip that the transformer takes, all of one size, or they make no batch."""
    where, fields = storage.where(INFO), info.fields
    spec = fields.get("latents.safetensors", {}).get("latents")
    if spec is None or "caption.txt" not in fields:
        raise ValueError(
            f"{where}: fields: fine-tuning needs latents.safetensors and caption.txt, has {sorted(fields)}"
        )
    sizes = [size for size in spec.shape if size is not None]
    if len(sizes) != 4 or len(spec.shape) != 4:
        raise ValueError(f"{where}: latents: must be clips [F, C, H, W] of one size, got {list(spec.shape)}")
    _, channels, height, width = sizes
    if channels != config.in_channels:
        raise ValueError(f"{where}: latents: have {channels} channels, the model takes {config.in_channels}")
    try:
        config.tokens_per_frame(height, width)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def export(init: Path, folder: Path, tuner: TeacherLearner) -> None:
    """Write the averaged weights in bfloat16, and beside them what the model came with."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source, target = init / name, folder / name
        if target.exists():
            continue
        temporary = folder / f"{name}.tmp"
        if source.is_dir():
            shutil.copytree(source, temporary, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    transformer = tuner.averaged()
    state = {name: value.to(torch.bfloat16).cpu() for name, value in transformer.state_dict().items()}
    write_transformer(folder, transformer.config, state)


def origin(latents: Storage, init: Path) -> dict[str, str]:
    """What a run of fine-tuning starts from, apart from its recipe: told by content, not by path."""
    return {"latents": read_dataset(latents).fingerprint, "init": velocity_digest(init)}
