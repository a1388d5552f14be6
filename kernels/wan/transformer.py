"""The Wan2.1 video diffusion transformer: one network, one set of weights, for teacher and student.

What a frame may look at is an argument (`attention`), not a subclass: everything, a mask, or a KV cache
(`reelway.kernels.causal`). Every frame has its own timestep. Parameters carry diffusers' names, so the state
dict is that of `WanTransformer3DModel`.

Shape suffixes: B batch, F latent frames, C channels, N tokens of a frame, L tokens, H heads, K head channels,
D model width, M text rows.

Source: Wan2.1, arXiv 2503.20314, section 4; per-frame timesteps: CausVid, arXiv 2412.07772, section 4.1.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import dispatch as ops
from ..ops.reference import wide
from .config import TransformerConfig
from .context import TextContext
from .rotary import rotary_table


class SelfAttentionPattern(Protocol):
    """What the tokens of a forward pass attend to, and where their frames stand in time."""

    def positions(self, frames: int) -> Tensor:
        """Rotary positions of the pass's frames: float64 [F] on the CPU."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Self-attention of one layer: query, key (both rotated) and value [B, L, H, K] to [B, L, H, K]."""


class Bidirectional:
    """Every frame attends to every frame: the teacher."""

    def positions(self, frames: int) -> Tensor:
        return torch.arange(frames, dtype=torch.float64)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.attention(query, key, value)


BIDIRECTIONAL = Bidirectional()


@dataclass(frozen=True)
class TextKeys:
    """Cross-attention keys and values of a batch of prompts, one pair [B, M, H, K] per layer.

    They depend on the prompt and the weights alone: compute them once per prompt, drop them at a switch.
    They carry no gradient to the text projections unless they were made under gradient.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    score_bias: Tensor


class RMSNorm(nn.Module):
    """Weight of a root-mean-square norm over the full width, before heads are split."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Projections(nn.Module):
    """Weights of one attention: queries, keys, values, output, and the norms of queries and keys."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.dim
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = RMSNorm(width, config.eps)
        self.norm_k = RMSNorm(width, config.eps)

    def split(self, x: Tensor) -> Tensor:
        """[B, L, D] to [B, L, H, K]."""
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads

    def out(self, attended: Tensor) -> Tensor:
        projected: Tensor = self.to_out[0](attended.flatten(-2))
        return projected


class SelfAttention(Projections):
    def forward(
        self, x: Tensor, layer: int, rotation: tuple[Tensor, Tensor], attention: SelfAttentionPattern
    ) -> Tensor:
        query = ops.rms_norm_rotary(self.to_q(x), self.norm_q.weight, self.norm_q.eps, *rotation)
        key = ops.rms_norm_rotary(self.to_k(x), self.norm_k.weight, self.norm_k.eps, *rotation)
        return self.out(attention.attend(layer, query, key, self.split(self.to_v(x))))


class CrossAttention(Projections):
    def keys(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, M, H, K] of projected text rows [B, M, D]."""
        return self.split(self.norm_k(self.to_k(rows))), self.split(self.to_v(rows))

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor], score_bias: Tensor) -> Tensor:
        query = self.split(self.norm_q(self.to_q(x)))
        return self.out(ops.attention(query, *keys, score_bias=score_bias))


class GeluLinear(nn.Module):
    """Linear, then GELU in its tanh form; `proj` is diffusers' name."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluLinear(width, hidden), nn.Identity(), nn.Linear(hidden, width)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward. diffusers' norm2 is the cross-attention norm (Wan's norm3)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.attn1 = SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps)
        self.attn2 = CrossAttention(config)
        self.ffn = FeedForward(config.dim, config.ffn_dim)

    def forward(
        self,
        x: Tensor,
        layer: int,
        modulation: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention: SelfAttentionPattern,
        text_keys: tuple[Tensor, Tensor],
        score_bias: Tensor,
    ) -> Tensor:
        """x [B, F, N, D]; modulation [B, F, 6, D] in float32: shift, scale, gate, for attention then feed-forward."""
        frames = x.shape[1]
        steps = (wide(self.scale_shift_table) + modulation).unsqueeze(3).unbind(2)
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = steps
        normed = ops.layer_norm_modulate(x, shift, scale, self.eps)
        attended = self.attn1(normed.flatten(1, 2), layer, rotation, attention)
        x = ops.gated_residual(x, attended.unflatten(1, (frames, -1)), gate)
        normed = _affine_norm(self.norm2, x).flatten(1, 2)
        x = x + self.attn2(normed, text_keys, score_bias).unflatten(1, (frames, -1))
        normed = ops.layer_norm_modulate(x, shift_ffn, scale_ffn, self.eps)
        return ops.gated_residual(x, self.ffn(normed), gate_ffn)


class TwoLayers(nn.Module):
    """Two linear layers under diffusers' names; the activation between them is the caller's."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)


