"""What a learner trains with: an engine, which holds a network, its optimisers and its average, and its ranks.

`TorchEngine` and `OneRank` are the plain versions: one process, CPU or one GPU, torch alone.
"""

import copy
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..kernels.precision import fast_dtype
from .muon import Muon

SMALLEST_MATRIX = 8  # weights with a side below this are no matrices for Muon
FILE = "engine.pt"

Number = TypeVar("Number", int, float)


class Engine(Protocol):
    """Trains one network, in one process or over many. Every rank makes the same calls in the same order."""

    network: nn.Module  # what a forward pass calls; a wrapped module where weights are sharded
    device: torch.device
    updates: int  # optimiser steps done

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of a forward pass."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. `loss` is scaled already: an update's losses sum to the rank's part of the mean.

        Gradients are averaged over ranks, so a rank's part counts `size` times its share of the whole batch.
        """
        ...

    def step(self) -> dict[str, float]:
        """Clip, optimise, average; returns gradient_norm (before the clipping) and learning_rate.

        FloatingPointError where a loss or a gradient was not finite: nothing is changed then.
        """
        ...

    def weights(self) -> dict[str, Tensor]:
        """All weights, whole, fp32, on the CPU. Every rank must call; only rank 0 must use the result."""
        ...

    def averaged_weights(self) -> dict[str, Tensor]:
        """Their moving average, as `weights`."""
        ...

    def save(self, folder: Path) -> None:
        """Write all that training needs to go on. Every rank must call."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. FileNotFoundError where nothing is."""
        ...


class Ranks(Protocol):
    """The processes of one training, and what they must agree on. Every rank makes the same calls."""

    rank: int
    size: int

    def broadcast(self, value: Number) -> Number:
        """Rank 0's value, on every rank."""
        ...

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over ranks of each value; every rank gives the same names."""
        ...

    def share(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank; every rank gives one of the same shape, dtype and kind of device."""
        ...

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, in order, on every rank."""
        ...

    def barrier(self) -> None:
        """Wait for all."""
        ...


class OneRank:
    """A training of one process."""

    rank = 0
    size = 1

    def broadcast(self, value: Number) -> Number:
        return value

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        return values

    def share(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, text: str) -> list[str]:
        return [text]

    def barrier(self) -> None:
        pass


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
    """Trains one network in one process.

    precision: of matrix products in a forward pass, the fast one by default; float32 switches autocast off. Without
    an `ema_decay` the average is the network itself, and costs no memory.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: OptimizerSettings,
        device: torch.device | str = "cpu",
        precision: torch.dtype | None = None,
    ) -> None:
        self.network = network.to(device)
        self.settings = settings
        self.device = torch.device(device)
        self.precision = precision or fast_dtype(device)
        self.updates = 0
        averages = settings.ema_decay > 0
        self.average = copy.deepcopy(self.network).requires_grad_(False) if averages else self.network
        self._loss: Tensor | None = None  # of the update that is being accumulated
        matrices = _matrices(self.network) if settings.muon else []
        # Muon takes matrices: a kernel enters as a view [outputs, the rest] of its own memory.
        self._views = [(weight, nn.Parameter(weight.detach().flatten(1))) for weight in matrices]
        self._optimizers = _optimizers(self.network, self._views, settings)

    def autocast(self) -> torch.autocast:
        """`precision` for what is safe in it, on any device."""
        enabled = self.precision in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.precision if enabled else torch.bfloat16, enabled=enabled)

    def update(self, loss: Tensor) -> dict[str, float]:
        """One optimiser step on one loss, see `step`."""
        self._forget()
        self.backward(loss)
        return {"loss": loss.item(), **self.step()}

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        detached = loss.detach().double()
        self._loss = detached if self._loss is None else self._loss + detached

    def step(self) -> dict[str, float]:
        assert self._loss is not None, "a step without a backward"
        loss = self._loss
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip_norm)
        if not bool(torch.isfinite(norm) & torch.isfinite(loss)):
            self._forget()
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
        self._forget()
        return {"gradient_norm": norm.item(), "learning_rate": rate}

    def weights(self) -> dict[str, Tensor]:
        return _whole(self.network)

    def averaged_weights(self) -> dict[str, Tensor]:
        return _whole(self.average)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / FILE)

    def load(self, folder: Path) -> None:
        if not (folder / FILE).is_file():
            raise FileNotFoundError(f"{folder / FILE}: no such file; the checkpoint is not one of the plain engine")
        self.load_state_dict(torch.load(folder / FILE, map_location="cpu", weights_only=True))

    def _forget(self) -> None:
        """Drop what is accumulated."""
        self.network.zero_grad(set_to_none=True)
        self._loss = None

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights; early on it forgets faster, so that it never lags far behind."""
        if self.average is self.network:
            return
        decay = min(self.settings.ema_decay, (1 + self.updates) / (10 + self.updates))
        pairs = (list(self.average.parameters()), list(self.network.parameters()))
        torch._foreach_lerp_(*pairs, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        averages = self.average is not self.network
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict() if averages else {},
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.average is not self.network:
            self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.updates = state["updates"]


def computed_dtype(engine: Engine) -> torch.dtype:
    """What an engine's forward pass computes matrix products in."""
    with engine.autocast():
        if torch.is_autocast_enabled(engine.device.type):
            return torch.get_autocast_dtype(engine.device.type)
    return next(engine.network.parameters()).dtype


def _whole(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights, fp32, on the CPU."""
    state = network.state_dict()
    return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in state.items()}


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
    muon = Muon([view for _, view in views], rate, decay)
    return [adamw, muon]
