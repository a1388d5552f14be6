"""ODE initialisation (CausVid, arXiv 2412.07772, section 4.3): from points of a teacher's path to its end."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion.schedule import Velocity, velocity_to_clean


class OdeRegression(NamedTuple):
    """loss: scalar; frame_error [B, F] (0 for clean frames) and the frames' timesteps [B, F], detached."""

    loss: Tensor
    frame_error: Tensor
    timesteps: Tensor


def draw_block_indices(batch: int, blocks: int, states: int, generator: torch.Generator) -> Tensor:
    """One state index per block, uniform and independent, the clean state included: [B, blocks], int64."""
    return torch.randint(states, (batch, blocks), generator=generator, device=generator.device)


def ode_regression_loss(
    velocity: Velocity,
    trajectory: Tensor,
    timesteps: Sequence[float],
    indices: Tensor,
    block_sizes: Sequence[int],
) -> OdeRegression:
    """Mean squared x0 error over the frames whose timestep is not 0, in fp32 or better.

    Each block starts from its own state of the same path, so that blocks stand at different noise levels; a
    block at t = 0 is clean context for the later ones and is not supervised. Where every frame is clean the
    loss is 0 with a zero gradient, so that all ranks run the same backward.

    trajectory: [B, K + 1, F, C, H, W], noise to clean, in the network's dtype; timesteps: its K + 1
    timesteps, strictly falling to 0; indices: [B, blocks]; block_sizes: frames per block.
    """
    _check(trajectory, timesteps, indices, block_sizes)
    noisy, levels = _gather_states(trajectory, timesteps, indices, block_sizes)
    dtype = torch.promote_types(noisy.dtype, torch.float32)
    clean = velocity_to_clean(velocity(noisy, levels), noisy.to(dtype), levels)
    supervised = (levels > 0).to(dtype)
    frame_error = (clean - trajectory[:, -1].to(dtype)).square().mean(dim=(2, 3, 4)) * supervised
    loss = frame_error.sum() / supervised.sum().clamp(min=1)
    return OdeRegression(loss, frame_error.detach(), levels)


def _gather_states(
    trajectory: Tensor, timesteps: Sequence[float], indices: Tensor, block_sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The chosen states [B, F, C, H, W] and their timesteps [B, F]."""
    device = trajectory.device
    sizes = torch.tensor(block_sizes, device=device)
    states = indices.to(device).repeat_interleave(sizes, dim=1)
    samples = torch.arange(states.shape[0], device=device)[:, None]
    frames = torch.arange(states.shape[1], device=device)[None, :]
    levels = torch.tensor(timesteps, dtype=torch.promote_types(trajectory.dtype, torch.float32), device=device)
    return trajectory[samples, states, frames], levels[states]


def _check(trajectory: Tensor, timesteps: Sequence[float], indices: Tensor, block_sizes: Sequence[int]) -> None:
    if len(timesteps) != trajectory.shape[1]:
        raise ValueError(f"trajectory: {trajectory.shape[1]} states, but {len(timesteps)} timesteps {list(timesteps)}")
    falling = all(later < earlier for earlier, later in pairwise(timesteps))
    if timesteps[-1] != 0 or not falling:
        raise ValueError(f"timesteps: must fall strictly and end at 0, got {list(timesteps)}")
    if sum(block_sizes) != trajectory.shape[2]:
        raise ValueError(f"block_sizes: {list(block_sizes)} do not make {trajectory.shape[2]} frames")
    assert indices.shape == (trajectory.shape[0], len(block_sizes)), f"indices {tuple(indices.shape)}"
