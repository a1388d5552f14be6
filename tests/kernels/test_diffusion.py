"""Schedule, samplers, guidance and noise against closed forms of Gaussian data, and against diffusers."""

import hashlib
import json
from itertools import pairwise
from statistics import NormalDist

import numpy
import pytest
import torch
from torch import Tensor

from reelway.kernels.diffusion import guidance, noise, sampler, schedule
from reelway.kernels.diffusion.noise import SampleKey

STUDENT = [1000.0, 750.0, 500.0, 250.0]
SHAPE = (2, 1, 1, 2)  # F, C, H, W: four correlated dimensions
DIM = 4

torch.manual_seed(0)
MEAN = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
FACTOR = torch.tensor(
    [[0.9, 0, 0, 0], [0.4, 0.5, 0, 0], [-0.3, 0.2, 1.2, 0], [0.1, -0.2, 0.3, 0.6]], dtype=torch.float64
)
COVARIANCE = FACTOR @ FACTOR.T


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def marginal_factor(sigma: float) -> Tensor:
    """Symmetric square root of the covariance of x_t."""
    values, vectors = torch.linalg.eigh(COVARIANCE)
    return vectors @ torch.diag(((1 - sigma) ** 2 * values + sigma**2).sqrt()) @ vectors.T


def ode_state(start: Tensor, sigma: float) -> Tensor:
    """Where the exact flow carries noise [B, F, C, H, W]: (1 - sigma) mu + M^(1/2) eps."""
    moved = (1 - sigma) * MEAN + start.double().flatten(1) @ marginal_factor(sigma)
    return moved.reshape(start.shape)


def exact_velocity(latents: Tensor, timesteps: Tensor) -> Tensor:
    """E[eps - x0 | x_t] for x0 ~ N(MEAN, COVARIANCE), one timestep for all."""
    sigma = float(timesteps[0, 0]) / 1000
    marginal = (1 - sigma) ** 2 * COVARIANCE + sigma**2 * torch.eye(DIM, dtype=torch.float64)
    centred = latents.double().flatten(1) - (1 - sigma) * MEAN
    white = torch.linalg.solve(marginal, centred.T).T
    velocity = sigma * white - MEAN - (1 - sigma) * white @ COVARIANCE
    return velocity.reshape(latents.shape).to(latents.dtype)


def consistency_velocity(latents: Tensor, timesteps: Tensor) -> Tensor:
    """The velocity whose x0 is the end of the exact flow from x_t: a perfect student."""
    sigma = float(timesteps[0, 0]) / 1000
    centred = latents.double().flatten(1) - (1 - sigma) * MEAN
    end = MEAN + centred @ torch.linalg.inv(marginal_factor(sigma)) @ marginal_factor(0.0)
    return schedule.clean_to_velocity(end.reshape(latents.shape), latents, timesteps)


