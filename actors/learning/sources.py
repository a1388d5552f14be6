"""How the student makes the clips that distribution matching looks at: from noised data, or from nothing."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.causal.cache import CacheShape, KVCache
from ...kernels.causal.generator import CachedStudent
from ...kernels.causal.student import StudentSettings
from ...kernels.diffusion.schedule import add_noise, velocity_to_clean
from ...kernels.objectives.ode_regression import draw_block_indices
from ...kernels.objectives.self_forcing import draw_exit_step, rollout
from ...kernels.wan.config import TransformerConfig
from ...kernels.wan.context import TextContext
from ..engine import Engine, Ranks
from .batch import Batch, Draws, PromptContexts, as_latents
from .causality import check_causality
from .regression import student_mask


@dataclass(frozen=True)
class Clip:
    """What the score networks see, and what of it is trained.

    latents: x0 [B, F, C, H, W], with gradient where it was asked for. trained: bool [B, F]. trained_in_all: how many
    frames are true in `trained` over the whole batch, on all processes. prompts: of the clips.
    """

    latents: Tensor
    trained: Tensor
    trained_in_all: int
    prompts: tuple[str, ...]


class ClipSource(Protocol):
    """Makes the student's clips, one micro-batch at a time."""

    def make(self, batch: Batch, *, with_gradient: bool) -> Clip:
        """The clips of a micro-batch."""
        ...

    def check_causality(self, batch: Batch) -> None:
        """The self-test of the forward pass that trains. CausalityError where it fails."""
        ...

    def save(self, folder: Path) -> None:
        """Write what lives from step to step."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        ...


class NoisedClips:
    """CausVid (arXiv 2412.07772, section 4.2): data, noised block by block, denoised in one block-causal pass.

    Each block is noised to a timestep of its own, one of the student's or 0. A block at 0 is context: what comes out
    of it is the data, whatever the weights, so it has no gradient and does not count as trained; the score networks
    see it as part of the clip.
    """

    def __init__(self, engine: Engine, contexts: PromptContexts, student: StudentSettings, seed: int) -> None:
        self._engine = engine
        self._contexts = contexts
        self._student = student
        self._seed = seed

    def make(self, batch: Batch, *, with_gradient: bool) -> Clip:
        clean = as_latents(batch.latents, self._engine.device)
        draws = Draws(self._seed, batch.step)
        timesteps = self._timesteps(draws, batch.positions, clean.shape[1]).to(clean.device)
        noisy = add_noise(clean, draws.noise_like(clean, batch.positions, "student"), timesteps)
        with torch.set_grad_enabled(with_gradient):
            made = self._denoise(noisy, timesteps, batch.prompts)
        in_all = int((self._timesteps(draws, range(batch.total), clean.shape[1]) > 0).sum())
        return Clip(made, timesteps > 0, in_all, batch.prompts)

    def check_causality(self, batch: Batch) -> None:
        one = batch[:1]
        clean = as_latents(one.latents, self._engine.device)
        sizes = self._student.blocks(clean.shape[1])
        levels = [*self._student.timesteps, 0.0]
        mixed = torch.tensor([levels[block % len(levels)] for block in range(len(sizes))])
        timesteps = mixed.repeat_interleave(torch.tensor(sizes))[None].to(clean.device)
        check_causality(lambda noisy, levels: self._denoise(noisy, levels, one.prompts), clean, timesteps, sizes)

    def save(self, folder: Path) -> None:
        pass  # nothing lives from step to step

    def load(self, folder: Path) -> None:
        pass

    def _denoise(self, noisy: Tensor, timesteps: Tensor, prompts: tuple[str, ...]) -> Tensor:
        mask = student_mask(self._student, noisy.shape[1])
        with self._engine.autocast():
            velocity = self._engine.network(noisy, timesteps, self._contexts(prompts), mask)
        return velocity_to_clean(velocity, noisy, timesteps)

    def _timesteps(self, draws: Draws, positions: range, frames: int) -> Tensor:
        """[B, F], one level for each block: uniform over the student's and 0."""
        levels, sizes = torch.tensor([*self._student.timesteps, 0.0]), self._student.blocks(frames)
        generators = [draws.generator(position, "states") for position in positions]
        indices = torch.cat([draw_block_indices(1, len(sizes), len(levels), one) for one in generators])
        return levels[indices].repeat_interleave(torch.tensor(sizes), dim=1)


