"""Wan's 3-D rotary angles: time, height and width turn their own share of a head's channels."""

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0


def frequencies(channels: int) -> Tensor:
    """Angles per unit of position, float64 [channels / 2]: theta^(-2j / channels)."""
    return THETA ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def rotary_table(
    positions: Tensor, height: int, width: int, dims: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 [F · height · width, K/2], of a video's tokens (frame-major, then rows).

    positions: [F] float64 on the CPU, in latent frames. There is no table to run out of: angles are
    computed in float64 and only their cosines are rounded, so a position may be as large as a stream is long.
    dims: channels that turn with time, height, width (Wan2.1, arXiv 2503.20314; 44, 42, 42 of 128).
    """
    return _table(tuple(positions.tolist()), height, width, dims, device)


@lru_cache(maxsize=64)
def _table(
    positions: tuple[float, ...], height: int, width: int, dims: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    axes = (torch.tensor(positions, dtype=torch.float64), torch.arange(height), torch.arange(width))
    time, row, column = (torch.outer(axis.double(), frequencies(dim)) for axis, dim in zip(axes, dims, strict=True))
    shape = (len(positions), height, width)
    angles = torch.cat(
        (
            time[:, None, None].expand(*shape, -1),
            row[None, :, None].expand(*shape, -1),
            column[None, None, :].expand(*shape, -1),
        ),
        dim=-1,
    ).flatten(0, 2)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def time_shift_table(frames: float, dims: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each [1, K/2], of the turn that moves a rotated key by `frames` along time."""
    time = frequencies(dims[0]) * frames
    still = torch.zeros((dims[1] + dims[2]) // 2, dtype=torch.float64)
    angles = torch.cat((time, still))[None]
    return angles.cos().float().to(device), angles.sin().float().to(device)
