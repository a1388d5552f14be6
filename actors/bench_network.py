"""The transformer as a benchmark runs it: plain, compiled, replayed as CUDA graphs, or with float8 products.

None of the three changes what is computed; float8 rounds it. All leave the caller's side as it is: a
`ChunkGenerator` cannot tell them from the plain network.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import util

import torch
from torch import Tensor

from ..kernels.causal.student import StudentSettings
from ..kernels.wan.config import TransformerConfig
from ..kernels.wan.context import TextContext
from ..kernels.wan.rotary import rotary_table
from ..kernels.wan.tensors import State
from ..kernels.wan.transformer import BIDIRECTIONAL, SelfAttentionPattern, TextKeys, VideoTransformer
from ..kernels.wan.weights import load_into

FP8_CAPABILITY = (8, 9)  # the first CUDA devices with float8 matrix products (Ada; Hopper is 9.0)


@dataclass(frozen=True)
class Acceleration:
    """What makes the network's passes faster. Names as on the command line."""

    compile: bool = False
    cuda_graphs: bool = False
    fp8: bool = False

    def check(self, device: torch.device, dtype: torch.dtype, student: StudentSettings) -> None:
        """ValueError, in one line, for what cannot run on the device or with the student's window."""
        for wanted, flag in ((self.cuda_graphs, "--cuda-graphs"), (self.fp8, "--fp8")):
            if wanted and device.type != "cuda":
                raise ValueError(f"{flag}: needs a CUDA device, got {device.type}")
        parts = {"first block": student.size_of(0), "window": student.window, "sink": student.sink}
        for part, frames in parts.items():
            if self.cuda_graphs and frames % student.block:
                raise ValueError(f"--cuda-graphs: {part} must be whole blocks of {student.block}, got {frames}")
        if self.fp8:
            self._check_fp8(device, dtype)

    def _check_fp8(self, device: torch.device, dtype: torch.dtype) -> None:
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8_CAPABILITY:
            raise ValueError(f"--fp8: needs compute capability 8.9 or above, got {capability[0]}.{capability[1]}")
        if dtype != torch.bfloat16:
            raise ValueError(f"--fp8: needs --dtype bf16, got {dtype}")
        if util.find_spec("torchao") is None:
            raise ValueError("--fp8: needs torchao, which is not installed")


def build_network(
    config: TransformerConfig,
    state: State | None,
    device: torch.device,
    dtype: torch.dtype,
    acceleration: Acceleration,
    student: StudentSettings,
) -> "MeasuredTransformer":
    """The network in `dtype` on `device`, with the weights of `state`, or random ones.

    Compiled and captured as `acceleration` says; float8 is the caller's (`bench.quantise_blocks`).
    """
    with torch.device(device):
        network = MeasuredTransformer(config)
    if state is not None:
        load_into(network, state)
    network.to_precision(dtype).requires_grad_(False).eval()
    if acceleration.compile:
        network.compile_blocks()
    if acceleration.cuda_graphs:
        network.capture_blocks_of(student)
    return network


def cut(config: TransformerConfig, state: State | None, layers: int) -> tuple[TransformerConfig, State | None]:
    """The first `layers` blocks of a network; ValueError if it does not have as many."""
    if not 1 <= layers <= config.num_layers:
        raise ValueError(f"--layers: must be 1 to {config.num_layers}, got {layers}")
    gone = tuple(f"blocks.{index}." for index in range(layers, config.num_layers))
    if state is not None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(gone)}
    return replace(config, num_layers=layers), state


