"""The optimiser of matrices, beside torch's own and beside singular values."""

import pytest
import torch
from torch import nn

from reelway.actors.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 48, 16), (2, 16, 48)])
def test_singular_values_come_near_one_and_their_vectors_stay(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrices)
    assert found.dtype == matrices.dtype
    for before, after in zip(matrices, found, strict=True):
        left, values, right = torch.linalg.svd(before.double(), full_matrices=False)
        turned = left.T @ after.double() @ right.T
        large = values > 0.1 * values[0]
        assert turned.diagonal()[large].min() > 0.6
        assert turned.diagonal().max() < 1.3
        torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=0.05)


def test_updates_are_those_of_torch() -> None:
    """torch computes the iteration in bfloat16, so the same to a few hundredths of an update."""
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator) for shape in ((12, 20), (20, 12), (12, 20))]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    optimizers = (
        Muon(ours, 0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(5):
        gradients = [torch.randn(value.shape, generator=generator) for value in start]
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
    for before, mine, other in zip(start, ours, theirs, strict=True):
        moved = (other - before).norm()
        assert (mine - other).norm() < 0.05 * moved


def test_a_weight_without_a_gradient_stays() -> None:
    still, moved = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moved.grad = torch.eye(4)
    Muon([still, moved], 0.1).step()
    assert torch.equal(still, torch.ones(4, 4))
    assert not torch.equal(moved, still)
