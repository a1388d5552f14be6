"""Training steps of a causal network on given targets: ODE regression, and flow matching of a many-step model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...kernels.causal.masks import FrameMask, block_causal, teacher_forcing
from ...kernels.causal.student import StudentSettings
from ...kernels.diffusion.schedule import MAX_TIMESTEP, add_noise, sample_timesteps
from ...kernels.objectives.flow_matching import flow_matching_loss
from ...kernels.objectives.ode_regression import draw_block_indices, ode_regression_loss
from ...kernels.wan.context import TextContext
from ..engine import Engine, OneRank, Ranks
from .batch import Batch, Draws, PromptContexts, Tally, as_latents
from .causality import check_causality


@dataclass(frozen=True)
class LearnerSettings:
    """What every learner has. micro_batch: samples of one forward pass, None for all of a process at once."""

    seed: int = 0
    micro_batch: int | None = None


def student_mask(student: StudentSettings, frames: int) -> FrameMask:
    """The student's attention in one parallel pass over a clip: block-causal, with its window and sink."""
    return _block_causal(frames, student.block, student.first_block, student.window, student.sink)


# A mask carries its compiled form, which is worth keeping from step to step.
@cache
def _block_causal(frames: int, block: int, first_block: int | None, window: int, sink: int) -> FrameMask:
    return block_causal(frames, block, first_block=first_block, window=window, sink=sink)


@cache
def _teacher_forcing(frames: int, block: int, first_block: int | None) -> FrameMask:
    return teacher_forcing(frames, block, first_block=first_block)


class OdeLearner:
    """ODE initialisation (CausVid, arXiv 2412.07772, section 4.3) on a teacher's trajectories.

    One parallel block-causal pass per micro-batch; each block starts from a state of its own draw, the clean one
    included, which is context for later blocks and not supervised. The mean is over the supervised frames of the
    whole batch, on whatever process they are.

    teacher_forcing: a pass over [clean | noisy] instead, in which a block sees the clean ends of the blocks before it,
    as the paths of a causal teacher do (Causal Forcing, arXiv 2602.02214); every block is noisy then, and the mask has
    no window.
    """

    def __init__(
        self,
        engine: Engine,
        contexts: PromptContexts,
        student: StudentSettings,
        settings: LearnerSettings | None = None,
        ranks: Ranks | None = None,
        *,
        teacher_forcing: bool = False,
    ) -> None:
        self.engine = engine
        self._contexts = contexts
        self._teacher_forcing = teacher_forcing
        self._levels = [*student.timesteps, 0.0]
        self._student = student
        self._settings = settings or LearnerSettings()
        self._ranks = ranks or OneRank()

    @property
    def updates(self) -> int:
        return self.engine.updates

    def step(self, batch: Batch) -> dict[str, float]:
        """One update on trajectories [B, K + 1, F, C, H, W]; the loss is the mean squared error of x0."""
        assert batch.latents is not None
        sizes = self._student.blocks(batch.latents.shape[2])
        share = self._ranks.size / max(1, self._supervised_frames(batch, sizes))
        tally = Tally(list(map(_error_name, self._levels[:-1])))
        loss = 0.0
        for part in batch.micro_batches(self._settings.micro_batch):
            trajectory = as_latents(part.latents, self.engine.device)
            indices = self._indices(part, part.positions, len(sizes))
            velocity = self._velocity(trajectory[:, -1], self._contexts(part.prompts))
            result = ode_regression_loss(velocity, trajectory, self._levels, indices, sizes)
            scaled = result.loss * (int((result.timesteps > 0).sum()) * share)
            self.engine.backward(scaled)
            loss += scaled.item()
            for index, level in enumerate(self._levels[:-1]):
                drawn = (indices == index).repeat_interleave(torch.tensor(sizes), dim=1)
                tally.add(_error_name(level), result.frame_error.cpu()[drawn])
        metrics = self._ranks.mean({"loss": loss})
        return {**metrics, **tally.means(self._ranks), **self.engine.step()}

    def check_causality(self, batch: Batch) -> None:
        """The self-test on one sample, with every block at its own level. CausalityError where it fails."""
        trajectory = as_latents(batch[:1].latents, self.engine.device)
        sizes = self._student.blocks(trajectory.shape[2])
        text = self._contexts(batch.prompts[:1])
        levels = torch.tensor([self._levels[block % len(self._levels)] for block in range(len(sizes))])
        timesteps = levels.repeat_interleave(torch.tensor(sizes))[None].to(trajectory.device)

        def forward(latents: Tensor, levels: Tensor) -> Tensor:
            return self._velocity(latents, text)(latents, levels)

        check_causality(forward, trajectory[:, 0], timesteps, sizes)

    def save(self, folder: Path) -> None:
        self.engine.save(folder / "student")

    def load(self, folder: Path) -> None:
        self.engine.load(folder / "student")

    def _velocity(self, clean: Tensor, text: TextContext) -> Callable[[Tensor, Tensor], Tensor]:
        if self._teacher_forcing:
            return _forced(self.engine, text, clean, self._student)
        return _masked(self.engine, text, student_mask(self._student, clean.shape[1]))

    def _indices(self, batch: Batch, positions: range, blocks: int) -> Tensor:
        """The state that each block of each sample starts from: [B, blocks]."""
        draws, states = Draws(self._settings.seed, batch.step), len(self._levels) - self._teacher_forcing
        generators = [draws.generator(position, "states") for position in positions]
        return torch.cat([draw_block_indices(1, blocks, states, one) for one in generators])

    def _supervised_frames(self, batch: Batch, sizes: list[int]) -> int:
        """Of the whole batch: every process knows all draws."""
        indices = self._indices(batch, range(batch.total), len(sizes))
        noisy = (indices < len(self._levels) - 1).long()
        return int((noisy @ torch.tensor(sizes)).sum())


