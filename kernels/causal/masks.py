"""Which latent frame may look at which: every mask of causal video diffusion, as a table of frames.

Tokens of one frame always see the same frames, so a mask is a boolean table [F, F] (True: the row's frame may
look at the column's) plus the rotary position of each frame. Sources: block-causal, CausVid (arXiv 2412.07772)
section 4.1; window and sink, LongLive (arXiv 2509.22622) section 3; teacher forcing, Self-Forcing
(arXiv 2506.08009) section 3.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..ops import dispatch as ops
from ..ops import flex


@dataclass(frozen=True, eq=False)
class FrameMask:
    """An attention pattern of one parallel pass. allowed: bool [F, F]; frame_positions: float64 [F]. On the CPU."""

    allowed: Tensor
    frame_positions: Tensor

    def positions(self, frames: int) -> Tensor:
        if frames != len(self.frame_positions):
            raise ValueError(f"mask: made for {len(self.frame_positions)} latent frames, got {frames}")
        return self.frame_positions

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Masked self-attention: compiled FlexAttention where it runs, dense attention in groups elsewhere."""
        if len(self.groups) > 1 and flex.runs_compiled(query):
            block_mask = self.block_mask(query.shape[1] // len(self.allowed), query.device)
            return flex.attention(query, key, value, block_mask, flex.compiled())
        return self.attend_in_groups(query, key, value)

    def attend_in_groups(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Masked attention without a mask: frames with equal rows attend together to just their frames."""
        frames = len(self.allowed)
        queries, keys, values = (tensor.unflatten(1, (frames, -1)) for tensor in (query, key, value))
        outputs = []
        for rows, columns in self.groups:
            seen = (keys[:, columns].flatten(1, 2), values[:, columns].flatten(1, 2))
            outputs.append(ops.attention(queries[:, rows].flatten(1, 2), *seen))
        return torch.cat(outputs, dim=1)

    @cached_property
    def groups(self) -> list[tuple[slice, slice | Tensor]]:
        """Runs of consecutive frames that see the same frames: (their rows, what they see)."""
        changes = (self.allowed[1:] != self.allowed[:-1]).any(dim=1).nonzero().flatten() + 1
        edges = [0, *changes.tolist(), len(self.allowed)]
        return [(slice(start, stop), _columns(self.allowed[start])) for start, stop in pairwise(edges)]

    def block_mask(self, tokens_per_frame: int, device: torch.device) -> BlockMask:
        """The mask for FlexAttention, made once for each number of tokens per frame and device."""
        key = (tokens_per_frame, device)
        if key not in self._block_masks:
            self._block_masks[key] = flex.frame_block_mask(self.allowed, tokens_per_frame, device)
        return self._block_masks[key]

    @cached_property
    def _block_masks(self) -> dict[tuple[int, torch.device], BlockMask]:
        return {}

    def tokens(self, tokens_per_frame: int) -> Tensor:
        """The mask token by token: bool [L, L]."""
        return self.allowed.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)


def _columns(row: Tensor) -> slice | Tensor:
    """The frames that a row sees; a slice where they stand side by side (no copy)."""
    seen = row.nonzero().flatten()
    first, last = int(seen[0]), int(seen[-1])
    return slice(first, last + 1) if last + 1 - first == len(seen) else seen


def block_sizes(frames: int, block: int, first_block: int | None = None) -> list[int]:
    """Latent frames of each block. `first_block` (for example 1: an independent first frame) defaults to `block`."""
    first = block if first_block is None else first_block
    if block < 1 or first < 1:
        raise ValueError(f"block: at least 1 latent frame, got block {block}, first block {first}")
    if frames < first or (frames - first) % block:
        raise ValueError(f"frames: {frames} latent frames are not {first} and then whole blocks of {block}")
    return [first] + [block] * ((frames - first) // block)


def block_causal(
    frames: int, block: int, *, first_block: int | None = None, window: int | None = None, sink: int = 0
) -> FrameMask:
    """Each block sees itself and earlier blocks.

    window: latent frames that a block sees in all, its own and the sink's included; None is no limit.
    sink: first frames of the video that are always seen. The positions are the frames' own: a KV cache moves
    its sink along with its window, so only a mask without a gap (no sink, or a window as long as the video)
    computes what the cache computes.
    """
    sizes = block_sizes(frames, block, first_block)
    ends = torch.tensor(sizes).cumsum(0).repeat_interleave(torch.tensor(sizes))[:, None]
    column = torch.arange(frames)[None]
    allowed = column < ends
    if window is not None:
        check_window(window, sink, max(sizes))
        allowed &= (column >= ends - (window - sink)) | (column < sink)
    return FrameMask(allowed, torch.arange(frames, dtype=torch.float64))


def teacher_forcing(frames: int, block: int, *, first_block: int | None = None) -> FrameMask:
    """For a pass over [clean frames | noisy frames], both halves at the same positions.

    Clean blocks are block-causal among themselves; a noisy block sees the clean blocks before it and itself.
    """
    sizes = block_sizes(frames, block, first_block)
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    row, column = index[:, None], index[None]
    nothing = torch.zeros(frames, frames, dtype=torch.bool)
    clean = torch.cat((column <= row, nothing), dim=1)
    noisy = torch.cat((column < row, column == row), dim=1)
    return FrameMask(torch.cat((clean, noisy)), torch.arange(frames, dtype=torch.float64).repeat(2))


def bidirectional(frames: int) -> FrameMask:
    """Every frame sees every frame."""
    return FrameMask(torch.ones(frames, frames, dtype=torch.bool), torch.arange(frames, dtype=torch.float64))


def check_window(window: int, sink: int, block: int) -> None:
    """ValueError unless the window holds the sink and one block."""
    if sink < 0 or window < sink + block:
        raise ValueError(f"window: must hold the sink ({sink}) and a block ({block}), got {window} latent frames")