@dataclass(frozen=True)
class RolloutShape:
    """Of the clips that are made from nothing: latent frames, height, width, and the network that makes them."""

    config: TransformerConfig
    frames: int
    height: int
    width: int
    cache_dtype: torch.dtype = torch.bfloat16

    @property
    def frame(self) -> tuple[int, int, int]:
        return self.config.in_channels, self.height, self.width


class StudentRollout:
    """Blocks of a few streams, made on their own output (Self-Forcing, arXiv 2506.08009, Algorithm 1)."""

    def __init__(
        self,
        engine: Engine,
        contexts: PromptContexts,
        student: StudentSettings,
        shape: RolloutShape,
        ranks: Ranks,
        seed: int,
    ) -> None:
        self.engine = engine
        self.contexts = contexts
        self.student = student
        self.shape = shape
        self.ranks = ranks
        self.seed = seed
        self._exit = (-1, 0)  # the step that the exit belongs to, and the exit

    def new_cache(self, batch: int) -> KVCache:
        shape, student = self.shape, self.student
        cached = CacheShape(
            shape.config, batch, shape.height, shape.width, student.window, student.sink, shape.cache_dtype
        )
        return KVCache(cached, self.engine.device)

    def model(self, cache: KVCache, text: TextContext) -> CachedStudent:
        return CachedStudent(self.engine.network, cache, text)

    def exit_step(self, step: int) -> int:
        """One for all blocks, micro-batches and ranks of a training step."""
        if self._exit[0] != step:
            drawn = draw_exit_step(len(self.student.timesteps), Draws(self.seed, step).generator(0, "exit"))
            self._exit = (step, self.ranks.broadcast(drawn))
        return self._exit[1]

    def noise(self, batch: Batch, frames: range) -> Tensor:
        """The streams' noise for every timestep up to the exit: [K, B, F, C, H, W]."""
        draws, levels = Draws(self.seed, batch.step), range(self.exit_step(batch.step) + 1)
        noise = [draws.noise(batch.positions, frames, self.shape.frame, "rollout", level) for level in levels]
        return torch.stack(noise).to(self.engine.device)

    def run(self, model: CachedStudent, noise: Tensor, sizes: list[int], *, with_gradient: bool) -> Tensor:
        """x0 of the next blocks [B, F, C, H, W]; the streams go on by them."""
        with self.engine.autocast(), torch.set_grad_enabled(with_gradient):
            return rollout(model, noise, self.student.timesteps, noise.shape[0] - 1, sizes).clean

    def check_causality(self, batch: Batch) -> None:
        """Later blocks' noise may not change earlier blocks, over whole rollouts."""
        one = batch[:1]
        noise = self.noise(one, range(self.shape.frames))
        sizes = self.student.blocks(self.shape.frames)
        text = self.contexts(one.prompts)

        def forward(first: Tensor, levels: Tensor) -> Tensor:
            everything = torch.cat((first[None], noise[1:]))
            return self.run(self.model(self.new_cache(1), text), everything, sizes, with_gradient=True)

        check_causality(forward, noise[0], torch.zeros(noise.shape[1:3]), sizes)


class Rollouts:
    """Self-Forcing (arXiv 2506.08009, section 3.2): every clip is a rollout of its own, from noise, without data.

    All frames are trained. The exit step is one draw per training step, the same for all blocks and ranks: it decides
    how many passes there are.
    """

    def __init__(self, student_rollout: StudentRollout) -> None:
        self._rollout = student_rollout

    def make(self, batch: Batch, *, with_gradient: bool) -> Clip:
        rollout, frames = self._rollout, self._rollout.shape.frames
        model = rollout.model(rollout.new_cache(len(batch)), rollout.contexts(batch.prompts))
        noise = rollout.noise(batch, range(frames))
        made = rollout.run(model, noise, rollout.student.blocks(frames), with_gradient=with_gradient)
        trained = torch.ones(made.shape[:2], dtype=torch.bool, device=made.device)
        return Clip(made, trained, frames * batch.total, batch.prompts)

    def check_causality(self, batch: Batch) -> None:
        self._rollout.check_causality(replace(batch, latents=None))

    def save(self, folder: Path) -> None:
        pass  # nothing lives from step to step

    def load(self, folder: Path) -> None:
        pass
