"""One rank of the runs that test_zero.py looks at: `zero_ranks.py SCENARIO RANK SIZE FOLDER`. Writes results there."""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from zero_recipe import DECAY, RATE, error, make_network, samples, share

from reelway.cluster import zero
from reelway.cluster.zero import ZeroEngine, ZeroSettings, shard_frozen
from reelway.kernels.objectives.dmd import dmd_generator_loss
from reelway.kernels.wan.config import CONFIGS
from reelway.kernels.wan.context import TextContext
from reelway.kernels.wan.transformer import VideoTransformer

STAGES = (0, 1, 2, 3)
UPDATES, SAVED_AFTER = 4, 2


def settings(**changes: Any) -> ZeroSettings:
    return ZeroSettings(**{"rate": lambda step: RATE, "ema_decay": DECAY, "clip_norm": 1e9} | changes)


def outcome(engine: ZeroEngine, losses: list[float]) -> dict[str, Any]:
    return {"losses": losses, "weights": engine.weights(), "average": engine.averaged_weights()}


def train(engine: ZeroEngine, first: int = 0, folder: Path | None = None, pieces: int = 1) -> dict[str, Any]:
    """To update UPDATES; each rank's share in `pieces` backward passes; saved after SAVED_AFTER updates."""
    losses = []
    for step in range(first, UPDATES):
        inputs, targets = share(step, dist.get_rank(), dist.get_world_size())
        if engine.settings.precision == "bf16":
            inputs = inputs.bfloat16()
        total = torch.zeros((), dtype=torch.float64)
        for part in zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True):
            with engine.autocast():
                loss = error(engine.network, *part) / pieces
            engine.backward(loss)
            total += loss.detach().double()
        engine.step()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
        if folder and engine.updates == SAVED_AFTER:
            engine.save(folder)
    return outcome(engine, losses)


def poisoned(engine: ZeroEngine) -> dict[str, Any]:
    """An update whose loss is not finite on rank 1 alone, though its gradient is; then the training as ever."""
    before = engine.weights()
    loss = error(engine.network, *samples(0)) + (float("nan") if dist.get_rank() == 1 else 0.0)
    engine.backward(loss)
    try:
        engine.step()
        message = "no error"
    except FloatingPointError as refusal:
        message = str(refusal)
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return {"messages": messages, "before": before, "after": engine.weights(), **train(engine)}


def small_transformer(seed: int) -> VideoTransformer:
    torch.manual_seed(seed)
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 48}
    network = VideoTransformer(replace(CONFIGS["tiny"], **sizes, text_dim=16, freq_dim=16))
    network.gradient_checkpointing = seed == 0
    return network


def velocity(network: Any, text: TextContext) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda noisy, timesteps: network(noisy, timesteps, text)


def distil(
    student: Any, critic: Any, teacher: Any, update: Callable[[str, Tensor], None], rank: int, size: int
) -> None:
    """Two rounds: student and critic in turn, a rollout without gradient before, text keys shared by two passes."""
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        shape = (2, 2, student.config.in_channels, 4, 4)
        latents, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        rows = torch.randn(2, 3, 16, generator=generator)
        part = slice(2 * rank // size, 2 * (rank + 1) // size)
        latents, noise, text = latents[part], noise[part], TextContext.dense(rows[part])
        timesteps = torch.full(latents.shape[:2], 700.0)
        with torch.no_grad():
            for _ in range(step + 1):
                latents = latents - 0.1 * student(latents, timesteps, text)
        keys = student.text_keys(text)
        clean = latents - student(latents, timesteps, keys) + 0.1 * student(noise, timesteps, keys)
        real, fake = (velocity(network, text) for network in (teacher, critic))
        update("student", dmd_generator_loss(clean, real, fake, timesteps[:, 0], noise).loss)
        predicted = critic(clean.detach(), timesteps, text)
        update("critic", (predicted - noise).square().mean())


def distil_zero(stage: int, prepare: Callable[[Any], Any] = lambda network: network) -> dict[str, Any]:
    engines = {
        name: ZeroEngine(prepare(small_transformer(seed)), settings(stage=stage))
        for seed, name in enumerate(("student", "critic"))
    }
    teacher = shard_frozen(prepare(small_transformer(2))) if stage == 3 else small_transformer(2)
    losses = []

    def update(name: str, loss: Tensor) -> None:
        engines[name].backward(loss)
        engines[name].step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())

    networks = (engines["student"].network, engines["critic"].network, teacher)
    distil(*networks, update, dist.get_rank(), dist.get_world_size())
    return outcome(engines["student"], losses)


