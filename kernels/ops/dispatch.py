"""Chooses, by device, the version of each operation that runs. Signatures and meaning: see `reference`.

On CUDA: Triton kernels for the norms, modulation, the gated residual and attention with a score bias (a bias
takes `scaled_dot_product_attention` off its fast path); torch's own attention for the rest. Everywhere else,
and for what the kernels do not cover: the reference. Triton is imported only where its kernels can run.

Under gradient the Triton element-wise kernels run with the backward of `gradients`; Triton attention has no
backward, so there the reference runs. Each choice is logged once, with its reason, at level INFO.

The environment variable REELWAY_OPS, read once at import, is for tests and benchmarks:
    auto       the choice above (the default)
    reference  plain torch everywhere
    triton     Triton wherever a kernel covers the case, dense attention too; an error where none can run.
               With TRITON_INTERPRET=1 they run on the CPU, in Triton's interpreter.
"""

import logging
import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from . import gradients, reference
from .reference import rotate

__all__ = ["attention", "gated_residual", "layer_norm_modulate", "rms_norm", "rms_norm_rotary", "rotate"]

MODES = ("auto", "reference", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST_ROW = 8192  # channels: a wider row does not fit the registers of one program
WIDEST_HEAD = 256
LOWEST_CAPABILITY = (8, 0)  # bfloat16 in tensor cores

logger = logging.getLogger(__name__)


def read_mode(value: str) -> str:
    """The mode that REELWAY_OPS names; ValueError if it is none."""
    if value not in MODES:
        raise ValueError(f"REELWAY_OPS: must be one of {', '.join(MODES)}, got {value!r}")
    return value


MODE = read_mode(os.environ.get("REELWAY_OPS", "auto"))


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, score_bias: Tensor | None = None
) -> Tensor:
    gap = _attention_gap(query, key, value, mask, score_bias)
    if _runs_triton("attention" + _kind(mask, score_bias), query, gap):
        from . import flash

        return flash.attention(query, key, value, score_bias=score_bias)
    return reference.attention(query, key, value, mask=mask, score_bias=score_bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if _runs_triton("rms_norm", x, _row_gap(x, weight)):
        from . import fused

        return gradients.rms_norm(fused.rms_norm, x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def rms_norm_rotary(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    if _runs_triton("rms_norm_rotary", x, _row_gap(x, weight, cos, sin)):
        from . import fused

        return gradients.rms_norm_rotary(fused.rms_norm_rotary, x, weight, eps, cos, sin)
    return reference.rms_norm_rotary(x, weight, eps, cos, sin)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    if _runs_triton("layer_norm_modulate", x, _row_gap(x, shift, scale) or _frame_gap(x, shift, scale)):
        from . import fused

        return gradients.layer_norm_modulate(fused.layer_norm_modulate, x, shift, scale, eps)
    return reference.layer_norm_modulate(x, shift, scale, eps)


def gated_residual(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    if _runs_triton("gated_residual", x, _row_gap(x, update, gate) or _frame_gap(x, gate)):
        from . import fused

        return gradients.gated_residual(fused.gated_residual, x, update, gate)
    return reference.gated_residual(x, update, gate)


def kernels_gap(device: torch.device) -> str | None:
    """Why compiled kernels cannot run on `device`, or None; ValueError if REELWAY_OPS=triton."""
    if MODE == "reference":
        return "REELWAY_OPS=reference"
    gap = _device_gap(device)
    if gap is not None and MODE == "triton":
        raise ValueError(f"REELWAY_OPS: triton needs CUDA (or TRITON_INTERPRET=1) and Triton, but {gap}")
    return gap


@cache
def _device_gap(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if MODE == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.cuda.get_device_capability(device) < LOWEST_CAPABILITY:
        return f"the compute capability of {device} is below {LOWEST_CAPABILITY}"
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "Triton finds no C compiler"
    return None


def _runs_triton(operation: str, x: Tensor, gap: str | None) -> bool:
    reason = kernels_gap(x.device) or gap
    if not torch.compiler.is_compiling():
        _announce(operation, "torch" if reason else "triton", reason or f"on {x.device.type}")
    return reason is None


@cache
def _announce(operation: str, version: str, reason: str) -> None:
    logger.info("%s: %s version (%s)", operation, version, reason)


def _row_gap(x: Tensor, *others: Tensor) -> str | None:
    """Why the element-wise kernels do not cover these tensors, or None."""
    if x.shape[-1] > WIDEST_ROW:
        return f"rows wider than {WIDEST_ROW}"
    return _dtype_gap(x, *others) or (None if x.numel() else "empty input")


def _frame_gap(x: Tensor, *steps: Tensor) -> str | None:
    expected = (*x.shape[:2], 1, x.shape[-1])
    return None if all(step.shape == expected for step in steps) else "broadcast modulation"


def _dtype_gap(*tensors: Tensor) -> str | None:
    uncovered = [str(tensor.dtype) for tensor in tensors if tensor.dtype not in KERNEL_DTYPES]
    return f"dtype {uncovered[0]}" if uncovered else None


def _kind(mask: Tensor | None, score_bias: Tensor | None) -> str:
    return " with a mask" if mask is not None else " with a score bias" if score_bias is not None else ""


def _attention_gap(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, score_bias: Tensor | None
) -> str | None:
    """Why torch's attention is to run, or None for Triton's."""
    inputs = [query, key, value] + ([] if score_bias is None else [score_bias])
    if mask is not None:
        return "the kernel takes no mask"
    if score_bias is None and MODE != "triton":
        return "torch has fused kernels for it"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return "the kernel has no backward"
    if query.shape[-1] % 16 or query.shape[-1] > WIDEST_HEAD:
        return f"heads of {query.shape[-1]} channels"
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return "Triton's interpreter has no bfloat16 products"
    if not query.dtype == key.dtype == value.dtype:
        return "mixed dtypes"
    return _dtype_gap(*inputs) or (None if query.numel() and key.numel() else "empty input")
