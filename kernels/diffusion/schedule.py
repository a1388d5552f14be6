"""The rectified-flow schedule in closed form: x_t = (1 - sigma) x0 + sigma eps, v = eps - x0, t = 1000 sigma.

Flow matching after arXiv 2210.02747 and 2209.03003, the timestep shift after arXiv 2403.03206 (section
5.3.2). Sigma is never looked up in a table: t = 0 is exactly clean and a fractional timestep is exactly
itself.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

MAX_TIMESTEP = 1000.0

TimestepLaw = Literal["uniform", "logit-normal"]
Sigma = TypeVar("Sigma", float, Tensor)


class Velocity(Protocol):
    """A network with its text, masks and caches bound: what samplers and objectives call.

    latents: [B, F, C, H, W]; timesteps: [B, F] in [0, 1000]; the result is v = eps - x0, [B, F, C, H, W].
    """

    def __call__(self, latents: Tensor, timesteps: Tensor, /) -> Tensor: ...


def shift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """k s / (1 + (k - 1) s): raises noise levels where shift > 1; 0 and 1 stay (arXiv 2403.03206, 5.3.2)."""
    if shift <= 0:
        raise ValueError(f"shift: must be positive, got {shift}")
    return shift * sigma / (1 + (shift - 1) * sigma)


def warp(values: Sequence[float], shift: float) -> list[float]:
    """An unshifted list under the shift: 1000, 750, 500, 250 with 5 are 1000, 937.5, 833.33, 625."""
    outside = [value for value in values if not 0 <= value <= MAX_TIMESTEP]
    if outside:
        raise ValueError(f"timesteps: must lie in [0, {MAX_TIMESTEP:g}], got {outside}")
    return [MAX_TIMESTEP * shift_sigma(value / MAX_TIMESTEP, shift) for value in values]


def timesteps(steps: int, shift: float) -> list[float]:
    """The sampling grid of `steps` steps: `steps` + 1 timesteps, strictly falling from 1000 to 0."""
    if steps < 1:
        raise ValueError(f"steps: must be at least 1, got {steps}")
    return warp([MAX_TIMESTEP * ((steps - step) / steps) for step in range(steps + 1)], shift)


def uniform_timesteps(latents: Tensor, timestep: float) -> Tensor:
    """One timestep for every frame of `latents` [B, F, C, H, W]: [B, F], fp32 (fp64 for fp64 latents)."""
    dtype = torch.promote_types(latents.dtype, torch.float32)
    return torch.full(latents.shape[:2], timestep, dtype=dtype, device=latents.device)


def add_noise(clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t of `clean` [B, F, C, H, W] at `timesteps` [B, F] (or [B]); float64 inside, dtype of `clean`."""
    sigma = _broadcast_sigma(timesteps, clean)
    return ((1 - sigma) * clean.double() + sigma * noise.double()).to(clean.dtype)


def velocity_to_clean(velocity: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
    """x0 = x_t - sigma v at `timesteps` [B, F] (or [B]); float64 inside, dtype of `latents`."""
    sigma = _broadcast_sigma(timesteps, latents)
    return (latents.double() - sigma * velocity.double()).to(latents.dtype)


def clean_to_velocity(clean: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
    """v = (x_t - x0) / sigma at `timesteps` [B, F] (or [B]); float64 inside, dtype of `latents`.

    Raises ValueError where a timestep is 0: a clean frame does not determine its velocity.
    """
    if bool((timesteps <= 0).any()):
        raise ValueError("timesteps: the velocity of a frame is undefined at t = 0")
    sigma = _broadcast_sigma(timesteps, latents)
    return ((latents.double() - clean.double()) / sigma).to(latents.dtype)


def sample_timesteps(
    shape: Sequence[int],
    shift: float,
    generator: torch.Generator,
    minimum: float = 20.0,
    maximum: float = 980.0,
) -> Tensor:
    """Random timesteps: uniform, shifted, then clamped to [minimum, maximum]; fp32 on the generator's device.

    The defaults are those of distribution matching (CausVid arXiv 2412.07772, Self-Forcing arXiv 2506.08009);
    with minimum 0 and maximum 1000 it is the shifted-uniform law of teacher training.
    """
    if not 0 <= minimum < maximum <= MAX_TIMESTEP:
        raise ValueError(f"minimum, maximum: need 0 <= minimum < maximum <= 1000, got {minimum}, {maximum}")
    uniform = torch.rand(tuple(shape), generator=generator, device=generator.device, dtype=torch.float64)
    return (MAX_TIMESTEP * shift_sigma(uniform, shift)).clamp(minimum, maximum).float()


def stratified_timesteps(count: int, law: TimestepLaw, shift: float, generator: torch.Generator) -> Tensor:
    """One timestep for each clip of a batch, fp32 [count]: uniform, or logit-normal (arXiv 2403.03206, 3.1); shifted.

    Each lies in a `count`-th of the law of its own, in random order: every batch sees every noise level, which calms
    the gradient. Under a shift of k the logit-normal law's logits are normal around ln k.
    """
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    shuffled = uniform[torch.randperm(count, generator=generator)]
    sigma = shuffled if law == "uniform" else torch.sigmoid(torch.special.ndtri(shuffled))
    return MAX_TIMESTEP * shift_sigma(sigma, shift)


def _broadcast_sigma(timesteps: Tensor, latents: Tensor) -> Tensor:
    leading = timesteps.shape
    assert leading == latents.shape[: len(leading)], f"timesteps {leading}, latents {latents.shape}"
    return (timesteps.double() / MAX_TIMESTEP).reshape(*leading, *(1,) * (latents.ndim - len(leading)))
