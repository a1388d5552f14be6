"""The closed-form cost of a pass, against torch's FLOP counter and against real networks and caches."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reelway.kernels.causal.cache import CacheShape, KVCache
from reelway.kernels.wan.config import CONFIGS, TransformerConfig
from reelway.kernels.wan.context import TextContext
from reelway.kernels.wan.cost import (
    ForwardShape,
    decode_flops,
    forward_bytes,
    forward_flops,
    forward_weight_bytes,
    kv_bytes,
    text_flops,
    weight_bytes,
)
from reelway.kernels.wan.transformer import BIDIRECTIONAL, VideoTransformer
from reelway.kernels.wan.vae import StreamingVAE

SMALL = TransformerConfig(
    num_attention_heads=2, attention_head_dim=24, ffn_dim=112, num_layers=2, text_dim=40, freq_dim=32
)
VAE = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "scale_factor_temporal": 2,
    "scale_factor_spatial": 2,
}


@pytest.fixture(scope="module")
def model() -> VideoTransformer:
    torch.manual_seed(0)
    return VideoTransformer(SMALL)


def counted(call) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(("batch", "rows"), [(1, 9), (3, 4)])
def test_forward_flops_bidirectional(model: VideoTransformer, batch: int, rows: int) -> None:
    keys = model.text_keys(TextContext.dense(torch.randn(batch, rows, SMALL.text_dim)))
    latents, timesteps = torch.randn(batch, 5, 16, 6, 8), torch.zeros(batch, 5)
    expected = counted(lambda: model(latents, timesteps, keys, BIDIRECTIONAL))
    shape = ForwardShape(frames=5, tokens=12, text_rows=rows, batch=batch)
    assert forward_flops(SMALL, shape).total == expected


def test_forward_flops_with_cached_context(model: VideoTransformer) -> None:
    keys = model.text_keys(TextContext.dense(torch.randn(1, 7, SMALL.text_dim)))
    cache = KVCache(CacheShape(SMALL, 1, 6, 8, window=8, sink=2, dtype=torch.float32))
    latents, timesteps = torch.randn(1, 3, 16, 6, 8), torch.zeros(1, 3)
    for context in (0, 3, 5, 5):  # the window of 8 has room for a block of 3 and 5 frames before it
        block = cache.open(3)
        expected = counted(lambda block=block: model(latents, timesteps, keys, block))
        shape = ForwardShape(frames=3, tokens=12, text_rows=7, context=context)
        assert forward_flops(SMALL, shape).total == expected
        block.commit()


def test_text_flops(model: VideoTransformer) -> None:
    text = TextContext.dense(torch.randn(2, 11, SMALL.text_dim))
    assert text_flops(SMALL, rows=11, batch=2) == counted(lambda: model.text_keys(text))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_bytes_are_those_of_the_network(dtype: torch.dtype) -> None:
    network = VideoTransformer(SMALL).to_precision(dtype)
    assert weight_bytes(SMALL, dtype) == sum(parameter.nbytes for parameter in network.parameters())


def test_a_pass_does_not_read_the_text_side(model: VideoTransformer) -> None:
    """With gradients as witnesses: what a pass with given keys does not touch gets none."""
    keys = model.text_keys(TextContext.dense(torch.randn(1, 7, SMALL.text_dim)))
    detached = dataclasses.replace(keys, layers=tuple((k.detach(), v.detach()) for k, v in keys.layers))
    model.zero_grad()
    model(torch.randn(1, 2, 16, 6, 8), torch.full((1, 2), 500.0), detached).sum().backward()
    touched = sum(parameter.nbytes for parameter in model.parameters() if parameter.grad is not None)
    assert forward_weight_bytes(SMALL, torch.float32) == touched


def test_quantised_linears_are_those_of_the_blocks() -> None:
    linears = [module for module in VideoTransformer(SMALL).blocks.modules() if isinstance(module, torch.nn.Linear)]
    saved = sum(layer.weight.numel() for layer in linears)  # one byte instead of two
    bfloat16 = weight_bytes(SMALL, torch.bfloat16)
    assert bfloat16 - weight_bytes(SMALL, torch.bfloat16, torch.float8_e4m3fn) == saved


def test_kv_bytes_agree_with_the_cache() -> None:
    shape = CacheShape(SMALL, 2, 6, 8, window=8, sink=2, dtype=torch.bfloat16)
    cache = KVCache(shape)
    assert kv_bytes(SMALL, 8, 12, torch.bfloat16, batch=2) == cache.keys.nbytes + cache.values.nbytes
    assert shape.bytes() == kv_bytes(SMALL, 8, 12, torch.bfloat16, 2) + cache.sink_keys.nbytes


def test_published_cache_size() -> None:
    """Wan2.1-1.3B at 832x480 in bfloat16: 6.04 GB for 21 latent frames, the whole clip."""
    assert kv_bytes(CONFIGS["wan2.1-1.3b"], 21, 1560, torch.bfloat16) == pytest.approx(6.04e9, rel=1e-3)


def test_forward_bytes() -> None:
    shape = ForwardShape(frames=3, tokens=12, text_rows=7, context=5, batch=2)
    cache = kv_bytes(SMALL, 8 + 3, 12, torch.bfloat16, batch=2)  # eight frames read, three written
    text = 2 * 2 * 2 * 7 * SMALL.dim * 2
    expected = forward_weight_bytes(SMALL, torch.bfloat16) + cache + text
    assert forward_bytes(SMALL, shape, torch.bfloat16) == expected


def test_decode_flops_are_those_of_a_real_decode() -> None:
    vae = StreamingVAE.from_config(VAE)
    counts, state = [], None
    for frames in (1, 2, 3):
        latents = torch.randn(2, frames, 16, 6, 8)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            _, state = vae.decode(latents, state)
        counts.append(counter.get_total_flops())
    assert decode_flops(vae, [1, 2, 3], (6, 8), batch=2) == counts
    assert counts[1] > 1.5 * counts[0]
