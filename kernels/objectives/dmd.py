"""Distribution matching distillation (arXiv 2311.18828, 2405.14867) of clips (CausVid, arXiv 2412.07772)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion.schedule import Velocity, add_noise, velocity_to_clean
from .flow_matching import FlowMatching, flow_matching_loss

LATENT_AXES = (1, 2, 3, 4)


class DmdGenerator(NamedTuple):
    """The generator's loss and, detached, what its gradient was made of.

    loss: scalar, whose value says little; its gradient is the method.
    gradient: [B, F, C, H, W], (fake_x0 - real_x0) / normaliser, non-finite elements set to 0.
    normaliser: [B], mean |x - real_x0|.
    non_finite: how many elements of the gradient were not finite; a training must watch it.
    """

    loss: Tensor
    gradient: Tensor
    normaliser: Tensor
    non_finite: Tensor


def dmd_generator_loss(
    clean: Tensor,
    real_velocity: Velocity,
    fake_velocity: Velocity,
    timesteps: Tensor,
    noise: Tensor,
    frame_mask: Tensor | None = None,
) -> DmdGenerator:
    """A loss whose gradient with respect to `clean` is (fake_x0 - real_x0) / mean|x - real_x0| / numel.

    CausVid, arXiv 2412.07772, section 4.2; the normaliser is DMD's (arXiv 2311.18828, section 3.2), one
    scalar per sample over all of its frames. Per element, gradient * normaliser is sigma^2 / (1 - sigma)^2
    times the path-wise gradient of KL(fake || real) at that noise level.

    clean: [B, F, C, H, W], the student's x0, with gradient. real_velocity: the teacher, guidance already
    applied; fake_velocity: the critic. timesteps: [B], one per clip, above 0: both score networks are
    bidirectional and know a clip at one noise level only. frame_mask: [B, F], true where a frame is
    trained; numel counts these only, and with none the loss is 0 with a zero gradient.
    """
    assert timesteps.shape == clean.shape[:1], f"timesteps {tuple(timesteps.shape)}: one per clip is needed"
    exact = clean.double()
    gradient, normaliser = _score_difference(
        exact.detach(), clean.dtype, real_velocity, fake_velocity, timesteps, noise
    )
    non_finite = (~gradient.isfinite()).sum()
    gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
    half_square = 0.5 * (exact - (exact - gradient).detach()).square()
    if frame_mask is None:
        loss = half_square.mean()
    else:
        frames = half_square.mean(dim=(2, 3, 4)) * frame_mask
        loss = frames.sum() / frame_mask.sum().clamp(min=1)
    return DmdGenerator(loss, gradient, normaliser, non_finite)


def dmd_critic_loss(fake_velocity: Velocity, clean: Tensor, timesteps: Tensor, noise: Tensor) -> FlowMatching:
    """Flow matching of the critic on the student's samples `clean` [B, F, C, H, W], which get no gradient.

    On the raw velocity, so that small timesteps do not amplify rounding. timesteps: [B], one per clip.
    """
    assert timesteps.shape == clean.shape[:1], f"timesteps {tuple(timesteps.shape)}: one per clip is needed"
    return flow_matching_loss(fake_velocity, clean.detach(), noise, _per_frame(timesteps, clean))


def _score_difference(
    clean: Tensor,
    network_dtype: torch.dtype,
    real_velocity: Velocity,
    fake_velocity: Velocity,
    timesteps: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """(fake_x0 - real_x0) / normaliser [B, F, C, H, W] and the normaliser [B], in the dtype of `clean`."""
    with torch.no_grad():
        levels = _per_frame(timesteps, clean)
        noisy = add_noise(clean, noise, levels).to(network_dtype)
        exact = noisy.to(clean.dtype)
        real = velocity_to_clean(real_velocity(noisy, levels), exact, levels)
        fake = velocity_to_clean(fake_velocity(noisy, levels), exact, levels)
        normaliser = (clean - real).abs().mean(dim=LATENT_AXES)
        return (fake - real) / normaliser.reshape(-1, 1, 1, 1, 1), normaliser


def _per_frame(timesteps: Tensor, latents: Tensor) -> Tensor:
    return timesteps.to(latents.device)[:, None].expand(latents.shape[:2])
