"""Self-Forcing (arXiv 2506.08009): the student makes a clip on its own context, with a truncated gradient."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..diffusion.schedule import add_noise, uniform_timesteps, velocity_to_clean


class BlockModel(Protocol):
    """A causal student with its text bound and the context of the stream so far, one block at a time.

    Under gradient the context must be functional: `write_context` leaves what earlier `denoise` calls read
    as it was, evictions included, because gradient checkpointing runs those calls again during backward.
    What is kept of a clean block is detached.
    """

    def denoise(self, noisy: Tensor, timesteps: Tensor, /) -> Tensor:
        """Velocity [B, f, C, H, W] of the next block at `timesteps` [B, f] on the context; keeps nothing.

        Whether it carries gradient is the ambient gradient mode.
        """
        ...

    def write_context(self, clean: Tensor, /) -> None:
        """Pass the block's clean latents [B, f, C, H, W] at t = 0, append them to the context and move on."""
        ...


class Rollout(NamedTuple):
    """clean: [B, F, C, H, W], x0 at the exit step; exit_timestep: the level it was predicted from."""

    clean: Tensor
    exit_timestep: float


def draw_exit_step(steps: int, generator: torch.Generator) -> int:
    """A uniform exit step; one draw serves all blocks and must be the same on all ranks."""
    return int(torch.randint(steps, (), generator=generator))


def rollout(
    model: BlockModel,
    noise: Tensor,
    timesteps: Sequence[float],
    exit_step: int,
    block_sizes: Sequence[int],
    gradient_from: int = 0,
) -> Rollout:
    """Make a clip block by block on the student's own output (Self-Forcing, arXiv 2506.08009, Algorithm 1).

    Every block walks the few-step sampler up to `exit_step`, without gradient before it and with gradient
    at it; the x0 predicted there is the block's output. Then the block enters the context at t = 0,
    detached and without gradient, the last one too, so that a stream can go on. The gradient of a block's
    frames thus reaches exactly one forward pass.

    noise: [K, B, F, C, H, W], K > exit_step: noise[0] is the initial noise, noise[k] is what x0 is mixed
    with for timesteps[k]; its dtype is that of all states: pass fp32, whatever the network computes in.
    timesteps: the student's, strictly falling, without 0. block_sizes: frames per block. gradient_from:
    blocks that begin before this frame carry no gradient (long rollouts train their last frames); 0 trains
    all.
    """
    _check(noise, timesteps, exit_step, block_sizes)
    levels = timesteps[: exit_step + 1]
    blocks, first = [], 0
    for size in block_sizes:
        block_noise = noise[:, :, first : first + size]
        clean = _denoise_block(model, block_noise, levels, with_gradient=first >= gradient_from)
        with torch.no_grad():
            model.write_context(clean.detach())
        blocks.append(clean)
        first += size
    return Rollout(torch.cat(blocks, dim=1), levels[-1])


def _denoise_block(model: BlockModel, noise: Tensor, levels: Sequence[float], with_gradient: bool) -> Tensor:
    """x0 [B, f, C, H, W] predicted at the last of `levels`; `noise` [K, B, f, C, H, W]."""
    with_gradient = with_gradient and torch.is_grad_enabled()
    noisy = noise[0]
    with torch.no_grad():
        for step, level in enumerate(levels[:-1]):
            clean = _predict_clean(model, noisy, level)
            noisy = add_noise(clean, noise[step + 1], uniform_timesteps(noisy, levels[step + 1]))
    with torch.set_grad_enabled(with_gradient):
        return _predict_clean(model, noisy, levels[-1])


def _predict_clean(model: BlockModel, noisy: Tensor, level: float) -> Tensor:
    timesteps = uniform_timesteps(noisy, level)
    return velocity_to_clean(model.denoise(noisy, timesteps), noisy, timesteps)


def _check(noise: Tensor, timesteps: Sequence[float], exit_step: int, block_sizes: Sequence[int]) -> None:
    if not 0 <= exit_step < len(timesteps):
        raise ValueError(f"exit_step: must be one of the {len(timesteps)} steps, got {exit_step}")
    if timesteps[exit_step] <= 0:
        raise ValueError(f"timesteps: the student's list has no 0, got {list(timesteps)}")
    if sum(block_sizes) != noise.shape[2]:
        raise ValueError(f"block_sizes: {list(block_sizes)} do not make {noise.shape[2]} frames")
    assert noise.shape[0] > exit_step, f"noise for {noise.shape[0]} steps, exit at step {exit_step}"
