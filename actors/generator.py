"""A causal student that makes video: its networks, loaded once, and the streams that share them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..kernels.causal.cache import CacheShape
from ..kernels.causal.student import StudentSettings
from ..kernels.clips import Pixels
from ..kernels.wan.config import TEXT_LENGTH
from ..kernels.wan.context import TextContext
from ..kernels.wan.text import TextEncoder
from ..kernels.wan.transformer import VideoTransformer
from ..kernels.wan.vae import StreamingVAE
from ..kernels.wan.weights import load_into, read_transformer
from .modes import MODES, Mode
from .pretraining import to_pixels
from .streams import (
    CLIP_LATENTS,
    SNAPSHOT_VERSION,
    Redraw,
    Snapshot,
    Stream,
    StreamPlan,
    make_together,
    may_share,
)

PROMPTS_KEPT: Final = 64  # text contexts; one of Wan's is at most 8 MB
WAN_SIZE: Final = (480, 832)
TINY_SIZE: Final = (64, 64)
BESIDE: Final = ("origin", "height", "width", "sampling")  # settings that change nothing of a stream that runs
WAN_TEXT_DIM: Final = 4096  # UMT5-XXL's; a tiny model has a tiny text encoder


class NoRoom(ValueError):
    """A stream that does not fit into the student's budget."""


@dataclass(frozen=True)
class StreamBytes:
    """Memory of one stream, in bytes, known before it is opened.

    kv_cache, vae_states, history are exact (history: the clean latents of the window, for prompt switches, and blocks
    not yet decoded); text is for a prompt of the largest length. activations is an estimate of what a pass of this
    stream, or the decoding of one latent frame, holds while it runs.
    """

    kv_cache: int
    vae_states: int
    history: int
    text: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