class TestSchedule:
    def test_warped_student_list_is_exact(self) -> None:
        assert schedule.warp(STUDENT, 5.0) == pytest.approx([1000, 937.5, 2500 / 3, 625], rel=1e-15)
        assert schedule.warp(STUDENT, 8.0) == pytest.approx([1000, 960, 8000 / 9, 8000 / 11], rel=1e-15)
        assert schedule.warp(STUDENT, 1.0) == STUDENT

    def test_grid_is_that_of_diffusers(self) -> None:
        diffusers = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete")
        reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
        reference.set_timesteps(sigmas=numpy.linspace(1.0, 1 / 50, 50))
        grid = schedule.timesteps(50, 8.0)
        assert grid[0] == 1000.0
        assert grid[-1] == 0.0
        torch.testing.assert_close(torch.tensor(grid) / 1000, reference.sigmas)

    def test_conversions_against_float64(self) -> None:
        clean, eps = (torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, generator=generator(s)) for s in (1, 2))
        levels = torch.tensor([[0.0, 20.0, 333.3], [625.0, 2500 / 3, 1000.0]], dtype=torch.float64)
        expected = torch.empty_like(clean)
        for b in range(2):
            for f in range(3):
                s = levels[b, f].item() / 1000
                expected[b, f] = (1 - s) * clean[b, f] + s * eps[b, f]
        noisy = schedule.add_noise(clean, eps, levels)
        torch.testing.assert_close(noisy, expected, rtol=1e-15, atol=1e-15)
        torch.testing.assert_close(schedule.velocity_to_clean(eps - clean, noisy, levels), clean, rtol=0, atol=1e-14)
        levels[0, 0] = 5.0
        noisy = schedule.add_noise(clean, eps, levels)
        back = schedule.clean_to_velocity(clean, noisy, levels)
        torch.testing.assert_close(back, eps - clean, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_conversions_round_once(self, dtype: torch.dtype) -> None:
        """The result is the float64 one, rounded to the input's dtype: no rounding in between."""
        clean, eps = (torch.randn(2, 3, 2, 4, 4, generator=generator(s)).to(dtype) for s in (1, 2))
        levels = schedule.sample_timesteps((2, 3), 5.0, generator(3))
        exact = schedule.add_noise(clean.double(), eps.double(), levels.double())
        noisy = schedule.add_noise(clean, eps, levels)
        assert noisy.dtype == dtype
        assert torch.equal(noisy, exact.to(dtype))
        exact = schedule.velocity_to_clean(eps.double(), noisy.double(), levels.double())
        assert torch.equal(schedule.velocity_to_clean(eps, noisy, levels), exact.to(dtype))

    def test_ends_are_exact(self) -> None:
        clean, eps = torch.randn(2, 1, 2, 1, 4, 4).unbind()
        ends = torch.tensor([[0.0, 1000.0]])
        noisy = schedule.add_noise(clean, eps, ends)
        assert torch.equal(noisy[:, 0], clean[:, 0])
        assert torch.equal(noisy[:, 1], eps[:, 1])
        with pytest.raises(ValueError, match="undefined at t = 0"):
            schedule.clean_to_velocity(clean, noisy, ends)

    @pytest.mark.parametrize(("shift", "median", "high", "clamped"), [(8, 889, 0.47, 0.14), (5, 833, 0.36, 0.09)])
    def test_training_timesteps_statistics(self, shift: float, median: int, high: float, clamped: float) -> None:
        levels = schedule.sample_timesteps((200, 1000), shift, generator())
        assert levels.shape == (200, 1000)
        assert levels.min() >= 20
        assert levels.max() == 980
        assert levels.median().item() == pytest.approx(median, abs=2)
        assert (levels > 900).float().mean().item() == pytest.approx(high, abs=0.006)
        assert (levels == 980).float().mean().item() == pytest.approx(clamped, abs=0.006)

    @pytest.mark.parametrize("shift", [1.0, 2.3])
    def test_stratified_timesteps_follow_their_law(self, shift: float) -> None:
        """A shift of k moves a logit by ln k, so the law is normal around it; 64 strata leave no room for chance."""
        levels = {
            law: schedule.stratified_timesteps(64, law, shift, generator(1)) for law in ("uniform", "logit-normal")
        }
        for raw in (0.1, 0.2, 0.5, 0.8, 0.95):
            shifted = 1000 * shift * raw / (1 + (shift - 1) * raw)
            logit = float(numpy.log(shifted / (1000 - shifted)))
            assert (levels["uniform"] <= shifted).double().mean().item() == pytest.approx(raw, abs=1 / 64)
            below = NormalDist(float(numpy.log(shift))).cdf(logit)
            assert (levels["logit-normal"] <= shifted).double().mean().item() == pytest.approx(below, abs=1 / 64)
        for values in levels.values():
            assert values.dtype == torch.float32
            assert not torch.equal(values, values.sort().values)
        again = schedule.stratified_timesteps(64, "uniform", shift, generator(2))
        assert not torch.equal(again.sort().values, levels["uniform"].sort().values)

    def test_errors_name_the_value(self) -> None:
        with pytest.raises(ValueError, match=r"timesteps: must lie in \[0, 1000\], got \[1001\]"):
            schedule.warp([1001, 5], 5.0)
        with pytest.raises(ValueError, match="shift: must be positive, got 0"):
            schedule.timesteps(4, 0)
        with pytest.raises(ValueError, match="steps: must be at least 1, got 0"):
            schedule.timesteps(0, 5)
        with pytest.raises(ValueError, match="got 980, 20"):
            schedule.sample_timesteps((1,), 5.0, generator(), minimum=980, maximum=20)


class TestEuler:
    start = torch.randn(64, *SHAPE, dtype=torch.float64, generator=generator(7))

    def error(self, steps: int) -> float:
        end = sampler.euler_sample(exact_velocity, self.start, schedule.timesteps(steps, 3.0))
        return (end - ode_state(self.start, 0.0)).abs().max().item()

    def test_converges_to_the_analytic_map_at_order_one(self) -> None:
        errors = [self.error(steps) for steps in (100, 200, 400)]
        for coarse, fine in pairwise(errors):
            assert 1.9 < coarse / fine < 2.1
        assert self.error(8000) < 1e-3

    def test_recorded_states_are_those_of_the_analytic_path(self) -> None:
        record = [*schedule.warp(STUDENT, 5.0), 0.0]
        states = sampler.euler_trajectory(exact_velocity, self.start, schedule.timesteps(8000, 5.0), record)
        assert states.shape == (5, 64, *SHAPE)
        assert torch.equal(states[0], self.start)
        for state, level in zip(states, record, strict=True):
            torch.testing.assert_close(state, ode_state(self.start, level / 1000), rtol=0, atol=1e-3)

    def test_steps_are_those_of_diffusers(self) -> None:
        diffusers = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete")
        reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
        reference.set_timesteps(sigmas=numpy.linspace(1.0, 1 / 20, 20))
        state = self.start.float()
        for level in reference.timesteps:
            velocity = exact_velocity(state, level.expand(64, 2))
            state = reference.step(velocity, level, state).prev_sample
        ours = sampler.euler_sample(exact_velocity, self.start.float(), schedule.timesteps(20, 5.0))
        torch.testing.assert_close(ours, state, rtol=0, atol=2e-5)

    def test_state_is_fp32_while_the_network_sees_bf16(self) -> None:
        seen = []

        def velocity(latents: Tensor, timesteps: Tensor) -> Tensor:
            seen.append((latents.dtype, timesteps.dtype))
            return torch.full_like(latents, 1 / 3)

        start = torch.ones(1, *SHAPE, dtype=torch.bfloat16)
        states = sampler.euler_trajectory(velocity, start, schedule.timesteps(1000, 1.0), [1000.0, 0.0])
        assert set(seen) == {(torch.bfloat16, torch.float32)}
        assert states.dtype == torch.float32
        slope = torch.tensor(1 / 3, dtype=torch.bfloat16).item()
        rounding = 1000 * 2**-24  # one fp32 rounding per step; a bf16 state would be off by 0.1 and more
        torch.testing.assert_close(states[1], torch.full_like(states[1], 1 - slope), rtol=0, atol=rounding)

    def test_the_network_is_told_the_state_s_own_timestep(self) -> None:
        grid, seen = schedule.timesteps(10, 5.0), []

        def velocity(latents: Tensor, timesteps: Tensor) -> Tensor:
            assert timesteps.shape == latents.shape[:2]
            seen.append(timesteps[0, 0].item())
            return torch.zeros_like(latents)

        sampler.euler_sample(velocity, self.start, grid)
        assert seen == grid[:-1]

    def test_carries_no_gradient_and_leaves_the_mode(self) -> None:
        scale = torch.ones((), requires_grad=True)
        states = sampler.euler_trajectory(
            lambda latents, _: scale * latents,
            torch.ones(1, *SHAPE),
            schedule.timesteps(4, 5.0),
            [1000.0, 0.0],
        )
        assert not states.requires_grad
        assert torch.is_grad_enabled()


class TestRecordingGrid:
    def test_shift_trap_is_an_error(self) -> None:
        """48 steps of shift 8 hold 960 where the shift-5 student means 937.5."""
        record = [*schedule.warp(STUDENT, 5.0), 0.0]
        with pytest.raises(ValueError, match=r"does not hold \[937.5, 833.3333, 625\]; nearest grid values: \[93"):
            sampler.euler_trajectory(exact_velocity, torch.ones(1, *SHAPE), schedule.timesteps(48, 8.0), record)

    def test_48_steps_hold_the_student_of_the_same_shift(self) -> None:
        record = [*schedule.warp(STUDENT, 5.0), 0.0]
        grid = sampler.recording_grid(record, 48, 5.0)
        assert grid == schedule.timesteps(48, 5.0)
        assert set(record) <= set(grid)
        assert [grid.index(level) for level in record] == [0, 12, 24, 36, 48]

    def test_steps_are_raised_until_the_grid_holds_the_list(self) -> None:
        record = [*schedule.warp(STUDENT, 8.0), 0.0]
        assert len(sampler.recording_grid(record, 50, 8.0)) == 52 + 1

    def test_rounded_list_has_no_grid(self) -> None:
        """CausVid's 757 is 756.757 on its 50-step grid of shift 8."""
        with pytest.raises(ValueError, match=r"holds \[1000, 757, 522, 0\]; nearest grid values: \[1000, 756.756"):
            sampler.recording_grid([1000, 757, 522, 0], 50, 8.0)
        exact = [1000, 1000 * 8 * 0.28 / (1 + 7 * 0.28), 1000 * 8 * 0.12 / (1 + 7 * 0.12), 0]
        assert len(sampler.recording_grid(exact, 50, 8.0)) == 51

    @pytest.mark.parametrize("record", [[0.0, 1000.0], [1000.0, 1000.0], [1000.0, -1.0], []])
    def test_record_must_fall(self, record: list[float]) -> None:
        with pytest.raises(ValueError, match="record: timesteps must fall strictly"):
            sampler.euler_trajectory(exact_velocity, torch.ones(1, *SHAPE), schedule.timesteps(4, 5.0), record)


class TestFewStep:
    levels = schedule.warp(STUDENT, 5.0)

    def test_perfect_student_samples_the_data(self) -> None:
        start = torch.randn(40_000, *SHAPE, dtype=torch.float64, generator=generator(1))
        fresh = generator(2)

        def fresh_noise(step: int, like: Tensor) -> Tensor:
            return torch.randn(like.shape, dtype=like.dtype, generator=fresh)

        samples = sampler.few_step_sample(consistency_velocity, start, self.levels, fresh_noise).flatten(1)
        torch.testing.assert_close(samples.mean(0), MEAN, rtol=0, atol=0.03)
        torch.testing.assert_close(samples.T.cov(), COVARIANCE, rtol=0, atol=0.04)

    def test_exact_denoiser_with_given_noise_follows_the_recursion(self) -> None:
        """In the eigenbasis: E[x0 | x_t] = mu + (1 - s) l / ((1 - s)^2 l + s^2) (x_t - (1 - s) mu)."""
        noises = torch.randn(4, 3, *SHAPE, dtype=torch.float64, generator=generator(3))
        values, vectors = (part.numpy() for part in torch.linalg.eigh(COVARIANCE))
        mean = MEAN.numpy() @ vectors
        state = noises[0].flatten(1).numpy() @ vectors
        for step, level in enumerate(self.levels):
            s = level / 1000
            if step:
                state = (1 - s) * clean + s * (noises[step].flatten(1).numpy() @ vectors)  # noqa: F821
            gain = (1 - s) * values / ((1 - s) ** 2 * values + s**2)
            clean = mean + gain * (state - (1 - s) * mean)
        asked = []

        def fresh_noise(step: int, like: Tensor) -> Tensor:
            asked.append(step)
            return noises[step].to(like)

        ours = sampler.few_step_sample(exact_velocity, noises[0], self.levels, fresh_noise)
        numpy.testing.assert_allclose(ours.flatten(1).numpy(), clean @ vectors.T, atol=1e-12)
        assert asked == [1, 2, 3]

    def test_list_with_a_zero_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"ends above 0, got \[1000, 500, 0\]"):
            sampler.few_step_sample(exact_velocity, torch.ones(1, *SHAPE), [1000, 500, 0], lambda _, like: like)

    def test_a_sample_is_the_same_in_any_batch(self) -> None:
        keys = [SampleKey(3, prompt, 0) for prompt in ("a", "b", "c")]

        def run(part: list[SampleKey]) -> Tensor:
            start = noise.draw_noise(part, range(2), SHAPE[1:])
            network = lambda latents, timesteps: latents * timesteps[..., None, None, None] / 1000  # noqa: E731
            return sampler.few_step_sample(network, start, self.levels, noise.fresh_noise_of(part))

        assert torch.equal(run(keys)[1:2], run(keys[1:2]))


