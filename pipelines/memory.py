"""What a training needs of a device's memory: exact for weights and states, an estimate for activations.

A plain process holds everything; under ZeRO (arXiv 1910.02054) every process holds its part, by stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..actors.model_files import parameters
from ..cluster.zero_settings import FULL, HALF, Division, Place, Precision, Stage
from ..kernels.precision import fast_dtype
from ..kernels.wan.config import TransformerConfig
from ..kernels.wan.cost import kv_bytes, weight_bytes
from ..kernels.wan.tensors import expected_shapes
from .recipe import ZeroRecipe

GIB = 2**30
PLAIN = Division()
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
# Tensors of a block that autograd keeps, per token: of the model's width, in the computing precision and in float32,
# and of the feed-forward's width. Counted on the block as it is written: norms and modulation are in float32.
WIDE_COMPUTED, WIDE_EXACT, HIDDEN = 14, 9, 2


@dataclass(frozen=True)
class TrainedNetwork:
    """One network of a training. averages: keeps a moving average. trained: has gradients and an optimiser."""

    name: str
    config: TransformerConfig
    trained: bool = True
    averages: bool = False

    @property
    def sizes(self) -> list[int]:
        """Elements of each parameter."""
        return [shape.numel() for shape in expected_shapes(self.config).values()]

    def held(self, division: Division, computed: torch.dtype) -> dict[str, int]:
        """What one process holds of it, device and host together: bytes by what they are."""
        if self.trained:
            return division.trained(sum(self.sizes), averages=self.averages)
        # Whole, it is kept in the computing precision; divided, in that of the trained weights.
        if division.stage == 3:
            return {"weights": division.frozen(sum(self.sizes), division.weight_bytes)}
        return {"weights": weight_bytes(self.config, computed)}


@dataclass(frozen=True)
class TrainedClips:
    """What goes through a network at once. cached_frames: of a KV cache beside it, 0 for none."""

    batch: int
    frames: int
    tokens: int
    checkpointing: bool
    cached_frames: int = 0

    def activations(self, config: TransformerConfig, computed: torch.dtype = torch.bfloat16) -> int:
        """Bytes that autograd keeps of one pass: of all blocks, or of their inputs and of one block recomputed."""
        tokens = self.batch * self.frames * self.tokens
        wide = WIDE_COMPUTED * computed.itemsize + WIDE_EXACT * torch.float32.itemsize
        block = tokens * (config.dim * wide + HIDDEN * config.ffn_dim * computed.itemsize)
        if not self.checkpointing:
            return config.num_layers * block
        return config.num_layers * tokens * config.dim * computed.itemsize + block

    def cache(self, config: TransformerConfig, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the KV cache."""
        return kv_bytes(config, self.cached_frames, self.tokens, dtype, self.batch)


@dataclass(frozen=True)
class TrainingMemory:
    """All that one process of a training holds. others: further networks on the device, by name, in bytes."""

    networks: Sequence[TrainedNetwork]
    clips: TrainedClips
    others: Mapping[str, int] = field(default_factory=dict)

    def device(self, division: Division) -> dict[str, int]:
        """Bytes on the device, line by line."""
        computed = _computed(division)
        lines = {
            f"{network.name}: {kind}": size
            for network in self.networks
            for kind, size in network.held(division, computed).items()
            if not (network.trained and division.on_host(kind))
        }
        lines["weights cast to bfloat16"] = self._casts(division)
        lines["DeepSpeed's buffers, at most"] = max(division.working(network.sizes) for network in self._trained)
        lines["activations (estimate)"] = self._activations(self.clips, computed)
        lines["KV cache"] = self.clips.cache(self.networks[0].config)
        return lines | dict(self.others)

    def host(self, division: Division) -> dict[str, int]:
        """Bytes that were moved to the host's memory, line by line."""
        return {
            f"{network.name}: {kind}": size
            for network in self._trained
            for kind, size in network.held(division, _computed(division)).items()
            if division.on_host(kind)
        }

    def other_activations(self, division: Division) -> int:
        """Bytes of the activations with checkpointing where there is none, and without where there is."""
        return self._activations(replace(self.clips, checkpointing=not self.clips.checkpointing), _computed(division))

    @property
    def _trained(self) -> list[TrainedNetwork]:
        return [network for network in self.networks if network.trained]

    def _activations(self, clips: TrainedClips, computed: torch.dtype) -> int:
        """Of the largest trained network: student and critic have theirs in turn."""
        return max(clips.activations(network.config, computed) for network in self._trained)

    def _casts(self, division: Division) -> int:
        """autograd keeps the bfloat16 form of fp32 weights; in stage 3 only of the layers that are gathered."""
        if division.precision != "autocast" or division.stage == 3:
            return 0
        return max(HALF * sum(network.sizes) for network in self._trained)


