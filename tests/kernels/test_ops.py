"""The reference operations against float64 definitions written out here, their backward, the dispatcher."""

import logging
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from reelway.kernels.causal import masks
from reelway.kernels.causal.masks import FrameMask
from reelway.kernels.ops import dispatch, flex, gradients, reference

EPS = 1e-6
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SIZES = [(1, 48, 16), (7, 192, 64), (130, 1536, 128)]  # tokens, width, head channels


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rounded_once(found: Tensor, exact: Tensor) -> bool:
    """Whether `found` is `exact` rounded to its dtype, give or take float32 (for float64: float64) arithmetic."""
    slack = 1e-13 if found.dtype == torch.float64 else 2e-6
    allowed = torch.finfo(found.dtype).eps / 2 * exact.abs() + slack * (1 + exact.abs())
    return bool(((found.double() - exact).abs() <= allowed).all())


def exact_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """`bias` [B, L, M] is added to the scores."""
    scores = torch.einsum("blhk,bmhk->bhlm", query.double(), key.double()) / query.shape[-1] ** 0.5
    weights = (scores + bias[:, None]).exp()
    return torch.einsum("bhlm,bmhk->blhk", weights / weights.sum(-1, keepdim=True), value.double())


def exact_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() / ((x.double() ** 2).sum(-1, keepdim=True) / x.shape[-1] + EPS) ** 0.5 * weight.double()


