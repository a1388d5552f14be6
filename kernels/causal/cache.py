"""The KV cache of one batch of streams: a sink, a sliding window, and positions that never run out.

Buffers are allocated once, [layers, B, slots, N, H, K], where a slot holds one latent frame. Frames are written
once and never moved: attention does not care about the order of its keys, so when the window is full a new block
takes the slots of the oldest frames. Keys are stored rotated at their absolute position. Rotary attention sees
only differences of positions, so window keys stay right for ever; the sink, which must stay next to a window that
moves away from it, is turned along from its first copy (never from a turned one, so no error adds up).

Sources: rolling cache, Self-Forcing (arXiv 2506.08009) section 3.4; sink and window, LongLive (arXiv 2509.22622)
section 3; positions relative to the window, Infinity-RoPE (arXiv 2511.20649).

Shape suffixes: B batch, F latent frames, N tokens of a frame, L tokens, H heads, K head channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import dispatch as ops
from ..wan.config import TransformerConfig
from ..wan.rotary import time_shift_table
from .masks import check_window


@dataclass(frozen=True)
class CacheShape:
    """What a cache holds. window: latent frames that a block attends to, its own and the sink's included."""

    config: TransformerConfig
    batch: int
    height: int  # of a latent frame, before patches
    width: int
    window: int
    sink: int
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        check_window(self.window, self.sink, 1)

    @property
    def buffer(self) -> tuple[int, int, int, int, int, int]:
        """Shape of the keys, and of the values: [layers, B, slots, N, H, K]."""
        tokens = self.config.tokens_per_frame(self.height, self.width)
        heads, channels = self.config.num_attention_heads, self.config.attention_head_dim
        return self.config.num_layers, self.batch, self.window, tokens, heads, channels

    def bytes(self) -> int:
        """Memory of the keys, the values and the sink's first copy, known before anything is allocated."""
        layers, batch, window, tokens, heads, channels = self.buffer
        return layers * batch * (2 * window + self.sink) * tokens * heads * channels * self.dtype.itemsize


