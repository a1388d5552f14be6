"""Plain torch versions of every operation: the definition that the fused versions are tested against.

Each computes in float32 (float64 where the input is float64) and rounds once, at its end. They are also what
runs on the CPU, so each is written with as few passes over memory as plain torch allows.

Shape suffixes: B batch, F latent frames, N tokens of a frame, L tokens, H heads, K head channels,
D model width.
"""

import torch
import torch.nn.functional as functional
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or unchanged if it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, score_bias: Tensor | None = None
) -> Tensor:
    """Softmax attention, scores scaled by 1/sqrt(K).

    query [B, L, H, K]; key, value [B, M, H, K]; mask [L, M] bool, True where a query may look;
    score_bias [B, M], added to the scores of every query. At most one of the two. Returns [B, L, H, K].
    """
    assert mask is None or score_bias is None
    if score_bias is not None and query.device.type == "cpu":
        return _biased_attention_on_cpu(query, key, value, score_bias)
    bias = mask if score_bias is None else score_bias[:, None, None, :].to(query.dtype)
    return _heads_first_attention(query, key, value, bias)


def _biased_attention_on_cpu(query: Tensor, key: Tensor, value: Tensor, score_bias: Tensor) -> Tensor:
    """In float32, under autocast too: bfloat16 would round log n, and its backward takes 3 times as long."""
    exact = wide(query)
    bias = score_bias[:, None, None, :].to(exact.dtype)
    with torch.autocast("cpu", enabled=False):
        return _heads_first_attention(exact, wide(key), wide(value), bias).to(query.dtype)


def _heads_first_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)


def inverse_rms(exact: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps) over the last dimension, which is kept: [..., D] to [..., 1]."""
    mean_square = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square() / exact.shape[-1]
    return torch.rsqrt(mean_square + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in x's dtype."""
    exact = wide(x)
    return (exact * inverse_rms(exact, eps) * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs (x[2j], x[2j+1]): x [..., L, H, K], cos and sin [L, K/2]."""
    exact = wide(x).contiguous()
    aligned = exact if exact.storage_offset() % 2 == 0 else exact.clone()
    pairs = torch.view_as_complex(aligned.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None, :]).flatten(-2).to(x.dtype)


def rms_norm_rotary(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """RMS norm over the full width, then heads are split and rotated.

    x [B, L, D], weight [D], cos and sin [L, K/2]. Returns [B, L, H, K] with H = D / K.
    """
    normed = rms_norm(wide(x), weight, eps)
    return rotate(normed.unflatten(-1, (-1, 2 * cos.shape[-1])), cos, sin).to(x.dtype)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine, · (1 + scale) + shift: x [B, F, N, D], shift and scale [B, F, 1, D]."""
    normed = functional.layer_norm(wide(x), x.shape[-1:], eps=eps)
    return torch.addcmul(wide(shift), normed, 1 + scale.to(normed.dtype)).to(x.dtype)


def gated_residual(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + update · gate, summed in float32: x and update [B, F, N, D], gate [B, F, 1, D]."""
    return torch.addcmul(wide(x), wide(update), gate).to(x.dtype)
