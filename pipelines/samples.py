"""Training batches: from shards of trajectories or clips, or from prompts alone; the same on any number of processes.

A step's batch is dealt from fixed streams of samples, the lanes. A process reads whole lanes, so as long as the number
of processes divides that of the lanes, the batches are the same, sample by sample and place by place.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..actors.engine import Ranks
from ..actors.learning.batch import Batch
from ..cluster.dataset import DatasetInfo, ShardError, read_dataset, read_samples
from ..cluster.manifest import ManifestRow, read_manifest
from ..cluster.shards import Reading, ShardReader
from ..cluster.storage import Storage
from ..kernels.causal.student import StudentSettings
from ..kernels.diffusion.sampler import TIMESTEP_TOLERANCE
from ..kernels.sprites.splits import prompts as sprites_prompts
from .prompts import read_prompts
from .recipe import Recipe, TrainingRecipe, WorldRecipe, fingerprint

SPRITES = "sprites:train"
SPRITES_PROMPTS = 4096
TENSORS = {"trajectories": "trajectory.safetensors", "latents": "latents.safetensors"}
TEXTS = {"trajectories": "prompt.txt", "latents": "caption.txt"}

log = logging.getLogger(__name__)


class Batches(Protocol):
    """Gives a process its part of each step's batch. origin: of the samples, for the student's record."""

    origin: str

    @property
    def left_out(self) -> int:
        """Samples of this process that could not be used so far."""
        ...

    def take(self, step: int) -> Batch:
        """The part of step `step`; steps are asked for in order."""
        ...

    def save(self, folder: Path) -> None:
        """Write where the streams stand. Every rank calls."""
        ...

    def load(self, folder: Path) -> None:
        """Go on after `save`, on any number of processes that divides the lanes."""
        ...


@dataclass(frozen=True)
class Deal:
    """How batches are dealt, over all processes and for one of them."""

    batch: int
    lanes: int
    seed: int
    poisoned: Literal["fatal", "skip"]
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.lanes % self.ranks:
            raise ValueError(f"lanes: must be a multiple of the number of processes ({self.ranks}), got {self.lanes}")

    @classmethod
    def of(cls, recipe: TrainingRecipe, ranks: Ranks) -> "Deal":
        return cls(recipe.batch, recipe.lanes, recipe.seed, recipe.poisoned, ranks.rank, ranks.size)

    @property
    def own_lanes(self) -> range:
        each = self.lanes // self.ranks
        return range(self.rank * each, (self.rank + 1) * each)

    @property
    def positions(self) -> range:
        """Places of this process's samples in a batch: those of its lanes, one lane after the other."""
        each = self.batch // self.lanes
        return range(self.own_lanes.start * each, self.own_lanes.stop * each)


@dataclass(frozen=True)
class TrainingData:
    """A data set, checked for what a method needs of it.

    clean_only: of trajectories, give only their ends.
    """

    storage: Storage
    info: DatasetInfo
    rows: tuple[ManifestRow, ...]
    clean_only: bool

    @classmethod
    def open(cls, address: str, student: StudentSettings, *, clean_only: bool) -> "TrainingData":
        """ValueError or FileNotFoundError, in one line, where the data set cannot train `student`."""
        storage = Storage.open(address)
        info, rows = read_dataset(storage), tuple(read_manifest(storage))
        kinds = ("trajectories", "latents") if clean_only else ("trajectories",)
        if info.kind not in kinds:
            raise ValueError(f"{storage.uri}: must hold {' or '.join(kinds)}, holds {info.kind}")
        spec = info.fields[TENSORS[info.kind]]["latents"]
        student.blocks(int(spec.shape[-4] or 0))
        if not clean_only:
            _check_timesteps(storage.uri, info, student)
        if not sum(row.samples for row in rows):
            raise ValueError(f"{storage.uri}: holds no samples")
        return cls(storage, info, rows, clean_only)

    @property
    def shape(self) -> tuple[int, ...]:
        """[F, C, H, W] of a clip."""
        shape = self.info.fields[TENSORS[self.info.kind]]["latents"].shape[-4:]
        return tuple(int(size or 0) for size in shape)

    def some_prompts(self) -> list[str]:
        """The prompts of the first shard that can be read; what is damaged, the training itself will say."""
        for row in self.rows:
            with contextlib.suppress(ShardError, FileNotFoundError):
                if texts := _texts(self.storage, self.info, row.name):
                    return texts
        raise ValueError(f"{self.storage.uri}: no shard can be read")

    def sample(self, fields: dict[str, Any]) -> tuple[str, Tensor]:
        """Prompt and latents of a sample. ShardError, naming it, where a value is not finite."""
        latents: Tensor = fields[TENSORS[self.info.kind]]["latents"]
        if not bool(torch.isfinite(latents).all()):
            bad = int((~torch.isfinite(latents)).sum())
            reason = f"{bad} of {latents.numel()} latent values are not finite"
            raise ShardError(self.storage.where(fields["__shard__"]), fields["__key__"], reason)
        at_end = self.clean_only and self.info.kind == "trajectories"
        return fields[TEXTS[self.info.kind]], latents[-1] if at_end else latents


def _check_timesteps(uri: str, info: DatasetInfo, student: StudentSettings) -> None:
    """States at other noise levels than the student's would teach it the wrong map, without any sign of it."""
    needed, stored = [*student.timesteps, 0.0], info.made_by.get("timesteps")
    if not isinstance(stored, list):
        raise ValueError(f"{uri}: dataset.json: made_by has no timesteps, the student needs {_listed(needed)}")
    close = len(stored) == len(needed) and all(
        abs(have - want) <= TIMESTEP_TOLERANCE for have, want in zip(stored, needed, strict=True)
    )
    if not close:
        raise ValueError(f"{uri}: holds states at {_listed(stored)}, the recipe's student needs {_listed(needed)}")


