"""What `reelway trajectories` has to make: from a recipe, a teacher and prompts to planned shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow
import pyarrow.compute
import torch

from ..actors.model_files import (
    check_model,
    latents_shape,
    loading_bytes,
    transformer_config,
    velocity_digest,
)
from ..actors.trajectories import SAMPLE_FORMAT, TrajectorySettings, TrajectoryWorker, shard_bytes
from ..cluster.dataset import DatasetInfo
from ..cluster.manifest import ShardPlan, pending, plan
from ..cluster.storage import Storage
from ..kernels.causal.student import StudentSettings
from ..kernels.diffusion.sampler import recording_grid
from .making import check_same
from .prompts import identity, packed
from .recipe import Recipe, fingerprint

KIND: Final = "trajectories"
WORKER_BYTES: Final = 1 << 30  # of a worker without a model: Python, torch, the libraries
STATES_HELD: Final = 4  # copies of a batch's path, in float32, that are alive at once


@dataclass(frozen=True)
class Order:
    """What a user asked for. teacher: a model folder, as every worker sees it. prompts: each once; as an Arrow array
    (`prompts.packed`) many take half the memory. threads: of torch in a worker.
    """

    recipe: Recipe
    teacher: Path
    prompts: Sequence[str] | pyarrow.Array
    out: Storage
    device: str = "cpu"
    threads: int = 1


@dataclass(frozen=True)
class Job:
    """An order on a known kind of device: exactly which bytes shall be made."""

    order: Order
    settings: TrajectorySettings
    info: DatasetInfo
    shards: list[ShardPlan]

    @property
    def samples(self) -> int:
        return sum(shard.items.num_rows for shard in self.shards)

    def pending(self) -> list[ShardPlan]:
        """The shards still to be made. ValueError when the folder holds another data set."""
        check_same(self.order.out, KIND, self.info.made_by)
        return pending(self.order.out, self.shards)

    def bytes(self, shards: Sequence[ShardPlan], text_rows: Mapping[str, int] | None = None) -> int:
        """Bytes of these shards; without the prompts' `text_rows` an upper bound, if embeddings are stored."""
        return sum(shard_bytes(self.settings, shard, text_rows or {}) for shard in shards)

    def worker(self) -> "partial[TrajectoryWorker]":
        """Builds a worker in its own process."""
        return partial(TrajectoryWorker, self.order.teacher, self.order.out, self.settings)


def plan_job(order: Order, kind: str) -> Job:
    """Plan every sample and shard. ValueError or FileNotFoundError names what is wrong with the recipe or teacher."""
    settings = _settings(order, kind)
    made_by = _made_by(order, settings)
    identity = fingerprint(made_by)
    info = DatasetInfo(kind=KIND, fields=settings.fields(), made_by=made_by, fingerprint=identity)
    items = _items(order.prompts, order.recipe.trajectories.samples)
    return Job(order, settings, info, plan(items, order.recipe.trajectories.per_shard, identity))


