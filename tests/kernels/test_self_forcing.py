"""Self-forcing rollouts of a small attention network with a windowed cache, against a plain computation."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reelway.kernels.diffusion.sampler import few_step_sample
from reelway.kernels.diffusion.schedule import warp
from reelway.kernels.objectives.self_forcing import draw_exit_step, rollout

LEVELS = warp([1000, 750, 500, 250], 5.0)
SIZES = (2, 2, 2, 2)
FRAMES, LATENT = 8, (3, 2, 1)
WIDTH = 6  # channels × height × width: one token per frame
WINDOW = 4  # frames kept: the third block's context evicts the first


class Student(nn.Module):
    """One attention layer; each block adds its own bias, so a gradient shows which block it went through."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.checkpointed = checkpointed
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.time = nn.Parameter(torch.randn(WIDTH))
        self.bias = nn.ParameterList(torch.randn(WIDTH) for _ in SIZES)
        self.double()
        self.context = torch.zeros(2, 0, 0, WIDTH, dtype=torch.float64)
        self.block = 0
        self.calls: list[tuple[int, float, bool]] = []
        self.contexts: list[tuple[Tensor, bool]] = []

    def keys_values(self, latents: Tensor, timesteps: Tensor, block: int) -> tuple[Tensor, Tensor]:
        hidden = latents.flatten(2) + timesteps[..., None] / 1000 * self.time + self.bias[block]
        return hidden, torch.stack([self.projections[1](hidden), self.projections[2](hidden)])

    def attend(self, latents: Tensor, timesteps: Tensor, context: Tensor, block: int) -> Tensor:
        hidden, own = self.keys_values(latents, timesteps, block)
        keys, values = torch.cat((context, own), dim=2) if context.shape[2] else own
        scores = self.projections[0](hidden) @ keys.transpose(1, 2) / WIDTH**0.5
        return self.projections[3](torch.tanh(hidden + scores.softmax(-1) @ values)).reshape(latents.shape)

    def denoise(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        self.calls.append((self.block, timesteps[0, 0].item(), torch.is_grad_enabled()))
        arguments = (noisy, timesteps, self.context, self.block)
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self.attend, *arguments, use_reentrant=False)
        return self.attend(*arguments)

    def write_context(self, clean: Tensor) -> None:
        """Does not detach: that nothing leaks is the rollout's doing."""
        self.contexts.append((clean, torch.is_grad_enabled()))
        _, written = self.keys_values(clean, clean.new_zeros(clean.shape[:2]), self.block)
        joined = torch.cat((self.context, written), dim=2) if self.context.shape[2] else written
        self.context = joined[:, :, -WINDOW:]
        self.block += 1


def noise(frames: int = FRAMES) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, 2, frames, *LATENT, dtype=torch.float64, generator=generator)


def gradients(student: Student, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(student.named_parameters(), found, strict=True)
    }


def last_blocks_loss(clean: Tensor, start: int) -> Tensor:
    return clean[:, start:].square().mean()


@pytest.mark.parametrize("exit_step", range(4))
def test_no_gradient_reaches_earlier_blocks_through_the_context(exit_step: int) -> None:
    student = Student()
    loss = last_blocks_loss(rollout(student, noise(), LEVELS, exit_step, SIZES).clean, start=6)
    found = gradients(student, loss)
    for block in range(3):
        assert found[f"bias.{block}"].abs().max() == 0
    assert found["bias.3"].abs().min() > 0


def test_the_context_is_read_all_the_same() -> None:
    """The zeros above are truncation, not independence: an earlier bias moves the last block's loss."""
    plain, moved = Student(), Student()
    with torch.no_grad():
        moved.bias[1].add_(1e-3)
    clean, other = (rollout(student, noise(), LEVELS, 2, SIZES).clean for student in (plain, moved))
    assert torch.equal(clean[:, :2], other[:, :2])
    assert abs(last_blocks_loss(clean, 6) - last_blocks_loss(other, 6)) > 1e-7