class TestNoise:
    key = SampleKey(1, "prompt", 0)

    def test_frames_do_not_depend_on_length_or_batch(self) -> None:
        whole = noise.draw_noise([self.key, SampleKey(1, "other", 0)], range(21), (4, 3, 5))
        assert whole.shape == (2, 21, 4, 3, 5)
        assert torch.equal(whole[:1, :3], noise.draw_noise([self.key], range(3), (4, 3, 5)))
        assert torch.equal(whole[:1, 6:9], noise.draw_noise([self.key], range(6, 9), (4, 3, 5)))
        latents = torch.zeros(1, 3, 4, 3, 5, dtype=torch.float64)
        fresh = noise.fresh_noise_of([self.key], first_frame=6)(2, latents)
        assert torch.equal(fresh, noise.draw_noise([self.key], range(6, 9), (4, 3, 5), step=2).double())

    def test_every_part_of_the_key_and_every_stream_counts(self) -> None:
        keys = [self.key, SampleKey(2, "prompt", 0), SampleKey(1, "prompt ", 0), SampleKey(1, "prompt", 1)]
        streams = torch.cat([noise.draw_noise(keys, range(3), (64, 8, 8), step) for step in range(3)])
        flat = streams.flatten(0, 1).flatten(1).double()
        correlation = torch.corrcoef(flat) - torch.eye(len(flat), dtype=torch.float64)
        assert correlation.abs().max() < 5 / flat.shape[1] ** 0.5
        assert flat.mean().abs() < 0.01
        assert flat.var().item() == pytest.approx(1, abs=0.01)

    def test_streams_are_pinned(self) -> None:
        """Data sets are made again from these bits: a change here changes every sample of every run."""
        digest = hashlib.sha256(json.dumps([1, "prompt", 0, "noise", 2, 5]).encode()).digest()
        stream = numpy.random.Generator(numpy.random.Philox(key=int.from_bytes(digest[:16], "big")))
        expected = torch.from_numpy(stream.standard_normal((2, 3, 4), dtype=numpy.float32))
        assert torch.equal(noise.draw_noise([self.key], range(5, 6), (2, 3, 4), step=2)[0, 0], expected)
        first = noise.draw_noise([self.key], range(1), (1, 1, 2)).flatten().tolist()
        assert first == pytest.approx([0.7863489, 0.7592911], abs=1e-6)

    def test_generator_is_the_sample_s(self) -> None:
        def draw(*key: object) -> list[float]:
            return torch.rand(4, generator=noise.sample_generator(*key)).tolist()  # type: ignore[arg-type]

        assert draw(1, "prompt", 0) == draw(1, "prompt", 0)
        others = [(1, "prompt", 1), (2, "prompt", 0), (1, "q", 0), (1, "prompt", 0, 0), (1, "prompt", 0, 1)]
        drawn = [draw(1, "prompt", 0), *(draw(*other) for other in others)]
        assert len({tuple(row) for row in drawn}) == 6


