"""The streaming VAE against diffusers' own offline encode and decode, with the same random weights."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from reelway.kernels.wan.vae import StreamingVAE, VAEState

PATCHED = {"patch_size": 2, "in_channels": 12, "out_channels": 12}
CONFIGS: dict[str, dict[str, Any]] = {
    "wan2.1": {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1},
    "patched": {
        "base_dim": 16,
        "z_dim": 16,
        "dim_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        **PATCHED,
    },
    "wan2.2": {
        "base_dim": 4,
        "decoder_base_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 1,
        "is_residual": True,
        "scale_factor_spatial": 16,
        **PATCHED,
    },
}
LATENTS = 7
every_config = pytest.mark.parametrize("name", CONFIGS)
chunkings = st.lists(st.integers(1, LATENTS), min_size=1, max_size=LATENTS)


@cache
def build(name: str) -> StreamingVAE:
    """Random weights, the norms' gains too; pixels small enough that no clamp can hide a difference."""
    torch.manual_seed(0)
    vae = StreamingVAE.from_config(CONFIGS[name]).eval().requires_grad_(False)
    for key, parameter in vae.named_parameters():
        if key.endswith("gamma"):
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    vae.vae.decoder.conv_out.weight.mul_(0.3)
    return vae


@cache
def clip(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents and what diffusers decodes from them; pixels and what it encodes from them, normalised."""
    vae, generator = build(name), torch.Generator().manual_seed(1)
    latents = torch.randn(2, LATENTS, 16, 2, 3, generator=generator)
    size = (2 * vae.spatial_factor, 3 * vae.spatial_factor)
    pixels = torch.rand(2, 4 * LATENTS - 3, 3, *size, generator=generator) * 2 - 1
    decoded = vae.vae.decode(raw(vae, latents)).sample.transpose(1, 2)
    assert decoded.abs().max() < 1
    mode = vae.vae.encode(pixels.transpose(1, 2)).latent_dist.mode()
    return latents, decoded, pixels, ((mode - mean(vae)) / std(vae)).transpose(1, 2)


def mean(vae: StreamingVAE) -> Tensor:
    return torch.tensor(vae.vae.config.latents_mean).view(1, -1, 1, 1, 1)


def std(vae: StreamingVAE) -> Tensor:
    return torch.tensor(vae.vae.config.latents_std).view(1, -1, 1, 1, 1)


def raw(vae: StreamingVAE, latents: Tensor) -> Tensor:
    """As diffusers wants latents: un-normalised, channels first."""
    return latents.transpose(1, 2) * std(vae) + mean(vae)


def partition(chunking: list[int]) -> list[int]:
    """The first sizes that fit into the clip, and the rest of it."""
    sizes: list[int] = []
    for size in chunking:
        sizes.append(min(size, LATENTS - sum(sizes)))
    return [size for size in [*sizes, LATENTS - sum(sizes)] if size]


def decode_chunks(vae: StreamingVAE, chunks: list[Tensor], state: VAEState | None = None) -> list[Tensor]:
    pixels = []
    for chunk in chunks:
        frames, state = vae.decode(chunk, state)
        pixels.append(frames)
    return pixels


def encode_chunks(vae: StreamingVAE, chunks: list[Tensor], state: VAEState | None = None) -> list[Tensor]:
    latents = []
    for chunk in chunks:
        frames, state = vae.encode(chunk, state)
        latents.append(frames)
    return latents


@every_config
@settings(max_examples=12, deadline=None)
@given(chunking=chunkings)
def test_decoding_any_chunks_equals_diffusers_offline(name: str, chunking: list[int]) -> None:
    latents, expected, _, _ = clip(name)
    found = decode_chunks(build(name), list(latents.split(partition(chunking), dim=1)))
    assert [frames.shape[1] for frames in found[1:]] == [4 * size for size in partition(chunking)[1:]]
    assert (torch.cat(found, dim=1) - expected).abs().max() <= 1e-5


@every_config
@settings(max_examples=12, deadline=None)
@given(chunking=chunkings)
def test_encoding_any_chunks_equals_diffusers_offline(name: str, chunking: list[int]) -> None:
    _, _, pixels, expected = clip(name)
    first, *later = partition(chunking)
    sizes = [4 * first - 3, *(4 * size for size in later)]
    found = encode_chunks(build(name), list(pixels.split(sizes, dim=1)))
    assert (torch.cat(found, dim=1) - expected).abs().max() <= 1e-5


@every_config
def test_a_state_restored_from_disk_continues_with_the_same_bits(name: str, tmp_path: Path) -> None:
    vae, (latents, _, pixels, _) = build(name), clip(name)
    _, decoding = vae.decode(latents[:, :3])
    _, encoding = vae.encode(pixels[:, :9])
    restored = []
    for index, state in enumerate((decoding, encoding)):
        save_file(state.state_dict(), tmp_path / f"{index}.safetensors")
        restored.append(VAEState.from_state_dict(load_file(tmp_path / f"{index}.safetensors")))
        assert restored[-1].latents_seen == 3
    assert torch.equal(vae.decode(latents[:, 3:], restored[0])[0], vae.decode(latents[:, 3:], decoding)[0])
    assert torch.equal(vae.encode(pixels[:, 9:], restored[1])[0], vae.encode(pixels[:, 9:], encoding)[0])


@every_config
def test_a_chunk_leaves_the_state_before_it_as_it_was(name: str) -> None:
    vae, (latents, *_) = build(name), clip(name)
    _, state = vae.decode(latents[:, :2])
    once, _ = vae.decode(latents[:, 2:4], state)
    again, _ = vae.decode(latents[:, 2:4], state)
    assert torch.equal(once, again)


@every_config
def test_bytes_per_stream_are_known_before_and_never_grow(name: str) -> None:
    vae, state = build(name), None
    size = (2 * vae.spatial_factor, vae.spatial_factor)
    for seen in range(1, 101):
        _, state = vae.decode(torch.randn(1, 1, 16, 2, 1), state)
        assert state.latents_seen == seen
        if seen in (1, 3, 30, 100):
            assert state.bytes() == vae.bytes_per_stream(*size)
            held = sum(context.untyped_storage().nbytes() for context in state.contexts)
            assert held == state.bytes(), "a context is a view that holds more than itself"
    assert vae.bytes_per_stream(*size, batch=3) == 3 * vae.bytes_per_stream(*size)
    _, encoding = vae.encode(torch.zeros(2, 5, 3, *size))
    assert encoding.bytes() == vae.encoder_bytes_per_stream(*size, batch=2)


@every_config
def test_a_later_latent_changes_no_earlier_pixel(name: str) -> None:
    vae, (latents, *_) = build(name), clip(name)
    changed = latents.clone()
    changed[:, 4] += 1.0
    before, after = vae.decode(latents)[0], vae.decode(changed)[0]
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13:], after[:, 13:])


@every_config
def test_a_later_frame_changes_no_earlier_latent(name: str) -> None:
    vae, (_, _, pixels, _) = build(name), clip(name)
    changed = pixels.clone()
    changed[:, 13] *= -1.0
    before, after = vae.encode(pixels)[0], vae.encode(changed)[0]
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("chunking", [[3], [1, 2]])
@every_config
def test_gradients_equal_those_through_diffusers(name: str, chunking: list[int]) -> None:
    """Also across chunks: the state carries the graph of the chunks before."""
    vae, latents = build(name), clip(name)[0][:, :3]
    weight = vae.vae.decoder.mid_block.resnets[0].conv1.weight.requires_grad_()
    ours, theirs = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    expected = vae.vae.decode(raw(vae, theirs)).sample.transpose(1, 2)
    found = torch.cat(decode_chunks(vae, list(ours.split(chunking, dim=1))), dim=1)
    target = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    wanted = torch.autograd.grad((expected - target).square().mean(), [theirs, weight])
    for mine, reference in zip(
        torch.autograd.grad((found - target).square().mean(), [ours, weight]), wanted, strict=True
    ):
        assert reference.norm() > 0
        assert (mine - reference).norm() <= 1e-4 * reference.norm()
    weight.requires_grad_(False)


def test_a_detached_state_carries_no_gradient() -> None:
    vae, latents = build("wan2.1"), clip("wan2.1")[0][:, :3].clone().requires_grad_()
    _, state = vae.decode(latents[:, :2])
    pixels, _ = vae.decode(latents[:, 2:], state.detach())
    (gradient,) = torch.autograd.grad(pixels.sum(), latents)
    assert gradient[:, 2].abs().sum() > 0
    assert gradient[:, :2].abs().sum() == 0


@every_config
def test_training_entrances_agree_with_diffusers_posterior(name: str) -> None:
    vae, (latents, decoded, pixels, _) = build(name), clip(name)
    posterior = vae.vae.encode(pixels.transpose(1, 2)).latent_dist
    mean_found, logvar = vae.encode_moments(pixels)
    assert (mean_found.transpose(1, 2) - posterior.mean).abs().max() <= 1e-5
    assert (logvar.transpose(1, 2) - posterior.logvar).abs().max() <= 1e-5
    unclamped = vae.decode_raw(raw(vae, latents).transpose(1, 2))
    assert (unclamped - decoded).abs().max() <= 1e-5


def test_only_decode_clamps_pixels() -> None:
    vae, latents = copy.deepcopy(build("wan2.1")), clip("wan2.1")[0]
    vae.vae.decoder.conv_out.weight.mul_(10.0)
    unclamped = vae.decode_raw(raw(vae, latents).transpose(1, 2))
    assert unclamped.abs().max() > 2
    assert torch.equal(unclamped.clamp(-1, 1), vae.decode(latents)[0])


def test_half_precision_keeps_the_statistics_exact() -> None:
    """Casting the module to bf16 must not round latents_mean and latents_std."""
    vae = StreamingVAE.from_config(CONFIGS["wan2.1"]).to(torch.bfloat16).eval()
    pixels = torch.zeros(1, 1, 3, 16, 16)
    with torch.no_grad():
        latents, state = vae.encode(pixels)
        raw_mean, _ = vae.encode_moments(pixels)
        decoded, _ = vae.decode(latents)
        undone = vae.decode_raw(raw(vae, latents).transpose(1, 2))
    assert decoded.dtype == state.contexts[0].dtype == torch.bfloat16
    expected = (raw_mean.float().transpose(1, 2) - mean(vae)) / std(vae)
    assert torch.equal(latents, expected.transpose(1, 2))
    assert torch.equal(decoded, undone.clamp(-1, 1))
    assert vae.encoder_bytes_per_stream(16, 16) == state.bytes()


def test_from_pretrained_reads_a_diffusers_folder(tmp_path: Path) -> None:
    vae, (latents, *_) = build("patched"), clip("patched")
    vae.vae.save_pretrained(tmp_path / "vae")
    loaded = StreamingVAE.from_pretrained(tmp_path / "vae")
    assert torch.equal(loaded.decode(latents)[0], vae.decode(latents)[0])
    assert StreamingVAE.from_pretrained(tmp_path / "vae", torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        StreamingVAE.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(("frames", "started"), [(4, False), (0, False), (5, True), (1, True), (0, True)])
def test_a_wrong_number_of_frames_is_refused(frames: int, started: bool) -> None:
    vae = build("wan2.1")
    state = vae.encode(torch.zeros(1, 1, 3, 16, 16))[1] if started else None
    with pytest.raises(ValueError, match=f"number of frames must be .*, got {frames}"):
        vae.encode(torch.zeros(1, frames, 3, 16, 16), state)


def test_wrong_shapes_and_foreign_states_are_refused() -> None:
    vae = build("wan2.1")
    _, decoding = vae.decode(torch.zeros(1, 1, 16, 2, 2))
    with pytest.raises(ValueError, match="multiples of 8, got 16x20"):
        vae.encode(torch.zeros(1, 1, 3, 16, 20))
    with pytest.raises(ValueError, match="multiples of 8, got 12x16"):
        vae.bytes_per_stream(12, 16)
    with pytest.raises(ValueError, match=r"expected \[B, T, 3, H, W\]"):
        vae.encode(torch.zeros(1, 3, 1, 16, 16))
    for shape in [(1, 1, 8, 2, 2), (1, 0, 16, 2, 2)]:
        with pytest.raises(ValueError, match=r"latents: expected \[B, n, 16, h, w\]"):
            vae.decode(torch.zeros(shape))
    for shape in [(2, 1, 16, 2, 2), (1, 1, 16, 2, 3)]:
        with pytest.raises(ValueError, match="VAE state"):
            vae.decode(torch.zeros(shape), decoding)
    with pytest.raises(ValueError, match="VAE state"):
        vae.encode(torch.zeros(1, 4, 3, 16, 16), decoding)
    with pytest.raises(ValueError, match=r"context\.3 is missing"):
        VAEState.from_state_dict({k: v for k, v in decoding.state_dict().items() if k != "context.3"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"patch_size": 2},
        {"scale_factor_spatial": 16},
        {"scale_factor_temporal": 8},
        {"temperal_downsample": [True, True]},
        {"latents_mean": [0.0]},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_config_that_contradicts_itself_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="vae config: "):
        StreamingVAE.from_config({**CONFIGS["wan2.1"], **wrong})
