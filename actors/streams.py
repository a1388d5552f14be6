"""One video that a student makes, chunk by chunk, with all the state that is its own.

A stream owns its KV cache, its VAE states and its place in the video; the networks are the student's. So streams join
and leave a batch at no cost, and a snapshot of one goes on in another process.

Sources: the block loop, CausVid (arXiv 2412.07772), Algorithm 2; the rolling window with a sink, Self-Forcing (arXiv
2506.08009) section 3.4 and LongLive (arXiv 2509.22622) section 3; overlapping segments, CausVid's long videos.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..kernels.causal.generator import ChunkGenerator, append_blocks, next_blocks
from ..kernels.clips import Pixels
from ..kernels.diffusion.noise import SampleKey
from ..kernels.wan.vae import VAEState
from .modes import CLIP_LATENTS, SNAPSHOT, Mode, Redraw
from .pretraining import to_pixels, to_video

if TYPE_CHECKING:
    from .generator import Student

SNAPSHOT_VERSION: Final = 1

# The motion-adaptive noise of StreamDiffusionV2 (arXiv 2511.07399): fast motion gets less noise, so that it follows
# the source; the level moves slowly, so that the picture does not pulse.
FULL_MOTION: Final = 0.2  # root mean square change from frame to frame, pixels in [-1, 1], that counts as full motion
MOTION_DEPTH: Final = 0.1  # what full motion takes off the noise level
INERTIA: Final = 0.1  # share of the level before in the new one


def adapted_noise(initial: float, previous: float, frames: Tensor) -> float:
    """The next noise level. frames: pixels [T, 3, H, W] in [-1, 1], led by the last frame of the chunk before."""
    changes = frames.diff(dim=0).square().mean(dim=(1, 2, 3)).sqrt()
    motion = min(1.0, float(changes.max()) / FULL_MOTION) if len(changes) else 0.0
    return (1 - INERTIA) * (initial - MOTION_DEPTH * motion) + INERTIA * previous


@dataclass(frozen=True)
class StreamPlan:
    """What a stream was opened with. prompt, seed, sample: whose noise it is. height, width: pixels.

    segment: latent frames of a segment, for the mode "overlap".
    """

    prompt: str
    seed: int
    sample: int
    height: int
    width: int
    mode: Mode = "rolling"
    segment: int = CLIP_LATENTS
    redraw: Redraw | None = None


@dataclass(frozen=True)
class Snapshot:
    """All of a stream: tensors on the CPU, and what JSON can say."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]

    def write(self, path: Path) -> None:
        """Write one .safetensors file, whole or not at all."""
        staged = path.with_name(f".{path.name}.partial")
        staged.write_bytes(save(self.tensors, {SNAPSHOT: json.dumps(self.info)}))
        staged.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Snapshot":
        """FileNotFoundError, or ValueError where the file is not a whole snapshot."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such snapshot")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
                return cls(tensors, json.loads((file.metadata() or {})[SNAPSHOT]))
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: not a snapshot of a stream ({error})") from None


class Stream:
    """Made by `Student.open` and `Student.restore`. Chunks are uint8 [T, H, W, 3]; T is 9 for a first block of three
    latent frames and 12 after it.
    """

    def __init__(self, student: "Student", plan: StreamPlan) -> None:
        self.student = student
        self.plan = plan
        self.prompts: list[tuple[int, str]] = [(0, plan.prompt)]  # each with the latent frame from which it holds
        self.frames_out = 0
        factor = student.vae.spatial_factor
        self.generator = ChunkGenerator(
            student.transformer,
            student.settings_of(plan),
            student.context(plan.prompt),
            [SampleKey(plan.seed, plan.prompt, plan.sample)],
            (plan.height // factor, plan.width // factor),
            student.dtype,
        )
        self._decoder: VAEState | None = None
        self._encoder: VAEState | None = None
        self._owed: Tensor | None = None  # the last block, if its clean pass is still to run
        self._showing: Tensor | None = None  # what is left of the block that is being decoded
        self._unshown: deque[Tensor] = deque()  # blocks after it
        self._noise = plan.redraw.noise if plan.redraw else 1.0
        self._last_source: Tensor | None = None  # pixels [1, 3, H, W]
        self._open = True

    # --- What it is ------------------------------------------------------------------------------------------------

    @property
    def prompt(self) -> str:
        return self.prompts[-1][1]

    @property
    def bytes(self) -> int:
        """What the student has set aside for this stream."""
        return self.student.bytes_of(self.plan).total

    @property
    def held_bytes(self) -> int:
        """Memory of the tensors that it holds now."""
        cache, states = self.generator.cache, (self._decoder, self._encoder)
        tensors = [cache.keys, cache.values, cache.sink_keys, *self.generator.history, *self._blocks_left()]
        return sum(tensor.nbytes for tensor in tensors) + sum(state.bytes() for state in states if state)

    @property
    def latents_done(self) -> int:
        """Latent frames that were made or given."""
        return self.generator.frames_done + self._owed_frames

    @property
    def next_size(self) -> int:
        """Latent frames of the next block."""
        return self.generator.settings.size_of(self.generator.cache.next_position + self._owed_frames)

    @property
    def frames_due(self) -> int:
        """Pixel frames of the next block."""
        factor = self.student.vae.temporal_factor
        return factor * self.next_size - (0 if self.latents_done else factor - 1)

    @property
    def has_unshown(self) -> bool:
        """Whether there are blocks, or parts of one, that were made or given and not decoded."""
        return bool(self._blocks_left())

    @property
    def may_run_ahead(self) -> bool:
        """Whether blocks may be made before the ones before them are decoded: overlapping segments need the pixels."""
        return self.plan.mode == "rolling"

    # --- Making video ----------------------------------------------------------------------------------------------

    def next_chunk(self) -> Pixels:
        """The frames of the next block, uint8 [T, H, W, 3]."""
        return np.concatenate(list(self.frames()))

    def frames(self) -> Iterator[Pixels]:
        """The next chunk, a latent frame's pictures at a time: the first are there before the rest is decoded.

        What is not taken from the iterator stays in the stream, and comes first the next time.
        """
        if not self.has_unshown:
            self.make()
        yield from self.shown()

    def shown(self) -> Iterator[Pixels]:
        """What is left of the oldest block that was made and not decoded, a latent frame at a time."""
        self._check_open()
        assert self.has_unshown, "no block was made"
        if self._showing is None:
            self._showing = self._unshown.popleft()
        while self._showing is not None:
            yield self._show(self._showing)

    def make(self) -> None:
        """Make the next block, without decoding it."""
        make_together([self])

    @torch.no_grad()
    def switch_prompt(self, text: str) -> None:
        """Follow another prompt from the next block on: the window is recomputed under it (KV-recache)."""
        settle([self])
        self.generator.switch_prompt(self.student.context(text))
        self.prompts.append((self.latents_done, text))

    def redraw(self, frames: Pixels) -> Pixels:
        """The next chunk of a video, redrawn under the prompt. frames: uint8 [T, H, W, 3], T = `frames_due`.

        Each chunk is encoded by the streaming encoder, noised, and denoised on top of the cache (SDEdit, arXiv
        2108.01073, block by block: CausVid). ValueError where the frames are not the ones due.
        """
        self.make_redrawn(frames)
        return np.concatenate(list(self.shown()))

    @torch.no_grad()
    def make_redrawn(self, frames: Pixels) -> None:
        """The part of `redraw` before decoding."""
        self._check_source(frames)
        pixels = to_pixels(torch.from_numpy(frames)[None].to(self.student.device))
        latents, self._encoder = self.student.vae.encode(pixels, self._encoder)
        top = 1000 * self._next_noise(pixels[0])
        levels = [top, *(level for level in self.student.settings.timesteps if level < top)]
        settle([self])
        self._take(self.generator.next_block(latents, levels, keep=False))

    @torch.no_grad()
    def give(self, latents: Tensor, *, shown: bool) -> None:
        """Begin with given clean latents [1, F, C, h, w], whole blocks. shown: are they part of the video, or its past?

        Only before the first chunk.
        """
        assert self.latents_done == 0
        self.generator.append(latents)
        if shown:
            self._unshown.append(latents)
            return
        for latent in latents.split(1, dim=1):  # primes the decoder, so that the next frames join on
            _, self._decoder = self.student.vae.decode(latent, self._decoder)

    def close(self) -> None:
        """Give the memory back. The stream cannot be used any more."""
        if self._open:
            self._open = False
            self.student.release(self)
            del self.generator
            self._decoder = self._encoder = self._owed = self._showing = self._last_source = None
            self._unshown.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- Keeping and going on --------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Everything that the stream needs to go on bit for bit, here or in another process, from `Student.restore`."""
        settle([self])
        tensors = {f"generator.{name}": tensor for name, tensor in self.generator.state_dict().items()}
        for name, state in (("decoder", self._decoder), ("encoder", self._encoder)):
            if state is not None:
                tensors |= {f"{name}.{part}": tensor for part, tensor in state.state_dict().items()}
        tensors |= {f"unshown.{index}": block for index, block in enumerate(self._blocks_left())}
        if self._last_source is not None:
            tensors["last_source"] = self._last_source
        info = {
            "version": SNAPSHOT_VERSION,
            "student": self.student.fingerprint,
            "plan": asdict(self.plan),
            "prompts": list(self.prompts),
            "frames_out": self.frames_out,
            "noise": self._noise,
        }
        return Snapshot({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, info)

    def load(self, snapshot: Snapshot) -> None:
        """Take over the state of a snapshot of a stream with this plan."""
        device = self.student.device
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in snapshot.tensors.items():
            kind, _, rest = name.partition(".")
            parts.setdefault(kind, {})[rest] = tensor
        self.prompts = [(int(start), text) for start, text in snapshot.info["prompts"]]
        if len(self.prompts) > 1:
            self.generator.switch_prompt(self.student.context(self.prompt))
        self.generator.load_state_dict(parts["generator"])
        self._decoder, self._encoder = (
            VAEState.from_state_dict(parts[name]).to(device) if name in parts else None
            for name in ("decoder", "encoder")
        )
        unshown = parts.get("unshown", {})
        self._unshown = deque(unshown[str(index)].to(device) for index in range(len(unshown)))
        if "last_source" in parts:
            self._last_source = parts["last_source"][""].to(device)
        self.frames_out, self._noise = int(snapshot.info["frames_out"]), float(snapshot.info["noise"])

    # --- Inside ----------------------------------------------------------------------------------------------------

    @property
    def _owed_frames(self) -> int:
        return 0 if self._owed is None else self._owed.shape[1]

    def _blocks_left(self) -> list[Tensor]:
        """Blocks that were not decoded; of the first one, what is left."""
        return [*([] if self._showing is None else [self._showing]), *self._unshown]

    def _take(self, block: Tensor) -> None:
        """A block that was made. Its clean pass waits until the next block needs it: the pictures come first."""
        self._owed = block
        self._unshown.append(block)

    @torch.no_grad()
    def _show(self, block: Tensor) -> Pixels:
        """Decode the first latent frame of a block; the rest is what is shown next."""
        self._check_open()
        pixels, self._decoder = self.student.vae.decode(block[:, :1], self._decoder)
        if not bool(torch.isfinite(pixels).all()):
            raise ArithmeticError(f"the stream's pictures are not finite after {self.frames_out} frames")
        if self._ends_segment():
            self._showing = self._begin_segment(pixels, block[:, 1:])
            pixels = pixels[:, :-1]
        else:
            self._showing = block[:, 1:] if block.shape[1] > 1 else None
        frames = to_video(pixels[0]).cpu().numpy()
        self.frames_out += len(frames)
        return frames

    def _ends_segment(self) -> bool:
        """Whether the latent frame just decoded is the first one of the segment's last block."""
        if self.plan.mode == "rolling":  # where another thread may be making the next block
            return False
        return self.generator.cache.next_position + self._owed_frames == self.plan.segment

    def _begin_segment(self, pixels: Tensor, rest: Tensor) -> Tensor:
        """Start a segment that overlaps this one by a block: the block as the new segment has it.

        Its first latent must be one of an image: the last picture decoded so far, encoded alone. The block's other
        latents are kept. The old segment's pictures of them are never decoded, so no frame is shown twice or left out.
        """
        image, _ = self.student.vae.encode(pixels[:, -1:])
        start = torch.cat((image.to(rest), rest), dim=1)
        self._owed = self._decoder = None
        self.generator.restart(start)
        return start

    def _check_source(self, frames: Pixels) -> None:
        self._check_open()
        if self.plan.redraw is None:
            raise ValueError("redraw: the stream was not opened for it; open it with redraw=Redraw(noise)")
        if (self._encoder.latents_seen if self._encoder else 0) != self.latents_done:
            raise ValueError("redraw: the stream has made frames without a source, and cannot take one up now")
        expected = (self.frames_due, self.plan.height, self.plan.width, 3)
        if frames.shape != expected or frames.dtype != np.uint8:
            raise ValueError(f"redraw: uint8 frames {expected} are due, got {frames.dtype} {frames.shape}")

    def _next_noise(self, pixels: Tensor) -> float:
        redraw = self.plan.redraw
        assert redraw is not None
        if redraw.adaptive:
            seen = pixels if self._last_source is None else torch.cat((self._last_source, pixels))
            self._noise = adapted_noise(redraw.noise, self._noise, seen)
            self._last_source = pixels[-1:].clone()
        return self._noise

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError("stream: it is closed")


def may_share(stream: Stream) -> tuple[Any, ...]:
    """Streams for which this is the same may be made together; prompts, windows and positions may differ."""
    return stream.generator.frame_shape, stream.generator.settings.timesteps, stream.next_size


@torch.no_grad()
def make_together(streams: Sequence[Stream]) -> None:
    """The next block of each stream in one batch, undecoded. All must agree in `may_share`."""
    for stream in streams:
        stream._check_open()
        assert stream.may_run_ahead or not stream.has_unshown, "a segment goes on only when it was decoded"
    settle(streams)
    for stream, block in zip(streams, next_blocks([stream.generator for stream in streams], keep=False), strict=True):
        stream._take(block)


@torch.no_grad()
def settle(streams: Sequence[Stream]) -> None:
    """Run the clean passes that are owed, in as few batches as there are block sizes."""
    for stream in streams:
        stream._check_open()
    owing = sorted((stream for stream in streams if stream._owed is not None), key=lambda stream: stream._owed_frames)
    for _, group in groupby(owing, key=lambda stream: stream._owed_frames):
        together = list(group)
        append_blocks([stream.generator for stream in together], [_owed(stream) for stream in together])
        for stream in together:
            stream._owed = None


def _owed(stream: Stream) -> Tensor:
    assert stream._owed is not None
    return stream._owed


def overlapped(
    stream: Stream, blocks: int | None = None, prepare: Callable[[Stream], None] = lambda _: None
) -> Iterator[Pixels]:
    """The frames of the next `blocks` chunks (None: without end), decoded while a thread makes the block after.

    Yields groups of frames as `Stream.frames` does, the same ones. prepare: called before each block is made, for
    prompt switches. The caller must leave the stream alone between two groups. A block that was made ahead when the
    iteration is given up stays in the stream, as its next chunk. Segments that overlap cannot be made ahead: their
    chunks come one after the other.
    """
    if not stream.may_run_ahead:
        for _ in range(blocks) if blocks is not None else iter(int, 1):
            prepare(stream)
            yield from stream.frames()
        return
    side = _Side(stream.student.device)
    with ThreadPoolExecutor(1, thread_name_prefix="denoise") as worker:

        def ahead() -> Any:
            prepare(stream)
            return worker.submit(side.after, stream.make)

        count = 0
        making = None if stream.has_unshown else ahead()
        while blocks is None or count < blocks:
            made = making.result() if making else None
            count += 1
            making = ahead() if blocks is None or count < blocks else None
            yield from side.run(made, stream.shown())


class _Side:
    """Where blocks are decoded: on CUDA a stream of its own, so that the device has both kinds of work at once."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._cuda is not None:
            self._cuda.wait_stream(torch.cuda.current_stream(device))

    def after(self, make: Callable[[], None]) -> "torch.cuda.Event | None":
        """Make a block; on CUDA the event that says when it is there."""
        make()
        if self._cuda is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def run(self, made: "torch.cuda.Event | None", groups: Iterator[Pixels]) -> Iterator[Pixels]:
        """Take the groups one by one within the side stream."""
        if self._cuda is not None and made is not None:
            self._cuda.wait_event(made)
        while True:
            place: AbstractContextManager[Any] = nullcontext() if self._cuda is None else torch.cuda.stream(self._cuda)
            with place:
                group = next(groups, None)
            if group is None:
                return
            yield group
