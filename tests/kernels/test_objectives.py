"""Objectives against closed forms of Gaussian data and plain loops."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reelway.kernels.diffusion.schedule import sample_timesteps, warp
from reelway.kernels.objectives.dmd import dmd_critic_loss, dmd_generator_loss
from reelway.kernels.objectives.flow_matching import flow_matching_loss
from reelway.kernels.objectives.ode_regression import draw_block_indices, ode_regression_loss

SHAPE = (2, 1, 1, 1)  # F, C, H, W: two correlated dimensions, one per frame
DIM = 2
MEAN = torch.tensor([1.5, -0.7], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.8, 0.5], [0.5, 0.6]], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def whitened(*shape: int, seed: int = 0) -> Tensor:
    """Samples whose empirical mean and covariance are exactly 0 and 1: means of quadratic forms are exact."""
    raw = normal(*shape, seed=seed)
    raw = raw - raw.mean(0)
    factor = torch.linalg.cholesky(raw.T @ raw / len(raw))
    return torch.linalg.solve_triangular(factor, raw.T, upper=False).T


def gaussian_velocity(mean: Tensor, covariance: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """E[eps - x0 | x_t] for x0 ~ N(mean, covariance), one timestep per clip; differentiable in both."""

    def velocity(latents: Tensor, timesteps: Tensor) -> Tensor:
        assert (timesteps == timesteps[:, :1]).all(), "score networks know one noise level per clip"
        sigma = timesteps[:, :1].to(mean.dtype) / 1000
        clean = (1 - sigma)[..., None] ** 2 * covariance
        marginal = clean + sigma[..., None] ** 2 * torch.eye(len(mean), dtype=mean.dtype)
        centred = latents.to(mean.dtype).flatten(1) - (1 - sigma) * mean
        white = torch.linalg.solve(marginal, centred[..., None])[..., 0]
        return (sigma * white - mean - (1 - sigma) * white @ covariance).reshape(latents.shape)

    return velocity


def gaussian_kl(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """KL(N(mean, covariance) || N(other_mean, other_covariance))."""
    inverse = torch.linalg.inv(other_covariance)
    gap = other_mean - mean
    logs = torch.logdet(other_covariance) - torch.logdet(covariance)
    return 0.5 * (torch.trace(inverse @ covariance) + gap @ inverse @ gap - len(mean) + logs)


class TestFlowMatching:
    @pytest.mark.parametrize("level", [50.0, 500.0, 950.0])
    def test_loss_at_the_optimum_is_the_conditional_variance(self, level: float) -> None:
        """tr Cov(eps - x0 | x_t) / D, and per eigenvalue l of the covariance: l / ((1 - s)^2 l + s^2)."""
        count, s = 200_000, level / 1000
        clean = MEAN + normal(count, DIM, seed=1) @ torch.linalg.cholesky(COVARIANCE).T
        levels = torch.full((count, 2), level, dtype=torch.float64)
        result = flow_matching_loss(
            gaussian_velocity(MEAN, COVARIANCE),
            clean.reshape(-1, *SHAPE),
            normal(count, *SHAPE, seed=2),
            levels,
        )
        values = torch.linalg.eigvalsh(COVARIANCE)
        expected = (values / ((1 - s) ** 2 * values + s**2)).mean().item()
        assert result.loss.item() == pytest.approx(expected, rel=0.01)

    def test_weights_and_diagnostics(self) -> None:
        clean, noise = normal(3, *SHAPE, seed=1), normal(3, *SHAPE, seed=2)
        levels = torch.tensor([[0.0, 300.0], [500.0, 700.0], [900.0, 1000.0]], dtype=torch.float64)
        weight = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
        scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        result = flow_matching_loss(
            lambda noisy, t: scale * noisy + t[..., None, None, None], clean, noise, levels, weight
        )
        errors = torch.zeros(3, 2, dtype=torch.float64)
        for b in range(3):
            for f in range(2):
                s = levels[b, f] / 1000
                noisy = (1 - s) * clean[b, f] + s * noise[b, f]
                errors[b, f] = (0.3 * noisy + levels[b, f] - (noise[b, f] - clean[b, f])).square().mean()
        torch.testing.assert_close(result.frame_error, errors)
        torch.testing.assert_close(result.loss.detach(), (errors * weight).mean())
        assert not result.frame_error.requires_grad
        (gradient,) = torch.autograd.grad(result.loss, scale)
        assert gradient != 0

    def test_bf16_latents_give_an_fp32_loss(self) -> None:
        clean, noise = (normal(8, *SHAPE, seed=seed).bfloat16() for seed in (1, 2))
        levels = torch.full((8, 2), 600.0)
        result = flow_matching_loss(lambda noisy, _: torch.zeros_like(noisy), clean, noise, levels)
        assert result.loss.dtype == torch.float32
        expected = (noise.double() - clean.double()).square().mean().item()
        assert result.loss.item() == pytest.approx(expected, rel=1e-6)


class TestOdeRegression:
    levels = [*warp([1000, 750, 500, 250], 5.0), 0.0]  # noqa: RUF012
    sizes = (1, 3, 3)

    def trajectory(self) -> Tensor:
        return normal(2, 5, 7, 2, 3, 3, seed=5)

    def test_blocks_take_their_own_states_and_clean_frames_do_not_count(self) -> None:
        trajectory, indices = self.trajectory(), torch.tensor([[4, 0, 2], [1, 4, 3]])
        seen = {}

        def velocity(noisy: Tensor, timesteps: Tensor) -> Tensor:
            seen["noisy"], seen["timesteps"] = noisy, timesteps
            return torch.sin(noisy)

        result = ode_regression_loss(velocity, trajectory, self.levels, indices, self.sizes)
        errors = []
        for b in range(2):
            for f in range(7):
                block = 0 if f < 1 else 1 if f < 4 else 2
                state = int(indices[b, block])
                assert torch.equal(seen["noisy"][b, f], trajectory[b, state, f])
                assert seen["timesteps"][b, f] == self.levels[state]
                if state == 4:
                    assert result.frame_error[b, f] == 0
                    continue
                x0 = trajectory[b, state, f] - self.levels[state] / 1000 * torch.sin(trajectory[b, state, f])
                errors.append((x0 - trajectory[b, 4, f]).square().mean())
                torch.testing.assert_close(result.frame_error[b, f], errors[-1])
        assert len(errors) == 14 - 1 - 3
        torch.testing.assert_close(result.loss, torch.stack(errors).mean())

    def test_a_straight_path_with_its_own_velocity_has_no_loss(self) -> None:
        """And with the labels of another shift the same states do: the label is what is learnt."""
        start, end = normal(2, 7, 2, 3, 3, seed=1), normal(2, 7, 2, 3, 3, seed=2)
        states = torch.stack([(1 - t / 1000) * end + t / 1000 * start for t in self.levels], dim=1)
        indices = draw_block_indices(2, 3, 4, generator())
        arguments = (lambda *_: start - end, states)
        assert ode_regression_loss(*arguments, self.levels, indices, self.sizes).loss < 1e-28
        other = [*warp([1000, 750, 500, 250], 8.0), 0.0]
        assert ode_regression_loss(*arguments, other, indices, self.sizes).loss > 1e-4

    def test_all_clean_is_a_zero_with_a_gradient(self) -> None:
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        clean = torch.full((2, 3), 4)
        result = ode_regression_loss(lambda x, _: scale * x, self.trajectory(), self.levels, clean, self.sizes)
        assert result.loss == 0
        (gradient,) = torch.autograd.grad(result.loss, scale)
        assert gradient == 0

    def test_fp16_states_give_an_fp32_loss(self) -> None:
        result = ode_regression_loss(
            lambda x, _: x / 2,
            self.trajectory().half(),
            self.levels,
            torch.zeros(2, 3, dtype=torch.long),
            self.sizes,
        )
        assert result.loss.dtype == torch.float32
        assert result.timesteps.dtype == torch.float32

    def test_indices_are_uniform_and_independent(self) -> None:
        indices = draw_block_indices(20_000, 3, 5, generator())
        assert indices.shape == (20_000, 3)
        shares = torch.stack([(indices == state).double().mean(0) for state in range(5)])
        assert (shares - 0.2).abs().max() < 0.02
        assert torch.corrcoef(indices.T.double()).triu(1).abs().max() < 0.03

    @pytest.mark.parametrize(
        ("timesteps", "sizes", "message"),
        [
            ([1000, 500, 0], (1, 3, 3), "trajectory: 5 states"),
            ([1000, 900, 800, 700, 600], (1, 3, 3), "end at 0"),
            ([0, 250, 500, 750, 1000], (1, 3, 3), "must fall strictly"),
            ([1000, 750, 500, 250, 0], (3, 3, 3), "do not make 7 frames"),
        ],
    )
    def test_errors(self, timesteps: list[float], sizes: tuple[int, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ode_regression_loss(
                lambda x, _: x, self.trajectory(), timesteps, torch.zeros(2, 3, dtype=torch.long), sizes
            )


class TestDmd:
    real = staticmethod(gaussian_velocity(MEAN, COVARIANCE))

    def test_gradient_is_the_normalised_score_difference(self) -> None:
        clean = normal(3, 2, 2, 3, 3, seed=1).requires_grad_()
        noise, levels = (
            normal(3, 2, 2, 3, 3, seed=2),
            torch.tensor([100.0, 500.0, 900.0], dtype=torch.float64),
        )
        result = dmd_generator_loss(clean, lambda x, _: 0.2 * x, lambda x, _: -0.4 * x, levels, noise)
        (gradient,) = torch.autograd.grad(result.loss, clean)
        for b in range(3):
            s = levels[b] / 1000
            noisy = (1 - s) * clean[b].detach() + s * noise[b]
            real_x0, fake_x0 = noisy - s * 0.2 * noisy, noisy + s * 0.4 * noisy
            expected = (fake_x0 - real_x0) / (clean[b].detach() - real_x0).abs().mean()
            torch.testing.assert_close(gradient[b], expected / clean.numel())
            torch.testing.assert_close(result.gradient[b], expected)
        assert result.non_finite == 0
        torch.testing.assert_close(result.loss.detach(), 0.5 * result.gradient.square().mean())

    @pytest.mark.parametrize("level", [20.0, 400.0, 980.0])
    def test_gradient_is_that_of_the_diffused_kl(self, level: float) -> None:
        """For x = A z + b, exact scores, up to the documented factor: d KL(p_t || q_t) / d(A, b)."""
        count, s = 64, level / 1000
        a = torch.tensor([[0.7, 0.2], [-0.3, 1.1]], dtype=torch.float64, requires_grad=True)
        b = torch.tensor([0.2, 0.4], dtype=torch.float64, requires_grad=True)
        draws = whitened(count, 2 * DIM, seed=3)
        clean = (draws[:, :DIM] @ a.T + b).reshape(count, *SHAPE)
        fake = gaussian_velocity(b.detach(), (a @ a.T).detach())
        levels = torch.full((count,), level, dtype=torch.float64)
        result = dmd_generator_loss(clean, self.real, fake, levels, draws[:, DIM:].reshape(count, *SHAPE))
        (at_clean,) = torch.autograd.grad(result.loss, clean, retain_graph=True)
        undone = at_clean * clean.numel() * result.normaliser[:, None, None, None, None] * (1 - s) ** 2 / s**2
        ours = torch.autograd.grad(clean, (a, b), undone / count)
        eye = s**2 * torch.eye(DIM, dtype=torch.float64)
        kl = gaussian_kl((1 - s) * b, (1 - s) ** 2 * a @ a.T + eye, (1 - s) * MEAN, (1 - s) ** 2 * COVARIANCE + eye)
        for found, expected in zip(ours, torch.autograd.grad(kl, (a, b)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)

    def test_generator_and_critic_learn_the_distribution(self) -> None:
        """A linear generator and a Gaussian critic, both trained, end at the data's mean and covariance."""
        a = torch.tensor([[0.4, 0.0], [0.0, 0.4]], dtype=torch.float64, requires_grad=True)
        b = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        critic_mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        critic_factor = (0.4 * torch.eye(2, dtype=torch.float64)).requires_grad_()
        generator_steps = torch.optim.Adam([a, b], lr=0.02, betas=(0.0, 0.99))
        critic_steps = torch.optim.Adam([critic_mean, critic_factor], lr=0.02, betas=(0.0, 0.99))
        draws, batch = generator(1), 256

        def sample() -> tuple[Tensor, Tensor, Tensor]:
            z, noise = torch.randn(2, batch, 2, dtype=torch.float64, generator=draws)
            levels = sample_timesteps((batch,), 1.0, draws).double()
            return (z @ a.T + b).reshape(batch, *SHAPE), levels, noise.reshape(batch, *SHAPE)

        def critic() -> Callable[[Tensor, Tensor], Tensor]:
            return gaussian_velocity(critic_mean, critic_factor @ critic_factor.T)

        steps = 400
        for step in range(steps):
            for group in (*generator_steps.param_groups, *critic_steps.param_groups):
                group["lr"] = 0.02 * (1 - step / steps) + 1e-4
            for _ in range(3):
                clean, levels, noise = sample()
                critic_steps.zero_grad()
                dmd_critic_loss(critic(), clean, levels, noise).loss.backward()
                critic_steps.step()
            clean, levels, noise = sample()
            generator_steps.zero_grad()
            dmd_generator_loss(clean, self.real, critic(), levels, noise).loss.backward()
            generator_steps.step()
        torch.testing.assert_close(b.detach(), MEAN, rtol=0, atol=0.05)
        torch.testing.assert_close((a @ a.T).detach(), COVARIANCE, rtol=0, atol=0.05)

    def test_gradient_reaches_the_generator_only(self) -> None:
        clean = normal(2, *SHAPE, seed=1).requires_grad_()
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        levels, noise = torch.tensor([200.0, 800.0]), normal(2, *SHAPE, seed=2)
        result = dmd_generator_loss(clean, self.real, lambda x, _: scale * x, levels, noise)
        result.loss.backward()
        assert scale.grad is None
        assert not any(part.requires_grad for part in result[1:])  # the scores' activations are not kept
        assert clean.grad is not None
        clean.grad = None
        dmd_critic_loss(lambda x, _: scale * x, clean, levels, noise).loss.backward()
        assert clean.grad is None
        assert scale.grad is not None

    def test_critic_regresses_the_raw_velocity(self) -> None:
        clean, noise = normal(2, *SHAPE, seed=1), normal(2, *SHAPE, seed=2)
        levels = torch.tensor([20.0, 900.0])
        result = dmd_critic_loss(lambda x, t: x * t[..., None, None, None], clean, levels, noise)
        expected = []
        for b in range(2):
            s = levels[b].item() / 1000
            noisy = (1 - s) * clean[b] + s * noise[b]
            expected.append((noisy * levels[b].item() - (noise[b] - clean[b])).square().mean())
        torch.testing.assert_close(result.loss, torch.stack(expected).mean(), rtol=1e-6, atol=0)

    def test_masked_frames_get_no_gradient_but_stay_in_the_normaliser(self) -> None:
        clean = normal(2, 3, 2, 2, 2, seed=1).requires_grad_()
        levels, noise = torch.tensor([300.0, 700.0]), normal(2, 3, 2, 2, 2, seed=2)
        networks = (lambda x, _: 0.2 * x, lambda x, _: -0.4 * x)
        mask = torch.tensor([[False, True, True], [True, False, False]])
        plain = dmd_generator_loss(clean, *networks, levels, noise)
        masked = dmd_generator_loss(clean, *networks, levels, noise, mask)
        (gradient,) = torch.autograd.grad(masked.loss, clean)
        torch.testing.assert_close(masked.normaliser, plain.normaliser)
        torch.testing.assert_close(gradient, plain.gradient * mask[..., None, None, None] / (3 * 8))
        none = dmd_generator_loss(clean, *networks, levels, noise, torch.zeros_like(mask))
        assert none.loss == 0
        assert torch.autograd.grad(none.loss, clean)[0].abs().max() == 0

    def test_non_finite_elements_are_counted(self) -> None:
        clean = normal(2, *SHAPE, seed=1).requires_grad_()

        def broken(latents: Tensor, timesteps: Tensor) -> Tensor:
            velocity = latents.clone()
            velocity[0, 0], velocity[1, 1] = torch.nan, torch.inf
            return velocity

        levels, noise = torch.tensor([300.0, 700.0]), normal(2, *SHAPE, seed=2)
        result = dmd_generator_loss(clean, self.real, broken, levels, noise)
        assert result.non_finite == 2
        (gradient,) = torch.autograd.grad(result.loss, clean)
        assert gradient.isfinite().all()
        assert (gradient.flatten() == 0).tolist() == [True, False, False, True]

    def test_bf16_student_keeps_an_exact_gradient(self) -> None:
        """x - (x - g) in bf16 would lose a g that is small against x; networks still see bf16."""
        clean = (100 + normal(1, *SHAPE, seed=1)).bfloat16().requires_grad_()
        seen = []

        def network(gain: float) -> Callable[[Tensor, Tensor], Tensor]:
            def velocity(latents: Tensor, timesteps: Tensor) -> Tensor:
                seen.append(latents.dtype)
                return gain * latents

            return velocity

        levels, noise = torch.tensor([500.0]), normal(1, *SHAPE, seed=2).bfloat16()
        result = dmd_generator_loss(clean, network(1.0), network(1.02), levels, noise)
        (gradient,) = torch.autograd.grad(result.loss, clean)
        assert set(seen) == {torch.bfloat16}
        torch.testing.assert_close(gradient.double(), result.gradient / 2, rtol=2**-8, atol=0)
        assert result.gradient.abs().min() > 0
