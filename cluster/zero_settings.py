"""What a ZeRO engine is asked for, and what a rank of it must hold (ZeRO, arXiv 1910.02054, sections 3 and 5).

No part of this needs DeepSpeed, so that memory is known before anything starts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Stage = Literal[0, 1, 2, 3]
Precision = Literal["fp32", "autocast", "bf16"]
Place = Literal["none", "cpu"]

LARGEST_BUCKET = 200_000_000  # elements that one reduction or gathering moves at most
LARGEST_LIVE = 1_000_000_000  # elements that stage 3 keeps gathered at a time
PERSISTENT = 100_000  # stage 3 keeps smaller parameters whole: gathering each would cost more than it saves

FULL, HALF = 4, 2  # bytes of an element
MOMENTS = 2  # of AdamW


def check(stage: int, precision: str, offload_optimizer: str, offload_parameters: str) -> None:
    """ValueError naming the field where the parts do not fit."""
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage: must be 0, 1, 2 or 3, got {stage}")
    if precision == "bf16" and stage < 2:
        raise ValueError(f"precision: bf16 weights need stage 2 or 3, got stage {stage}")
    if offload_optimizer != "none" and stage < 1:
        raise ValueError(f"offload_optimizer: needs stage 1, 2 or 3, got stage {stage}")
    if offload_parameters != "none" and stage < 3:
        raise ValueError(f"offload_parameters: needs stage 3, got stage {stage}")


@dataclass(frozen=True)
class ZeroSettings:
    """What one engine is made of. ValueError naming the field where the parts do not fit.

    rate: learning rate of the update after so many updates. stage: 0 replicates everything, 1 shards the optimiser's
    state, 2 the gradients too, 3 the parameters too. precision: "fp32"; "autocast", fp32 weights computed with in
    bfloat16; "bf16", bfloat16 weights beside sharded fp32 masters. ema_decay: 0 keeps no average.
    """

    rate: Callable[[int], float]
    stage: Stage = 2
    precision: Precision = "fp32"
    offload_optimizer: Place = "none"
    offload_parameters: Place = "none"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        check(self.stage, self.precision, self.offload_optimizer, self.offload_parameters)
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm: must be above 0, got {self.clip_norm}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: must be at least 0 and below 1, got {self.ema_decay}")


# --- Working memory -----------------------------------------------------------------------------------------------


def bucket_elements(sizes: Sequence[int]) -> int:
    """Elements of one bucket for parameters of these sizes: a quarter of the network at most, the largest at least.

    DeepSpeed's own sizes would hold a small network whole.
    """
    bucket = max(max(sizes), min(_quarter(sizes), LARGEST_BUCKET))
    return bucket + bucket % 2


def live_elements(sizes: Sequence[int]) -> int:
    """Elements that stage 3 keeps gathered at a time, at most."""
    return min(_quarter(sizes), LARGEST_LIVE)


def _quarter(sizes: Sequence[int]) -> int:
    return max(max(sizes), sum(sizes) // 4)


# --- What must be held --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Division:
    """How a network's training is divided among processes. ValueError as `ZeroSettings`.

    stage None is one plain process: everything in fp32, once.
    """

    stage: Stage | None = None
    ranks: int = 1
    precision: Precision = "fp32"
    offload_optimizer: Place = "none"
    offload_parameters: Place = "none"

    def __post_init__(self) -> None:
        if self.stage is not None:
            check(self.stage, self.precision, self.offload_optimizer, self.offload_parameters)

    def share(self, from_stage: int) -> int:
        """Among how many processes is divided what this stage and the later ones divide."""
        return self.ranks if self.stage is not None and self.stage >= from_stage else 1

    @property
    def weight_bytes(self) -> int:
        """Of an element of the weights that are computed with."""
        return HALF if self.precision == "bf16" else FULL

    def trained(self, parameters: int, *, averages: bool) -> dict[str, int]:
        """Bytes that one process must hold for a trained network of so many parameters, by what they are.

        weights: those computed with. masters: fp32 copies that the optimiser moves, where they are not the weights
        themselves. Stages 1 to 3 keep one flat copy of their part; in stage 3 and fp32 it is the weights' own.
        """
        part = -(-parameters // self.share(1))
        has_masters = self.stage in (1, 2) or self.precision == "bf16"
        return {
            "weights": self.weight_bytes * -(-parameters // self.share(3)),
            "gradients": FULL * -(-parameters // self.share(2)),
            "masters": FULL * part if has_masters else 0,
            "moments": MOMENTS * FULL * part,
            "average": FULL * part if averages else 0,
        }

    def on_host(self, kind: str) -> bool:
        """Whether what `trained` calls by this name lies in host memory."""
        if kind == "weights":
            return self.offload_parameters == "cpu"
        return self.offload_optimizer == "cpu" and kind != "gradients"

    def frozen(self, parameters: int, element: int) -> int:
        """Bytes of a network for forward passes alone, with so many bytes an element: whole, in stage 3 its part."""
        return element * -(-parameters // self.share(3))

    def working(self, sizes: Sequence[int]) -> int:
        """Bytes of DeepSpeed's buffers for parameters of these sizes, at most.

        Two buckets that reduce gradients in turn; in stage 3 the layers that are gathered, too.
        """
        if self.stage is None or self.ranks == 1:
            return 0
        reduced = (2 if self.stage >= 2 else 1) * FULL * bucket_elements(sizes)
        return reduced + (self.weight_bytes * live_elements(sizes) if self.stage == 3 else 0)