class MeasuredTransformer(VideoTransformer):
    """`VideoTransformer` whose blocks may be compiled, and whose steady-state passes may be CUDA graphs."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self._eager_attend: Callable[..., Tensor] | None = None  # there once the blocks are compiled
        self._student: StudentSettings | None = None
        self._passes: dict[tuple[int, ...], CapturedPass] = {}
        self._given_text: TextKeys | None = None
        self._held_text: TextKeys | None = None

    def compile_blocks(self) -> None:
        """Compile block by block: all blocks share one piece of code."""
        self._eager_attend = torch.compiler.disable(_attend)
        for block in self.blocks:
            block.compile()

    def capture_blocks_of(self, student: StudentSettings) -> None:
        """Replay passes as CUDA graphs from when the student's window is full.

        For the streams of one generator at a time, each from its beginning and under one prompt.
        """
        self._student = student

    def forget_captures(self) -> None:
        """Free the graphs, before another generator uses the network."""
        self._passes.clear()
        self._given_text = self._held_text = None

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: TextContext | TextKeys,
        attention: SelfAttentionPattern = BIDIRECTIONAL,
    ) -> Tensor:
        pattern = attention if self._eager_attend is None else Opaque(attention, self._eager_attend)
        if self._student is None or attention is BIDIRECTIONAL or isinstance(text, TextContext):
            return super().forward(latents, timesteps, text, pattern)
        start = int(attention.positions(latents.shape[1])[0])
        keys = self._follow(text, start)
        slots = steady_slots(self._student, start, latents.shape[1])
        if slots is None:
            return super().forward(latents, timesteps, text, pattern)
        inputs = (latents, timesteps, *self.rotation(latents, attention))
        key = (slots, *latents.shape)
        if key not in self._passes:
            self._passes[key] = CapturedPass(lambda *held: self.rotated(*held, keys, pattern), inputs)
        return self._passes[key].replay(inputs)

    def rotation(self, latents: Tensor, attention: SelfAttentionPattern) -> tuple[Tensor, Tensor]:
        """The rotary tables of a pass, which a graph takes as inputs: positions grow for ever."""
        _, patch_height, patch_width = self.config.patch_size
        height, width = latents.shape[-2] // patch_height, latents.shape[-1] // patch_width
        positions = attention.positions(latents.shape[1])
        return rotary_table(positions, height, width, self.config.rotary_dims, latents.device)

    def rotated(
        self,
        latents: Tensor,
        timesteps: Tensor,
        cos: Tensor,
        sin: Tensor,
        text: TextKeys,
        attention: SelfAttentionPattern,
    ) -> Tensor:
        """`forward` from given rotary tables: work of the device alone, nothing comes from the host."""
        x, (height, width) = self._embed_patches(latents)
        embedding, modulation = self.condition_embedder.time(timesteps, torch.float32)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, modulation, (cos, sin), attention, text.layers[layer], text.score_bias)
        return self._head(x, embedding, height, width).to(latents.dtype)

    def _follow(self, text: TextKeys, start: int) -> TextKeys:
        """The stream's text keys in memory that stays where it is: a graph reads addresses."""
        held = self._held_text
        if held is not None and text is self._given_text:
            return held
        assert start == 0, "a captured stream keeps its prompt: a switch refills the cache from another slot"
        self._given_text = text
        if held is None or held.score_bias.shape != text.score_bias.shape:
            self._passes.clear()
            layers = tuple((keys.clone(), values.clone()) for keys, values in text.layers)
            held = self._held_text = TextKeys(layers, text.score_bias.clone())
            return held
        held.score_bias.copy_(text.score_bias)
        for kept, given in zip(held.layers, text.layers, strict=True):
            kept[0].copy_(given[0])
            kept[1].copy_(given[1])
        return held


def steady_slots(student: StudentSettings, start: int, frames: int) -> int | None:
    """Which of the window's slots the block at latent frame `start` uses, in blocks; None while the window fills.

    A full window goes round: the sink stays, and each block takes the slots of the oldest one.
    """
    if start + frames < student.window:
        return None
    return (start - student.sink) // frames % ((student.window - student.sink) // frames)


class CapturedPass:
    """A pass as one CUDA graph. `work` must do the same on every call, and read its inputs where they are."""

    def __init__(self, work: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up, and compilers compile, before the capture
            for _ in range(2):
                work(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = work(*self._inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The pass on other inputs of the same shapes; the result is the caller's."""
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        return self._output.clone()


class Opaque:
    """An attention pattern that a compiler does not look into: a cache's bookkeeping differs every time."""

    def __init__(self, pattern: SelfAttentionPattern, attend: Callable[..., Tensor]) -> None:
        self._pattern = pattern
        self._attend = attend  # one function for all patterns: compiled code is guarded by its identity

    def positions(self, frames: int) -> Tensor:
        return self._pattern.positions(frames)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._attend(self._pattern, layer, query, key, value)


def _attend(pattern: SelfAttentionPattern, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return pattern.attend(layer, query, key, value)