class CausalTeacherLearner:
    """A causal many-step model, by flow matching.

    context "noisy": each block at its own level, earlier blocks noisy (diffusion forcing, arXiv 2407.01392), under
    the student's mask. context "clean": a pass over [clean | noisy] in which a noisy block sees the clean ones before
    it (teacher forcing, as in Self-Forcing, arXiv 2506.08009, section 3.1); that mask has no window.
    shift: of the levels' distribution. prompt_drop: the share of prompts that are emptied, for guidance.
    """

    def __init__(
        self,
        engine: Engine,
        contexts: PromptContexts,
        student: StudentSettings,
        context: Literal["noisy", "clean"],
        *,
        shift: float,
        prompt_drop: float = 0.1,
        settings: LearnerSettings | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.engine = engine
        self._contexts = contexts
        self._student = student
        self._context = context
        self._shift = shift
        self._prompt_drop = prompt_drop
        self._settings = settings or LearnerSettings()
        self._ranks = ranks or OneRank()

    @property
    def updates(self) -> int:
        return self.engine.updates

    def step(self, batch: Batch) -> dict[str, float]:
        """One update on clean latents [B, F, C, H, W]; the loss is the mean squared error of the velocity."""
        loss = 0.0
        draws = Draws(self._settings.seed, batch.step)
        for part in batch.micro_batches(self._settings.micro_batch):
            clean = as_latents(part.latents, self.engine.device)
            noise = draws.noise_like(clean, part.positions, "noise")
            timesteps = self._timesteps(draws, part, clean.shape[1]).to(clean.device)
            velocity = self._velocity(clean, self._contexts(self._prompts(draws, part)))
            share = len(part) * self._ranks.size / batch.total
            scaled = flow_matching_loss(velocity, clean, noise, timesteps).loss * share
            self.engine.backward(scaled)
            loss += scaled.item()
        return {**self._ranks.mean({"loss": loss}), **self.engine.step()}

    def check_causality(self, batch: Batch) -> None:
        """The self-test on one sample. CausalityError where it fails."""
        one = batch[:1]
        clean = as_latents(one.latents, self.engine.device)
        context = self._contexts(one.prompts)
        timesteps = self._timesteps(Draws(self._settings.seed, batch.step), one, clean.shape[1]).to(clean.device)
        noise = torch.ones_like(clean)

        def forward(latents: Tensor, levels: Tensor) -> Tensor:
            return self._velocity(latents, context)(add_noise(latents, noise, levels), levels)

        check_causality(forward, clean, timesteps, self._student.blocks(clean.shape[1]))

    def save(self, folder: Path) -> None:
        self.engine.save(folder / "student")

    def load(self, folder: Path) -> None:
        self.engine.load(folder / "student")

    def _velocity(self, clean: Tensor, text: TextContext) -> Callable[[Tensor, Tensor], Tensor]:
        if self._context == "clean":
            return _forced(self.engine, text, clean, self._student)
        return _masked(self.engine, text, student_mask(self._student, clean.shape[1]))

    def _timesteps(self, draws: Draws, batch: Batch, frames: int) -> Tensor:
        """One level for each block of each sample: [B, F]."""
        sizes = self._student.blocks(frames)
        generators = [draws.generator(position, "timesteps") for position in batch.positions]
        levels = [sample_timesteps((len(sizes),), self._shift, one, 0.0, MAX_TIMESTEP) for one in generators]
        return torch.stack(levels).repeat_interleave(torch.tensor(sizes), dim=1)

    def _prompts(self, draws: Draws, batch: Batch) -> list[str]:
        kept = (
            float(torch.rand((), generator=draws.generator(position, "prompt drop"))) >= self._prompt_drop
            for position in batch.positions
        )
        return [prompt if keep else "" for prompt, keep in zip(batch.prompts, kept, strict=True)]


def _masked(engine: Engine, text: TextContext, mask: FrameMask) -> Callable[[Tensor, Tensor], Tensor]:
    """The engine's network under a mask, in the engine's precision; the result has the latents' dtype."""

    def velocity(latents: Tensor, timesteps: Tensor) -> Tensor:
        with engine.autocast():
            predicted: Tensor = engine.network(latents, timesteps, text, mask)
        return predicted

    return velocity


def _forced(
    engine: Engine, text: TextContext, clean: Tensor, student: StudentSettings
) -> Callable[[Tensor, Tensor], Tensor]:
    """Teacher forcing: the velocity of noisy latents whose blocks see the clean blocks before them."""
    frames = clean.shape[1]
    both = _masked(engine, text, _teacher_forcing(frames, student.block, student.first_block))

    def velocity(noisy: Tensor, timesteps: Tensor) -> Tensor:
        levels = torch.cat((torch.zeros_like(timesteps), timesteps), dim=1)
        return both(torch.cat((clean.to(noisy), noisy), dim=1), levels)[:, frames:]

    return velocity


def _error_name(level: float) -> str:
    return f"error_at_{level:.0f}"
