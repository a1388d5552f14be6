"""Training data of the tiny models: rendered clips by index, so that any step can be drawn again."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels.sprites.captions import caption
from ...kernels.sprites.labels import answers, token_maps
from ...kernels.sprites.render import draw, render, simulate
from ...kernels.sprites.splits import Split, clip_seed, sample_scene
from ..recipe import PretrainRecipe

LEVELS = (0, 1, 2, 3)
BETWEEN_LENGTHS = 1_000_000  # indices between the clips of one length and those of the next
PATCH = 2  # latents of a token's side


@dataclass(frozen=True)
class Clip:
    """A caption, frames uint8 [T, H, W, 3], and what each token shows, float32 [F, N, M] (`kernels.sprites.labels`)."""

    caption: str
    frames: np.ndarray
    maps: np.ndarray


def clip(recipe: PretrainRecipe, frames: int, index: int, factors: tuple[int, int]) -> Clip:
    """The teacher's training clip `index` of those of `frames` latent frames.

    factors: of the VAE, in time and in space. No two lengths have a scene in common, but by chance.
    """
    world, (temporal, spatial) = recipe.world, factors
    seed = clip_seed("train", frames * BETWEEN_LENGTHS + index, recipe.seed)
    scene = sample_scene("train", seed, level=world.level)
    track = simulate(scene, seed, 1 + (frames - 1) * temporal, level=world.level)
    pixels = draw(scene, track, world.size, level=world.level, seed=seed)
    grid = world.size // (spatial * PATCH)
    return Clip(caption(scene, seed), pixels, token_maps(scene, track, grid, temporal))


def captions_at(recipe: PretrainRecipe, step: int, split: Split = "train") -> tuple[list[str], Tensor]:
    """The text encoder's batch of a step: captions, and the answers int64 [B, questions]."""
    batch = recipe.text.batch
    seeds = [clip_seed(split, index, recipe.seed) for index in range(step * batch, (step + 1) * batch)]
    scenes = [sample_scene(split, seed, level=recipe.world.level) for seed in seeds]
    texts = [caption(scene, seed) for scene, seed in zip(scenes, seeds, strict=True)]
    return texts, torch.tensor([answers(scene) for scene in scenes])


def vae_batch(recipe: PretrainRecipe, phase: int, step: int) -> Tensor:
    """uint8 [B, T, H, W, 3]: clips of every level, so that one VAE serves all."""
    settings, clips = recipe.vae.phases[phase], []
    for row in range(settings.batch):
        index = step * settings.batch + row
        level = LEVELS[index % len(LEVELS)]
        seed = _seed(recipe, "vae" if phase == 0 else f"vae {phase}", index)
        scene = sample_scene("train", seed, level=level)
        clips.append(render(scene, seed, settings.clip_frames, level=level, size=recipe.world.size))
    return torch.from_numpy(np.stack(clips))


def _seed(recipe: PretrainRecipe, purpose: str, index: int) -> int:
    """A seed of 32 bits that no two purposes or indices share by accident."""
    entropy = [recipe.seed, *purpose.encode(), index]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