class TestGuidance:
    conditional, unconditional = torch.randn(2, 3, *SHAPE, generator=generator(4)).unbind()

    def test_standard_scale(self) -> None:
        pair = (self.conditional, self.unconditional)
        torch.testing.assert_close(guidance.guided(pair, 1.0), self.conditional)
        assert torch.equal(guidance.guided(pair, 0.0), self.unconditional)
        expected = 6 * self.conditional.double() - 5 * self.unconditional.double()
        torch.testing.assert_close(guidance.guided(pair, 6.0), expected.float())

    @pytest.mark.parametrize(("plus", "standard"), [(3.5, 4.5), (3.0, 4.0), (0.0, 1.0)])
    def test_plus_form(self, plus: float, standard: float) -> None:
        assert guidance.from_plus_form(plus) == standard
        expected = self.conditional + plus * (self.conditional - self.unconditional)
        pair = (self.conditional, self.unconditional)
        torch.testing.assert_close(guidance.guided(pair, guidance.from_plus_form(plus)), expected)

    def test_bf16_velocities_are_combined_in_fp32(self) -> None:
        pair = (self.conditional.bfloat16(), self.unconditional.bfloat16())
        expected = 6 * pair[0].double() - 5 * pair[1].double()
        torch.testing.assert_close(guidance.guided(pair, 6.0), expected.float(), rtol=0, atol=1e-5)

    def test_one_pass_over_the_doubled_batch(self) -> None:
        contexts = torch.tensor([1.0, 2.0, 3.0, -1.0, -2.0, -3.0]).reshape(6, 1, 1, 1, 1)

        def both(latents: Tensor, timesteps: Tensor) -> Tensor:
            return latents * contexts + timesteps[..., None, None, None]

        latents, levels = torch.randn(3, *SHAPE), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        ours = guidance.guided_velocity(both, 4.0)(latents, levels)
        pair = latents * contexts[:3], latents * contexts[3:]
        expected = pair[1] + 4 * (pair[0] - pair[1]) + levels[..., None, None, None]
        torch.testing.assert_close(ours, expected)
