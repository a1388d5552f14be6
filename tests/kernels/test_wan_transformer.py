"""The transformer against diffusers' WanTransformer3DModel, with the same random weights."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from reelway.kernels.wan.config import CONFIGS, TransformerConfig
from reelway.kernels.wan.context import TextContext
from reelway.kernels.wan.transformer import VideoTransformer, sinusoid

SMALL = TransformerConfig(
    num_attention_heads=2, attention_head_dim=24, ffn_dim=80, num_layers=3, text_dim=32, freq_dim=32
)
SHAPES = [(1, 1, 4, 4), (2, 3, 8, 6), (1, 5, 2, 12)]  # batch, frames, height, width


def pair(config: TransformerConfig) -> tuple[VideoTransformer, WanTransformer3DModel]:
    """Ours and diffusers', with equal weights. Biases and norms are made random, so that none can be forgotten."""
    torch.manual_seed(0)
    ours = VideoTransformer(config).requires_grad_(False)
    for parameter in ours.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs = WanTransformer3DModel.from_config(config.to_diffusers()).requires_grad_(False).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def inputs(config: TransformerConfig, shape: tuple[int, ...], rows: int = 7) -> tuple[Tensor, Tensor]:
    batch, frames, height, width = shape
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, frames, config.in_channels, height, width, generator=generator)
    return latents, torch.randn(batch, rows, config.text_dim, generator=generator)


