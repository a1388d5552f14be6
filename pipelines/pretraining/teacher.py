"""Stage 3: the teacher and its text encoder, trained by flow matching on the latents."""

from functools import partial
from pathlib import Path

import torch

from ...actors.pretraining import TeacherBatch, TeacherLearner
from ...kernels.diffusion.schedule import shift_sigma
from ...kernels.sprites.captions import VOCABULARY
from ...kernels.wan.config import CONFIGS
from ...kernels.wan.text import tiny_text_encoder
from ...kernels.wan.transformer import VideoTransformer
from ..recipe import PretrainRecipe
from .latents import LatentSet, load_latents
from .loop import train
from .vae import settings


def new_learner(recipe: PretrainRecipe, device: str) -> TeacherLearner:
    """A teacher with random weights, by the recipe's seed."""
    torch.manual_seed(recipe.seed)
    config = CONFIGS[recipe.model]
    encoder = tiny_text_encoder(VOCABULARY, config.text_dim)
    transformer = VideoTransformer(config)
    _initialise(transformer)
    return TeacherLearner(transformer, encoder, settings(recipe.teacher.optimizer, recipe.teacher.steps), device)


def train_teacher(recipe: PretrainRecipe, run: Path, device: str) -> TeacherLearner:
    """Train in `run/teacher`, going on from its checkpoint; returns the learner with the final weights."""
    learner = new_learner(recipe, device)
    data = load_latents(recipe, run)
    train("teacher", run / "teacher", learner, partial(batch_at, recipe, learner, data), recipe.teacher.steps)
    return learner


def batch_at(recipe: PretrainRecipe, learner: TeacherLearner, data: LatentSet, step: int) -> TeacherBatch:
    """The batch of a step: clips in a new order every epoch, some prompts dropped, fresh timesteps and noise."""
    teacher = recipe.teacher
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    rows = _rows(len(data.captions), teacher.batch, step, recipe.seed)
    dropped = torch.rand(teacher.batch, generator=generator) < teacher.prompt_drop
    prompts = ["" if drop else data.captions[row] for row, drop in zip(rows.tolist(), dropped.tolist(), strict=True)]
    ids, mask = learner.tokenize(prompts)
    latents = data.latents[rows]
    # Stratified over the batch: each step sees every noise level, which calms the gradient.
    uniform = (torch.arange(teacher.batch) + torch.rand(teacher.batch, generator=generator)) / teacher.batch
    timesteps = 1000 * shift_sigma(uniform[torch.randperm(teacher.batch, generator=generator)], teacher.shift)
    noise = torch.randn(latents.shape, generator=generator)
    return TeacherBatch(latents, ids, mask, timesteps, noise)


def _rows(clips: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """Indices of a step's clips: epoch after epoch of permutations, cut into batches."""
    positions = torch.arange(step * batch, (step + 1) * batch)
    epochs = positions // clips
    rows = torch.empty(batch, dtype=torch.int64)
    for epoch in epochs.unique().tolist():
        order = torch.randperm(clips, generator=torch.Generator().manual_seed(seed * 7_919 + epoch))
        chosen = epochs == epoch
        rows[chosen] = order[positions[chosen] % clips]
    return rows


def _initialise(transformer: VideoTransformer) -> None:
    """Gates and the output start at zero: every block begins as the identity (adaLN-Zero, arXiv 2212.09748)."""
    with torch.no_grad():
        for block in transformer.blocks:
            block.scale_shift_table.zero_()
        transformer.scale_shift_table.zero_()
        transformer.proj_out.weight.zero_()
        transformer.proj_out.bias.zero_()
        transformer.condition_embedder.time_proj.weight.mul_(0.1)
        transformer.condition_embedder.time_proj.bias.zero_()
