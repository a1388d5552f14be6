"""The VAE's training loss against closed forms, and PSNR against its definition."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from reelway.kernels.objectives.reconstruction import kl_divergence, psnr, reconstruction_loss

NO_WEIGHTS = {"absolute_weight": 0.0, "square_weight": 0.0, "edge_weight": 0.0, "kl_weight": 0.0}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    pixels, decoded = torch.rand(2, 2, 5, 3, 6, 8) * 2 - 1
    mean, logvar = torch.randn(2, 2, 2, 4, 3, 4)
    return pixels, decoded, mean, logvar


def test_terms_equal_their_definitions(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    pixels, decoded, mean, logvar = batch
    found = reconstruction_loss(*batch)
    error = (decoded - pixels).double().numpy()
    assert found.absolute.item() == pytest.approx(abs(error).mean(), rel=1e-5)
    assert found.square.item() == pytest.approx((error**2).mean(), rel=1e-5)
    across = abs(error[..., 1:] - error[..., :-1]).mean()
    down = abs(error[..., 1:, :] - error[..., :-1, :]).mean()
    assert found.edge.item() == pytest.approx(across + down, rel=1e-5)
    normal = Normal(mean.double(), (0.5 * logvar.double()).exp())
    expected = exact_kl(normal, Normal(torch.zeros_like(normal.mean), torch.ones_like(normal.mean))).mean()
    assert found.kl.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["absolute", "square", "edge", "kl"])
def test_each_weight_scales_its_own_term(name: str, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    found = reconstruction_loss(*batch, **{**NO_WEIGHTS, f"{name}_weight": 3.0})
    assert found.loss.item() == pytest.approx(3.0 * found._asdict()[name].item())


def test_a_perfect_clip_at_the_prior_costs_nothing() -> None:
    pixels, zeros = torch.rand(1, 3, 3, 4, 4), torch.zeros(1, 1, 2, 1, 1)
    assert reconstruction_loss(pixels, pixels, zeros, zeros).loss.item() == 0.0


def test_a_constant_shift_has_no_edges() -> None:
    pixels, zeros = torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 1, 2, 1, 1)
    found = reconstruction_loss(pixels, pixels + 0.25, zeros, zeros)
    assert (found.absolute.item(), found.square.item(), found.edge.item()) == (0.25, 0.0625, 0.0)


def test_gradients_reach_the_decoded_pixels_and_the_posterior(
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    pixels, *learned = batch
    leaves = [tensor.clone().requires_grad_() for tensor in learned]
    gradients = torch.autograd.grad(reconstruction_loss(pixels, *leaves).loss, leaves)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_half_precision_is_summed_in_fp32() -> None:
    mean = torch.full((1, 2, 16, 40, 40), 300.0, dtype=torch.float16)  # 300² overflows fp16
    assert kl_divergence(mean, torch.zeros_like(mean)).item() == pytest.approx(0.5 * 300.0**2)
    white = torch.ones(1, 1, 3, 4, 4, dtype=torch.bfloat16)
    zeros = torch.zeros(1, 1, 2, 1, 1, dtype=torch.bfloat16)
    assert reconstruction_loss(white, -white, zeros, zeros).loss.dtype == torch.float32


@pytest.mark.parametrize(("error", "decibels"), [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0)])
def test_psnr_of_a_known_error(error: float, decibels: float) -> None:
    a = torch.zeros(2, 3, 3, 4, 4)
    found = psnr(a, a + error)
    assert found.shape == (2, 3)
    assert found.flatten().tolist() == pytest.approx([decibels] * 6, abs=1e-4)


def test_psnr_is_per_frame_and_infinite_for_equal_frames() -> None:
    a = torch.rand(1, 2, 3, 4, 4)
    b = a.clone()
    b[0, 1, 0, 0, 0] = 1.0 - b[0, 1, 0, 0, 0].round()
    error = (a - b)[0, 1, 0, 0, 0].item()
    assert psnr(a, b)[0, 0].item() == math.inf
    assert psnr(a, b)[0, 1].item() == pytest.approx(10 * math.log10(48 / error**2), abs=1e-3)


def test_different_shapes_are_refused_not_broadcast() -> None:
    a, zeros = torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 1, 2, 1, 1)
    with pytest.raises(ValueError, match="shapes must be equal"):
        psnr(a, a[:, :1])
    with pytest.raises(ValueError, match="must have the pixels' shape"):
        reconstruction_loss(a, a[:, :1], zeros, zeros)
