# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Triton versions of the norms, the rotary embedding, modulation and the gated residual. Forward only.

One program takes a tile of whole rows (a row is one token): it is read once, kept in registers in float32,
and written once. Importing this module imports Triton; `dispatch` does so only where the kernels can run.

Shape suffixes: B batch, F latent frames, N tokens of a frame, L tokens, H heads, K head channels,
D model width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # elements of a tile of several rows


@triton.jit
def _rms_norm_kernel(x, weight, out, rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (channel < width)
    exact = tl.load(x + row * width + channel, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, axis=1) / width + eps)
    gain = tl.load(weight + channel, mask=channel < width, other=0.0).to(tl.float32)
    normed = exact * scale[:, None] * gain
    tl.store(out + row * width + channel, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_rotary_kernel(
    x, weight, cos, sin, out, rows, length, width, pairs, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (channel < width)
    exact = tl.load(x + row * width + channel, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, axis=1) / width + eps)
    gain = tl.load(weight + channel, mask=channel < width, other=0.0).to(tl.float32)
    normed = exact * scale[:, None] * gain
    even, odd = tl.split(tl.reshape(normed, (ROWS, WIDTH // 2, 2)))
    # Heads share the angles: pair p of the row is pair p mod K/2 of its head.
    pair = tl.arange(0, WIDTH // 2)[None, :]
    angle = (row % length) * pairs + pair % pairs
    known = (row < rows) & (2 * pair < width)
    cosine = tl.load(cos + angle, mask=known, other=0.0)
    sine = tl.load(sin + angle, mask=known, other=0.0)
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    flat = tl.reshape(turned, (ROWS, WIDTH))
    tl.store(out + row * width + channel, flat.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_modulate_kernel(
    x, shift, scale, out, rows, tokens, width, shift_stride, scale_stride, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (channel < width)
    exact = tl.load(x + row * width + channel, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(exact, axis=1) / width
    # Two passes over registers: E[x²] − E[x]² would cancel where the mean is large.
    centred = tl.where(inside, exact - mean[:, None], 0.0)
    inverse_deviation = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
    frame = row // tokens
    offset = tl.load(shift + frame * shift_stride + channel, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 + tl.load(scale + frame * scale_stride + channel, mask=inside, other=0.0).to(tl.float32)
    modulated = centred * inverse_deviation[:, None] * factor + offset
    tl.store(out + row * width + channel, modulated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_residual_kernel(
    x, update, gate, out, rows, tokens, width, gate_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (channel < width)
    residual = tl.load(x + row * width + channel, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(update + row * width + channel, mask=inside, other=0.0).to(tl.float32)
    amount = tl.load(gate + (row // tokens) * gate_stride + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + channel, (residual + change * amount).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`: x [..., D], weight [D]."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    grid, tile = _tiles(rows, width)
    with torch.cuda.device_of(x):
        _rms_norm_kernel[grid](x, weight, out, rows, width, eps, **tile)
    return out


def rms_norm_rotary(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rms_norm_rotary`: x [B, L, D], weight [D], cos and sin [L, K/2] to [B, L, H, K]."""
    batch, length, width = x.shape
    rows, pairs = batch * length, cos.shape[-1]
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = x.new_empty(batch, length, width // (2 * pairs), 2 * pairs)
    grid, tile = _tiles(rows, width)
    with torch.cuda.device_of(x):
        _rms_norm_rotary_kernel[grid](x, weight, cos, sin, out, rows, length, width, pairs, eps, **tile)
    return out


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`reference.layer_norm_modulate`: x [B, F, N, D], shift and scale [B, F, 1, D]."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens, width = x.shape[-2:]
    rows = x.numel() // width
    shift, shift_stride = _frame_rows(shift)
    scale, scale_stride = _frame_rows(scale)
    grid, tile = _tiles(rows, width)
    with torch.cuda.device_of(x):
        _layer_norm_modulate_kernel[grid](
            x, shift, scale, out, rows, tokens, width, shift_stride, scale_stride, eps, **tile
        )
    return out


def gated_residual(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """`reference.gated_residual`: x and update [B, F, N, D], gate [B, F, 1, D]."""
    assert x.shape == update.shape
    x, update = x.contiguous(), update.contiguous()
    out = torch.empty_like(x)
    tokens, width = x.shape[-2:]
    rows = x.numel() // width
    gate, gate_stride = _frame_rows(gate)
    grid, tile = _tiles(rows, width)
    with torch.cuda.device_of(x):
        _gated_residual_kernel[grid](x, update, gate, out, rows, tokens, width, gate_stride, **tile)
    return out


def _tiles(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the shape of a tile with its warps: several narrow rows, or one wide row."""
    padded = triton.next_power_of_2(width)
    tile_rows = max(1, min(_TILE // padded, triton.next_power_of_2(rows)))
    warps = max(1, min(8, tile_rows * padded // 512))
    return (triton.cdiv(rows, tile_rows),), {"ROWS": tile_rows, "WIDTH": padded, "num_warps": warps}


def _frame_rows(steps: Tensor) -> tuple[Tensor, int]:
    """[B, F, 1, D] as rows that lie `stride` apart, one per frame; copied only where it is not so already."""
    batch, frames, _, _ = steps.shape
    even = steps.stride(-1) == 1 and (batch == 1 or steps.stride(0) == frames * steps.stride(1))
    steps = steps if even else steps.contiguous()
    return steps, steps.stride(1)
