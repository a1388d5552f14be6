"""Stage 2: the text encoder, trained to answer questions about captions."""

import logging
from functools import partial
from pathlib import Path

import torch

from ...actors.pretraining import TextLearner
from ...kernels.sprites.captions import VOCABULARY
from ...kernels.sprites.labels import question_sizes
from ...kernels.wan.config import CONFIGS
from ...kernels.wan.text import TextEncoder, tiny_text_encoder
from ..recipe import PretrainRecipe
from .curves import plot_curve
from .loop import train
from .vae import settings
from .world import captions_at

REPORT_EVERY = 500

logger = logging.getLogger(__name__)


def train_text(recipe: PretrainRecipe, run: Path, device: str) -> TextEncoder:
    """Train in `run/text`, going on from the checkpoint there; returns the finished encoder."""
    torch.manual_seed(recipe.seed)
    encoder = tiny_text_encoder(VOCABULARY, CONFIGS[recipe.model].text_dim)
    chosen, folder = recipe.text, run / "text"
    learner = TextLearner(encoder, question_sizes(), settings(chosen.optimizer, chosen.steps), device)

    def report(step: int) -> None:
        plot_curve(folder)
        right = {split: learner.accuracy(*captions_at(recipe, 0, split)) for split in ("validation", "heldout")}
        logger.info("text encoder at step %d: right answers %s", step, right)
        (folder / "accuracy.txt").write_text(f"step {step}: right answers {right}\n")

    train("text", folder, learner, partial(captions_at, recipe), chosen.steps, every=(REPORT_EVERY, report))
    return learner.averaged()
