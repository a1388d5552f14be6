"""Operations with a written-out backward, which give gradients to kernels that have only a forward.

Each takes first the version that computes the value: a fused kernel, or the reference, of the same signature.
The backward is the same for all of them, computes in float32 (float64 for float64) and rounds once, as the
forward does, and keeps nothing but the inputs. It cannot itself be differentiated: second derivatives and
forward mode need the reference.

Shape suffixes: B batch, F latent frames, N tokens of a frame, L tokens, H heads, K head channels,
D model width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import inverse_rms, rotate, wide

Version = Callable[..., Tensor]


def rms_norm(version: Version, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    result: Tensor = _RMSNorm.apply(version, x, weight, eps)  # type: ignore[no-untyped-call]
    return result


def rms_norm_rotary(version: Version, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """cos and sin are constants: no gradient flows into them."""
    result: Tensor = _RMSNormRotary.apply(version, x, weight, eps, cos, sin)  # type: ignore[no-untyped-call]
    return result


def layer_norm_modulate(version: Version, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    result: Tensor = _LayerNormModulate.apply(version, x, shift, scale, eps)  # type: ignore[no-untyped-call]
    return result


def gated_residual(version: Version, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    result: Tensor = _GatedResidual.apply(version, x, update, gate)  # type: ignore[no-untyped-call]
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, version: Version, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return version(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return None, *_rms_norm_backward(wide(grad), x, weight, ctx.eps), None


class _RMSNormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, version: Version, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return version(x, weight, eps, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None, None, None]:
        x, weight, cos, sin = ctx.saved_tensors
        turned_back = rotate(wide(grad), cos, -sin).flatten(-2)
        return None, *_rms_norm_backward(turned_back, x, weight, ctx.eps), None, None, None


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight for y = n · weight, n = x / rms(x): dx = (dn − n · mean(dn · n)) / rms(x)."""
    exact = wide(x)
    scale = inverse_rms(exact, eps)
    normed = exact * scale
    product = grad * normed
    grad_weight = product.flatten(0, -2).sum(0)
    mean = product.mul_(weight).mean(-1, keepdim=True)
    grad_x = (grad * weight).sub_(normed.mul_(mean)).mul_(scale)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


class _LayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, version: Version, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, shift, scale)
        ctx.eps = eps
        return version(x, shift, scale, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None]:
        x, shift, scale = ctx.saved_tensors
        grad, exact, width = wide(grad), wide(x), [x.shape[-1]]
        normed, mean, inverse_deviation = torch.native_layer_norm(exact, width, None, None, ctx.eps)
        grad_shift = grad.sum_to_size(shift.shape).to(shift.dtype)
        grad_scale = normed.mul_(grad).sum_to_size(scale.shape).to(scale.dtype)
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad * (1 + scale.to(grad.dtype)), exact, width, mean, inverse_deviation, None, None, [True, False, False]
        )
        return None, grad_x.to(x.dtype), grad_shift, grad_scale, None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, version: Version, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(update, gate)
        return version(x, update, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        update, gate = ctx.saved_tensors
        exact = wide(grad)
        grad_gate = (exact * update).sum_to_size(gate.shape).to(gate.dtype)
        return None, grad, (exact * gate).to(update.dtype), grad_gate
