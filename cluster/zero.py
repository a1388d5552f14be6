"""DeepSpeed ZeRO (arXiv 1910.02054) as a training engine: the only file that imports deepspeed.

The engine owns the optimiser that DeepSpeed runs. Its state is what ZeRO shards, so the average of the weights (EMA)
is one more entry of that state: it lies where the master weights lie, on every stage and with offloading.

What DeepSpeed's own checkpoints tie to the number of processes and pickle, is written here as safetensors: every rank
writes the stretches of the parameters that it owns, and every rank reads what it needs from all of the files. So a run
goes on with another number of processes or another stage.
"""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, at the import

import deepspeed
from deepspeed import utils as helpers

from .zero_settings import PERSISTENT, Place, Precision, ZeroSettings, bucket_elements, live_elements

STATE = "engine.json"
SCHEMA = 1


class AveragingAdamW(torch.optim.AdamW):
    """AdamW whose state holds, beside the moments, the running average of the weights.

    clip_norm: clips here, for stage 0, where DeepSpeed hands over whole gradients; None where it has clipped.
    """

    def __init__(self, parameters: list[nn.Parameter], settings: ZeroSettings, clip_norm: float | None) -> None:
        super().__init__(parameters, 0.0, settings.betas, weight_decay=settings.weight_decay, fused=True)
        self.averages = settings.ema_decay > 0
        self.decay = 0.0  # of the coming step
        self.clip_norm, self.norm = clip_norm, torch.zeros(())

    @property
    def kinds(self) -> tuple[str, ...]:
        """The entries of the state that are as large as the weights."""
        return ("exp_avg", "exp_avg_sq", *(["average"] if self.averages else []))

    @torch.no_grad()
    def prepare(self, masters: list[Tensor]) -> None:
        """Allocate the state of these flat weights now: its size is known before the first step, and loading fills it.

        The average begins as the weights.
        """
        for master in masters:
            state = self.state[master]
            state["step"] = torch.zeros((), device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            if self.averages:
                state["average"] = master.detach().clone()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        masters = [master for group in self.param_groups for master in group["params"] if master.grad is not None]
        if self.clip_norm is not None:
            self.norm = torch.nn.utils.clip_grad_norm_(masters, self.clip_norm)
            if not torch.isfinite(self.norm):
                return
        super().step()
        if self.averages:
            averages = [self.state[master]["average"] for master in masters]
            torch._foreach_lerp_(averages, masters, 1 - self.decay)


class ShardedNetwork(nn.Module):
    """A network whose calls go through DeepSpeed; everything else of it is read as before (`network.config`, ...).

    DeepSpeed's own wrapper hides attributes of the network behind its own of the same name.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.network: nn.Module = engine.module
        self.__dict__["_engine"] = engine  # not a submodule: it holds the same parameters

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self._engine(*inputs, **named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)


class ZeroEngine:
    """Trains one network on all processes of the default group; a process may hold several engines.

    Every rank makes the same calls in the same order. The network is whole on every rank at first and the same, or for
    stage 3 divided (`divided`); after that only `network` is called. Gradients are averaged over ranks.
    """

    def __init__(self, network: nn.Module, settings: ZeroSettings) -> None:
        self.settings = settings
        self.updates = 0
        self._loss: Tensor | None = None  # of this rank, since the last step
        self._trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
        clip = settings.clip_norm if settings.stage == 0 else None
        self._optimizer = AveragingAdamW(list(self._trained.values()), settings, clip)
        self._engine = _initialize(network, _configuration(network, settings), self._optimizer)
        self.network: nn.Module = ShardedNetwork(self._engine)
        self.device: torch.device = self._engine.device
        self._shards = _shards(self._engine, self._optimizer, list(self._trained.values()), settings)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 for what is safe in it, where the settings say so."""
        enabled = self.settings.precision == "autocast"
        return torch.autocast(self.device.type, torch.bfloat16) if enabled else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, scaled by the caller to the mean over this rank's part of the update."""
        # A loss that is not finite may have finite gradients: make them NaN, so that the norm tells every rank.
        detached = loss.detach().double()
        finite = torch.where(detached.isfinite(), 1.0, torch.nan)
        self._engine.backward(loss * finite, scale_wrt_gas=False)
        self._loss = detached if self._loss is None else self._loss + detached

    def step(self) -> dict[str, float]:
        """One update with the gradients since the last one.

        FloatingPointError on every rank if a loss or a gradient of any rank is not finite; nothing is changed then.
        """
        assert self._loss is not None, "a step without a backward"
        loss, self._loss = self._loss, None
        rate = self.settings.rate(self.updates)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.decay = min(self.settings.ema_decay, (2 + self.updates) / (11 + self.updates))
        self._engine.step()
        norm = float(self._optimizer.norm if self.settings.stage == 0 else self._engine.get_global_grad_norm())
        if not torch.isfinite(torch.tensor(norm)):
            raise FloatingPointError(f"update {self.updates}: this rank's loss {loss.item()}, gradient norm {norm}")
        self.updates += 1
        return {"gradient_norm": norm, "learning_rate": rate}

    def weights(self) -> dict[str, Tensor]:
        """The whole state dict, floating point in fp32, on the CPU; every rank calls, rank 0 alone gets it."""
        return self._gather("weight")

    def averaged_weights(self) -> dict[str, Tensor]:
        """Like `weights`, of the running average; without one (ema_decay 0), the weights themselves."""
        return self._gather("average" if self._optimizer.averages else "weight")

    def save(self, folder: Path) -> None:
        """Write what this rank owns into `folder`; rank 0 says there what belongs together."""
        folder.mkdir(parents=True, exist_ok=True)
        rank, size = dist.get_rank(), dist.get_world_size()
        pieces, starts = {}, {}
        for name, parameter in self._trained.items():
            start, length = self._shards.owned(parameter)
            if length == 0:
                continue
            starts[name] = start
            for kind in ("weight", *self._optimizer.kinds):
                pieces[f"{kind}/{name}"] = self._shards.read(parameter, kind)[:length].cpu().clone()
        save_file(pieces, folder / _file_of(rank, size), {"starts": json.dumps(starts)})
        if rank == 0:
            shapes = {name: list(_shape(parameter)) for name, parameter in self._trained.items()}
            state = {"schema": SCHEMA, "updates": self.updates, "ranks": size, "shapes": shapes}
            state["kinds"] = ["weight", *self._optimizer.kinds]
            (folder / STATE).write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Go on where `save` was called, with any number of ranks and any stage. ValueError for another network."""
        state = _read_state(folder, {name: list(_shape(value)) for name, value in self._trained.items()})
        kinds = ("weight", *self._optimizer.kinds)
        missing = set(kinds) - set(state["kinds"])
        if missing:
            raise ValueError(f"{folder}: has no {' and no '.join(sorted(missing))}; it was saved with ema_decay 0")
        with _pieces(folder, state["ranks"]) as files:
            for name, parameter in self._trained.items():
                start, length = self._shards.held(parameter)
                for kind in kinds if length else ():
                    self._shards.write(parameter, kind, _assemble(files, kind, name, start, length))
        self.updates = state["updates"]
        for moments in self._optimizer.state.values():
            moments["step"].fill_(self.updates)
        self._shards.publish()

    def _gather(self, kind: str) -> dict[str, Tensor]:
        keep = dist.get_rank() == 0
        whole: dict[str, Tensor] = {}
        for name, parameter in self._engine.module.named_parameters(remove_duplicate=False):
            value = self._shards.whole(parameter, kind) if parameter.requires_grad else _frozen(parameter)
            if keep:
                whole[name] = value.detach().float().cpu().clone()
        if not keep:
            return {}
        # What else a state dict has are buffers, which are never sharded.
        state = self._engine.module.state_dict()
        return {name: whole[name] if name in whole else value.cpu().clone() for name, value in state.items()}


def shard_frozen(network: nn.Module, precision: Literal["fp32", "bf16"] = "fp32") -> nn.Module:
    """`network` for forward passes only, its parameters divided among the ranks and gathered layer by layer.

    For a teacher that does not fit beside what is trained. Every rank makes the same calls in the same order.
    """
    network.requires_grad_(False).eval()
    config = _common(network, stage=3) | {"bf16": {"enabled": precision == "bf16"}}
    return ShardedNetwork(_initialize(network, config, None))


def divided(
    network: nn.Module,
    read: Callable[[str], Tensor],
    precision: Precision = "fp32",
    offload_parameters: Place = "none",
) -> nn.Module:
    """Give a network that has no memory yet (on torch's meta device) its weights, divided among the ranks for stage 3.

    read: a whole parameter by its name, in any floating type. Rank 0 alone reads, one parameter after the other, and
    every rank keeps its part: none ever holds more than that and the largest parameter. Every rank calls.
    """
    config = _common(network, stage=3) | {"bf16": {"enabled": precision == "bf16"}}
    if offload_parameters == "cpu":
        config["zero_optimization"] |= {"offload_param": _host_memory()}
    _quiet()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    convert: Callable[..., None] | None = None
    for name, parameter in list(network.named_parameters()):
        value = read(name).to(dtype, copy=True) if dist.get_rank() == 0 else torch.empty(parameter.shape, dtype=dtype)
        assert value.shape == parameter.shape, f"{name}: {value.shape} in place of {parameter.shape}"
        module, _, leaf = name.rpartition(".")
        fresh = nn.Parameter(value, requires_grad=parameter.requires_grad)
        setattr(network.get_submodule(module), leaf, fresh)
        if convert is None:
            deepspeed.zero.Init(module=nn.ParameterList([fresh]), config_dict_or_path=config)
            convert = fresh.convert_to_zero_parameters
        else:
            convert(param_list=[fresh])
    return network


# --- Setting up ---------------------------------------------------------------------------------------------------


def _initialize(network: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None) -> Any:
    _quiet()
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
    return engine


def _quiet() -> None:
    """Before the first call of DeepSpeed: where this process stands, and nothing to say or to compile."""
    assert dist.is_initialized(), "ZeRO needs torch's process group"
    os.environ.setdefault("LOCAL_RANK", "0")
    helpers.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # A C++ op for reductions at inference, built for half a minute at first use; training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _host_memory() -> dict[str, Any]:
    return {"device": "cpu", "pin_memory": torch.cuda.is_available()}


def _common(network: nn.Module, stage: int) -> dict[str, Any]:
    """What every engine has, `network` whole, divided or without memory."""
    sizes = [int(torch.Size(_shape(parameter)).numel()) for parameter in network.parameters()]
    bucket, live = bucket_elements(sizes), live_elements(sizes)
    zero = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        zero |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
        zero |= {"stage3_prefetch_bucket_size": bucket // 4, "stage3_param_persistence_threshold": PERSISTENT}
    return {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": zero}


def _configuration(network: nn.Module, settings: ZeroSettings) -> dict[str, Any]:
    """DeepSpeed's configuration. Micro-batches are ours to count: `step` is what ends an update."""
    config = _common(network, settings.stage)
    zero = config["zero_optimization"]
    zero["overlap_comm"] = settings.stage >= 2
    if settings.offload_optimizer == "cpu":
        zero["offload_optimizer"] = _host_memory()
    if settings.offload_parameters == "cpu":
        zero["offload_param"] = _host_memory()
    config |= {
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": settings.clip_norm if settings.stage else 0.0,
    }
    if settings.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if settings.precision == "autocast":
        # No module is listed, so that gradients are reduced in fp32.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


# --- Who holds what -----------------------------------------------------------------------------------------------


class _Shards(Protocol):
    """Where a stage keeps the fp32 weights and the optimiser's state. Kinds: weight, exp_avg, exp_avg_sq, average."""

    def held(self, parameter: nn.Parameter) -> tuple[int, int]:
        """First element and length of the stretch of the flat parameter that this rank holds."""

    def owned(self, parameter: nn.Parameter) -> tuple[int, int]:
        """The stretch that this rank saves: over all ranks each element once."""

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The held stretch, flat."""

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None: ...

    def whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The whole parameter; every rank calls."""

    def publish(self) -> None:
        """After writing: bring the weights that the network computes with up to the masters."""


@dataclass
class _Replicated:
    """Stage 0: everything on every rank, and rank 0 saves."""

    optimizer: AveragingAdamW

    def held(self, parameter: nn.Parameter) -> tuple[int, int]:
        return 0, parameter.numel()

    def owned(self, parameter: nn.Parameter) -> tuple[int, int]:
        return 0, parameter.numel() if dist.get_rank() == 0 else 0

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        return self.whole(parameter, kind).flatten()

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        self.whole(parameter, kind).copy_(value.view_as(parameter))

    def whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        return parameter.detach() if kind == "weight" else self.optimizer.state[parameter][kind]

    def publish(self) -> None:
        pass


@dataclass
class _Flat:
    """Stages 1 and 2: one flat vector of all parameters, cut into as many stretches as there are ranks."""

    engine: Any

    def held(self, parameter: nn.Parameter) -> tuple[int, int]:
        mapping = parameter._hp_mapping
        return (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)

    owned = held

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        return parameter._hp_mapping.get_hp_fragment(None if kind == "weight" else kind).detach()

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        self.read(parameter, kind).copy_(value)

    def whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if kind == "weight":
            return helpers.safe_get_full_fp32_param(parameter)
        return helpers.safe_get_full_optimizer_state(parameter, kind)

    def publish(self) -> None:
        self.engine.optimizer.update_lp_params()


@dataclass
class _Partitioned:
    """Stage 3: every parameter is cut into as many equal stretches as there are ranks, the last one padded."""

    engine: Any

    def held(self, parameter: nn.Parameter) -> tuple[int, int]:
        part = parameter.partition_numel()
        start = min(part * dist.get_rank(), parameter.ds_numel)
        return start, min(part, parameter.ds_numel - start)

    owned = held

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if kind == "weight":
            return helpers.safe_get_local_fp32_param(parameter).detach()
        return helpers.safe_get_local_optimizer_state(parameter, kind).detach()

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        padded = torch.zeros(parameter.partition_numel(), device=value.device)
        padded[: len(value)] = value
        if kind == "weight":
            helpers.safe_set_local_fp32_param(parameter, padded)
        else:
            helpers.safe_set_local_optimizer_state(parameter, padded, kind)

    def whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if kind == "weight":
            return helpers.safe_get_full_fp32_param(parameter)
        return helpers.safe_get_full_optimizer_state(parameter, kind)

    def publish(self) -> None:
        for parameter in self.engine.module.parameters():
            if parameter.requires_grad:
                whole = helpers.safe_get_full_fp32_param(parameter)
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(whole)


def _shards(engine: Any, optimizer: AveragingAdamW, trained: list[nn.Parameter], settings: ZeroSettings) -> _Shards:
    """The layout of a fresh engine, with the optimiser's state allocated."""
    if settings.stage == 0:
        optimizer.prepare(list(trained))
        return _Replicated(optimizer)
    if settings.stage == 3:
        optimizer.prepare(engine.optimizer.fp32_partitioned_groups_flat)
        return _Partitioned(engine)
    [master] = optimizer.param_groups[0]["params"]
    optimizer.prepare([master])
    helpers.lazy_init_hp_params_optimizer_state(trained, master, optimizer.state)
    return _Flat(engine)


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape: under stage 3 a parameter itself is empty most of the time."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape


def _frozen(parameter: nn.Parameter) -> Tensor:
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


# --- Files --------------------------------------------------------------------------------------------------------


def _file_of(rank: int, size: int) -> str:
    return f"rank-{rank:05d}-of-{size:05d}.safetensors"


def _read_state(folder: Path, shapes: dict[str, list[int]]) -> dict[str, Any]:
    path = folder / STATE
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no {STATE} in {folder}")
    state: dict[str, Any] = json.loads(path.read_text())
    if state["schema"] != SCHEMA:
        raise ValueError(f"{path}: schema must be {SCHEMA}, got {state['schema']}")
    for name in sorted(shapes.keys() | state["shapes"].keys()):
        here, there = shapes.get(name), state["shapes"].get(name)
        if here != there:
            raise ValueError(f"{path}: {name}: the network has {here or 'none'}, the checkpoint {there or 'none'}")
    return state


@contextmanager
def _pieces(folder: Path, ranks: int) -> Iterator[list[tuple[Any, dict[str, int]]]]:
    """The open files of all ranks that saved, each with the first element of its stretches."""
    paths = [folder / _file_of(rank, ranks) for rank in range(ranks)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"checkpoint {folder}: {len(missing)} of {ranks} files are missing, first {missing[0]}")
    files = [safe_open(path, framework="pt") for path in paths]
    yield [(file, json.loads(file.metadata()["starts"])) for file in files]


def _assemble(files: list[tuple[Any, dict[str, int]]], kind: str, name: str, start: int, length: int) -> Tensor:
    """Elements start .. start + length of a flat parameter, from whichever files have them."""
    result, filled = torch.empty(length), 0
    for file, starts in files:
        if name not in starts:
            continue
        piece = file.get_slice(f"{kind}/{name}")
        first, count = starts[name], piece.get_shape()[0]
        begin, end = max(start, first), min(start + length, first + count)
        if begin < end:
            result[begin - start : end - start] = piece[begin - first : end - first]
            filled += end - begin
    assert filled == length, f"{kind} of {name}: {filled} of {length} elements in the checkpoint"
    return result
