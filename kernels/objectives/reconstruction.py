"""Training a VAE on pixels (arXiv 1312.6114; the small KL weight is latent diffusion's, arXiv 2112.10752)."""

from typing import NamedTuple

import torch
from torch import Tensor


class Reconstruction(NamedTuple):
    """loss: scalar to descend. absolute, square, edge, kl: its unweighted terms, scalar and detached."""

    loss: Tensor
    absolute: Tensor
    square: Tensor
    edge: Tensor
    kl: Tensor


def reconstruction_loss(
    pixels: Tensor,
    decoded: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    absolute_weight: float = 1.0,
    square_weight: float = 1.0,
    edge_weight: float = 1.0,
    kl_weight: float = 1e-6,
) -> Reconstruction:
    """Weighted sum of four means over all elements, in fp32 or better.

    pixels, decoded: [B, T, 3, H, W] in [-1, 1]; `decoded` not clamped, or its gradient dies outside.
    mean, logvar: the posterior, [B, n, C, h, w], from which the decoded latents were drawn.
    absolute_weight: of |error|, which keeps colours of flat areas exact.
    square_weight: of error², which finds the few pixels that are far off.
    edge_weight: of |error of the image's gradient|, which keeps outlines sharp (arXiv 1511.05440).
    kl_weight: of the divergence from N(0, 1) in nats per latent element. It only keeps the latents near unit
        scale: their scale is measured and divided out later, so it is far too small to cost sharpness.
    raises: ValueError where the two clips differ in shape.
    """
    if pixels.shape != decoded.shape:
        raise ValueError(f"decoded: must have the pixels' shape {[*pixels.shape]}, got {[*decoded.shape]}")
    dtype = torch.promote_types(decoded.dtype, torch.float32)
    error = decoded.to(dtype) - pixels.to(dtype)
    absolute, square = error.abs().mean(), error.square().mean()
    edge = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = kl_divergence(mean, logvar)
    loss = absolute_weight * absolute + square_weight * square + edge_weight * edge + kl_weight * kl
    return Reconstruction(loss, absolute.detach(), square.detach(), edge.detach(), kl.detach())


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Of N(mean, exp(logvar)) from N(0, 1), mean over elements, in fp32 or better (arXiv 1312.6114)."""
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, logvar = mean.to(dtype), logvar.to(dtype)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each frame: [..., 3, H, W] in [0, 1] -> [...].

    Infinite where two frames are equal. raises: ValueError where the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"psnr: shapes must be equal, got {[*a.shape]} and {[*b.shape]}")
    square = (a.double() - b.double()).square().mean(dim=(-3, -2, -1))
    return (-10.0 * square.log10()).float()
