"""Classifier-free guidance (arXiv 2207.12598), always v = v_u + w (v_c - v_u): w = 1 is unguided."""

import torch
from torch import Tensor

from .schedule import Velocity


def guided(velocities: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Combine (conditional, unconditional) velocities with the standard scale w; fp32 or better.

    The same on x0 predictions, which are linear in v at a given x_t.
    """
    conditional, unconditional = (
        velocity.to(torch.promote_types(velocity.dtype, torch.float32)) for velocity in velocities
    )
    return unconditional + scale * (conditional - unconditional)


def from_plus_form(scale: float) -> float:
    """The standard w = 1 + s of a scale s that is written v_c + s (v_c - v_u).

    The DMD configurations of CausVid (s = 3.5) and Self-Forcing (s = 3.0) are in this form; the scale of
    their ODE sampling (6.0) is already standard.
    """
    return 1.0 + scale


def guided_velocity(both: Velocity, scale: float) -> Velocity:
    """A guided network from one that is bound to 2B contexts: B conditional ones, then B unconditional ones.

    Each call makes one pass over the doubled batch.
    """

    def velocity(latents: Tensor, timesteps: Tensor) -> Tensor:
        doubled = both(torch.cat((latents, latents)), torch.cat((timesteps, timesteps)))
        conditional, unconditional = doubled.chunk(2)
        return guided((conditional, unconditional), scale)

    return velocity
