"""Stage 4: the teacher, trained by flow matching on the latents."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ...actors.pretraining import MapSettings, TeacherBatch, TeacherLearner
from ...actors.teacher import Teacher
from ...kernels.diffusion.noise import SampleKey
from ...kernels.diffusion.schedule import TimestepLaw, stratified_timesteps, timesteps
from ...kernels.sprites.oracle import grade
from ...kernels.sprites.splits import prompts
from ...kernels.wan.config import CONFIGS
from ...kernels.wan.text import TextEncoder
from ...kernels.wan.transformer import VideoTransformer
from ...kernels.wan.vae import StreamingVAE
from ...kernels.wan.weights import load_into, read_transformer
from ..recipe import PretrainRecipe, TurnRecipe
from ..sheet import contact_sheet
from .curves import plot_curve
from .latents import LatentSet, load_latents
from .loop import train
from .vae import settings

REPORT_EVERY = 500
PHASE_SEEDS = 1000  # between the seeds of two phases
SCALE_CLIPS, SMALLEST_SCALE = 500, 1e-2  # of the maps' channels
SAMPLES, STEPS, GUIDANCE = 6, 50, 3.0


def train_teacher(
    recipe: PretrainRecipe,
    run: Path,
    encoder: TextEncoder,
    device: str,
    init: Path | None = None,
    *,
    compiled: bool = False,
) -> VideoTransformer:
    """Train in `run/teacher-<phase>`, going on from the checkpoints there; returns the averaged network.

    encoder: the finished text encoder; it stays as it is. init: a model's folder, to begin with its transformer.
    compiled: torch.compile the network's blocks.
    """
    torch.manual_seed(recipe.seed)
    transformer = _first_transformer(recipe, init)
    for phase, chosen in enumerate(recipe.teacher.phases):
        data = load_latents(recipe, run, {turn.frames for turn in chosen.turns})
        learner = _train_phase(recipe, run, phase, (transformer, encoder), data, device, compiled)
        transformer = copy.deepcopy(learner.averaged())
    return transformer


def _first_transformer(recipe: PretrainRecipe, init: Path | None) -> VideoTransformer:
    transformer = VideoTransformer(CONFIGS[recipe.model])
    if init is None:
        _initialise(transformer)
        return transformer
    _, state = read_transformer(init)
    load_into(transformer, {name: value.float() for name, value in state.items()})
    return transformer


def _train_phase(
    recipe: PretrainRecipe,
    run: Path,
    phase: int,
    networks: tuple[VideoTransformer, TextEncoder],
    data: dict[int, LatentSet],
    device: str,
    compiled: bool,
) -> TeacherLearner:
    chosen, folder = recipe.teacher.phases[phase], run / f"teacher-{phase + 1}"
    optimizer, maps = settings(chosen.optimizer, chosen.steps), _map_settings(recipe, data)
    learner = TeacherLearner(*networks, optimizer, device, maps, compiled)
    vae = StreamingVAE.from_pretrained(run / "model" / "vae")

    def report(step: int) -> None:
        plot_curve(folder)
        _sheet(recipe, learner, networks[1], vae, folder / f"sheet-{step:06d}.png")

    batches = partial(batch_at, recipe, phase, learner, data)
    train(folder.name, folder, learner, batches, chosen.steps, every=(REPORT_EVERY, report), ahead=True)
    return learner


def _map_settings(recipe: PretrainRecipe, data: dict[int, LatentSet]) -> MapSettings | None:
    """The channels of the maps weigh the same: each is divided by its root mean square in the longest clips."""
    maps = data[max(data)].maps
    if not recipe.teacher.map_weight or maps is None:
        return None
    scale = maps[:SCALE_CLIPS].float().square().mean(dim=(0, 1, 2)).sqrt().clamp_min(SMALLEST_SCALE)
    return MapSettings(recipe.teacher.map_weight, scale)


def _sheet(
    recipe: PretrainRecipe, learner: TeacherLearner, encoder: TextEncoder, vae: StreamingVAE, path: Path
) -> None:
    """Samples of the averaged teacher for held-out prompts, each with its score."""
    networks = (copy.deepcopy(learner.averaged()), encoder, copy.deepcopy(vae).to(learner.engine.device))
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


def batch_at(
    recipe: PretrainRecipe, phase: int, learner: TeacherLearner, data: dict[int, LatentSet], step: int
) -> TeacherBatch:
    """The batch of a step: clips in a new order every epoch, some prompts dropped, fresh timesteps and noise."""
    teacher, seed = recipe.teacher, recipe.seed + PHASE_SEEDS * phase
    turn, first = _portion(teacher.phases[phase].turns, step)
    whole = data[turn.frames]
    rows = _rows(len(whole.captions), first, turn.clips, seed)
    maps = None if whole.maps is None else whole.maps[rows]
    clips = LatentSet(whole.latents[rows], [whole.captions[row] for row in rows.tolist()], maps)
    law = (turn.law, teacher.shift if turn.shift is None else turn.shift)
    return noised(clips, learner.tokenize, step_generator(seed, step), law, teacher.prompt_drop)


def _portion(turns: list[TurnRecipe], step: int) -> tuple[TurnRecipe, int]:
    """The turn of a step, and how many clips of its length the steps before it took."""
    rounds, place = divmod(step, len(turns))
    turn = turns[place]
    same = [other.clips if other.frames == turn.frames else 0 for other in turns]
    return turn, rounds * sum(same) + sum(same[:place])


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step of a run."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def noised(
    clips: LatentSet,
    tokenize: Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]],
    generator: torch.Generator,
    law: tuple[TimestepLaw, float],
    prompt_drop: float,
) -> TeacherBatch:
    """A batch of these clips: some prompts dropped, a timestep for each clip, and noise.

    law: of the timesteps, with its shift.
    """
    batch = len(clips.captions)
    dropped = torch.rand(batch, generator=generator) < prompt_drop
    pairs = zip(clips.captions, dropped.tolist(), strict=True)
    ids, mask = tokenize(["" if drop else caption for caption, drop in pairs])
    levels = stratified_timesteps(batch, *law, generator)
    noise = torch.randn(clips.latents.shape, generator=generator)
    return TeacherBatch(clips.latents, ids, mask, levels, noise, clips.maps)


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
