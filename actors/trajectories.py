"""The trajectory worker: a teacher that turns planned shards of (prompt, sample) into its ODE states.

The training data of ODE initialisation (CausVid, arXiv 2412.07772, section 4.3): the teacher's Euler path from the
sample's own noise, kept at exactly the student's timesteps and at the clean end.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow.compute
import torch
from torch import Tensor

from ..cluster.dataset import TAR_BLOCK, Quarantined, Sample, TensorSpec, encode_field
from ..cluster.manifest import ShardPlan
from ..cluster.shards import write_shard
from ..cluster.storage import Storage
from ..kernels.causal.student import StudentSettings
from ..kernels.diffusion.noise import SampleKey, draw_noise
from ..kernels.diffusion.sampler import euler_trajectory
from ..kernels.diffusion.schedule import MAX_TIMESTEP, uniform_timesteps
from ..kernels.precision import autocast
from ..kernels.wan.config import TEXT_LENGTH
from .model_files import velocity_digest

if TYPE_CHECKING:
    from ..kernels.wan.vae import StreamingVAE
    from .causal_teacher import CausalTeacher
    from .teacher import Teacher

SAMPLE_FORMAT: Final = 1  # raised when the fields of a sample, or what they mean, change
TRAJECTORY, PROMPT, META, TEXT = "trajectory.safetensors", "prompt.txt", "meta.json", "text.safetensors"

DTYPES: Final = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Item = Mapping[str, Any]  # a planned sample: key, prompt, and sample, its number among the prompt's


@dataclass(frozen=True)
class TrajectorySettings:
    """Everything but the prompt that decides a sample.

    grid: the Euler steps' timesteps. record: those of the states that are kept, the last one 0. shape: [F, C, H, W] of
    the latents. guidance: standard w. dtype: of what is stored. text_dim: width of the text embeddings that are
    stored; None stores none. threads: of torch. device_kind, torch_version, teacher: what a worker must find
    (`device_kind`, torch's version, `velocity_digest`). causal: of a causal teacher of many steps, whose paths are made
    block by block; None for a bidirectional one.
    """

    seed: int
    grid: tuple[float, ...]
    record: tuple[float, ...]
    shape: tuple[int, int, int, int]
    guidance: float
    negative_prompt: str
    batch: int
    dtype: str
    autocast: bool
    text_dim: int | None
    device: str
    threads: int
    device_kind: str
    torch_version: str
    teacher: str
    causal: StudentSettings | None = None

    @property
    def storage_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def fields(self) -> dict[str, dict[str, TensorSpec]]:
        """The fields of a sample, for `dataset.json`."""
        latents = TensorSpec(shape=(len(self.record), *self.shape), dtype=self.dtype)
        fields = {TRAJECTORY: {"latents": latents}, PROMPT: {}, META: {}}
        if self.text_dim is not None:
            fields[TEXT] = {"rows": TensorSpec(shape=(None, self.text_dim), dtype=self.dtype)}
        return fields

    def meta(self, item: Item) -> dict[str, Any]:
        """What a sample says of itself besides its prompt."""
        return {
            "seed": self.seed,
            "sample": item["sample"],
            "timesteps": list(self.record),
            "steps": len(self.grid) - 1,
            "guidance": self.guidance,
        }

    def key(self, item: Item) -> SampleKey:
        """Whose noise it is: the prompt's text is its identity, so a prompt gives the same path in every data set."""
        return SampleKey(self.seed, item["prompt"], item["sample"])

    def noise(self, items: Sequence[Item]) -> Tensor:
        """[B, F, C, H, W], float32."""
        frames, *frame_shape = self.shape
        return draw_noise([self.key(item) for item in items], range(frames), frame_shape)


def device_kind(device: str) -> str:
    """What sort of device this is, as far as the last bits of a result go: the GPU's name, or the CPU's vectors.

    Raises ValueError where this process sees no such device.
    """
    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: this process sees no CUDA device, {device} was asked for")
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


class TrajectoryWorker:
    """Makes shards with a teacher that is loaded once. Batches are those of the plan, so any worker gives its bytes.

    Raises ValueError when this process has another device, torch or teacher than the data set is made with.
    """

    # A pool's worker is one logical teacher. One that is too large for a device would be this same class in rank 0,
    # with a `Teacher` whose velocity runs on further ranks: plan, noise, batches and writing stay as they are.
    def __init__(self, teacher: Path, out: Storage, settings: TrajectorySettings) -> None:
        from .teacher import Teacher  # with its libraries 0.3 GB and seconds, which a job's driver does without

        torch.set_num_threads(settings.threads)
        _must_agree("device", device_kind(settings.device), settings.device_kind)
        _must_agree("torch", torch.__version__, settings.torch_version)
        _must_agree(f"teacher {teacher}", velocity_digest(teacher), settings.teacher)
        loaded = Teacher.from_pretrained(teacher, settings.device, autocast=settings.autocast)
        self.teacher = Teacher(
            loaded.transformer,
            loaded.encoder,
            loaded.vae,
            shift=loaded.shift,
            negative_prompt=settings.negative_prompt,
            autocast=settings.autocast,
        )
        self._causal = _causal(self.teacher, settings) if settings.causal else None
        self.settings = settings
        self._out = out

    def process(self, shard: ShardPlan) -> dict[str, Any]:
        """Write one shard, unless it is there; its row, and when the work on it began and ended (Unix seconds)."""
        began = time.time()
        row = write_shard(self._out, shard, self.samples(shard))
        figures = {"samples": row.samples, "quarantined": row.quarantined, "bytes": row.bytes}
        return {"shard": row.name, **figures, "began": began, "ended": time.time()}

    def samples(self, shard: ShardPlan) -> Iterator[tuple[str, Sample | Quarantined]]:
        """(key, sample) in the plan's order, made in batches of exactly `batch`, the shard's last one shorter."""
        for items in batches(shard, self.settings.batch):
            for item, sample in zip(items, self.make(items), strict=True):
                yield item["key"], sample

    def make(self, items: Sequence[Item]) -> list[Sample | Quarantined]:
        """One batch of samples. One with values that are not finite is quarantined; the others do not suffer."""
        settings, prompts = self.settings, [item["prompt"] for item in items]
        states = self._states(items, settings.grid, settings.record)
        paths = states.transpose(0, 1).to(settings.storage_dtype).cpu()
        texts = self.embed(prompts) if settings.text_dim is not None else [None] * len(items)
        return [self._sample(*parts) for parts in zip(items, paths, texts, strict=True)]

    def _states(self, items: Sequence[Item], grid: Sequence[float], record: Sequence[float]) -> Tensor:
        """The batch's paths [K, B, F, C, H, W]: of whole clips, or of a causal teacher block by block."""
        settings, prompts = self.settings, [item["prompt"] for item in items]
        if self._causal is not None:
            frames, _, height, width = settings.shape
            keys = [settings.key(item) for item in items]
            return self._causal.paths(prompts, keys, (frames, height, width), grid, record, settings.guidance)
        noise = settings.noise(items).to(self.teacher.device)
        return euler_trajectory(self.teacher.velocity(prompts, settings.guidance), noise, grid, record)

    def embed(self, prompts: Sequence[str]) -> list[Tensor]:
        """Each prompt's own rows of text embeddings, [n, D], without padding, in the stored dtype."""
        ids, mask = self.teacher.encoder.tokenize(prompts)
        precision = autocast(self.teacher.device, enabled=self.settings.autocast)
        with precision, torch.no_grad():
            rows = self.teacher.encoder.embed(ids, mask).rows
        rows = rows.to(self.settings.storage_dtype).cpu()
        return [row[:length] for row, length in zip(rows, mask.sum(dim=1).tolist(), strict=True)]

    def text_rows(self, prompts: Sequence[str]) -> list[int]:
        """How many rows `embed` gives for each prompt."""
        counts: list[int] = []
        for start in range(0, len(prompts), 256):
            _, mask = self.teacher.encoder.tokenize(prompts[start : start + 256])
            counts += mask.sum(dim=1).tolist()
        return counts

    def seconds_per_batch(self, items: Sequence[Item], steps: int = 3) -> float:
        """An estimate of the time of one batch: its text, then all steps at the pace of the fastest of a few."""
        if self._causal is not None:
            return self._causal_seconds(items)
        began = time.perf_counter()
        velocity = self.teacher.velocity([item["prompt"] for item in items], self.settings.guidance)
        text = time.perf_counter() - began
        noise = self.settings.noise(items).to(self.teacher.device)
        levels = uniform_timesteps(noise, self.settings.grid[0])
        paces = []
        for _ in range(1 + steps):  # the first warms up
            began = time.perf_counter()
            velocity(noise, levels)
            if self.teacher.device.type == "cuda":
                torch.cuda.synchronize(self.teacher.device)
            paces.append(time.perf_counter() - began)
        return text + (len(self.settings.grid) - 1) * min(paces[1:])

    def _causal_seconds(self, items: Sequence[Item]) -> float:
        """`seconds_per_batch` where blocks come one after the other: by clips of two steps and a clean pass a block."""
        short, paces = (self.settings.grid[0], self.settings.grid[0] / 2, 0.0), []
        for _ in range(2):  # the first warms up
            began = time.perf_counter()
            self._states(items, short, short[-1:]).cpu()
            paces.append((time.perf_counter() - began) / len(short))
        return len(self.settings.grid) * paces[-1]

    def _sample(self, item: Item, path: Tensor, text: Tensor | None) -> Sample | Quarantined:
        fault = _not_finite(path, self.settings)
        if fault is None and text is not None and not bool(torch.isfinite(text).all()):
            fault = f"the text embedding is not finite in {self.settings.dtype}"
        if fault is not None:
            return Quarantined(fault)
        sample = {TRAJECTORY: {"latents": path}, PROMPT: item["prompt"], META: self.settings.meta(item)}
        return sample if text is None else sample | {TEXT: {"rows": text}}


def _causal(teacher: "Teacher", settings: TrajectorySettings) -> "CausalTeacher":
    from .causal_teacher import CausalTeacher

    assert settings.causal is not None
    prompt = settings.negative_prompt
    return CausalTeacher(teacher, settings.causal, negative_prompt=prompt, autocast=settings.autocast)


def batches(shard: ShardPlan, batch: int) -> Iterator[list[dict[str, Any]]]:
    """The shard's items in the batches that they are made in."""
    for start in range(0, shard.items.num_rows, batch):
        yield shard.items.slice(start, batch).to_pylist()


def _must_agree(what: str, here: str, wanted: str) -> None:
    if here != wanted:
        raise ValueError(f"{what}: this worker has {here}, the data set is made with {wanted}")


def _not_finite(path: Tensor, settings: TrajectorySettings) -> str | None:
    finite = torch.isfinite(path).flatten(1).all(dim=1).tolist()
    if all(finite):
        return None
    first = settings.record[finite.index(False)]
    return f"the latents are not finite in {settings.dtype} from timestep {first:g} on"


# --- How large a shard will be -----------------------------------------------------------------------------------


def shard_bytes(settings: TrajectorySettings, shard: ShardPlan, text_rows: Mapping[str, int]) -> int:
    """The exact size of a shard's tar with no sample quarantined.

    text_rows: rows of each prompt's embedding, if embeddings are stored; a prompt that is not there counts with the
    largest number, and the result is then an upper bound.
    """
    prompts, samples = shard.items.column("prompt"), shard.items.column("sample").to_numpy()
    sizes = [np.full(len(samples), _tensor_bytes("latents", (len(settings.record), *settings.shape), settings.dtype))]
    sizes.append(pyarrow.compute.binary_length(prompts).to_numpy().astype(np.int64))
    numbers, place = np.unique(samples, return_inverse=True)
    sizes.append(np.array([len(encode_field(META, settings.meta({"sample": int(n)}))) for n in numbers])[place])
    if settings.text_dim is not None:
        rows = [text_rows.get(prompt, TEXT_LENGTH) for prompt in prompts.to_pylist()]
        sizes.append(np.array([_tensor_bytes("rows", (count, settings.text_dim), settings.dtype) for count in rows]))
    members = np.stack(sizes)
    return int((TAR_BLOCK + members + -members % TAR_BLOCK).sum()) + 2 * TAR_BLOCK


@cache
def _tensor_bytes(name: str, shape: tuple[int, ...], dtype: str) -> int:
    return len(encode_field(TRAJECTORY, {name: torch.empty(shape, dtype=DTYPES[dtype])}))


# --- Whether a finished set is what it should be -----------------------------------------------------------------

LEAST_DIFFERENCE: Final = 1e-3  # of two ends, relative: below it they are the same video


def sample_problems(settings: TrajectorySettings, item: Item, sample: Sample) -> list[str]:
    """What is wrong with a stored sample, in words; nothing if it is sound. Shapes and dtypes must be right."""
    problems = []
    if sample[PROMPT] != item["prompt"]:
        problems.append(f"its prompt is {sample[PROMPT]!r}, planned was {item['prompt']!r}")
    if sample[META] != settings.meta(item):
        problems.append(f"meta.json says {sample[META]}, planned was {settings.meta(item)}")
    path = sample[TRAJECTORY]["latents"].float()
    if not bool(torch.isfinite(path).all()):
        return [*problems, "values that are not finite"]
    if settings.record[0] == MAX_TIMESTEP:
        problems += _noise_problems(path[0], settings.noise([item])[0])
    if any(torch.equal(earlier, later) for earlier, later in pairwise(path)):
        problems.append("two states of the path are equal")
    if float(path[-1].std()) < LEAST_DIFFERENCE:
        problems.append(f"the end is constant (standard deviation {float(path[-1].std()):.2g})")
    return problems


def _noise_problems(first: Tensor, noise: Tensor) -> list[str]:
    spread, slack = float(first.std()), 6 / (2 * first.numel()) ** 0.5 + 1e-3
    if abs(spread - 1) > slack:
        return [f"the first state's standard deviation is {spread:.3f}, not 1 within {slack:.3f}"]
    if not torch.allclose(first, noise, rtol=1e-2, atol=1e-2):
        return ["the first state is not this sample's noise"]
    return []


def equal_ends(ends: Sequence[tuple[str, str, Tensor]]) -> list[str]:
    """Pairs of (key, prompt, end [F, C, H, W]) of different prompts that ended in the same video."""
    return [
        f"{key}: ends in the same video as {other_key}, which has another prompt"
        for (other_key, other_prompt, other), (key, prompt, end) in combinations(ends, 2)
        if prompt != other_prompt and float((end - other).norm()) <= LEAST_DIFFERENCE * float(end.norm())
    ]


def decode_end(vae: "StreamingVAE", end: Tensor) -> np.ndarray:
    """The clean end [F, C, H, W] of a path as a video: uint8 [T, height, width, 3]."""
    from .pretraining import to_video

    with torch.no_grad():
        pixels, _ = vae.decode(end[None].float())
    return to_video(pixels)[0].numpy()