class KVCache:
    """Keys and values of the clean latent frames that the next block may look at.

    Use: `block = cache.open(frames)`, forward passes with `attention=block`, a last pass on the clean latents,
    `block.commit()`. Under gradient use `block.frozen()` for the passes that carry gradient.
    """

    def __init__(self, shape: CacheShape, device: torch.device | str = "cpu") -> None:
        self.shape = shape
        self.keys = torch.zeros(shape.buffer, dtype=shape.dtype, device=device)
        self.values = torch.zeros(shape.buffer, dtype=shape.dtype, device=device)
        self.sink_keys = self.keys[:, :, : shape.sink].clone()
        self.next_position = 0
        self.slots: list[int] = []  # slot of each held frame, oldest first
        self.frame_positions: list[int] = []  # its position in the stream, which for the sink is where it was written
        self._shared = False  # a frozen block reads the buffers: copy before overwriting

    def __len__(self) -> int:
        """Latent frames that the next block could look at now."""
        return len(self.slots)

    def open(self, frames: int) -> "OpenBlock":
        """Make room for the next block of `frames` latent frames. A block that was open is dropped."""
        check_window(self.shape.window, self.shape.sink, frames)
        self._evict(len(self) + frames - self.shape.window)
        self._turn_sink()
        free = sorted(set(range(self.shape.window)) - set(self.slots))
        return OpenBlock(self, free[:frames])

    def reset(self, position: int = 0) -> None:
        """Forget every frame; the next one stands at `position`."""
        self._own_buffers()
        self.slots, self.frame_positions, self.next_position = [], [], position

    def state_dict(self) -> dict[str, Tensor]:
        """All that the stream needs to go on, ready for safetensors."""
        return {
            "keys": self.keys[:, :, self.slots],
            "values": self.values[:, :, self.slots],
            "sink_keys": self.sink_keys[:, :, : len(self)].contiguous(),
            "slots": torch.tensor(self.slots, dtype=torch.int64),
            "frame_positions": torch.tensor(self.frame_positions, dtype=torch.int64),
            "next_position": torch.tensor([self.next_position]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict` of a cache of the same shape; ValueError names what differs."""
        slots = state["slots"].tolist()
        layers, batch, window, *rest = self.shape.buffer
        expected = (layers, batch, len(slots), *rest)
        if tuple(state["keys"].shape) != expected or any(slot >= window for slot in slots):
            raise ValueError(f"KV cache: expected keys {expected} in {window} slots, got {tuple(state['keys'].shape)}")
        self._own_buffers()
        self.keys[:, :, slots] = state["keys"].to(self.keys)
        self.values[:, :, slots] = state["values"].to(self.values)
        self.sink_keys[:, :, : state["sink_keys"].shape[2]] = state["sink_keys"].to(self.keys)
        self.slots, self.frame_positions = slots, state["frame_positions"].tolist()
        self.next_position = int(state["next_position"])

    def _commit(self, slots: list[int]) -> None:
        first = self.next_position
        for index, slot in enumerate(slots):
            if len(self) < self.shape.sink:
                self.sink_keys[:, :, len(self)] = self.keys[:, :, slot]
            self.slots.append(slot)
            self.frame_positions.append(first + index)
        self.next_position += len(slots)

    def _evict(self, count: int) -> None:
        if count > 0:
            self._own_buffers()
            sink = self.shape.sink
            del self.slots[sink : sink + count], self.frame_positions[sink : sink + count]

    def _turn_sink(self) -> None:
        """Place the sink right before the oldest frame of the window."""
        sink = min(self.shape.sink, len(self))
        oldest = self.frame_positions[sink] if len(self) > sink else self.next_position
        gap = oldest - 1 - self.frame_positions[sink - 1] if sink else 0
        if gap:
            dims = self.shape.config.rotary_dims
            cos, sin = time_shift_table(gap, dims, self.keys.device)
            self.keys[:, :, self.slots[:sink]] = ops.rotate(self.sink_keys[:, :, :sink], cos, sin)

    def _own_buffers(self) -> None:
        if self._shared:
            self.keys, self.values, self._shared = self.keys.clone(), self.values.clone(), False


class OpenBlock:
    """The attention pattern of the block that is being made: the cache's frames and itself.

    Passes without gradient write the block's keys and values into its own slots, over and over; `commit` makes
    what the last pass wrote part of the past.
    """

    def __init__(self, cache: KVCache, slots: list[int]) -> None:
        self._cache = cache
        self._slots = slots
        contiguous = slots == list(range(slots[0], slots[0] + len(slots)))
        self._target = slice(slots[0], slots[0] + len(slots)) if contiguous else slots
        self._used = len(cache) + len(slots)  # free slots are reused from the front: what is in use is a prefix

    def positions(self, frames: int) -> Tensor:
        if frames != len(self._slots):
            raise ValueError(f"KV cache: the open block has {len(self._slots)} latent frames, got {frames}")
        first = self._cache.next_position
        return torch.arange(first, first + frames, dtype=torch.float64)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert not (torch.is_grad_enabled() and key.requires_grad), "a pass under gradient reads a frozen() block"
        frames = len(self._slots)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[:, self._target] = key.unflatten(1, (frames, -1)).to(keys.dtype)
        values[:, self._target] = value.unflatten(1, (frames, -1)).to(values.dtype)
        seen = (tensor[:, : self._used].flatten(1, 2).to(query.dtype) for tensor in (keys, values))
        return ops.attention(query, *seen)

    def frozen(self) -> "FrozenBlock":
        """The same pattern for passes under gradient: reads the past as it is now, writes nothing."""
        self._cache._shared = True
        return FrozenBlock(self._cache, self.positions(len(self._slots)))

    def commit(self) -> None:
        """Keep what the last pass wrote. That pass must have been the one on the clean latents."""
        self._cache._commit(self._slots)


class FrozenBlock:
    """A functional view of the cache: later writes do not reach it, so backward may run (or recompute) any time."""

    def __init__(self, cache: KVCache, positions: Tensor) -> None:
        self._keys, self._values = cache.keys, cache.values
        self._slots = list(cache.slots)
        self._positions = positions

    def positions(self, frames: int) -> Tensor:
        assert frames == len(self._positions)
        return self._positions

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        past = (tensor[layer][:, self._slots].flatten(1, 2).to(query.dtype) for tensor in (self._keys, self._values))
        keys, values = (torch.cat(pair, dim=1) for pair in zip(past, (key, value), strict=True))
        return ops.attention(query, keys, values)
