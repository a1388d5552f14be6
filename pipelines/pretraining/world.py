"""Training data of the tiny models: rendered clips by index, so that any step can be drawn again."""

import numpy as np
import torch
from torch import Tensor

from ...kernels.sprites.captions import caption
from ...kernels.sprites.render import render
from ...kernels.sprites.splits import clip_seed, sample_scene
from ..recipe import PretrainRecipe

LEVELS = (0, 1, 2, 3)


def clip(recipe: PretrainRecipe, index: int) -> tuple[str, np.ndarray]:
    """Caption and frames, uint8 [T, H, W, 3], of the teacher's training clip `index`."""
    world = recipe.world
    seed = clip_seed("train", index, recipe.seed)
    scene = sample_scene("train", seed, level=world.level)
    return caption(scene, seed), render(scene, seed, world.frames, level=world.level, size=world.size)


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
