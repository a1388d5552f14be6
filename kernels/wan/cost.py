"""What a pass of the transformer must compute and move, in closed form, and what the VAE's decoder must.

FLOPs are those of matrix products, two per multiply-add; norms, activations and softmax are left out. Bytes
are those that no implementation gets around: weights, and keys and values. Both are lower bounds, so together
with a device's peak they give the time that a pass cannot beat (roofline, Williams et al. 2009, CACM 52(4)).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .config import TransformerConfig
from .tensors import expected_shapes

if TYPE_CHECKING:
    from .vae import StreamingVAE

TEXT_SIDE = ("text_embedder.", "attn2.to_k.", "attn2.to_v.", "attn2.norm_k.")
BLOCK_LINEARS = (
    ".to_q.weight",
    ".to_k.weight",
    ".to_v.weight",
    ".to_out.0.weight",
    ".proj.weight",
    ".net.2.weight",
)


@dataclass(frozen=True)
class ForwardShape:
    """Sizes of one forward pass whose cross-attention keys are at hand.

    frames: latent frames that go through. tokens: of one latent frame. text_rows: rows of the text context.
    context: cached latent frames that self-attention reads besides the pass's own.
    """

    frames: int
    tokens: int
    text_rows: int
    context: int = 0
    batch: int = 1

    @property
    def queries(self) -> int:
        """Tokens of the whole batch."""
        return self.batch * self.frames * self.tokens

    @property
    def keys(self) -> int:
        """Keys that a token attends to in self-attention."""
        return (self.context + self.frames) * self.tokens


@dataclass(frozen=True)
class ForwardFlops:
    """Matrix-product FLOPs of a pass, by what a lower precision reaches.

    block_linears: the linear layers of the blocks. attention: both products of self- and cross-attention.
    edges: patch embedding, time embedding and output head.
    """

    block_linears: int
    attention: int
    edges: int

    @property
    def total(self) -> int:
        return self.block_linears + self.attention + self.edges


def forward_flops(config: TransformerConfig, shape: ForwardShape) -> ForwardFlops:
    """FLOPs of a forward pass with given text keys."""
    dim, queries = config.dim, shape.queries
    # Six maps of dim x dim: q, k, v and output of self-attention, q and output of cross-attention.
    linears = 2 * queries * (6 * dim * dim + 2 * dim * config.ffn_dim)
    attention = 4 * queries * dim * (shape.keys + shape.text_rows)
    patch = math.prod(config.patch_size)
    per_token = 2 * dim * patch * (config.in_channels + config.out_channels)
    per_frame = 2 * dim * (config.freq_dim + dim + 6 * dim)
    edges = queries * per_token + shape.batch * shape.frames * per_frame
    return ForwardFlops(config.num_layers * linears, config.num_layers * attention, edges)


def text_flops(config: TransformerConfig, rows: int, batch: int = 1) -> int:
    """FLOPs of the cross-attention keys and values of a prompt (`VideoTransformer.text_keys`)."""
    embedder = 2 * config.dim * (config.text_dim + config.dim)
    return batch * rows * (embedder + config.num_layers * 4 * config.dim**2)


def weight_bytes(config: TransformerConfig, dtype: torch.dtype, linear_dtype: torch.dtype | None = None) -> int:
    """Memory of all weights after `VideoTransformer.to_precision(dtype)`.

    linear_dtype: of the blocks' weight matrices where they are quantised (their scales are not counted).
    """
    return sum(size for _, size in _stored(config, dtype, linear_dtype))


def forward_weight_bytes(config: TransformerConfig, dtype: torch.dtype, linear_dtype: torch.dtype | None = None) -> int:
    """The part of `weight_bytes` that a pass with given text keys reads."""
    stored = _stored(config, dtype, linear_dtype)
    return sum(size for name, size in stored if not any(part in name for part in TEXT_SIDE))


def kv_bytes(config: TransformerConfig, frames: int, tokens: int, dtype: torch.dtype, batch: int = 1) -> int:
    """Memory of the self-attention keys and values of `frames` latent frames, over all layers."""
    return 2 * config.num_layers * batch * frames * tokens * config.dim * dtype.itemsize


def forward_bytes(
    config: TransformerConfig,
    shape: ForwardShape,
    dtype: torch.dtype,
    linear_dtype: torch.dtype | None = None,
) -> int:
    """Bytes that a cached pass moves at least: weights once, seen keys and values read, its own written too.

    Activations are left out: in the limit they stay on the chip.
    """
    read = kv_bytes(config, shape.context + shape.frames, shape.tokens, dtype, shape.batch)
    written = kv_bytes(config, shape.frames, shape.tokens, dtype, shape.batch)
    text = 2 * config.num_layers * shape.batch * shape.text_rows * config.dim * dtype.itemsize
    return forward_weight_bytes(config, dtype, linear_dtype) + read + written + text


def decode_flops(vae: "StreamingVAE", chunks: Sequence[int], size: tuple[int, int], batch: int = 1) -> list[int]:
    """FLOPs of each call of a streaming decode, counted on a copy without memory.

    chunks: latent frames of the calls, in order; the first one begins the stream. size: of a latent frame.
    """
    with torch.device("meta"):
        twin = type(vae).from_config(vae.config).to(vae.dtype)
    counts, state = [], None
    # Only the plain attention is made of products that the counter knows on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for frames in chunks:
            latents = torch.empty(batch, frames, vae.config["z_dim"], *size, device="meta")
            with FlopCounterMode(display=False) as counter:
                _, state = twin.decode(latents, state)
            counts.append(int(counter.get_total_flops()))
    return counts


def _stored(
    config: TransformerConfig, dtype: torch.dtype, linear_dtype: torch.dtype | None
) -> Iterator[tuple[str, int]]:
    """Name and bytes of every tensor; the exact ones are those that `to_precision` leaves in float32."""
    for name, shape in expected_shapes(config).items():
        kept = dtype
        if "time_" in name or "scale_shift_table" in name or ".norm" in name:
            kept = torch.promote_types(dtype, torch.float32)
        elif linear_dtype is not None and name.startswith("blocks.") and name.endswith(BLOCK_LINEARS):
            kept = linear_dtype
        yield name, shape.numel() * kept.itemsize
