"""Small trainings for the tests: a data set of random trajectories, and jobs of a few steps on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelway.actors.engine import OneRank
from reelway.cluster.dataset import DatasetInfo, TensorSpec, create_dataset
from reelway.cluster.manifest import merge_manifest, plan
from reelway.cluster.shards import write_shard
from reelway.cluster.storage import Storage
from reelway.pipelines import distill, initialize
from reelway.pipelines.commands import plain_engines
from reelway.pipelines.recipe import load_recipe

RECIPE = Path(__file__).parents[3] / "configs" / "tiny.yaml"
SHAPE = (6, 16, 4, 4)  # latent frames, channels, height, width: 21 frames of 32x32
SAMPLES = 12
CAPTIONS = [
    f"a {color} {shape} drifts left" for color in ("red", "blue", "green") for shape in ("star", "disk", "ring")
]
COMMON = [
    "clip.height=32",
    "clip.width=32",
    "clip.frames=21",
    "student.timesteps=[1000, 500]",
    "student.window=6",
]


def small(section: str, *more: str) -> list[str]:
    values = {"steps": 4, "batch": 4, "lanes": 2, "checkpoint_every": 2, "sheet_every": 4}
    return [*COMMON, *(f"{section}.{name}={value}" for name, value in values.items()), *more]


INITIALIZE = small("initialize", "initialize.optimizer.learning_rate=1e-3", "initialize.optimizer.ema_decay=0.5")


def resolved(overrides: list[str]) -> dict[str, Any]:
    return load_recipe(RECIPE, overrides).model_dump(mode="json")


def latents(index: int, states: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(states, *SHAPE, generator=generator).to(torch.float16)


def write_dataset(
    folder: Path,
    kind: str = "trajectories",
    samples: int = SAMPLES,
    spoil: Callable[[int, Tensor], Tensor] = lambda index, value: value,
    timesteps: tuple[float, ...] = (1000.0, 750.0, 0.0),
) -> str:
    """A data set as `reelway trajectories` or `reelway ingest` leaves it; the tiny recipe's shift warps 500 to 750."""
    states = (len(timesteps),) if kind == "trajectories" else ()
    tensors, text = ("trajectory.safetensors", "prompt.txt") if states else ("latents.safetensors", "caption.txt")
    spec = TensorSpec(shape=(*states, *SHAPE), dtype="float16")
    made_by = {"timesteps": list(timesteps)} if states else {}
    info = DatasetInfo(kind=kind, fields={tensors: {"latents": spec}, text: {}}, made_by=made_by, fingerprint="set")
    storage = Storage.open(folder)
    create_dataset(storage, info)
    keys = [f"s{index:02d}" for index in range(samples)]
    for shard in plan(keys, 4, "set"):
        values = ((key, spoil(int(key[1:]), latents(int(key[1:]), len(timesteps)))) for key in shard.keys)
        samples_of = (
            (key, {tensors: {"latents": value if states else value[-1]}, text: CAPTIONS[int(key[1:]) % len(CAPTIONS)]})
            for key, value in values
        )
        write_shard(storage, shard, samples_of)
    merge_manifest(storage)
    return str(folder)


def initialize_job(teacher: Path, data: str, run: Path, *more: str, method: str = "ode") -> initialize.InitializeJob:
    recipe = resolved([*INITIALIZE, *small("causal_teacher"), *more])
    return initialize.InitializeJob(recipe, method, str(teacher), str(teacher), data, str(run))


def carry_out(job: Any, **more: Any) -> bool:
    module = distill if isinstance(job, distill.DistillJob) else initialize
    return module.train(job, plain_engines("cpu"), OneRank(), **more)


def weights_of(run: Path, step: int, network: str = "student") -> dict[str, Tensor]:
    folder = run / "checkpoints" / f"step-{step:06d}" / network
    return torch.load(folder / "engine.pt", weights_only=True)["network"]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def distill_job(method: str, student: Path, teacher: Path, data: str, run: Path, *more: str) -> distill.DistillJob:
    section = f"distill.{method.replace('-', '_')}"
    changes = [f"{section}.critic_updates=2", f"{section}.student.learning_rate=1e-4", "distill.long.rollout_frames=12"]
    recipe = resolved([*small(section, *changes), *more])
    prompts = None if method == "causvid" else "sprites:train"
    return distill.DistillJob(
        recipe, method, str(student), str(teacher), data if method == "causvid" else None, prompts, str(run)
    )
