"""What a training needs of a device's memory: exact for weights and states, an estimate for activations."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels.wan.config import TransformerConfig
from ..kernels.wan.cost import kv_bytes, weight_bytes

MOMENTS = 2  # of AdamW
# Tensors of a block that autograd keeps, per token: of the model's width, in the computing precision and in float32,
# and of the feed-forward's width. Counted on the block as it is written: norms and modulation are in float32.
WIDE_COMPUTED, WIDE_EXACT, HIDDEN = 14, 9, 2


@dataclass(frozen=True)
class TrainedNetwork:
    """One network of a training. averages: keeps a moving average. trained: has gradients and an optimiser."""

    name: str
    config: TransformerConfig
    trained: bool = True
    averages: bool = False

    def lines(self) -> list[tuple[str, int]]:
        """What its weights need: (name, bytes); all in float32."""
        weights = weight_bytes(self.config, torch.float32)
        found = [(f"{self.name}: weights", weights)]
        if self.trained:
            found += [(f"{self.name}: gradients", weights), (f"{self.name}: optimiser", MOMENTS * weights)]
        if self.averages:
            found.append((f"{self.name}: average", weights))
        return found


@dataclass(frozen=True)
class TrainedClips:
    """What goes through a network at once. cached_frames: of a KV cache beside it, 0 for none."""

    batch: int
    frames: int
    tokens: int
    checkpointing: bool
    cached_frames: int = 0

    def activations(self, config: TransformerConfig, computed: torch.dtype = torch.bfloat16) -> int:
        """Bytes that autograd keeps of one pass: of all blocks, or of their inputs and of one block recomputed."""
        tokens = self.batch * self.frames * self.tokens
        wide = WIDE_COMPUTED * computed.itemsize + WIDE_EXACT * torch.float32.itemsize
        block = tokens * (config.dim * wide + HIDDEN * config.ffn_dim * computed.itemsize)
        if not self.checkpointing:
            return config.num_layers * block
        return config.num_layers * tokens * config.dim * torch.float32.itemsize + block

    def cache(self, config: TransformerConfig, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the KV cache."""
        return kv_bytes(config, self.cached_frames, self.tokens, dtype, self.batch)


def memory_lines(networks: Sequence[TrainedNetwork], clips: TrainedClips) -> list[str]:
    """A table in text: what one device holds with the plain engine, line by line and in all."""
    parts = [line for network in networks for line in network.lines()]
    largest = max((network.config for network in networks if network.trained), key=clips.activations)
    parts.append(("activations (estimate)", clips.activations(largest)))
    if clips.cached_frames:
        parts.append(("KV cache", clips.cache(networks[0].config)))
    parts.append(("in all, without text encoder and VAE", sum(size for _, size in parts)))
    width = max(len(name) for name, _ in parts)
    return [f"{name:<{width}}  {size / 2**30:9.3f} GiB" for name, size in parts]
