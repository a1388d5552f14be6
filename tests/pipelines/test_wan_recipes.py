"""The recipes of the real models: published settings, and that every stage runs with them."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reelway.cluster.zero_settings import Division
from reelway.kernels.diffusion.sampler import recording_grid
from reelway.kernels.sprites.captions import VOCABULARY
from reelway.kernels.wan.config import CONFIGS
from reelway.kernels.wan.text import tiny_text_encoder
from reelway.kernels.wan.transformer import VideoTransformer
from reelway.pipelines import distill, initialize
from reelway.pipelines.memory import GIB, division_of
from reelway.pipelines.models import write_model
from reelway.pipelines.recipe import Recipe, load_recipe
from reelway.pipelines.telemetry import read_curve

sys.path.insert(0, str(Path(__file__).parent))
from trainings.jobs import carry_out, write_dataset

ROOT = Path(__file__).parents[2]
MODELS = ("wan2.1-1.3b", "wan2.1-14b")
METHODS = ("causvid", "self-forcing", "long")
UMT5 = 5_680_910_336  # parameters of the text encoder


def recipe_of(model: str, *changes: str) -> Recipe:
    return load_recipe(ROOT / "configs" / f"{model}.yaml", list(changes))


# CausVid's repository, Self-Forcing's, LongLive's: steps, batch, rate of student and critic, betas, decay of the
# average, guidance (standard w), shift of the score's timestep.
PUBLISHED = {
    "causvid": (1000, 64, 2e-6, 2e-6, (0.9, 0.999), 0.0, 1 + 3.5, 8.0),
    "self_forcing": (600, 64, 2e-6, 4e-7, (0.0, 0.999), 0.99, 1 + 3.0, 5.0),
    "long": (3000, 64, 1e-5, 2e-6, (0.0, 0.999), 0.0, 1 + 3.0, 5.0),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", PUBLISHED)
def test_distillation_has_the_published_settings(model: str, method: str) -> None:
    section = getattr(recipe_of(model).distill, method)
    student, critic = section.student, section.critic
    found = (section.steps, section.batch, student.learning_rate, critic.learning_rate, student.betas)
    assert (*found, student.ema_decay, section.guidance, section.shift) == PUBLISHED[method]
    assert student.betas == critic.betas
    assert section.critic_updates == 5
    assert (section.smallest_timestep, section.largest_timestep) == (20, 980)
    assert {student.clip_norm, critic.clip_norm} == {10.0}
    assert {student.weight_decay, critic.weight_decay} == {0.01}
    assert {student.warmup_steps, critic.warmup_steps} == {0}
    assert section.rollout_frames == (240 if method == "long" else None)


@pytest.mark.parametrize("model", MODELS)
def test_initialisation_and_trajectories_have_the_published_settings(model: str) -> None:
    recipe = recipe_of(model)
    section, optimizer = recipe.initialize, recipe.initialize.optimizer
    assert (section.steps, section.batch, optimizer.learning_rate) == (3000, 128, 2e-6)
    assert (optimizer.betas, optimizer.clip_norm, optimizer.ema_decay) == ((0.9, 0.999), 10.0, 0.0)
    student = recipe.student.settings()
    assert student.timesteps == pytest.approx((1000, 937.5, 833.3333, 625))
    assert (student.block, student.blocks(21)) == (3, [3] * 7)
    assert recipe.trajectories.guidance == 6.0
    grid = recording_grid((*student.timesteps, 0.0), recipe.trajectories.minimum_steps, student.shift)
    assert len(grid) == 1 + 48, "the student's timesteps lie on the path's own steps"
    assert (recipe.clip.height, recipe.clip.width, recipe.clip.frames) == (480, 832, 81)


# --- What they take -----------------------------------------------------------------------------------------------


def bare_model(folder: Path, model: str) -> Path:
    """What of a model's folder says how large it is."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer/config.json").write_text(json.dumps(CONFIGS[model].to_diffusers()))
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_a_distillation_fits_64_devices_of_80_gb(model: str, method: str, tmp_path: Path) -> None:
    recipe = recipe_of(model)
    folder = str(bare_model(tmp_path / model, model))
    job = distill.DistillJob(recipe.model_dump(mode="json"), method, folder, folder, "data", "prompts", "run", "zero")
    memory = distill.memory(job)
    held = memory.device(division_of(recipe.zero, 64, "cuda"))
    text = 2 * UMT5  # in bfloat16; the folder here has no files of it
    assert 5 < sum(held.values()) / GIB < 74.5 - text / GIB, held  # 80 GB are 74.5 GiB
    assert (held["KV cache"] > 0) == (method != "causvid")
    alone = memory.device(Division(precision="autocast"))
    assert sum(alone.values()) / GIB > (400 if model == "wan2.1-14b" else 50)


# --- That they run ------------------------------------------------------------------------------------------------


def cut_model(folder: Path, model: str, **sizes: int) -> Path:
    """The model with random weights, cut to one block."""
    config = replace(CONFIGS[model], num_layers=1, text_dim=128, **sizes)
    torch.manual_seed(0)
    shutil.copytree(ROOT / "assets/tiny/vae", folder / "vae")
    write_model(folder, VideoTransformer(config), tiny_text_encoder(VOCABULARY, config.text_dim), shift=3.0)
    return folder


SMALL = ("clip.height=32", "clip.width=32", "clip.frames=21", "distill.long.rollout_frames=9")


def few_steps(section: str, steps: int) -> list[str]:
    values = {"steps": steps, "batch": 1, "lanes": 1, "sheet_every": 100}
    return [f"{section}.{name}={value}" for name, value in values.items()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("wan2.1-1.3b", {}),
        # Of 14B one block of full width would take 20 GB with its optimisers.
        ("wan2.1-14b", {"num_attention_heads": 4, "ffn_dim": 1408}),
    ],
)
def test_every_stage_runs_with_one_block(model: str, sizes: dict[str, int], tmp_path: Path) -> None:
    teacher = cut_model(tmp_path / "teacher", model, **sizes)
    timesteps = (1000.0, 937.5, 2500 / 3, 625.0, 0.0)
    data = write_dataset(tmp_path / "data", samples=4, timesteps=timesteps)
    recipe = recipe_of(model, *SMALL, *few_steps("initialize", 1)).model_dump(mode="json")
    student, run = str(teacher), str(tmp_path / "initialize")
    assert carry_out(initialize.InitializeJob(recipe, "ode", student, student, data, run))
    student = f"{run}/model"
    for method in METHODS:
        section = f"distill.{method.replace('-', '_')}"
        changes = [*few_steps(section, 2), f"{section}.critic_updates=1"]
        recipe, run = recipe_of(model, *SMALL, *changes).model_dump(mode="json"), str(tmp_path / method)
        sources: tuple[Any, Any] = (data, None) if method == "causvid" else (None, "sprites:train")
        assert carry_out(distill.DistillJob(recipe, method, student, str(teacher), *sources, run))
        assert "dmd_gradient" in read_curve(Path(run) / "curve.jsonl")[1]
        student = f"{run}/model"