def _listed(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.7g}" for value in values) + "]"


class Lane:
    """One endless stream of a data set's samples: epoch after epoch of its own stretch."""

    def __init__(self, data: TrainingData, deal: Deal, lane: int) -> None:
        self._data = data
        self._lane = lane
        self._skips = deal.poisoned == "skip"
        self._reading = Reading(deal.seed, lane, deal.lanes, damaged=deal.poisoned)
        self._reader = ShardReader(data.storage, data.rows, self._reading)
        if not len(self._reader):
            total = sum(row.samples for row in data.rows)
            raise ValueError(f"{data.storage.uri}: {total} samples are too few for {deal.lanes} lanes")
        self._stream = self._samples()
        self._poisoned = 0

    @property
    def left_out(self) -> int:
        return self._poisoned + self._reader.skipped

    def take(self) -> tuple[str, str, Tensor]:
        """Key, prompt and latents of the next sample. ShardError where it cannot be used and that is fatal."""
        try:
            return next(self._stream)
        except ShardError:
            self._poisoned += 1
            raise

    def state(self) -> dict[str, Any]:
        return {"reader": self._reader.state(), "poisoned": self._poisoned}

    def load_state(self, state: dict[str, Any]) -> None:
        data = self._data
        self._reader = ShardReader.from_state(data.storage, data.rows, self._reading, state["reader"])
        self._poisoned = state["poisoned"]
        self._stream = self._samples()

    def _samples(self) -> Iterator[tuple[str, str, Tensor]]:
        empty_epochs = 0
        while empty_epochs < 2:  # the rest of an epoch may be empty, a whole one may not
            empty_epochs += 1
            for fields in self._reader:
                try:
                    prompt, latents = self._data.sample(fields)
                except ShardError as error:
                    if not self._skips:
                        raise
                    log.warning("left out: %s", error)
                    self._poisoned += 1
                    continue
                empty_epochs = 0
                yield fields["__key__"], prompt, latents
        raise ValueError(f"{self._data.storage.uri}: lane {self._lane}: not one sample can be used")


def _lane_file(lane: int) -> str:
    return f"lane-{lane:04d}.json"


class ShardBatches:
    """Batches from a data set of shards."""

    def __init__(self, data: TrainingData, deal: Deal) -> None:
        self._deal = deal
        self._lanes = {lane: Lane(data, deal, lane) for lane in deal.own_lanes}
        self.origin = data.info.fingerprint

    @property
    def left_out(self) -> int:
        return sum(lane.left_out for lane in self._lanes.values())

    def take(self, step: int) -> Batch:
        deal = self._deal
        each = deal.batch // deal.lanes
        keys, prompts, latents = zip(*(lane.take() for lane in self._lanes.values() for _ in range(each)), strict=True)
        return Batch(step, deal.batch, deal.positions, keys, prompts, torch.stack(latents))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, lane in self._lanes.items():
            (folder / _lane_file(number)).write_text(json.dumps(lane.state()))

    def load(self, folder: Path) -> None:
        for number, lane in self._lanes.items():
            lane.load_state(json.loads((folder / _lane_file(number)).read_text()))


class PromptBatches:
    """Batches of prompts alone: epoch after epoch of permutations, a function of the step."""

    left_out = 0

    def __init__(self, prompts: Sequence[str], deal: Deal) -> None:
        self._prompts = list(prompts)
        self._deal = deal
        self.origin = fingerprint({"prompts": self._prompts})

    def take(self, step: int) -> Batch:
        deal = self._deal
        chosen = [self._index(step * deal.batch + position) for position in deal.positions]
        prompts = tuple(self._prompts[index] for index in chosen)
        return Batch(step, deal.batch, deal.positions, tuple(f"prompt {index}" for index in chosen), prompts)

    def save(self, folder: Path) -> None:
        pass  # a step alone says which prompts are its

    def load(self, folder: Path) -> None:
        pass

    def _index(self, place: int) -> int:
        epoch, within = divmod(place, len(self._prompts))
        generator = torch.Generator().manual_seed(self._deal.seed * 7_919 + epoch)
        return int(torch.randperm(len(self._prompts), generator=generator)[within])


def training_prompts(source: str, recipe: Recipe) -> list[str]:
    """Prompts for a method without data.

    source: a file of prompts, a data set (its captions), or `sprites:train` for the embedded world's training split.
    """
    if source == SPRITES:
        world = recipe.pretrain.world if recipe.pretrain else WorldRecipe()
        texts = (text for text, _ in sprites_prompts("train", SPRITES_PROMPTS, 0, world.level))
        return list(dict.fromkeys(texts))
    if "://" in source or (Path(source) / "dataset.json").is_file():
        return _captions(Storage.open(source))
    return list(read_prompts(Path(source)).texts)


def _captions(storage: Storage) -> list[str]:
    """The texts of a data set, each once, in the order of its shards."""
    info = read_dataset(storage)
    if info.kind not in TEXTS:
        raise ValueError(f"{storage.uri}: prompts are read from {' or '.join(TEXTS)}, it holds {info.kind}")
    names = [row.name for row in read_manifest(storage)]
    texts = dict.fromkeys(text for name in names for text in _texts(storage, info, name))
    if not texts:
        raise ValueError(f"{storage.uri}: holds no samples")
    return list(texts)


def _texts(storage: Storage, info: DatasetInfo, shard: str) -> list[str]:
    """The prompt or caption of each sample of a shard that has one."""
    with storage.open_input(shard) as file:
        samples = (fields for _, _, fields in read_samples(file, storage.where(shard)))
        return [fields[TEXTS[info.kind]].decode() for fields in samples if TEXTS[info.kind] in fields]