@pytest.mark.parametrize("exit_step", range(4))
def test_values_and_gradient_are_those_of_one_pass_per_block(exit_step: int) -> None:
    """Re-computed in the open: walk with no gradient at all, then one differentiable pass on constants."""
    student, noises = Student(), noise()
    clean = rollout(student, noises, LEVELS, exit_step, SIZES).clean
    reference, expected = Student(), []
    context = reference.context
    for block in range(4):
        frames = slice(2 * block, 2 * block + 2)
        state = noises[0, :, frames]
        for step in range(exit_step + 1):
            sigma = LEVELS[step] / 1000
            times = torch.full((2, 2), LEVELS[step], dtype=torch.float64)
            x0 = state - sigma * reference.attend(state, times, context, block)
            if step < exit_step:
                after = LEVELS[step + 1] / 1000
                state = ((1 - after) * x0 + after * noises[step + 1, :, frames]).detach()
        expected.append(x0)
        _, written = reference.keys_values(x0, torch.zeros(2, 2, dtype=torch.float64), block)
        written = written.detach()
        context = torch.cat((context, written), dim=2)[:, :, -WINDOW:] if context.shape[2] else written
    wanted = torch.cat(expected, dim=1)
    torch.testing.assert_close(clean, wanted)
    weights = torch.linspace(-1, 1, clean.numel(), dtype=torch.float64).reshape(clean.shape)
    found = gradients(student, (clean * weights).sum())
    for name, gradient in gradients(reference, (wanted * weights).sum()).items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("exit_step", range(4))
def test_steps_modes_and_context_passes(exit_step: int) -> None:
    student = Student()
    result = rollout(student, noise(), LEVELS, exit_step, SIZES)
    expected = [(block, LEVELS[step], step == exit_step) for block in range(4) for step in range(exit_step + 1)]
    assert student.calls == expected
    assert result.exit_timestep == LEVELS[exit_step]
    assert len(student.contexts) == 4
    for block, (written, with_gradient) in enumerate(student.contexts):
        assert not with_gradient
        assert not written.requires_grad
        assert torch.equal(written, result.clean[:, 2 * block : 2 * block + 2])


def test_one_block_is_the_few_step_sampler() -> None:
    noises = noise(2)
    student = Student()
    walked = rollout(Student(), noises, LEVELS, 3, (2,)).clean
    sampled = few_step_sample(student.denoise, noises[0], LEVELS, lambda step, _: noises[step])
    torch.testing.assert_close(walked.detach(), sampled)


def test_gradient_checkpointing_with_eviction_gives_the_same_gradient() -> None:
    results = []
    for checkpointed in (False, True):
        student = Student(checkpointed)
        clean = rollout(student, noise(), LEVELS, 1, SIZES).clean
        results.append(gradients(student, clean.square().mean()))
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=0, atol=0)


def test_only_the_last_frames_of_a_long_rollout_are_trained() -> None:
    student = Student()
    clean = rollout(student, noise(), LEVELS, 1, SIZES, gradient_from=4).clean
    found = gradients(student, clean.square().mean())
    assert [bool(found[f"bias.{block}"].abs().max() > 0) for block in range(4)] == [False, False, True, True]
    full = rollout(Student(), noise(), LEVELS, 1, SIZES).clean
    assert torch.equal(clean, full)


def test_without_gradient_nothing_is_tracked() -> None:
    student = Student()
    with torch.no_grad():
        assert not rollout(student, noise(), LEVELS, 1, SIZES).clean.requires_grad
    assert not any(with_gradient for _, _, with_gradient in student.calls)


def test_uneven_blocks() -> None:
    """An independent first frame: [1, 3, 4]."""
    student = Student()
    clean = rollout(student, noise(), LEVELS, 1, (1, 3, 4)).clean
    assert clean.shape == (2, 8, *LATENT)
    assert [written.shape[1] for written, _ in student.contexts] == [1, 3, 4]
    prefix = rollout(Student(), noise()[:, :, :4], LEVELS, 1, (1, 3)).clean
    torch.testing.assert_close(prefix, clean[:, :4])


@pytest.mark.parametrize(
    ("timesteps", "exit_step", "sizes", "message"),
    [
        (LEVELS, 4, SIZES, "exit_step: must be one of the 4 steps, got 4"),
        (LEVELS, -1, SIZES, "exit_step: must be one of the 4 steps, got -1"),
        ([1000, 500, 0], 2, SIZES, "the student's list has no 0"),
        (LEVELS, 0, (3, 3), "do not make 8 frames"),
    ],
)
def test_errors(timesteps: Sequence[float], exit_step: int, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rollout(Student(), noise(), timesteps, exit_step, sizes)


def test_exit_steps_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([draw_exit_step(4, generator) for _ in range(4000)]), minlength=4)
    assert counts.min() > 880
    assert counts.max() < 1120
