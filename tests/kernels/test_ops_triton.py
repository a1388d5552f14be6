"""The Triton kernels against the reference in float64: on CUDA, and on the CPU in Triton's interpreter.

The interpreter is chosen when Triton is imported, and this process may have imported it already. So without
TRITON_INTERPRET=1 the one test that is not marked `gpu` runs the others in a process of their own.
"""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from reelway.kernels.ops import dispatch, reference

EPS = 1e-6
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = (torch.float32, torch.bfloat16)
SIZES = [(1, 48, 16), (7, 192, 64), (130, 192, 64), (7, 1536, 128)]  # tokens, width, head channels
runnable = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs CUDA")

if INTERPRETED or torch.cuda.is_available():
    from reelway.kernels.ops import flash, fused


def test_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "REELWAY_OPS": "triton"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def rounded_once(found: Tensor, exact: Tensor) -> bool:
    """Whether `found` is `exact` rounded (by the interpreter: cut off), give or take float32 arithmetic."""
    ulps = 1.0 if INTERPRETED else 0.5
    allowed = ulps * torch.finfo(found.dtype).eps * exact.abs() + 3e-6 * (1 + exact.abs())
    return found.shape == exact.shape and bool(((found.double() - exact).abs() <= allowed).all())


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter multiplies bfloat16 matrices as the integers of their bits: widen them first."""
    if not INTERPRETED:
        return
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder

    products = InterpreterBuilder.create_dot

    def create_dot(self: InterpreterBuilder, left: object, right: object, *rest: object) -> object:
        if left.dtype == language.bfloat16:
            left, right = (self.cast_impl(operand, language.float32) for operand in (left, right))
        return products(self, left, right, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def double(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


@pytest.mark.gpu
@runnable
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "width", "channels"), SIZES)
def test_row_kernels(length: int, width: int, channels: int, dtype: torch.dtype) -> None:
    x, weight = randn(2, length, width, dtype=dtype) * 3 + 1, randn(width, seed=1)
    cos, sin = randn(length, channels // 2, seed=2), randn(length, channels // 2, seed=3)
    exact_x, exact_weight, exact_cos, exact_sin = double(x, weight, cos, sin)
    assert rounded_once(fused.rms_norm(x, weight, EPS), reference.rms_norm(exact_x, exact_weight, EPS))
    turned = reference.rms_norm_rotary(exact_x, exact_weight, EPS, exact_cos, exact_sin)
    assert rounded_once(fused.rms_norm_rotary(x, weight, EPS, cos, sin), turned)


@pytest.mark.gpu
@runnable
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 48), (7, 192), (65, 192), (3, 1536)])
def test_frame_kernels_read_each_frames_own_steps(tokens: int, width: int, dtype: torch.dtype) -> None:
    x, update = (randn(2, 3, tokens, width, dtype=dtype, seed=seed) + 3 for seed in range(2))
    shift, scale, gate = randn(2, 3, 3, width, seed=2).unsqueeze(3).unbind(2)  # as the network has them: strided
    modulated = reference.layer_norm_modulate(*double(x, shift, scale), EPS)
    assert rounded_once(fused.layer_norm_modulate(x, shift, scale, EPS), modulated)
    assert rounded_once(fused.gated_residual(x, update, gate), reference.gated_residual(*double(x, update, gate)))
    late = slice(1, None)  # frames that are not evenly spaced over the batch
    found = fused.gated_residual(x[:, late], update[:, late], gate[:, late])
    assert rounded_once(found, reference.gated_residual(*double(x, update, gate))[:, late])


ATTENTION_SHAPES = [
    (1, 7, 64),
    (7, 5, 16),
    (33, 70, 48),
    (130, 130, 64),
    (20, 140, 128),
]  # queries, keys, channels


@pytest.mark.gpu
@runnable
@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "channels"), ATTENTION_SHAPES)
def test_attention(queries: int, keys: int, channels: int, dtype: torch.dtype, biased: bool) -> None:
    query = randn(2, queries, 2, channels, dtype=dtype)
    key, value = randn(2, keys, 2, 2, channels, dtype=dtype, seed=1).unbind(2)  # strided, as from one buffer
    bias = torch.zeros(2, keys, device=DEVICE)
    bias[0, 3:], bias[1, : keys // 2], bias[1, -1] = -torch.inf, -torch.inf, 6.23
    score_bias = bias if biased else None
    found = flash.attention(query, key, value, score_bias=score_bias)
    exact_bias = None if score_bias is None else score_bias.double()
    expected = reference.attention(*double(query, key, value), score_bias=exact_bias)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2 if INTERPRETED else 5e-3}[dtype]
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.gpu
@runnable
def test_attention_of_large_scores_does_not_overflow() -> None:
    query, key, value = (randn(1, 20, 1, 16, seed=seed) for seed in range(3))
    found = flash.attention(query * 100, key * 100, value)
    assert torch.allclose(found.double(), reference.attention(*double(query * 100, key * 100, value)), atol=1e-4)


@pytest.mark.gpu
@runnable
def test_dispatch_runs_the_kernels_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._announce.cache_clear()
    x, weight, bias = randn(2, 5, 48), randn(48, seed=1), randn(2, 5, seed=2)
    heads = x.unflatten(-1, (3, 16))
    with caplog.at_level(logging.INFO, logger=dispatch.logger.name):
        assert torch.equal(dispatch.rms_norm(x, weight, EPS), fused.rms_norm(x, weight, EPS))
        found = dispatch.attention(heads, heads, heads, score_bias=bias)
        dispatch.rms_norm(x.double(), weight, EPS)
    assert torch.equal(found, flash.attention(heads, heads, heads, score_bias=bias))
    assert caplog.messages == [
        f"rms_norm: triton version (on {DEVICE.type})",
        f"attention with a score bias: triton version (on {DEVICE.type})",
        "rms_norm: torch version (dtype torch.float64)",
    ]


@pytest.mark.gpu
@runnable
def test_gradients_through_the_dispatcher_equal_the_references() -> None:
    leaves = [randn(2, 3, 5, 48, seed=seed).requires_grad_() for seed in range(2)]
    steps = [randn(2, 3, 1, 48, seed=seed).requires_grad_() for seed in range(2, 5)]
    weight, (cos, sin) = randn(48, seed=5).requires_grad_(), randn(2, 15, 8, seed=6)
    bias = randn(2, 15, seed=7)

    def block(ops: object) -> list[Tensor]:
        x = ops.layer_norm_modulate(leaves[0], steps[0], steps[1], EPS)
        query = ops.rms_norm_rotary(x.flatten(1, 2), weight, EPS, cos, sin)
        key = ops.rms_norm(x.flatten(1, 2), weight, EPS).unflatten(-1, (3, 16))
        attended = ops.attention(query, key, key, score_bias=bias).reshape(x.shape)
        out = ops.gated_residual(leaves[1], attended, steps[2])
        return [out, *torch.autograd.grad(out.square().sum(), [*leaves, *steps, weight])]

    for found, expected in zip(block(dispatch), block(reference), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
