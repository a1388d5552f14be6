"""Training on streams that outlast a clip: LongLive's streaming long tuning (arXiv 2509.22622, section 3.3)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.causal.cache import KVCache
from ...kernels.wan.vae import StreamingVAE, VAEState
from ..engine import Ranks
from .batch import Batch, Draws
from .sources import Clip, StudentRollout


@dataclass
class Stream:
    """The live state of one micro-batch's rollouts. All tensors are detached.

    done: latent frames made. cached: the clean frames [B, 1, C, H, W] that the cache holds, for a recache.
    tail: the last frames, as many as the next window begins with. unseen: frames that the decoder has not had.
    """

    positions: range
    prompts: tuple[str, ...]
    began: int  # training step of the first block
    cache: KVCache
    done: int = 0
    clips: int = 0
    cached: list[Tensor] = field(default_factory=list)
    tail: Tensor | None = None
    unseen: Tensor | None = None
    decoder: VAEState | None = None


class LongRollouts:
    """The same rollouts go on from step to step, on their live cache, for `rollout_frames` latent frames.

    A stream's first step makes a whole clip. Every later one makes new blocks, as many as leave room for one frame of
    the past, and the score networks see a window of a clip's length: the stream's last frames, then the new ones;
    only the new ones are trained. The student's positions run on; the score networks count a window's from 0. They
    know clips whose first latent stands for a single picture, and a latent from the middle of a stream does not: so
    the stream is decoded up to the window's first latent, and the last picture of that is encoded by itself into the
    window's first latent.

    switch: once in a rollout, before a step's first block, the streams take the step's prompts: the cached window is
    recomputed under them, block by block (KV-recache, section 3.2). The step of the switch is one draw per rollout,
    the same on all ranks, because a recache costs passes.
    """

    def __init__(
        self, student_rollout: StudentRollout, vae: StreamingVAE, rollout_frames: int, *, switch: bool
    ) -> None:
        shape, student = student_rollout.shape, student_rollout.student
        self._rollout = student_rollout
        self._vae = vae
        self._switch = switch
        self._sizes = student.blocks(shape.frames)
        self._new = (shape.frames - 1) // student.block * student.block
        if rollout_frames < shape.frames or not self._new:
            raise ValueError(
                f"rollout_frames: a long rollout has at least a clip ({shape.frames}) and a clip more than a block "
                f"({student.block}), got {rollout_frames} latent frames"
            )
        self._clips = 1 + (rollout_frames - shape.frames) // self._new
        self._streams: dict[int, Stream] = {}

    def make(self, batch: Batch, *, with_gradient: bool) -> Clip:
        stream = self._streams.get(batch.positions.start)
        if stream is None or stream.clips == self._clips:
            stream = Stream(batch.positions, batch.prompts, batch.step, self._rollout.new_cache(len(batch)))
            self._streams[batch.positions.start] = stream
        assert stream.positions == batch.positions, f"streams of samples {stream.positions} met {batch.positions}"
        if stream.clips and stream.clips == self._switch_at(stream.began):
            stream.prompts = batch.prompts
            self._recache(stream)
        frames = self._new if stream.clips else self._rollout.shape.frames
        past = self._past(stream) if stream.clips else None
        made = self._extend(stream, batch, frames, with_gradient=with_gradient)
        window = made if past is None else torch.cat((past, made), dim=1)
        trained = torch.arange(window.shape[1], device=made.device) >= window.shape[1] - frames
        return Clip(window, trained.expand(window.shape[:2]), frames * batch.total, stream.prompts)

    def check_causality(self, batch: Batch) -> None:
        self._rollout.check_causality(batch)

    def save(self, folder: Path) -> None:
        """One file per process; a resumed training needs the same processes and micro-batches."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {str(first): _pack(stream) for first, stream in self._streams.items()}
        torch.save(content, folder / _file(self._rollout.ranks))

    def load(self, folder: Path) -> None:
        path = folder / _file(self._rollout.ranks)
        if not path.is_file():
            raise ValueError(f"{path}: no such file; live rollouts go on only with as many processes as before")
        content = torch.load(path, map_location="cpu", weights_only=True)
        self._streams = {int(first): self._unpack(packed) for first, packed in content.items()}

    def _extend(self, stream: Stream, batch: Batch, frames: int, *, with_gradient: bool) -> Tensor:
        """Make the stream's next `frames` frames."""
        sizes = [self._rollout.student.block] * (frames // self._rollout.student.block)
        model = self._rollout.model(stream.cache, self._rollout.contexts(stream.prompts))
        noise = self._rollout.noise(batch, range(stream.done, stream.done + frames))
        made = self._rollout.run(model, noise, sizes if stream.clips else self._sizes, with_gradient=with_gradient)
        kept = made.detach()
        self._remember(stream, kept)
        stream.tail = kept[:, self._new - self._rollout.shape.frames :]
        stream.unseen = kept if stream.unseen is None else torch.cat((stream.unseen, kept), dim=1)
        stream.done += frames
        stream.clips += 1
        return made

    def _remember(self, stream: Stream, kept: Tensor) -> None:
        """What the cache holds now: the sink, and the last frames."""
        stream.cached.extend(kept.split(1, dim=1))
        sink = self._rollout.student.sink
        surplus = len(stream.cached) - len(stream.cache)
        del stream.cached[sink : sink + surplus]

    def _recache(self, stream: Stream) -> None:
        """Recompute the cache under the stream's prompts; a remainder of a block goes first."""
        held, size = len(stream.cached), self._rollout.student.block
        sizes = ([held % size] if held % size else []) + [size] * (held // size)
        stream.cache.reset(stream.cache.next_position - held)
        model = self._rollout.model(stream.cache, self._rollout.contexts(stream.prompts))
        with self._rollout.engine.autocast():
            for block in torch.cat(stream.cached, dim=1).split(sizes, dim=1):
                model.write_context(block)

    @torch.no_grad()
    def _past(self, stream: Stream) -> Tensor:
        """The frames that the next window begins with, the first of them as a picture's latent."""
        assert stream.tail is not None
        assert stream.unseen is not None
        count = stream.unseen.shape[1] - stream.tail.shape[1] + 1
        with self._rollout.engine.autocast():
            pixels, stream.decoder = self._vae.decode(stream.unseen[:, :count], stream.decoder)
            picture, _ = self._vae.encode(pixels[:, -1:])
        stream.unseen = stream.unseen[:, count:]
        return torch.cat((picture.to(stream.tail), stream.tail[:, 1:]), dim=1)

    def _switch_at(self, began: int) -> int | None:
        """The number of clips after which a rollout that began at a training step changes its prompts."""
        if not self._switch or self._clips < 2:
            return None
        generator = Draws(self._rollout.seed, began).generator(0, "switch")
        return int(torch.randint(1, self._clips, (), generator=generator))

    def _unpack(self, packed: dict[str, Any]) -> Stream:
        device = self._rollout.engine.device
        positions = range(*packed["positions"])
        stream = Stream(positions, tuple(packed["prompts"]), packed["began"], self._rollout.new_cache(len(positions)))
        stream.cache.load_state_dict(packed["cache"])
        stream.done, stream.clips = packed["done"], packed["clips"]
        stream.cached = list(packed["cached"].to(device).split(1, dim=1))
        stream.tail, stream.unseen = packed["tail"].to(device), packed["unseen"].to(device)
        if packed["decoder"]:
            stream.decoder = VAEState.from_state_dict(packed["decoder"]).to(device)
        return stream


def _pack(stream: Stream) -> dict[str, Any]:
    return {
        "positions": [stream.positions.start, stream.positions.stop],
        "prompts": list(stream.prompts),
        "began": stream.began,
        "done": stream.done,
        "clips": stream.clips,
        "cached": torch.cat(stream.cached, dim=1),
        "tail": stream.tail,
        "unseen": stream.unseen,
        "cache": stream.cache.state_dict(),
        "decoder": stream.decoder.state_dict() if stream.decoder else {},
    }


def _file(ranks: Ranks) -> str:
    return f"streams-{ranks.rank:04d}-of-{ranks.size:04d}.pt"
