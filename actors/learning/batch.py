"""What a training step is given, and draws that belong to a sample and a step, whoever makes them."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.diffusion.noise import SampleKey, draw_noise, sample_generator
from ...kernels.wan.context import TextContext
from ..engine import Ranks

PromptEncoder = Callable[[Sequence[str]], TextContext]


@dataclass(frozen=True)
class Batch:
    """One process's part of a step's batch.

    positions: the samples' places in the whole batch of `total` samples. keys: their names, for messages.
    latents: [B, F, C, H, W], or trajectories [B, K + 1, F, C, H, W], noise to clean; None for methods without data.
    """

    step: int
    total: int
    positions: range
    keys: tuple[str, ...]
    prompts: tuple[str, ...]
    latents: Tensor | None = None

    def __post_init__(self) -> None:
        assert len(self.positions) == len(self.keys) == len(self.prompts) > 0, self.positions
        assert self.positions.stop <= self.total, (self.positions, self.total)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, rows: slice) -> "Batch":
        latents = None if self.latents is None else self.latents[rows]
        return Batch(self.step, self.total, self.positions[rows], self.keys[rows], self.prompts[rows], latents)

    def micro_batches(self, size: int | None) -> "Iterator[Batch]":
        """Parts of at most `size` samples, in order; None is all at once."""
        size = size or len(self)
        return (self[start : start + size] for start in range(0, len(self), size))


@dataclass(frozen=True)
class Draws:
    """The random choices of one step. Each sample has its own, named by `purpose`, whatever the rest of the batch."""

    seed: int
    step: int

    def generator(self, position: int, purpose: str) -> torch.Generator:
        """For the few scalar choices of the sample at `position`."""
        return sample_generator(self.seed, self._name(purpose), position)

    def noise(
        self, positions: range, frames: range, frame_shape: Sequence[int], purpose: str, level: int = 0
    ) -> Tensor:
        """Standard normal [B, F, *frame_shape], fp32 on the CPU. level: counts the timesteps of a sampler."""
        keys = [SampleKey(self.seed, self._name(purpose), position) for position in positions]
        return draw_noise(keys, frames, frame_shape, level)

    def noise_like(self, latents: Tensor, positions: range, purpose: str) -> Tensor:
        """Noise for `latents` [B, F, C, H, W], with their dtype and device."""
        return self.noise(positions, range(latents.shape[1]), latents.shape[2:], purpose).to(latents)

    def _name(self, purpose: str) -> str:
        return f"{purpose} of training step {self.step}"


class PromptContexts:
    """Text contexts of prompts, each encoded once: the last `capacity` are kept, on the CPU.

    A prompt is encoded by itself, so that its context does not depend on the rest of its batch.
    """

    def __init__(self, encode: PromptEncoder, device: torch.device | str, capacity: int = 4096) -> None:
        self._encode = encode
        self._device = device
        self._capacity = capacity
        self._kept: OrderedDict[str, TextContext] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> TextContext:
        return TextContext.concatenate([self._one(prompt) for prompt in prompts]).to(self._device)

    @torch.no_grad()
    def _one(self, prompt: str) -> TextContext:
        if prompt not in self._kept:
            self._kept[prompt] = self._encode([prompt]).to("cpu")
            if len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        self._kept.move_to_end(prompt)
        return self._kept[prompt]


class Tally:
    """Means by name over a step's micro-batches and ranks, where not every one of them has something to say."""

    def __init__(self, names: Sequence[str]) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._names = list(names)

    def add(self, name: str, values: Tensor) -> None:
        """Count every element of `values` in."""
        assert name in self._names, name
        self._sums[name] += float(values.double().sum())
        self._counts[name] += values.numel()

    def means(self, ranks: Ranks) -> dict[str, float]:
        """The means over all ranks, on every rank; names of which nobody said anything are left out."""
        entries = {f"{name} {kind}": table[name] for name in self._names for kind, table in self._tables()}
        agreed = ranks.mean(entries)
        pairs = ((name, agreed[f"{name} sum"], agreed[f"{name} count"]) for name in self._names)
        return {name: total / count for name, total, count in pairs if count}

    def _tables(self) -> list[tuple[str, defaultdict[str, float]]]:
        return [("sum", self._sums), ("count", self._counts)]


def as_latents(latents: Tensor | None, device: torch.device) -> Tensor:
    """A batch's latents on the device, fp32 or better."""
    assert latents is not None, "the method trains on data, the batch has none"
    return latents.to(device, torch.promote_types(latents.dtype, torch.float32))