def reference(model: WanTransformer3DModel, latents: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
    output = model(latents.transpose(1, 2), timesteps, rows, return_dict=False)[0]
    return output.transpose(1, 2)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_uniform_timesteps_equal_diffusers(shape: tuple[int, ...]) -> None:
    ours, theirs = pair(SMALL)
    latents, rows = inputs(SMALL, shape)
    timesteps = torch.linspace(937.5, 311.0, shape[0])
    expected = reference(theirs, latents, timesteps, rows)
    found = ours(latents, timesteps[:, None].expand(-1, shape[1]), TextContext.dense(rows))
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_per_frame_timesteps_equal_diffusers_per_token_path(shape: tuple[int, ...]) -> None:
    ours, theirs = pair(SMALL)
    latents, rows = inputs(SMALL, shape)
    timesteps = torch.rand(shape[:2], generator=torch.Generator().manual_seed(2)) * 1000
    per_token = timesteps.repeat_interleave(SMALL.tokens_per_frame(*shape[2:]), dim=1)
    expected = reference(theirs, latents, per_token, rows)
    assert relative_error(ours(latents, timesteps, TextContext.dense(rows)), expected) <= 1e-5


def test_head_dim_of_wan_equals_diffusers() -> None:
    config = TransformerConfig(num_attention_heads=2, attention_head_dim=128, ffn_dim=64, num_layers=1, text_dim=16)
    assert config.rotary_dims == (44, 42, 42)
    ours, theirs = pair(config)
    # Wan's own code computes the sinusoid in float64, diffusers in float32: here that alone costs 1.4e-5.
    theirs.condition_embedder.timesteps_proj.forward = lambda timesteps: sinusoid(timesteps, 256).float()
    latents, rows = inputs(config, (1, 4, 4, 6))
    timesteps = torch.tensor([833.333])
    expected = reference(theirs, latents, timesteps, rows)
    found = ours(latents, timesteps.expand(1, 4), TextContext.dense(rows))
    assert relative_error(found, expected) <= 1e-5


def test_bfloat16_stays_near_and_keeps_the_exact_parts_in_float32() -> None:
    ours, _ = pair(SMALL)
    latents, rows = inputs(SMALL, (2, 3, 8, 6))
    timesteps = torch.tensor([[1000.0, 937.5, 0.0], [625.0, 833.333, 250.0]])
    context = TextContext.dense(rows)
    expected = ours(latents, timesteps, context)
    half = ours.to_precision(torch.bfloat16)
    assert relative_error(half(latents, timesteps, context), expected) <= 2e-2
    dtypes = {name: parameter.dtype for name, parameter in half.named_parameters()}
    assert dtypes["condition_embedder.time_proj.weight"] == torch.float32
    assert dtypes["blocks.0.scale_shift_table"] == torch.float32
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16


def test_modulation_is_exact_under_bfloat16() -> None:
    """At bfloat16 the timesteps 937.5 and 937 embed alike; they must not."""
    ours, _ = pair(SMALL)
    exact = ours.condition_embedder.time(torch.tensor([[937.5]]), torch.float32)[1]
    half = ours.to_precision(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = half.condition_embedder.time(torch.tensor([[937.5]]), torch.float32)[1]
    assert torch.equal(found, exact)


def test_folded_text_equals_512_zero_padded_rows() -> None:
    ours, theirs = pair(SMALL)
    latents, _ = inputs(SMALL, (3, 2, 4, 4))
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randn(length, SMALL.text_dim, generator=generator) for length in (5, 1, 11)]
    padded = torch.stack([torch.nn.functional.pad(prompt, (0, 0, 0, 512 - len(prompt))) for prompt in prompts])
    timesteps = torch.full((3,), 500.0)
    expected = reference(theirs, latents, timesteps, padded)
    folded = TextContext.fold(prompts)
    assert folded.rows.shape[1] == 12
    assert relative_error(ours(latents, timesteps[:, None].expand(3, 2), folded), expected) <= 1e-5


def test_joined_contexts_give_what_each_gives_alone() -> None:
    ours, _ = pair(SMALL)
    latents, _ = inputs(SMALL, (2, 2, 4, 4))
    contexts = [TextContext.fold([torch.randn(length, SMALL.text_dim)]) for length in (3, 9)]
    timesteps = torch.full((2, 2), 400.0)
    together = ours(latents, timesteps, TextContext.concatenate(contexts))
    alone = torch.cat([ours(latents[i : i + 1], timesteps[:1], contexts[i]) for i in range(2)])
    assert relative_error(together, alone) <= 1e-6


def test_shared_text_keys_change_nothing() -> None:
    ours, _ = pair(SMALL)
    latents, rows = inputs(SMALL, (2, 2, 4, 4))
    context = TextContext.dense(rows)
    timesteps = torch.full((2, 2), 250.0)
    assert torch.equal(ours(latents, timesteps, context), ours(latents, timesteps, ours.text_keys(context)))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    ours, _ = pair(SMALL)
    ours.requires_grad_(True)
    latents, rows = inputs(SMALL, (1, 2, 4, 4))

    def gradients() -> list[Tensor]:
        ours.zero_grad()
        ours(latents, torch.full((1, 2), 700.0), TextContext.dense(rows)).square().sum().backward()
        return [parameter.grad.clone() for parameter in ours.parameters() if parameter.grad is not None]

    plain = gradients()
    assert len(plain) == len(list(ours.parameters()))
    ours.gradient_checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(gradients(), plain, strict=True))


def test_sinusoid_is_cosine_first_and_keeps_fractions() -> None:
    found = sinusoid(torch.tensor([937.5]), 256)[0]
    rate = 10000.0 ** (-3 / 128)
    assert found[0] == pytest.approx(torch.tensor(937.5, dtype=torch.float64).cos().item(), abs=1e-12)
    assert found[128 + 3] == pytest.approx(torch.tensor(937.5 * rate, dtype=torch.float64).sin().item(), abs=1e-12)


def test_wrong_shapes_are_named() -> None:
    ours, _ = pair(SMALL)
    latents, rows = inputs(SMALL, (1, 2, 4, 4))
    with pytest.raises(ValueError, match=r"timesteps: one per latent frame"):
        ours(latents, torch.zeros(1), TextContext.dense(rows))
    with pytest.raises(ValueError, match=r"latent size 4x3 is not a multiple of the patch 2x2"):
        ours(latents[..., :3], torch.zeros(1, 2), TextContext.dense(rows))


@pytest.mark.parametrize(("name", "billions"), [("wan2.1-1.3b", 1.419), ("wan2.1-14b", 14.289)])
def test_published_sizes(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = VideoTransformer(CONFIGS[name])
        theirs = WanTransformer3DModel.from_config(CONFIGS[name].to_diffusers())
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)
