"""Flow matching (arXiv 2210.02747, 2209.03003): regress the velocity eps - x0."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion.schedule import Velocity, add_noise


class FlowMatching(NamedTuple):
    """loss: scalar; frame_error: [B, F], the unweighted mean squared error per frame, detached."""

    loss: Tensor
    frame_error: Tensor


def flow_matching_loss(
    velocity: Velocity, clean: Tensor, noise: Tensor, timesteps: Tensor, weight: Tensor | None = None
) -> FlowMatching:
    """Mean of (v - (eps - x0))^2 over `clean` [B, F, C, H, W] at `timesteps` [B, F], in fp32 or better.

    weight: [B, F], multiplies each frame's error; it is taken as it is, not normalised.
    """
    prediction = velocity(add_noise(clean, noise, timesteps), timesteps)
    dtype = torch.promote_types(clean.dtype, torch.float32)
    error = prediction.to(dtype) - (noise.to(dtype) - clean.to(dtype))
    frame_error = error.square().mean(dim=(2, 3, 4))
    weighted = frame_error if weight is None else weight * frame_error
    return FlowMatching(weighted.mean(), frame_error.detach())