class Student:
    """The networks of a student, and a budget of memory for its streams. Not thread-safe, but for `context` and `plan`.

    dtype: of matrix products, caches and VAE; norms, modulation and latents stay in float32. budget: bytes that open
    streams may set aside together; None is no limit.
    """

    def __init__(
        self,
        transformer: VideoTransformer,
        encoder: TextEncoder,
        vae: StreamingVAE,
        settings: StudentSettings,
        *,
        dtype: torch.dtype = torch.float32,
        budget: int | None = None,
    ) -> None:
        self.transformer = transformer.to_precision(dtype).requires_grad_(False).eval()
        self.encoder = encoder.requires_grad_(False).eval()
        self.vae = vae.to(dtype).requires_grad_(False).eval()
        self.settings = settings
        self.dtype = dtype
        self.budget = budget
        self.device = transformer.proj_out.weight.device
        self.streams: list[Stream] = []
        self.context = lru_cache(PROMPTS_KEPT)(self._encode)
        self._encoding = Lock()
        self._vae_bytes = lru_cache(None)(self._measure_vae)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype | None = None,
        settings: StudentSettings | None = None,
        budget: int | None = None,
    ) -> "Student":
        """Load a student's folder: the diffusers layout and student.json.

        dtype: float32 on the CPU, bfloat16 elsewhere by default. settings: instead of student.json's, to try another
        window, sink or list of timesteps. FileNotFoundError or ValueError names what is missing or wrong.
        """
        device = torch.device(device)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        settings = settings or StudentSettings.read(folder)
        if settings.sampling != "few-step":
            raise ValueError(f"{folder}: a causal model of many steps, not a student; distil one from it")
        config, state = read_transformer(folder)
        with device:
            transformer = VideoTransformer(config)
        load_into(transformer, state)
        encoder = TextEncoder.from_pretrained(folder, dtype=dtype).to(device)
        vae = StreamingVAE.from_pretrained(folder / "vae").to(device)
        return cls(transformer, encoder, vae, settings, dtype=dtype, budget=budget)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the student was trained on; where that is not known, its family's."""
        if self.settings.height and self.settings.width:
            return self.settings.height, self.settings.width
        return WAN_SIZE if self.transformer.config.text_dim == WAN_TEXT_DIM else TINY_SIZE

    @property
    def fingerprint(self) -> str:
        """Differs where a snapshot could not go on: other settings, sizes, precision or weights.

        The weights speak through the last layer, which every step of training changes.
        """
        last = self.transformer.proj_out.weight.float().cpu().numpy().tobytes()
        settings = {name: value for name, value in asdict(self.settings).items() if name not in BESIDE}
        # What begins with an underscore is diffusers' own, the folder's path among it.
        vae = {name: value for name, value in self.vae.config.items() if not name.startswith("_")}
        content = [settings, asdict(self.transformer.config), vae, str(self.dtype)]
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode() + last).hexdigest()[:16]

    # --- Streams ---------------------------------------------------------------------------------------------------

    def open(
        self,
        prompt: str,
        seed: int = 0,
        sample: int = 0,
        *,
        height: int | None = None,
        width: int | None = None,
        image: Pixels | None = None,
        clip: Pixels | None = None,
        redraw: Redraw | None = None,
        mode: Mode = "rolling",
        segment: int = CLIP_LATENTS,
    ) -> Stream:
        """Begin a video.

        height, width: pixels; those of `image` or `clip` if one is given, else `default_size`. image: uint8 [H, W, 3],
        shown by the first block. clip: uint8 [T, H, W, 3], a video to go on from; the stream gives what comes after.
        redraw: for a stream that is fed with `Stream.redraw`. mode: "rolling", a window with a sink; "overlap",
        CausVid's: every `segment` latent frames start over, overlapping by a block. ValueError in one line; NoRoom
        where the budget is used up.
        """
        if sum(given is not None for given in (image, clip, redraw)) > 1:
            raise ValueError("image, clip, redraw: a stream begins with at most one of them")
        given = image if image is not None else clip
        options: dict[str, Any] = {"mode": mode, "segment": segment, "redraw": redraw}
        stream = self._admit(self.plan(prompt, seed, sample, height=height, width=width, given=given, **options))
        try:
            if image is not None:
                stream.give(self._encode_image(image, stream.next_size), shown=True)
            elif clip is not None:
                stream.give(self._encode_end(clip, stream.generator.settings), shown=False)
        except BaseException:
            stream.close()
            raise
        return stream

    def plan(
        self,
        prompt: str,
        seed: int = 0,
        sample: int = 0,
        *,
        height: int | None = None,
        width: int | None = None,
        given: Pixels | None = None,
        redraw: Redraw | None = None,
        mode: Mode = "rolling",
        segment: int = CLIP_LATENTS,
    ) -> StreamPlan:
        """What `open` would open; given: its image or clip. ValueError in one line where it could not. Thread-safe."""
        plan = StreamPlan(prompt, seed, sample, *self._size(given, height, width), mode, segment, redraw)
        self._check(plan)
        return plan

    def restore(self, snapshot: Snapshot) -> Stream:
        """A stream that goes on where the snapshot was taken. ValueError where it is of another student."""
        info = snapshot.info
        for name, expected in (("version", SNAPSHOT_VERSION), ("student", self.fingerprint)):
            if info.get(name) != expected:
                raise ValueError(f"snapshot: {name} is {info.get(name)}, here it is {expected}")
        redraw = info["plan"]["redraw"]
        plan = StreamPlan(**{**info["plan"], "redraw": redraw and Redraw(**redraw)})
        stream = self._admit(plan)
        try:
            stream.load(snapshot)
        except BaseException:
            stream.close()
            raise
        return stream

    def step(self, streams: Sequence[Stream]) -> list[Pixels]:
        """The next chunk of each stream; blocks are made in one batch wherever streams agree in `may_share`.

        Equal to each stream's own `next_chunk` but for the last bits of the arithmetic.
        """
        self.make(streams)
        return [stream.next_chunk() for stream in streams]

    def make(self, streams: Sequence[Stream]) -> None:
        """The part of `step` that is done together: a block for each stream that has none left to show, undecoded."""
        waiting = sorted((stream for stream in streams if not stream.has_unshown), key=may_share)
        for _, group in groupby(waiting, key=may_share):
            make_together(list(group))

    def release(self, stream: Stream) -> None:
        """Called by a stream that closes."""
        self.streams.remove(stream)

    # --- Memory ----------------------------------------------------------------------------------------------------

    def bytes_per_stream(self, height: int, width: int) -> StreamBytes:
        """Memory of a rolling text-to-video stream of this size in pixels."""
        return self.bytes_of(StreamPlan("", 0, 0, height, width))

    def bytes_of(self, plan: StreamPlan) -> StreamBytes:
        """Memory of a stream of this plan."""
        settings, config, factor = self.settings_of(plan), self.transformer.config, self.vae.spatial_factor
        height, width = plan.height // factor, plan.width // factor
        shape = CacheShape(config, 1, height, width, settings.window, settings.sink, self.dtype)
        largest = max(settings.block, settings.first_block or 0)
        latents = settings.window + 2 * largest
        return StreamBytes(
            kv_cache=shape.bytes(),
            vae_states=self._vae_bytes(plan.height, plan.width, plan.redraw is not None),
            history=latents * config.in_channels * height * width * torch.float32.itemsize,
            text=2 * config.num_layers * TEXT_LENGTH * config.dim * self.dtype.itemsize,
            activations=max(self._pass_bytes(largest * shape.buffer[3]), self._decode_bytes(plan)),
        )

    @property
    def bytes_open(self) -> int:
        """What all open streams have set aside."""
        return sum(stream.bytes for stream in self.streams)

    def settings_of(self, plan: StreamPlan) -> StudentSettings:
        """The student's settings; overlapping segments have a window of a whole segment, and no sink."""
        if plan.mode == "rolling":
            return self.settings
        return replace(self.settings, window=plan.segment, sink=0)

    def _admit(self, plan: StreamPlan) -> Stream:
        self._check(plan)
        needed = self.bytes_of(plan).total
        if self.budget is not None and self.bytes_open + needed > self.budget:
            held = f"{len(self.streams)} open streams hold {self.bytes_open / 1e6:.1f} of {self.budget / 1e6:.1f} MB"
            raise NoRoom(f"student: a stream of {plan.width}x{plan.height} needs {needed / 1e6:.1f} MB; {held}")
        stream = Stream(self, plan)
        self.streams.append(stream)
        return stream

    def _check(self, plan: StreamPlan) -> None:
        patch = self.transformer.config.patch_size[1:]
        for name, size, side in zip(("height", "width"), (plan.height, plan.width), patch, strict=True):
            multiple = self.vae.spatial_factor * side
            if size < multiple or size % multiple:
                raise ValueError(f"{name}: must be a multiple of {multiple} pixels, got {size}")
        if plan.mode not in MODES:
            raise ValueError(f"mode: must be one of {', '.join(MODES)}, got {plan.mode!r}")
        if plan.mode == "overlap":
            if plan.redraw is not None:
                raise ValueError("mode: a stream that redraws a video is rolling, got 'overlap'")
            block = self.settings.block
            if self.settings.first_block not in (None, block):
                raise ValueError("mode: overlapping segments begin with a whole block, this student's first is another")
            if plan.segment < 2 * block or plan.segment % block:
                raise ValueError(f"segment: must be two or more whole blocks of {block}, got {plan.segment}")

    def _size(self, given: Pixels | None, height: int | None, width: int | None) -> tuple[int, int]:
        if given is None:
            return height or self.default_size[0], width or self.default_size[1]
        if given.dtype != np.uint8 or given.shape[-1] != 3:
            raise ValueError(f"image, clip: must be uint8 [..., H, W, 3], got {given.dtype} {given.shape}")
        size = (given.shape[-3], given.shape[-2])
        if (height or size[0], width or size[1]) != size:
            raise ValueError(f"height, width: {height}x{width} asked for, the given frames are {size[0]}x{size[1]}")
        return size

    # --- Encoding --------------------------------------------------------------------------------------------------

    def _encode(self, prompt: str) -> TextContext:
        with self._encoding:  # a tokenizer takes one call at a time
            return self.encoder([prompt])

    def _encode_image(self, image: Pixels, latents: int) -> Tensor:
        """An image as a first block: shown for as long as the block lasts (CausVid, arXiv 2412.07772)."""
        if image.ndim != 3:
            raise ValueError(f"image: must be [H, W, 3], got {image.shape}")
        return self._encode_video(np.repeat(image[None], 1 + self.vae.temporal_factor * (latents - 1), axis=0))

    def _encode_end(self, clip: Pixels, settings: StudentSettings) -> Tensor:
        """The last whole blocks of a clip, as many as the window holds beside the next block.

        They are encoded as a clip of their own, so that the first latent is one of an image, as a stream's first is: a
        latent from the middle of a clip means something else there.
        """
        if clip.ndim != 4:
            raise ValueError(f"clip: must be [T, H, W, 3], got {clip.shape}")
        factor, first = self.vae.temporal_factor, settings.size_of(0)
        needed = 1 + factor * (first - 1)
        if len(clip) < needed:
            raise ValueError(f"clip: at least {needed} frames are needed, got {len(clip)}")
        room = min((len(clip) - 1) // factor + 1, settings.window - settings.block)
        blocks = max(0, (room - first) // settings.block)
        latents = first + blocks * settings.block
        return self._encode_video(clip[len(clip) - 1 - factor * (latents - 1) :])

    @torch.no_grad()
    def _encode_video(self, frames: Pixels) -> Tensor:
        pixels = to_pixels(torch.from_numpy(np.ascontiguousarray(frames))[None].to(self.device))
        return self.vae.encode(pixels)[0]

    # --- What passes hold ------------------------------------------------------------------------------------------

    def _measure_vae(self, height: int, width: int, redraws: bool) -> int:
        decoder = self.vae.bytes_per_stream(height, width)
        return decoder + (self.vae.encoder_bytes_per_stream(height, width) if redraws else 0)

    def _pass_bytes(self, tokens: int) -> int:
        """Estimate: in attention the inputs, queries, keys and values, some of them in float32; in the feed-forward
        layer its hidden values twice.
        """
        config, wide = self.transformer.config, torch.float32.itemsize
        attention = config.dim * (5 * self.dtype.itemsize + 3 * wide)
        feed_forward = config.dim * (3 * self.dtype.itemsize + wide) + 2 * config.ffn_dim * self.dtype.itemsize
        return tokens * max(attention, feed_forward)

    def _decode_bytes(self, plan: StreamPlan) -> int:
        """Estimate: ten copies of the widest layer's values, for the frames of one latent, and the next state."""
        config = self.vae.config
        channels = (config["decoder_base_dim"] or config["base_dim"]) * config["dim_mult"][0]
        values = plan.height * plan.width // self.vae.patch_size**2 * self.vae.temporal_factor * channels
        return 10 * values * self.dtype.itemsize + self._vae_bytes(plan.height, plan.width, False)
