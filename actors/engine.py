"""The plain engine: one process, CPU or one GPU, torch alone. Holds a network, its optimisers and its average."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST_MATRIX = 8  # weights with a side below this are no matrices for Muon


@dataclass(frozen=True)
class OptimizerSettings:
    """Muon (momentum made orthogonal, arXiv 2502.16982) for matrices and kernels, AdamW for everything else.

    The learning rate is AdamW's for both: Muon's updates are scaled to the size of AdamW's. It rises over
    `warmup_steps`, then falls as a cosine to `final_share` of itself. muon False: AdamW for all.
    """

    learning_rate: float
    total_steps: int
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup_steps: int = 0
    final_share: float = 1.0
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    muon: bool = False

    def rate(self, step: int) -> float:
        """Learning rate of the update after `step` updates."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        share = self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * share


class TorchEngine:
    """Trains one network in one process."""

    def __init__(self, network: nn.Module, settings: OptimizerSettings, device: torch.device | str = "cpu") -> None:
        self.network = network.to(device)
        self.settings = settings
        self.device = torch.device(device)
        self.updates = 0
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        matrices = _matrices(self.network) if settings.muon else []
        # torch's Muon takes matrices: a kernel enters as a view [outputs, the rest] of its own memory.
        self._views = [(weight, nn.Parameter(weight.detach().flatten(1))) for weight in matrices]
        self._optimizers = _optimizers(self.network, self._views, settings)

    def autocast(self) -> torch.autocast:
        """bfloat16 for what is safe in it, on any device."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def update(self, loss: Tensor) -> dict[str, float]:
        """One optimiser step. FloatingPointError if the loss or a gradient is not finite: nothing is changed then."""
        self.network.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip_norm)
        if not bool(torch.isfinite(norm) & torch.isfinite(loss.detach())):
            raise FloatingPointError(f"update {self.updates}: loss {loss.item()}, gradient norm {norm.item()}")
        rate = self.settings.rate(self.updates)
        for weight, view in self._views:
            view.grad = None if weight.grad is None else weight.grad.flatten(1)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.updates += 1
        self._follow()
        return {"loss": loss.item(), "gradient_norm": norm.item(), "learning_rate": rate}

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights; early on it forgets faster, so that it never lags far behind."""
        decay = min(self.settings.ema_decay, (1 + self.updates) / (10 + self.updates))
        pairs = (list(self.average.parameters()), list(self.network.parameters()))
        torch._foreach_lerp_(*pairs, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.updates = state["updates"]


def _matrices(network: nn.Module) -> list[nn.Parameter]:
    """Weights that act as matrices: linear maps and kernels, not embeddings, gains, biases or tables."""
    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    weights = (parameter for parameter in network.parameters() if parameter.ndim >= 2)
    return [
        weight
        for weight in weights
        if id(weight) not in embeddings and min(weight.shape[0], weight[0].numel()) >= SMALLEST_MATRIX
    ]


def _optimizers(
    network: nn.Module, views: list[tuple[nn.Parameter, nn.Parameter]], settings: OptimizerSettings
) -> list[torch.optim.Optimizer]:
    rate, decay = settings.learning_rate, settings.weight_decay
    matrices = {id(weight) for weight, _ in views}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in matrices]
    adamw = torch.optim.AdamW(rest, rate, settings.betas, weight_decay=decay, fused=True)
    if not views:
        return [adamw]
    muon = torch.optim.Muon([view for _, view in views], rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]
