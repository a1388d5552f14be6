"""Randomness that belongs to a sample: the same bits on any worker, batch, device or retry."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from .sampler import FreshNoise


@dataclass(frozen=True)
class SampleKey:
    """What identifies a sample: the run's seed, the prompt's id, and which of the prompt's samples it is."""

    run_seed: int
    prompt_id: str
    index: int


def sample_generator(run_seed: int, prompt_id: str, index: int, *stream: int) -> torch.Generator:
    """A CPU generator that belongs to the sample; further integers name independent streams of it.

    For a sample's few scalar choices. Torch's CPU generator keeps 32 bits of its seed, so among some 10^5
    streams two may coincide; `draw_noise` has no such limit.
    """
    generator = torch.Generator()
    generator.manual_seed(_digest(SampleKey(run_seed, prompt_id, index), "generator", *stream) & 0xFFFFFFFF)
    return generator


def draw_noise(keys: Sequence[SampleKey], frames: range, frame_shape: Sequence[int], step: int = 0) -> Tensor:
    """Standard normal noise [B, F, *frame_shape] of the samples' `frames`, fp32 on the CPU.

    Each frame of each sample has its own stream per `step` (0: the initial noise; k: the noise that is
    drawn for the k-th timestep of a few-step sampler). So a frame's noise depends neither on the length of
    the video, nor on the block size, nor on the rest of the batch, and a stream may be drawn piece by
    piece.
    """
    noise = numpy.empty((len(keys), len(frames), *frame_shape), dtype=numpy.float32)
    bits = numpy.random.Philox(key=0)
    stream = numpy.random.Generator(bits)
    for row, key in enumerate(keys):
        for column, frame in enumerate(frames):
            bits.state = _beginning(_digest(key, "noise", step, frame))
            stream.standard_normal(dtype=numpy.float32, out=noise[row, column, ...])
    return torch.from_numpy(noise)


def fresh_noise_of(keys: Sequence[SampleKey], first_frame: int = 0) -> FreshNoise:
    """The fresh noise of a few-step sampler for the samples' latents that begin at `first_frame`."""

    def fresh_noise(step: int, like: Tensor) -> Tensor:
        frames = range(first_frame, first_frame + like.shape[1])
        return draw_noise(keys, frames, like.shape[2:], step).to(like)

    return fresh_noise


def _beginning(key: int) -> Any:
    """The state of a new `numpy.random.Philox(key=key)`: to be set, it takes a tenth of the time of a new one."""
    words = numpy.array([key & (1 << 64) - 1, key >> 64], dtype=numpy.uint64)
    state = {"counter": numpy.zeros(4, dtype=numpy.uint64), "key": words}
    buffer = numpy.zeros(4, dtype=numpy.uint64)
    used = {"buffer": buffer, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
    return {"bit_generator": "Philox", "state": state, **used}


def _digest(key: SampleKey, *stream: int | str) -> int:
    """128 bits of sha256 over an unambiguous text of the key and the stream's names."""
    text = json.dumps([key.run_seed, key.prompt_id, key.index, *stream])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
