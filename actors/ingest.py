"""The ingest worker: shards of clips, decoded ahead in processes of their own, encoded in batches on the device."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ..cluster.dataset import Quarantined, Sample, TensorSpec
from ..cluster.manifest import ShardPlan
from ..cluster.shards import write_shard
from ..cluster.storage import Storage
from .clips import Clip, ClipSettings
from .decode_ahead import DecodeAhead, jobs_of, quarantined
from .encoder import STORED, Encoder, text_digest, vae_digest
from .sources import VideoFolder
from .trajectories import device_kind

SAMPLE_FORMAT: Final = 1  # raised when the fields of a sample, or what they mean, change
LATENTS, CAPTION, META, TEXT = "latents.safetensors", "caption.txt", "meta.json", "text.safetensors"
ENCODE: Final = "encode"  # the stage of what the networks make nothing of
BATCHES_AHEAD: Final = 2  # that wait decoded, for each lane

Item = Mapping[str, Any]  # a planned clip: key, path, clip (its index in the video), caption


@dataclass(frozen=True)
class IngestSettings:
    """Everything but the video and its caption that decides a sample; `lanes` decides the pace only.

    shape: [F, C, h, w] of the latents. text_dim: width of the text embeddings that are stored; None stores none.
    threads: of torch. device_kind, torch, vae, text: what a worker must find (`device_kind`, torch's version,
    `vae_digest`, `text_digest`).
    """

    clip: ClipSettings
    batch: int
    shape: tuple[int, int, int, int]
    text_dim: int | None
    device: str
    threads: int
    device_kind: str
    torch: str
    vae: str
    text: str | None
    lanes: int = 1

    def fields(self) -> dict[str, dict[str, TensorSpec]]:
        """The fields of a sample, for `dataset.json`."""
        dtype = str(STORED).removeprefix("torch.")
        fields = {LATENTS: {"latents": TensorSpec(shape=self.shape, dtype=dtype)}, CAPTION: {}, META: {}}
        if self.text_dim is not None:
            fields[TEXT] = {"rows": TensorSpec(shape=(None, self.text_dim), dtype=dtype)}
        return fields

    def meta(self, item: Item) -> dict[str, Any]:
        """What a sample says of its origin. Times are seconds in the source, sizes pixels of the clip."""
        return {
            "source": item["path"],
            "clip": item["clip"],
            "start_seconds": item["clip"] * self.clip.stride / self.clip.frames_per_second,
            "frame_rate": self.clip.frames_per_second,
            "frames": self.clip.frames,
            "height": self.clip.height,
            "width": self.clip.width,
        }


class IngestWorker:
    """Makes shards, one at a time: child processes decode the next clips while the device encodes a batch.

    A batch is the next `batch` clips of the shard that give a sample, so it is the same on any worker. Raises
    ValueError when this process has another device, torch or model than the data set is made with.
    """

    def __init__(self, videos: VideoFolder, model: Path, out: Storage, settings: IngestSettings) -> None:
        torch.set_num_threads(settings.threads)
        _must_agree("device", device_kind(settings.device), settings.device_kind)
        _must_agree("torch", torch.__version__, settings.torch)
        _must_agree(f"VAE of {model}", vae_digest(model), settings.vae)
        if settings.text is not None:
            _must_agree(f"text encoder of {model}", text_digest(model), settings.text)
        self.encoder = Encoder.from_pretrained(model, settings.device, with_text=settings.text is not None)
        self.ahead = DecodeAhead(videos, settings.clip, lanes=settings.lanes, ahead=BATCHES_AHEAD * settings.batch)
        self.settings = settings
        self._out = out
        self._waited = self._encoded = 0.0

    def close(self) -> None:
        """End the processes that decode."""
        self.ahead.close()

    def process(self, shard: ShardPlan) -> dict[str, Any]:
        """Write one shard, unless it is there; its row, and the seconds that the device waited and worked."""
        self._waited = self._encoded = 0.0
        row = write_shard(self._out, shard, self.samples(shard))
        figures = {"samples": row.samples, "quarantined": row.quarantined, "bytes": row.bytes}
        return {"shard": row.name, **figures, "waited": self._waited, "encoded": self._encoded}

    def samples(self, shard: ShardPlan) -> Iterator[tuple[str, Sample | Quarantined]]:
        """(key, sample) in the plan's order."""
        items = shard.items.to_pylist()
        held: list[tuple[Item, Clip | Quarantined]] = []
        clips = 0
        for item, outcome in zip(items, self._outcomes(items), strict=True):
            held.append((item, outcome))
            clips += isinstance(outcome, Clip)
            if clips == self.settings.batch:
                yield from self._made(held)
                held, clips = [], 0
        yield from self._made(held)

    def _outcomes(self, items: Sequence[Item]) -> Iterator[Clip | Quarantined]:
        outcomes = self.ahead.outcomes(jobs_of([(item["path"], item["clip"]) for item in items]))
        while True:
            began = time.perf_counter()
            outcome = next(outcomes, None)
            self._waited += time.perf_counter() - began
            if outcome is None:
                return
            yield outcome

    def _made(self, held: Sequence[tuple[Item, Clip | Quarantined]]) -> Iterator[tuple[str, Sample | Quarantined]]:
        batch = [(item, outcome) for item, outcome in held if isinstance(outcome, Clip)]
        began = time.perf_counter()
        made = iter(self.make(batch))
        self._encoded += time.perf_counter() - began
        for item, outcome in held:
            yield item["key"], next(made) if isinstance(outcome, Clip) else outcome

    def make(self, batch: Sequence[tuple[Item, Clip]]) -> list[Sample | Quarantined]:
        """One batch of samples. One with values that are not finite is quarantined."""
        if not batch:
            return []
        latents = self.encoder.encode([clip.frames for _, clip in batch])
        texts: Sequence[Tensor | None] = [None] * len(batch)
        if self.settings.text is not None:
            texts = self.encoder.embed([item["caption"] for item, _ in batch])
        return [self._sample(item, *parts) for (item, _), *parts in zip(batch, latents, texts, strict=True)]

    def _sample(self, item: Item, latents: Tensor, text: Tensor | None) -> Sample | Quarantined:
        if not bool(torch.isfinite(latents).all()):
            return quarantined(ENCODE, "not-finite", "the latents are not finite in float16")
        sample = {LATENTS: {"latents": latents}, CAPTION: item["caption"], META: self.settings.meta(item)}
        if text is None:
            return sample
        if not bool(torch.isfinite(text).all()):
            return quarantined(ENCODE, "not-finite", "the text embedding is not finite in float16")
        return sample | {TEXT: {"rows": text}}


def _must_agree(what: str, here: str, wanted: str) -> None:
    if here != wanted:
        raise ValueError(f"{what}: this worker has {here}, the data set is made with {wanted}")
