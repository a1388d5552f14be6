"""Recipes: one YAML file per model, validated, with every default in exactly one place (here)."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """A section of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class WorldRecipe(Strict):
    """The sprites videos that a tiny model learns."""

    level: Annotated[int, Field(ge=0, le=3)] = 0
    size: Positive = 64
    frames: Positive = 81


class OptimizerRecipe(Strict):
    """Muon and AdamW, or AdamW alone; linear warm-up and cosine decay to `final_share` of the learning rate."""

    learning_rate: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    final_share: Share = 0.02
    clip_norm: Rate = 1.0
    ema_decay: Share = 0.998
    muon: bool = True


class ReconstructionRecipe(Strict):
    """Weights of the VAE's loss terms, see `kernels.objectives.reconstruction`."""

    absolute_weight: Share = 1.0
    square_weight: Annotated[float, Field(ge=0)] = 10.0
    edge_weight: Annotated[float, Field(ge=0)] = 1.0
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6


class VAEPhaseRecipe(Strict):
    """A stretch of the VAE's training, which begins with the averaged weights of the one before.

    Short clips teach quickly; a last phase on long ones is needed, or quality falls where the short ones ended.
    """

    steps: Positive
    batch: Positive
    clip_frames: Positive
    optimizer: OptimizerRecipe = OptimizerRecipe()


class VAERecipe(Strict):
    """`AutoencoderKLWan`'s shape and its training. Field names of `network` are diffusers'."""

    network: dict[str, Any]
    loss: ReconstructionRecipe = ReconstructionRecipe()
    phases: Annotated[list[VAEPhaseRecipe], Field(min_length=1)]


class TeacherRecipe(Strict):
    """Flow-matching training of the transformer, with the text encoder trained along."""

    clips: Positive = 12000
    steps: Positive = 6000
    batch: Positive = 48
    shift: Rate = 3.0
    prompt_drop: Share = 0.1
    optimizer: OptimizerRecipe = OptimizerRecipe()


class PretrainRecipe(Strict):
    """Everything that decides what `reelway pretrain` makes."""

    model: str = "tiny"
    seed: int = 0
    world: WorldRecipe = WorldRecipe()
    vae: VAERecipe
    teacher: TeacherRecipe = TeacherRecipe()


class Recipe(Strict):
    """One file of `configs/`: a section per job."""

    pretrain: PretrainRecipe


Section = TypeVar("Section", bound=Strict)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read and validate a recipe; `overrides` are "a.b=value", the value in YAML. ValueError on the first mistake."""
    if not path.is_file():
        raise FileNotFoundError(f"recipe: no such file: {path}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path}: must be a table of sections, got {type(content).__name__}")
    for override in overrides or []:
        _override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"recipe {path}: {field}: {first['msg']}, got {first['input']!r}") from None


def _override(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ValueError(f"--set: expected a.b=value, got {override!r}")
    *parents, last = key.split(".")
    table = content
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {override}: {parent} is not a section")
    table[last] = yaml.safe_load(value)


def fingerprint(section: BaseModel | dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that differ when any value of the section differs."""
    content = section.model_dump(mode="json") if isinstance(section, BaseModel) else section
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
