"""Muon: momentum, made orthogonal (Jordan, https://kellerjordan.github.io/posts/muon; scaled as in arXiv 2502.16982).

torch.optim.Muon computes in bfloat16 on every device, which a CPU without bfloat16 instructions does a hundred times
slower than float32. This one computes in the precision that is fast, and all matrices of one shape at once.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..kernels.precision import fast_dtype

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: steepest at 0, and it keeps (0, 1] within about (0.7, 1.2)
LIKE_ADAM = 0.2  # root mean square of AdamW's updates, in learning rates


class Muon(torch.optim.Optimizer):
    """For matrices: Nesterov momentum, its singular values brought to about 1, scaled to the size of AdamW's."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(list(weights), {"lr": lr, "weight_decay": weight_decay})
        assert all(weight.ndim == 2 for group in self.param_groups for weight in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.shape].append(weight)
            for weights in alike.values():
                self._step_alike(weights, group["lr"], group["weight_decay"])

    def _step_alike(self, weights: list[nn.Parameter], rate: float, decay: float) -> None:
        """One update of matrices of one shape."""
        directions = []
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            momentum = state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
            directions.append(torch.lerp(weight.grad, momentum, MOMENTUM))
        updates = orthogonal(torch.stack(directions))
        size = LIKE_ADAM * max(weights[0].shape) ** 0.5
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(1 - rate * decay).add_(update, alpha=-rate * size)


def orthogonal(matrices: Tensor) -> Tensor:
    """[N, A, B] with every singular value brought to about 1 (0.7 to 1.2), by a Newton-Schulz iteration."""
    values = matrices.to(fast_dtype(matrices.device))
    is_tall = values.shape[1] > values.shape[2]
    values = values.mT if is_tall else values
    values = values / values.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    first, second, third = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = values @ values.mT
        values = torch.baddbmm(values, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), values, beta=first)
    return (values.mT if is_tall else values).to(matrices.dtype)
