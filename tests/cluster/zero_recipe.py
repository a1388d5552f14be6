"""The training that the tests of ZeRO and of its host run, and the same in plain torch to compare with."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

BATCH, RATE, DECAY = 8, 0.01, 0.9


def make_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 17), nn.GELU(), nn.Linear(17, 3))


def samples(step: int) -> tuple[Tensor, Tensor]:
    """The whole batch of a step: [8, 6] and [8, 3]."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(BATCH, 6, generator=generator), torch.randn(BATCH, 3, generator=generator)


def share(step: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    part = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    inputs, targets = samples(step)
    return inputs[part], targets[part]


def error(network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return (network(inputs) - targets).square().mean()


class Plain:
    """AdamW, clipping and averaging without any framework. parts: halves of the batch whose gradients are averaged."""

    def __init__(self, clip_norm: float, parts: int = 2) -> None:
        self.network = make_network()
        self.average = {name: value.detach().clone() for name, value in self.network.named_parameters()}
        self.clip_norm, self.parts = clip_norm, parts
        self.optimizer = torch.optim.AdamW(self.network.parameters(), RATE, weight_decay=0.01, fused=True)

    def run(self, steps: int) -> Iterator[tuple[float, float]]:
        """Loss and gradient norm of every update."""
        parameters = list(self.network.parameters())
        for step in range(steps):
            losses = [error(self.network, *share(step, part, self.parts)) for part in range(self.parts)]
            gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
            for parameter, parts in zip(parameters, zip(*gradients, strict=True), strict=True):
                parameter.grad = torch.stack(parts).sum(0) / self.parts
            norm = nn.utils.clip_grad_norm_(parameters, self.clip_norm)
            self.optimizer.step()
            decay = min(DECAY, (2 + step) / (11 + step))
            torch._foreach_lerp_(list(self.average.values()), [value.detach() for value in parameters], 1 - decay)
            yield sum(map(Tensor.item, losses)) / self.parts, float(norm)