def refusals(folder: Path) -> list[str]:
    """What `load` says to folders that do not fit."""
    engine = ZeroEngine(make_network(), settings(stage=2))
    other = ZeroEngine(torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Linear(9, 3)), settings())
    lines = []
    for loading, place in ((engine, folder / "nothing"), (other, folder / "stage-2"), (engine, folder / "torn")):
        try:
            loading.load(place)
        except (ValueError, FileNotFoundError) as refusal:
            lines.append(str(refusal).replace(str(folder), "FOLDER"))
    return lines


def resumed(folder: Path, stage: int) -> dict[str, Any]:
    """From the checkpoint of the stage before, with other weights to begin with."""
    engine = ZeroEngine(make_network(seed=9), settings(stage=stage))
    engine.load(folder / f"stage-{(stage - 1) % len(STAGES)}")
    assert engine.updates == SAVED_AFTER
    return train(engine, first=SAVED_AFTER)


def divided_from(source: Any, precision: Any = "fp32") -> Any:
    """A network like `source`, built without memory and filled by rank 0, which alone may read."""

    def read(name: str) -> Tensor:
        assert dist.get_rank() == 0, f"rank {dist.get_rank()} read {name}"
        return source.state_dict()[name]

    return zero.divided(copy.deepcopy(source).to("meta"), read, precision)


def held_when_divided() -> list[dict[str, tuple[int, int]]]:
    """By rank: of every parameter the elements that are whole there, and those of the rank's part."""
    network = divided_from(make_network())
    own = {name: (value.numel(), value.ds_tensor.numel()) for name, value in network.named_parameters()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def pair(folder: Path) -> dict[str, Any]:
    zero.PERSISTENT = 0  # so that stage 3 shards the smallest parameter
    results: dict[str, Any] = {}
    for stage in STAGES:
        engine = ZeroEngine(make_network(), settings(stage=stage))
        results[f"exact-{stage}"] = train(engine, folder=folder / f"stage-{stage}")
        results[f"accumulated-{stage}"] = train(
            ZeroEngine(make_network(), settings(stage=stage, clip_norm=0.3)), pieces=2
        )
        results[f"poisoned-{stage}"] = poisoned(ZeroEngine(make_network(), settings(stage=stage)))
        results[f"distilled-{stage}"] = distil_zero(stage)
    for stage in STAGES:
        results[f"resumed-{stage}"] = resumed(folder, stage)
    for stage, precision in ((1, "autocast"), (3, "autocast"), (2, "bf16"), (3, "bf16")):
        how = settings(stage=stage, precision=precision)
        results[f"{precision}-{stage}"] = train(ZeroEngine(make_network(), how))
    results["exact-divided"] = train(ZeroEngine(divided_from(make_network()), settings(stage=3)))
    how = settings(stage=3, precision="bf16")
    results["bf16-divided"] = train(ZeroEngine(divided_from(make_network(), "bf16"), how))
    results["distilled-divided"] = distil_zero(3, divided_from)
    results["held"] = held_when_divided()
    for stage in (1, 2, 3):
        parameters = "cpu" if stage == 3 else "none"
        how = settings(stage=stage, offload_optimizer="cpu", offload_parameters=parameters)
        results[f"offloaded-{stage}"] = train(ZeroEngine(make_network(), how))
    return results


def alone(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {f"resumed-{stage}": resumed(folder, stage) for stage in STAGES}
    return results | {"refusals": refusals(folder)}


def plain_distillation() -> list[float]:
    """The losses of `distil` in torch alone, with the whole batch."""
    networks = {name: small_transformer(seed) for seed, name in enumerate(("student", "critic", "teacher"))}
    optimizers = {name: torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.01) for name, net in networks.items()}
    losses = []

    def update(name: str, loss: Tensor) -> None:
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()
        losses.append(loss.item())

    distil(*networks.values(), update, 0, 1)
    return losses


def main() -> None:
    scenario, rank, size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{scenario}.group", rank=rank, world_size=size)
    results = {"pair": pair, "alone": alone}[scenario](folder)
    if rank == 0:
        torch.save(results, folder / f"{scenario}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
