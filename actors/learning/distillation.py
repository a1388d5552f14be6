"""Distribution matching distillation of a causal student from a bidirectional teacher.

Method: CausVid (arXiv 2412.07772, section 4.2), after DMD (arXiv 2311.18828) and DMD2 (arXiv 2405.14867). What the
student's clips are made from is a `ClipSource`: CausVid, Self-Forcing and LongLive differ there and nowhere else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels.causal.masks import FrameMask
from ...kernels.diffusion.guidance import guided_velocity
from ...kernels.diffusion.schedule import Velocity, add_noise, sample_timesteps, uniform_timesteps, velocity_to_clean
from ...kernels.objectives.dmd import DmdGenerator, dmd_critic_loss, dmd_generator_loss
from ...kernels.wan.context import TextContext
from ..engine import Engine, OneRank, Ranks
from .batch import Batch, Draws, PromptContexts, Tally
from .sources import Clip, ClipSource

TIMESTEP_BINS = (0, 250, 500, 750, 1000)


@dataclass(frozen=True)
class DmdSettings:
    """guidance: standard w of the real score, 1 for none. shift, smallest, largest: of the score networks' timestep.

    critic_updates: the critic has one update per step; the student has its own in the steps that find the critic
    after a multiple of `critic_updates` updates, never before the first.
    """

    guidance: float = 4.5
    shift: float = 5.0
    smallest_timestep: float = 20.0
    largest_timestep: float = 980.0
    critic_updates: int = 5
    negative_prompt: str = ""
    seed: int = 0
    micro_batch: int | None = None


class DmdLearner:
    """One step: the student makes clips, the critic learns their distribution, and in its turn the student is moved.

    real: the frozen teacher's transformer, on the student's device. student, critic: trained; the critic begins as a
    teacher, too. Both score networks see a clip at one timestep of its own draw; they are bidirectional, or where the
    teacher is a causal model under its mask (score_mask: of a clip of so many frames). In a step that
    trains both, the student is scored by the critic as it was before the step, on clips the critic has not seen.
    """

    def __init__(
        self,
        student: Engine,
        critic: Engine,
        real: nn.Module,
        contexts: PromptContexts,
        source: ClipSource,
        settings: DmdSettings | None = None,
        ranks: Ranks | None = None,
        score_mask: Callable[[int], FrameMask] | None = None,
    ) -> None:
        self.student = student
        self.critic = critic
        self._score_mask = score_mask
        self.source = source
        self._real = real.requires_grad_(False).eval()
        self._contexts = contexts
        self._settings = settings or DmdSettings()
        self._ranks = ranks or OneRank()

    @property
    def updates(self) -> int:
        """Steps done: updates of the critic."""
        return self.critic.updates

    @property
    def trains_student(self) -> bool:
        """Whether the next step updates the student."""
        return self.critic.updates > 0 and self.critic.updates % self._settings.critic_updates == 0

    def step(self, batch: Batch) -> dict[str, float]:
        """One update of the critic, and in its turn of the student. FloatingPointError where one is not finite."""
        trains_student, draws = self.trains_student, Draws(self._settings.seed, batch.step)
        tally, losses = Tally(_TALLIED), {"loss": 0.0, "student_loss": 0.0, "dmd_non_finite": 0.0}
        for part in batch.micro_batches(self._settings.micro_batch):
            clip = self.source.make(part, with_gradient=trains_student)
            text = self._contexts(clip.prompts)
            if trains_student:
                result = self._score(clip, text, draws, part.positions)
                share = int(clip.trained.sum()) * self._ranks.size / max(1, clip.trained_in_all)
                self.student.backward(result.loss * share)
                losses["student_loss"] += result.loss.item() * share
                losses["dmd_non_finite"] += float(result.non_finite) * self._ranks.size
                tally.add("dmd_gradient", result.gradient.detach()[clip.trained].abs())
                tally.add("dmd_normaliser", result.normaliser)
            losses["loss"] += self._train_critic(clip, text, draws, part, tally)
        metrics = {**self._ranks.mean(losses), **tally.means(self._ranks), **_named("critic", self.critic.step())}
        if not trains_student:
            return {name: value for name, value in metrics.items() if name not in ("student_loss", "dmd_non_finite")}
        return {**metrics, **_named("student", self.student.step())}

    def check_causality(self, batch: Batch) -> None:
        self.source.check_causality(batch)

    def save(self, folder: Path) -> None:
        self.student.save(folder / "student")
        self.critic.save(folder / "critic")
        self.source.save(folder / "source")

    def load(self, folder: Path) -> None:
        self.student.load(folder / "student")
        self.critic.load(folder / "critic")
        self.source.load(folder / "source")

    @torch.no_grad()
    def scores(self, clean: Tensor, prompts: Sequence[str], timestep: float, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x0 as the teacher (with guidance) and as the critic see it in `clean` [B, F, C, H, W], noised to `timestep`.

        For the eye: where the two differ is where the student is pushed.
        """
        text, levels = self._contexts(prompts), uniform_timesteps(clean, timestep)
        noisy = add_noise(clean, noise, levels)
        velocities = (self._real_velocity(text)(noisy, levels), self._fake_velocity(text)(noisy, levels))
        real, fake = (velocity_to_clean(velocity, noisy, levels) for velocity in velocities)
        return real, fake

    def _score(self, clip: Clip, text: TextContext, draws: Draws, positions: range) -> DmdGenerator:
        """The student's loss on a clip that carries its gradient."""
        timesteps = self._timesteps(draws, positions, "student timestep").to(clip.latents.device)
        noise = draws.noise_like(clip.latents, positions, "student score")
        real, fake = self._real_velocity(text), self._fake_velocity(text)
        return dmd_generator_loss(clip.latents, real, fake, timesteps, noise, clip.trained)

    def _train_critic(self, clip: Clip, text: TextContext, draws: Draws, batch: Batch, tally: Tally) -> float:
        """Flow matching on the student's clips, all frames of them; returns the loss's part of the batch's mean."""
        clean = clip.latents.detach()
        timesteps = self._timesteps(draws, batch.positions, "critic timestep")
        noise = draws.noise_like(clean, batch.positions, "critic score")
        result = dmd_critic_loss(self._fake_velocity(text), clean, timesteps.to(clean.device), noise)
        scaled = result.loss * (len(batch) * self._ranks.size / batch.total)
        self.critic.backward(scaled)
        for error, timestep in zip(result.frame_error.mean(dim=1), timesteps.tolist(), strict=True):
            tally.add(_bin_name(timestep), error)
        return scaled.item()

    def _real_velocity(self, text: TextContext) -> Velocity:
        batch = len(text.rows)
        if self._settings.guidance == 1.0:
            return self._velocity(self._real, text)
        negative = self._contexts([self._settings.negative_prompt]).expand(batch)
        both = TextContext.concatenate((text, negative))
        return guided_velocity(self._velocity(self._real, both), self._settings.guidance)

    def _fake_velocity(self, text: TextContext) -> Velocity:
        return self._velocity(self.critic.network, text)

    def _velocity(self, network: nn.Module, text: TextContext) -> Velocity:
        def velocity(latents: Tensor, timesteps: Tensor, /) -> Tensor:
            masks = () if self._score_mask is None else (self._score_mask(latents.shape[1]),)
            with self.critic.autocast():
                predicted: Tensor = network(latents, timesteps, text, *masks)
            return predicted

        return velocity

    def _timesteps(self, draws: Draws, positions: range, purpose: str) -> Tensor:
        """One for each clip: [B]."""
        bounds = (self._settings.smallest_timestep, self._settings.largest_timestep)
        generators = [draws.generator(position, purpose) for position in positions]
        return torch.cat([sample_timesteps((1,), self._settings.shift, one, *bounds) for one in generators])


def _bin_name(timestep: float) -> str:
    edges = list(pairwise(TIMESTEP_BINS))
    low, high = next((low, high) for low, high in reversed(edges) if timestep >= low)
    return f"critic_loss_{low}_{high}"


def _named(network: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{network}_{name}": value for name, value in metrics.items()}


_TALLIED = ("dmd_gradient", "dmd_normaliser", *map(_bin_name, TIMESTEP_BINS[:-1]))
