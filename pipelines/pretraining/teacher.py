"""Stage 3: the teacher and its text encoder, trained by flow matching on the latents."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ...actors.pretraining import TeacherBatch, TeacherLearner
from ...actors.teacher import Teacher
from ...kernels.diffusion.noise import SampleKey
from ...kernels.diffusion.schedule import shift_sigma, timesteps
from ...kernels.sprites.captions import VOCABULARY
from ...kernels.sprites.oracle import grade
from ...kernels.sprites.splits import prompts
from ...kernels.wan.config import CONFIGS
from ...kernels.wan.text import TextEncoder, tiny_text_encoder
from ...kernels.wan.transformer import VideoTransformer
from ...kernels.wan.vae import StreamingVAE
from ..recipe import PretrainRecipe, TeacherPhaseRecipe
from ..sheet import contact_sheet
from .curves import plot_curve
from .latents import LatentSet, load_latents
from .loop import train
from .vae import settings

REPORT_EVERY = 500
PHASE_SEEDS = 1000  # between the seeds of two phases
MOST_SHORT = 4  # short clips in the place of a whole one: captions take memory too
SAMPLES, STEPS, GUIDANCE = 6, 50, 5.0


def train_teacher(recipe: PretrainRecipe, run: Path, device: str) -> TeacherLearner:
    """Train in `run/teacher-<phase>`, going on from the checkpoints there; returns the final learner."""
    torch.manual_seed(recipe.seed)
    config = CONFIGS[recipe.model]
    transformer, encoder = VideoTransformer(config), tiny_text_encoder(VOCABULARY, config.text_dim)
    _initialise(transformer)
    data = load_latents(recipe, run)
    for phase in range(len(recipe.teacher.phases)):
        learner = _train_phase(recipe, run, phase, (transformer, encoder), data, device)
        transformer, encoder = map(copy.deepcopy, learner.averaged())
    return learner


def _train_phase(
    recipe: PretrainRecipe,
    run: Path,
    phase: int,
    networks: tuple[VideoTransformer, TextEncoder],
    data: LatentSet,
    device: str,
) -> TeacherLearner:
    chosen, folder = recipe.teacher.phases[phase], run / f"teacher-{phase + 1}"
    transformer, encoder = networks
    transformer.requires_grad_(True)
    encoder.requires_grad_(True)
    learner = TeacherLearner(transformer, encoder, settings(chosen.optimizer, chosen.steps), device)
    vae = StreamingVAE.from_pretrained(run / "model" / "vae")

    def report(step: int) -> None:
        plot_curve(folder)
        _sheet(recipe, learner, vae, folder / f"sheet-{step:06d}.png")

    batches = partial(batch_at, recipe, phase, learner, data)
    train(folder.name, folder, learner, batches, chosen.steps, every=(REPORT_EVERY, report))
    return learner


def _sheet(recipe: PretrainRecipe, learner: TeacherLearner, vae: StreamingVAE, path: Path) -> None:
    """Samples of the averaged teacher for held-out prompts, each with its score."""
    networks = (*map(copy.deepcopy, learner.averaged()), copy.deepcopy(vae).to(learner.engine.device))
    teacher = Teacher(*networks, shift=recipe.teacher.shift)
    chosen = prompts("heldout", SAMPLES, recipe.seed, recipe.world.level)
    frames = 1 + (recipe.world.frames - 1) // vae.temporal_factor
    side = recipe.world.size // vae.spatial_factor
    noise = teacher.noise([SampleKey(recipe.seed, text, 0) for text, _ in chosen], (frames, side, side))
    grid = timesteps(STEPS, teacher.shift)
    videos = teacher.decode(teacher.sample([text for text, _ in chosen], noise, grid, GUIDANCE)).numpy()
    graded = [grade(video, scene, level=recipe.world.level) for video, (_, scene) in zip(videos, chosen, strict=True)]
    rows = [
        (f"{result.total:.2f}: {text}", video) for video, result, (text, _) in zip(videos, graded, chosen, strict=True)
    ]
    contact_sheet(rows, path)


def batch_at(recipe: PretrainRecipe, phase: int, learner: TeacherLearner, data: LatentSet, step: int) -> TeacherBatch:
    """The batch of a step: clips in a new order every epoch, some prompts dropped, fresh timesteps and noise."""
    teacher, seed = recipe.teacher, recipe.seed + PHASE_SEEDS * phase
    length, first, count = _portion(teacher.phases[phase], data.latents.shape[1], step)
    rows = _rows(len(data.captions), first, count, seed)
    clips = LatentSet(data.latents[rows, :length], [data.captions[row] for row in rows.tolist()])
    return noised(clips, learner.tokenize, step_generator(seed, step), teacher.shift, teacher.prompt_drop)


def _portion(phase: TeacherPhaseRecipe, frames: int, step: int) -> tuple[int, int, int]:
    """Of a step: latent frames of its clips, how many clips the steps before took, and how many it takes."""
    lengths = [min(length, frames) for length in phase.lengths]
    counts = [phase.batch * min(frames // length, MOST_SHORT) for length in lengths]
    turns, place = divmod(step, len(lengths))
    return lengths[place], turns * sum(counts) + sum(counts[:place]), counts[place]


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step of a run."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def noised(
    clips: LatentSet,
    tokenize: Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]],
    generator: torch.Generator,
    shift: float,
    prompt_drop: float,
) -> TeacherBatch:
    """A batch of these clips: some prompts dropped, a timestep for each clip, and noise."""
    batch = len(clips.captions)
    dropped = torch.rand(batch, generator=generator) < prompt_drop
    pairs = zip(clips.captions, dropped.tolist(), strict=True)
    ids, mask = tokenize(["" if drop else caption for caption, drop in pairs])
    # Stratified over the batch: each step sees every noise level, which calms the gradient.
    uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    levels = 1000 * shift_sigma(uniform[torch.randperm(batch, generator=generator)], shift)
    noise = torch.randn(clips.latents.shape, generator=generator)
    return TeacherBatch(clips.latents, ids, mask, levels, noise)


def _rows(clips: int, first: int, count: int, seed: int) -> torch.Tensor:
    """Indices of `count` clips from the `first` on: epoch after epoch of permutations, one after the other."""
    positions = torch.arange(first, first + count)
    epochs = positions // clips
    rows = torch.empty(count, dtype=torch.int64)
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