def shard_count(order: Order) -> int:
    """How many shards there will be."""
    recipe = order.recipe.trajectories
    return -(-len(order.prompts) * recipe.samples // recipe.per_shard)


def worker_bytes(order: Order) -> int:
    """Host memory that a worker should have reserved, from the model's files and the size of a batch."""
    frames, channels, height, width = _shape(order)
    recipe, config = order.recipe.trajectories, transformer_config(order.teacher)
    states = len(order.recipe.student.timesteps) + 1
    path = recipe.batch * states * frames * channels * height * width * 4
    needed = WORKER_BYTES + loading_bytes(order.teacher) + STATES_HELD * path
    if order.device == "cpu":
        tokens = 2 * recipe.batch * frames * config.tokens_per_frame(height, width)  # both passes of guidance
        needed += 4 * tokens * (8 * config.dim + 2 * config.ffn_dim)  # of the one block that is at work
    return needed


def _shape(order: Order) -> tuple[int, int, int, int]:
    check_model(order.teacher)
    clip = order.recipe.clip
    shape = latents_shape(order.teacher, clip.height, clip.width, clip.frames)
    try:
        order.recipe.student.settings().blocks(shape[0])
    except ValueError as error:
        raise ValueError(f"clip.frames: {clip.frames} frames are {shape[0]} latent frames: {error}") from None
    return shape


def _settings(order: Order, kind: str) -> TrajectorySettings:
    recipe, student = order.recipe.trajectories, order.recipe.student.settings()
    shape = _shape(order)
    record = (*student.timesteps, 0.0)
    # Under the student's shift, not the teacher's: the student's timesteps lie on no short grid of another shift.
    grid = recording_grid(record, recipe.minimum_steps, student.shift)
    return TrajectorySettings(
        seed=recipe.seed,
        grid=tuple(grid),
        record=record,
        shape=shape,
        guidance=recipe.guidance,
        negative_prompt=recipe.negative_prompt,
        batch=recipe.batch,
        dtype=recipe.dtype,
        autocast=recipe.autocast,
        text_dim=transformer_config(order.teacher).text_dim if recipe.text_embeddings else None,
        device=order.device,
        threads=order.threads,
        device_kind=kind,
        torch_version=torch.__version__,
        teacher=velocity_digest(order.teacher),
        causal=_causal(order),
    )


def _causal(order: Order) -> StudentSettings | None:
    """Of a causal teacher, as its folder says. ValueError for a student, or for one with other blocks than its own."""
    if not (order.teacher / "student.json").is_file():
        return None
    found, student = StudentSettings.read(order.teacher), order.recipe.student.settings()
    if found.sampling != "many-step":
        raise ValueError(f"{order.teacher}: a student of few steps has no ODE path; a teacher takes many")
    for name in ("block", "first_block"):
        have, want = getattr(found, name), getattr(student, name)
        if have != want:
            raise ValueError(f"{order.teacher}: student.json: {name} is {have}, the recipe's student has {want}")
    return replace(found, origin={})


def _made_by(order: Order, settings: TrajectorySettings) -> dict[str, Any]:
    """Everything that decides the bytes, under the names that a user knows. No paths: a copy is the same teacher."""
    return {
        "command": "reelway trajectories",
        "sample_format": SAMPLE_FORMAT,
        "teacher": settings.teacher,
        "prompts": {"count": len(order.prompts), "fingerprint": identity(order.prompts)},
        "trajectories": order.recipe.trajectories.model_dump(mode="json"),
        "clip": order.recipe.clip.model_dump(mode="json", include={"height", "width", "frames"}),
        "latents": list(settings.shape),
        "timesteps": list(settings.record),
        "grid": list(settings.grid),
        "device": settings.device_kind,
        "threads": settings.threads,
        "torch": settings.torch_version,
        **({"causal": _attention(settings.causal)} if settings.causal else {}),
    }


def _attention(causal: StudentSettings) -> dict[str, Any]:
    """What of a causal teacher decides its paths besides its weights."""
    return {name: getattr(causal, name) for name in ("block", "first_block", "window", "sink")}


def _items(prompts: Sequence[str] | pyarrow.Array, samples: int) -> pyarrow.Table:
    """One row per sample, the samples of a prompt beside each other."""
    texts = packed(prompts)
    index = np.repeat(np.arange(len(prompts)), samples)
    sample = np.tile(np.arange(samples), len(prompts))
    keys = pyarrow.compute.binary_join_element_wise(_digits(index, 8), _digits(sample, 4), "-")
    return pyarrow.table({"key": keys, "prompt": texts if samples == 1 else texts.take(index), "sample": sample})


def _digits(numbers: np.ndarray, width: int) -> pyarrow.Array:
    return pyarrow.compute.utf8_lpad(pyarrow.array(numbers).cast(pyarrow.string()), width, "0")
