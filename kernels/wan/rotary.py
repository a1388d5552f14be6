"""Wan's 3-D rotary angles: time, height and width turn their own share of a head's channels."""

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0
TABLES_KEPT = 8  # the passes of a block share one, and a stream never comes back to one


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


@lru_cache(maxsize=TABLES_KEPT)
def _table(
    positions: tuple[float, ...], height: int, width: int, dims: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.tensor(positions, dtype=torch.float64), frequencies(dims[0]))
    in_time = (angles.cos().float().to(device), angles.sin().float().to(device))
    cos, sin = (
        torch.cat((part[:, None].expand(-1, len(still), -1), still.expand(len(part), -1, -1)), dim=-1).flatten(0, 1)
        for part, still in zip(in_time, _frame_table(height, width, dims, device), strict=True)
    )
    return cos, sin


@lru_cache(maxsize=TABLES_KEPT)
def _frame_table(height: int, width: int, dims: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the turns by row and column, each [height · width, K_hw / 2]: the same in every frame."""
    axes = zip((torch.arange(height), torch.arange(width)), dims[1:], strict=True)
    row, column = (torch.outer(axis.double(), frequencies(dim)) for axis, dim in axes)
    parts = (row[:, None].expand(-1, width, -1), column[None].expand(height, -1, -1))
    angles = torch.cat(parts, dim=-1).flatten(0, 1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def time_shift_table(frames: float, dims: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each [1, K/2], of the turn that moves a rotated key by `frames` along time."""
    time = frequencies(dims[0]) * frames
    still = torch.zeros((dims[1] + dims[2]) // 2, dtype=torch.float64)
    angles = torch.cat((time, still))[None]
    return angles.cos().float().to(device), angles.sin().float().to(device)
