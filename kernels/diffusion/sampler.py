"""Samplers of the flow ODE and of few-step students. None of them carries gradient.

The state is kept in fp32 or better while the network sees the dtype of the noise it was given.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from .schedule import MAX_TIMESTEP, Velocity, add_noise, timesteps, uniform_timesteps, velocity_to_clean

TIMESTEP_TOLERANCE = 1e-3  # two timesteps closer than this are the same noise level (sigma to 1e-6)


class FreshNoise(Protocol):
    """Noise for the `step`-th timestep of a few-step sampler, with shape, dtype and device of `like`.

    `step` counts the sampler's timesteps: 0 is the initial noise, so a sampler asks for 1 and above.
    """

    def __call__(self, step: int, like: Tensor, /) -> Tensor: ...


def euler_sample(velocity: Velocity, noise: Tensor, grid: Sequence[float]) -> Tensor:
    """Integrate the flow ODE by Euler steps along `grid` from `noise` [B, F, C, H, W]; the end, in its dtype.

    grid: strictly falling timesteps, `schedule.timesteps` for the whole way; `noise` is the state at grid[0].
    """
    *_, end = _euler_states(velocity, noise, grid)
    return end.to(noise.dtype)


def euler_trajectory(velocity: Velocity, noise: Tensor, grid: Sequence[float], record: Sequence[float]) -> Tensor:
    """The Euler path's states at the timesteps `record`: [K, B, F, C, H, W], noise to clean, fp32 or fp64.

    The training data of ODE initialisation (CausVid, arXiv 2412.07772, section 4.3): `record` holds the
    student's own timesteps and 0, strictly falling. Raises ValueError where `grid` does not hold one of
    them: a state of another noise level under the student's label trains the wrong map.
    """
    positions = _recorded_positions(grid, record)
    states = enumerate(_euler_states(velocity, noise, grid))
    return torch.stack([state for position, state in states if position in positions])


def recording_grid(record: Sequence[float], minimum_steps: int, shift: float) -> list[float]:
    """The shortest shifted grid of at least `minimum_steps` steps that holds every timestep of `record`.

    Searches up to twice `minimum_steps`; ValueError where none holds them, as with timesteps that were
    rounded or warped by another shift. 48 steps with shift 5 hold 1000, 937.5, 833.3, 625 and 0.
    """
    for steps in range(minimum_steps, 2 * minimum_steps + 1):
        grid = timesteps(steps, shift)
        if not _missing(grid, record):
            return grid
    raise ValueError(
        f"record: no grid of {minimum_steps} to {2 * minimum_steps} steps with shift {shift:g} holds "
        f"{_listed(record)}; {_nearest(timesteps(minimum_steps, shift), record)}"
    )


def few_step_sample(velocity: Velocity, noise: Tensor, timesteps: Sequence[float], fresh_noise: FreshNoise) -> Tensor:
    """Stochastic consistency sampling: predict x0, noise it again to the next timestep; the last x0.

    The sampler of a distilled student (CausVid, arXiv 2412.07772, Algorithm 2; consistency models, arXiv
    2303.01469, Algorithm 1). noise: [B, F, C, H, W], the state at timesteps[0]; timesteps: strictly falling,
    without 0.
    """
    _check_falling("timesteps", timesteps)
    if timesteps[-1] <= 0:
        raise ValueError(f"timesteps: a few-step list ends above 0, got {_listed(timesteps)}")
    state = clean = _at_least_fp32(noise)
    with torch.no_grad():
        for step, timestep in enumerate(timesteps):
            if step:
                state = add_noise(clean, fresh_noise(step, clean), uniform_timesteps(clean, timestep))
            levels = uniform_timesteps(state, timestep)
            clean = velocity_to_clean(velocity(state.to(noise.dtype), levels), state, levels)
    return clean.to(noise.dtype)


def _euler_states(velocity: Velocity, noise: Tensor, grid: Sequence[float]) -> Iterator[Tensor]:
    """The states at each timestep of the grid; on v itself, so nothing is divided by a small sigma."""
    _check_falling("grid", grid)
    state = _at_least_fp32(noise)
    yield state
    for here, there in pairwise(grid):
        with torch.no_grad():
            slope = velocity(state.to(noise.dtype), uniform_timesteps(state, here))
            state = state + (there - here) / MAX_TIMESTEP * slope.to(state.dtype)
        yield state


def _at_least_fp32(latents: Tensor) -> Tensor:
    return latents.to(torch.promote_types(latents.dtype, torch.float32))


def _recorded_positions(grid: Sequence[float], record: Sequence[float]) -> set[int]:
    _check_falling("record", record)
    if missing := _missing(grid, record):
        raise ValueError(f"record: the grid does not hold {_listed(missing)}; {_nearest(grid, missing)}")
    return {min(range(len(grid)), key=lambda position: abs(grid[position] - wanted)) for wanted in record}


def _missing(grid: Sequence[float], record: Sequence[float]) -> list[float]:
    return [wanted for wanted in record if min(abs(held - wanted) for held in grid) > TIMESTEP_TOLERANCE]


def _nearest(grid: Sequence[float], wanted: Sequence[float]) -> str:
    return "nearest grid values: " + _listed([min(grid, key=lambda held: abs(held - one)) for one in wanted])


def _listed(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.7g}" for value in values) + "]"


def _check_falling(name: str, values: Sequence[float]) -> None:
    inside = len(values) > 0 and values[-1] >= 0 and values[0] <= MAX_TIMESTEP
    if not inside or any(later >= earlier for earlier, later in pairwise(values)):
        raise ValueError(f"{name}: timesteps must fall strictly within [0, 1000], got {_listed(values)}")