def exact_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every pair times its 2 × 2 rotation matrix."""
    turns = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2).double()
    pairs = x.double().reshape(*x.shape[:-1], -1, 2)
    return torch.einsum("lpij,blhpj->blhpi", turns, pairs).reshape(x.shape)


def exact_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x.double() - x.double().mean(-1, keepdim=True)
    normed = centred / ((centred**2).mean(-1, keepdim=True) + EPS) ** 0.5
    return normed * (1 + scale.double()) + shift.double()


def angles(length: int, channels: int) -> tuple[Tensor, Tensor]:
    angle = randn(length, channels // 2, seed=9) * 3
    return angle.cos().float(), angle.sin().float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "width", "channels"), SIZES)
def test_norms_and_modulation_round_once(length: int, width: int, channels: int, dtype: torch.dtype) -> None:
    x = randn(2, length, width, dtype=dtype) * 3 + 1
    weight, (cos, sin) = randn(width, dtype=torch.float32, seed=1), angles(length, channels)
    normed = exact_rms_norm(x, weight)
    assert rounded_once(reference.rms_norm(x, weight, EPS), normed)
    turned = exact_rotate(normed.reshape(2, length, -1, channels), cos, sin)
    assert rounded_once(reference.rms_norm_rotary(x, weight, EPS, cos, sin), turned)
    frames, update = x.reshape(2, 1, length, width), randn(2, 1, length, width, dtype=dtype, seed=2)
    shift, scale = randn(2, 2, 1, 1, width, dtype=torch.float32, seed=3)
    modulated = exact_modulate(frames, shift, scale)
    assert rounded_once(reference.layer_norm_modulate(frames, shift, scale, EPS), modulated)
    gated = frames.double() + update.double() * scale.double()
    assert rounded_once(reference.gated_residual(frames, update, scale), gated)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_takes_slices_of_any_offset(dtype: torch.dtype) -> None:
    storage = randn(2 * 5 * 3 * 16 + 1, dtype=dtype)
    cos, sin = angles(5, 16)
    odd = storage[1:].view(2, 5, 3, 16)
    strided = odd.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    for x in (odd, strided):
        assert rounded_once(reference.rotate(x, cos, sin), exact_rotate(x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "channels"), [(1, 7, 64), (130, 130, 48), (7, 33, 128)])
def test_attention_is_softmax_attention(queries: int, keys: int, channels: int, dtype: torch.dtype) -> None:
    query, key, value = (randn(2, n, 3, channels, dtype=dtype, seed=n + i) for i, n in enumerate((queries, keys, keys)))
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    mask = randn(queries, keys, seed=5) > 0
    mask[:, 0] = True
    for seen in (None, mask):
        bias = (
            torch.zeros(2, queries, keys)
            if seen is None
            else torch.zeros(2, *mask.shape).masked_fill(~mask, -torch.inf)
        )
        found, expected = (
            reference.attention(query, key, value, mask=seen),
            exact_attention(query, key, value, bias),
        )
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_score_bias_is_exact_also_under_autocast(dtype: torch.dtype, autocast: bool) -> None:
    query, key, value = (randn(2, n, 3, 64, dtype=dtype, seed=n) for n in (7, 5, 5))
    bias = torch.zeros(2, 5)
    bias[0, 3:], bias[1, 4] = -torch.inf, torch.tensor(508.0).log()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = reference.attention(query, key, value, score_bias=bias)
    assert found.dtype == dtype
    assert rounded_once(found, exact_attention(query, key, value, bias[:, None].double().expand(2, 7, 5)))


def cases(
    dtype: torch.dtype,
) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor], tuple]]:
    """Of each operation: the version with a written-out backward, the reference, inputs, constants."""
    x, weight = randn(2, 5, 48, dtype=dtype), randn(48, dtype=torch.float64, seed=1)
    frames, update = randn(2, 3, 5, 48, dtype=dtype, seed=2), randn(2, 3, 5, 48, dtype=dtype, seed=3)
    shift, scale = randn(2, 2, 3, 1, 48, seed=4)
    weight, shift, scale = (t if dtype == torch.float64 else t.float() for t in (weight, shift, scale))
    return {
        "rms_norm": (gradients.rms_norm, reference.rms_norm, [x, weight], (EPS,)),
        "rms_norm_rotary": (
            gradients.rms_norm_rotary,
            reference.rms_norm_rotary,
            [x, weight],
            (EPS, *angles(5, 16)),
        ),
        "layer_norm_modulate": (
            gradients.layer_norm_modulate,
            reference.layer_norm_modulate,
            [frames, shift, scale],
            (EPS,),
        ),
        "gated_residual": (gradients.gated_residual, reference.gated_residual, [frames, update, scale], ()),
    }


def gradient(function: Callable[..., Tensor], inputs: list[Tensor], constants: tuple) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves, *constants)
    return list(torch.autograd.grad(output, leaves, randn(*output.shape, dtype=output.dtype, seed=7)))


@pytest.mark.parametrize("operation", ["rms_norm", "rms_norm_rotary", "layer_norm_modulate", "gated_residual"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_written_out_backward_equals_autograd(operation: str, dtype: torch.dtype) -> None:
    written, plain, inputs, constants = cases(dtype)[operation]
    found = gradient(lambda *args: written(plain, *args), inputs, constants)
    expected = gradient(plain, [tensor.double() for tensor in inputs], constants)
    assert [grad.dtype for grad in found] == [tensor.dtype for tensor in inputs]
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 3e-3}[dtype]
    if dtype == torch.float64:
        expected, tolerance = gradient(plain, inputs, constants), 1e-12
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_written_out_backward_refuses_a_second_derivative() -> None:
    x, weight = randn(2, 8).requires_grad_(), torch.ones(8, dtype=torch.float64)
    (grad,) = torch.autograd.grad(
        gradients.rms_norm(reference.rms_norm, x, weight, EPS).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


MASKS = {
    "bidirectional": masks.bidirectional(6),
    "block-causal": masks.block_causal(6, 2),
    "first frame alone": masks.block_causal(7, 3, first_block=1),
    "window": masks.block_causal(8, 2, window=4),
    "window and sink": masks.block_causal(8, 2, window=5, sink=1),
    "teacher forcing": masks.teacher_forcing(4, 2),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("tokens", [1, 5, 32])
@pytest.mark.parametrize("name", MASKS)
def test_frame_mask_equals_the_token_mask_and_flex_attention(name: str, tokens: int) -> None:
    mask = FrameMask(MASKS[name].allowed, MASKS[name].frame_positions)
    length = len(mask.allowed) * tokens
    query, key, value = (randn(2, length, 2, 16, dtype=torch.float32, seed=seed) for seed in range(3))
    expected = reference.attention(query, key, value, mask=mask.tokens(tokens))
    assert torch.allclose(mask.attend(0, query, key, value), expected, atol=1e-6)
    block_mask = mask.block_mask(tokens, query.device)
    found = flex.attention(query, key, value, block_mask, flex_attention)
    assert found.shape == query.shape
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("tokens", [16, 37, 64, 200])
@pytest.mark.parametrize("name", MASKS)
def test_tiles_of_a_frame_mask_are_those_that_torch_finds(name: str, tokens: int) -> None:
    mask = MASKS[name]
    found = flex.frame_block_mask(mask.allowed, tokens, torch.device("cpu"))
    length = len(mask.allowed) * tokens
    table = mask.tokens(tokens)
    expected = create_block_mask(lambda b, h, q, k: table[q, k], None, None, length, length, device="cpu")
    assert found.seq_lengths == expected.seq_lengths == (length, length)
    for part in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part
    assert torch.equal(found.to_dense(), expected.to_dense())


def test_block_masks_are_kept_per_length() -> None:
    mask = masks.block_causal(4, 2)
    first, second = (mask.block_mask(tokens, torch.device("cpu")) for tokens in (32, 96))
    assert (first.seq_lengths, second.seq_lengths) == ((128, 128), (384, 384))
    assert mask.block_mask(32, torch.device("cpu")) is first
    assert masks.block_causal(4, 2).block_mask(32, torch.device("cpu")) is not first


def test_cpu_runs_the_reference_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._announce.cache_clear()
    x, weight = randn(2, 5, 8, dtype=torch.float32), torch.ones(8)
    with caplog.at_level(logging.INFO, logger=dispatch.logger.name):
        for _ in range(3):
            assert torch.equal(dispatch.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    assert caplog.messages == ["rms_norm: torch version (the device is cpu)"]


def test_forced_triton_without_a_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MODE", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._device_gap.cache_clear()
    with pytest.raises(ValueError, match=r"REELWAY_OPS: triton needs CUDA .* but the device is cpu"):
        dispatch.rms_norm(torch.ones(1, 8), torch.ones(8), EPS)


def test_mode_is_one_of_three() -> None:
    assert dispatch.read_mode("triton") == "triton"
    with pytest.raises(ValueError, match="REELWAY_OPS: must be one of auto, reference, triton, got 'fast'"):
        dispatch.read_mode("fast")


def test_the_networks_on_a_cpu_never_import_triton() -> None:
    script = """
import sys, torch
from reelway.kernels.causal import cache, masks
from reelway.kernels.wan.transformer import RMSNorm
RMSNorm(8, 1e-6)(torch.ones(2, 8))
masks.block_causal(2, 1).attend(0, *torch.ones(3, 1, 4, 1, 16))
assert not [name for name in sys.modules if name.split(".")[0] in ("triton", "diffusers", "transformers")]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("tokens", [5, 64])
@pytest.mark.parametrize("name", MASKS)
def test_compiled_flex_attention_equals_attention_in_groups(name: str, tokens: int) -> None:
    mask = MASKS[name]
    shape = (2, len(mask.allowed) * tokens, 2, 64)
    query, key, value = (randn(*shape, dtype=torch.bfloat16, seed=seed).cuda().requires_grad_() for seed in range(3))
    found, expected = mask.attend(0, query, key, value), mask.attend_in_groups(query, key, value)
    assert (found - expected).norm() <= 1e-2 * expected.norm()
    weights = randn(*shape, dtype=torch.bfloat16, seed=3).cuda()
    pairs = zip(*(torch.autograd.grad(out, (query, key, value), weights) for out in (found, expected)), strict=True)
    assert all((one - other).norm() <= 2e-2 * other.norm() for one, other in pairs)
