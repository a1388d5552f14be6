"""The self-test of every causal training: what a block makes may not depend on the frames after it.

One argument left out turns block-causal attention into bidirectional attention, and the loss falls all the better
for it; only the rollout shows. So each training tries it, in the forward pass that it trains, before its first step.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor], Tensor]


class CausalityError(RuntimeError):
    """The forward pass that trains lets a frame see later ones."""


def check_causality(forward: Forward, latents: Tensor, timesteps: Tensor, block_sizes: Sequence[int]) -> None:
    """Change everything from a block's edge on and compare what comes before it, bit by bit, for every edge.

    forward: latents [B, F, C, H, W] and timesteps [B, F] to outputs [B, F, ...]. Raises CausalityError with the
    first edge that leaks.
    """
    expected = forward(latents, timesteps).detach()
    for edge in list(accumulate(block_sizes))[:-1]:
        changed, levels = latents.clone(), timesteps.clone()
        changed[:, edge:] = 1 - changed[:, edge:]
        levels[:, edge:] = 1000 - levels[:, edge:]
        found = forward(changed, levels).detach()
        if not torch.equal(found[:, :edge], expected[:, :edge]):
            gap = float((found - expected)[:, :edge].abs().max())
            raise CausalityError(
                f"the student sees the future: latent frames from {edge} on change the ones before by up to {gap:.2g}"
            )