class ConditionEmbedder(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLayers(config.freq_dim, config.dim)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = TwoLayers(config.text_dim, config.dim)

    def time(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embedding [B, F, D] (for the head) and modulation [B, F, 6, D] of timesteps [B, F], in `dtype`."""
        with torch.autocast(timesteps.device.type, enabled=False):
            hidden = _wide_linear(self.time_embedder.linear_1, sinusoid(timesteps, self.freq_dim).to(dtype))
            embedding = _wide_linear(self.time_embedder.linear_2, functional.silu(hidden))
            modulation = _wide_linear(self.time_proj, functional.silu(embedding))
        return embedding, modulation.unflatten(-1, (6, -1))

    def text(self, rows: Tensor) -> Tensor:
        """Project text embeddings [B, M, text_dim] to the model's width."""
        hidden = self.text_embedder.linear_1(rows.to(self.text_embedder.linear_1.weight.dtype))
        projected: Tensor = self.text_embedder.linear_2(functional.gelu(hidden, approximate="tanh"))
        return projected


class VideoTransformer(nn.Module):
    """Wan2.1's DiT. Predicts the velocity ε − x0 of noisy latents (rectified flow, x_t = (1−σ) x0 + σ ε)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.patch_embedding = nn.Conv3d(config.in_channels, config.dim, config.patch_size, config.patch_size)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        patch_values = config.out_channels * config.patch_size[1] * config.patch_size[2]
        self.proj_out = nn.Linear(config.dim, patch_values)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: TextContext | TextKeys,
        attention: SelfAttentionPattern = BIDIRECTIONAL,
    ) -> Tensor:
        """Velocity [B, F, C, H, W], in the dtype of `latents`.

        latents [B, F, C, H, W]; timesteps [B, F] in [0, 1000] (fractions matter; 0 is clean);
        text: the prompts' context, or their keys (`text_keys`) when several passes share them.
        """
        if timesteps.shape != latents.shape[:2]:
            expected, found = tuple(latents.shape[:2]), tuple(timesteps.shape)
            raise ValueError(f"timesteps: one per latent frame is needed, {expected}, got {found}")
        keys = self.text_keys(text) if isinstance(text, TextContext) else text
        x, (height, width) = self._embed_patches(latents)
        positions = attention.positions(latents.shape[1])
        rotation = rotary_table(positions, height, width, self.config.rotary_dims, latents.device)
        embedding, modulation = self.condition_embedder.time(timesteps, wide(x[:0]).dtype)
        for layer, block in enumerate(self.blocks):
            inputs = (x, layer, modulation, rotation, attention, keys.layers[layer], keys.score_bias)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return self._head(x, embedding, height, width).to(latents.dtype)

    def text_keys(self, text: TextContext) -> TextKeys:
        """Cross-attention keys and values of every layer, for passes that share the prompt."""
        rows = self.condition_embedder.text(text.rows)
        blocks = cast(Iterable[Block], self.blocks)
        return TextKeys(tuple(block.attn2.keys(rows) for block in blocks), text.score_bias)

    def to_precision(self, dtype: torch.dtype) -> "VideoTransformer":
        """Cast to `dtype`, except the time embedding, the modulation tables and the norms, which stay float32."""
        for name, parameter in self.named_parameters():
            exact = "time_" in name or "scale_shift_table" in name or ".norm" in name
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32) if exact else dtype)
        return self

    def _embed_patches(self, latents: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens [B, F, N, D] and the token grid; the convolution's stride is its kernel, so it is a linear map."""
        _, patch_height, patch_width = self.config.patch_size
        self.config.tokens_per_frame(*latents.shape[-2:])
        grid = (latents.shape[-2] // patch_height, latents.shape[-1] // patch_width)
        patches = latents.unflatten(-1, (grid[1], patch_width)).unflatten(-3, (grid[0], patch_height))
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)
        weight = self.patch_embedding.weight.flatten(1)
        return functional.linear(patches.to(weight.dtype), weight, self.patch_embedding.bias), grid

    def _head(self, x: Tensor, embedding: Tensor, height: int, width: int) -> Tensor:
        _, patch_height, patch_width = self.config.patch_size
        shift, scale = (wide(self.scale_shift_table) + embedding.unsqueeze(2)).chunk(2, dim=2)
        patches = self.proj_out(ops.layer_norm_modulate(x, shift, scale, self.config.eps))
        # The channel is the fastest index of a token's outputs: (row in patch, column in patch, channel).
        patches = patches.unflatten(-1, (patch_height, patch_width, -1)).unflatten(2, (height, width))
        latents: Tensor = patches.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return latents


def sinusoid(timesteps: Tensor, channels: int) -> Tensor:
    """[..., channels] float64: cosines, then sines, of t · 10000^(−i/(channels/2)) for the raw t in [0, 1000]."""
    half = channels // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angles = timesteps.double().unsqueeze(-1) * rates
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _wide_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in the precision of `x`, whatever its weights were cast to."""
    return functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _affine_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    exact = wide(x)
    weight, bias = norm.weight.to(exact.dtype), norm.bias.to(exact.dtype)
    return functional.layer_norm(exact, norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)