def _computed(division: Division) -> torch.dtype:
    return torch.float32 if division.precision == "fp32" else torch.bfloat16


def precision_on(zero: ZeroRecipe | None, device: torch.device | str) -> Precision:
    """That of the recipe, of the plain engine without one; autocast only where the device is fast in bfloat16."""
    wanted: Precision = zero.precision if zero else "autocast"
    return "fp32" if wanted == "autocast" and fast_dtype(device) == torch.float32 else wanted


def division_of(zero: ZeroRecipe | None, ranks: int, device: torch.device | str) -> Division:
    """How the recipe divides what is trained on such devices; without one it is the plain engine's."""
    precision = precision_on(zero, device)
    if zero is None:
        return Division(precision=precision)
    return Division(zero.stage, ranks, precision, _place(zero.offload_optimizer), _place(zero.offload_parameters))


def _place(offloaded: bool) -> Place:
    return "cpu" if offloaded else "none"


def text_dtype(zero: ZeroRecipe | None) -> torch.dtype:
    """Of a text encoder beside what is trained: bfloat16 where the trained weights are."""
    return torch.bfloat16 if zero and zero.precision == "bf16" else torch.float32


def held_parts(vae: Path, texts: Sequence[Path], text: torch.dtype) -> dict[str, int]:
    """The other networks of model folders, whole on every device: a VAE in float32, and text encoders."""
    found = {"VAE": FULL * parameters(vae / "vae")}
    for folder in texts:
        name = "text encoder" if len(texts) == 1 else f"text encoder of {folder.name}"
        found[name] = text.itemsize * parameters(folder / "text_encoder")
    return found


def memory_lines(memory: TrainingMemory, division: Division) -> list[str]:
    """A table in text: what one process holds, line by line and in all; under ZeRO a column for every stage.

    Stages that the precision or an offloading does not go with are left out.
    """
    divisions = {"GiB": division} if division.stage is None else dict(_all_stages(division))
    told = {head: memory.device(one) for head, one in divisions.items()}
    names = max(told.values(), key=len)
    rows = [(name, [lines.get(name, 0) for lines in told.values()]) for name in names]
    rows = [row for row in rows if any(row[1])]
    rows.append(("in all on a device", [sum(lines.values()) for lines in told.values()]))
    if any(memory.host(one) for one in divisions.values()):
        rows.append(("in host memory, of each", [sum(memory.host(one).values()) for one in divisions.values()]))
    word = "without" if memory.clips.checkpointing else "with"
    rows.append((f"(activations {word} checkpointing)", [memory.other_activations(one) for one in divisions.values()]))
    return _table(list(divisions), rows)


def _all_stages(division: Division) -> list[tuple[str, Division]]:
    found = []
    for stage in STAGES:
        try:
            one = replace(division, stage=stage)
        except ValueError:
            continue
        found.append((f"ZeRO {stage}{' *' if stage == division.stage else ''}", one))
    return found


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[int]]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"  {head:>10}" for head in heads)] if len(heads) > 1 else []
    unit = "" if len(heads) > 1 else " GiB"
    for name, sizes in rows:
        cells = (f"{size / GIB:10.3f}" if size else f"{'-':>10}" for size in sizes)
        lines.append(f"{name:<{width}}" + "".join(f"  {cell}" for cell in cells) + unit)
    return lines
