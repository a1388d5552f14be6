"""FlexAttention for masks of latent frames: one compiled kernel that skips the tiles nobody looks at.

The mask is a function of token indices over a small table of frames, so no [L, L] tensor is ever made, and
the sequence needs no padding: the kernel handles a last tile that is not full.

Source: FlexAttention, arXiv 2412.05496.
Shape suffixes: B batch, F latent frames, N tokens of a frame, L tokens, H heads, K head channels.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from . import dispatch

TILE = 128  # tokens on a side of what the kernel computes or skips
HEAD_SIZES = (16, 32, 64, 128)


def runs_compiled(query: Tensor) -> bool:
    """Whether the compiled kernel is to be used for these queries [B, L, H, K]."""
    covered = query.is_cuda and query.shape[-1] in HEAD_SIZES and query.dtype in dispatch.KERNEL_DTYPES
    return covered and dispatch.kernels_gap(query.device) is None


@cache
def compiled() -> Callable[..., Tensor]:
    """`flex_attention` as one fused kernel. Un-compiled it materialises every score: for tests alone."""
    return torch.compile(flex_attention)


def attention(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, kernel: Callable[..., Tensor]
) -> Tensor:
    """Masked attention: query, key and value [B, L, H, K] to [B, L, H, K]; `kernel` is `compiled()`."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return kernel(query, key, value, block_mask=block_mask).transpose(1, 2)


def frame_block_mask(allowed: Tensor, tokens_per_frame: int, device: torch.device) -> BlockMask:
    """The mask of a table of frames, bool [F, F] (True: the row's frame sees the column's), for F · N tokens.

    Which tiles are empty or full follows from the table alone: its sums over the frames that a tile touches.
    """
    table = allowed.to(device)
    length = len(allowed) * tokens_per_frame

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return table[row // tokens_per_frame, column // tokens_per_frame]

    some, every = _tiles(allowed, tokens_per_frame)
    partial_counts, partial_columns = _ordered(some & ~every, device)
    full_counts, full_columns = _ordered(every, device)
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_columns,
        full_counts,
        full_columns,
        BLOCK_SIZE=TILE,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _tiles(allowed: Tensor, tokens_per_frame: int) -> tuple[Tensor, Tensor]:
    """Which tiles hold a pair that may look, and which hold nothing else: bool [tiles, tiles] each."""
    length = len(allowed) * tokens_per_frame
    starts = torch.arange(0, length, TILE)
    first = starts // tokens_per_frame
    end = (torch.clamp(starts + TILE, max=length) - 1) // tokens_per_frame + 1
    sums = torch.nn.functional.pad(allowed.long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    pairs = sums[end][:, end] - sums[first][:, end] - sums[end][:, first] + sums[first][:, first]
    whole = starts + TILE <= length  # the kernel must still mask the end of the sequence in the last tile
    touched = (end - first)[:, None] * (end - first)[None]
    return pairs > 0, (pairs == touched) & whole[:, None] & whole[None]


def _ordered(tiles: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per row of tiles, how many columns count, and all columns, those first: [1, 1, R] and [1, 1, R, C]."""
    counts, columns = tiles.sum(1), tiles.int().argsort(dim=1, descending=True, stable=True)
    return counts[None, None].to(device, torch.int32), columns[None, None].to(device, torch.int32)
