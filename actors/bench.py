"""The benchmark: a streaming student beside its teacher, in one run, with all that the figures depend on.

`run(BenchRequest(...))` returns the report as plain data. Weights are random unless a model folder is given: speed
does not depend on them. Times are taken when the device has finished, between the phases of a chunk; pixels stay
on the device. The student and the teacher are the same network, as in CausVid (arXiv 2412.07772, section 5).
"""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.causal.cache import CacheShape
from ..kernels.causal.generator import ChunkGenerator
from ..kernels.causal.student import StudentSettings
from ..kernels.diffusion.guidance import guided
from ..kernels.diffusion.noise import SampleKey, draw_noise
from ..kernels.diffusion.sampler import euler_sample
from ..kernels.diffusion.schedule import timesteps, uniform_timesteps
from ..kernels.wan.config import CONFIGS, TransformerConfig
from ..kernels.wan.context import TextContext
from ..kernels.wan.tensors import State, config_name
from ..kernels.wan.weights import read_transformer
from .bench_device import DTYPES, Clock, MemoryMeter, describe_device, find_device, measure_peaks
from .bench_network import Acceleration, MeasuredTransformer, build_network, cut
from .bench_report import FRAME_RATE, build_report

if TYPE_CHECKING:
    from ..kernels.wan.vae import StreamingVAE, VAEState

PIXELS_PER_LATENT = 8  # along height and width; the transformer's patch doubles it
FRAMES_PER_LATENT = 4  # of every latent frame but a stream's first, which is one pixel frame
PROMPT_TOKENS = 128
TEACHER_LATENTS = 21  # the clip that Wan2.1 was trained on; the teacher makes no longer one
GUIDANCE_SCALE = 6.0
SIZES = {"tiny": (64, 64)}
WAN_SIZE = (480, 832)
STUDENT = StudentSettings(window=12, sink=3)  # LongLive's window (arXiv 2509.22622, section 4)
VAE_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "base_dim": 32,
        "z_dim": 16,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [True, True],
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 8,
    }
}  # Wan2.1's own has diffusers' defaults


@dataclass(frozen=True)
class BenchRequest:
    """What the user asks for, named as on the command line; None is the default of `plan_bench`.

    seconds: of video; blocks: of latent frames; at most one of them. warmup: blocks made before the clock runs.
    teacher_forwards: measure so many forward passes of the teacher and extrapolate, instead of all of them.
    layers: cut the network to its first blocks.
    """

    config: str | None = None
    model: Path | None = None
    device: str = "cpu"
    dtype: str | None = None
    height: int | None = None
    width: int | None = None
    seconds: float | None = None
    blocks: int | None = None
    block: int | None = None
    window: int | None = None
    sink: int | None = None
    steps: int | None = None
    streams: int = 1
    warmup: int | None = None
    vae: bool = True
    teacher: bool = True
    teacher_steps: int = 50
    teacher_forwards: int | None = None
    layers: int | None = None
    acceleration: Acceleration = field(default_factory=Acceleration)


@dataclass(frozen=True)
class BenchPlan:
    """A request with every default filled in. size: height and width in pixels; layers: before any cut."""

    request: BenchRequest
    name: str
    config: TransformerConfig
    layers: int
    student: StudentSettings
    device: torch.device
    dtype: torch.dtype
    size: tuple[int, int]
    blocks: int
    warmup: int

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.size[0] // PIXELS_PER_LATENT, self.size[1] // PIXELS_PER_LATENT

    @property
    def latents(self) -> int:
        """Latent frames of the student's stream."""
        return self.student.size_of(0) + (self.blocks - 1) * self.student.block

    @property
    def tokens(self) -> int:
        """Of one latent frame."""
        return self.config.tokens_per_frame(*self.latent_size)

    @property
    def text_rows(self) -> int:
        """Rows of a prompt's context: its tokens, and one for all the padding."""
        return PROMPT_TOKENS + 1

    @property
    def teacher_latents(self) -> int:
        return min(self.latents, TEACHER_LATENTS)

    @property
    def cache_shape(self) -> CacheShape:
        """Of one stream."""
        return CacheShape(self.config, 1, *self.latent_size, self.student.window, self.student.sink, self.dtype)


def plan_bench(request: BenchRequest) -> tuple[BenchPlan, State | None]:
    """Check a request and fill it in; the weights too if it names a model folder.

    ValueError or FileNotFoundError, in one line, names what cannot be measured.
    """
    _check_counts(request)
    device = find_device(request.device)
    dtype_name = request.dtype or ("bf16" if device.type == "cuda" else "fp32")
    if dtype_name not in DTYPES:
        raise ValueError(f"--dtype: must be {' or '.join(DTYPES)}, got {dtype_name}")
    student = _student(request)
    request.acceleration.check(device, DTYPES[dtype_name], student)
    name, config, state = _network(request)
    layers = config.num_layers
    if request.layers is not None:
        config, state = cut(config, state, request.layers)
    plan = BenchPlan(
        request=request,
        name=name,
        config=config,
        layers=layers,
        student=student,
        device=device,
        dtype=DTYPES[dtype_name],
        size=_size(request, name),
        blocks=_blocks(request, student),
        warmup=_warmup(request, student, device),
    )
    return plan, state


def _check_counts(request: BenchRequest) -> None:
    for name in ("blocks", "block", "steps", "streams", "teacher_steps", "teacher_forwards"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: must be at least 1, got {value}")
    if request.warmup is not None and request.warmup < 0:
        raise ValueError(f"--warmup: must be at least 0, got {request.warmup}")
    if request.seconds is not None and not 0 < request.seconds < math.inf:
        raise ValueError(f"--seconds: must be above 0, got {request.seconds:g}")
    if request.seconds is not None and request.blocks is not None:
        raise ValueError("--seconds, --blocks: give at most one of them")


def _network(request: BenchRequest) -> tuple[str, TransformerConfig, State | None]:
    known = ", ".join(CONFIGS)
    if (request.config is None) == (request.model is None):
        raise ValueError(f"--config, --model: give one of them, a configuration ({known}) or a model folder")
    if request.model is not None:
        config, state = read_transformer(request.model)
        return config_name(config) or "custom", config, state
    assert request.config is not None
    if request.config not in CONFIGS:
        raise ValueError(f"--config: must be one of {known}, got {request.config}")
    return request.config, CONFIGS[request.config], None


def _student(request: BenchRequest) -> StudentSettings:
    """The model's own student.json, or the default, with what the command line says."""
    settings = STUDENT
    if request.model is not None and (request.model / "student.json").is_file():
        settings = StudentSettings.read(request.model)
    given = {"block": request.block, "window": request.window, "sink": request.sink}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if request.steps is not None:
        changes["timesteps"] = tuple(timesteps(request.steps, settings.shift)[:-1])
    return replace(settings, **changes)


def _size(request: BenchRequest, name: str) -> tuple[int, int]:
    height, width = SIZES.get(name, WAN_SIZE)
    size = (request.height or height, request.width or width)
    multiple = 2 * PIXELS_PER_LATENT
    for flag, asked, side in zip(("--height", "--width"), (request.height, request.width), size, strict=True):
        if asked is not None and (asked < multiple or asked % multiple):
            raise ValueError(f"{flag}: must be a multiple of {multiple} pixels, got {asked}")
        assert side % multiple == 0
    return size


def _blocks(request: BenchRequest, student: StudentSettings) -> int:
    if request.blocks is not None:
        return request.blocks
    latents = TEACHER_LATENTS
    if request.seconds is not None:
        latents = 1 + math.ceil((math.ceil(request.seconds * FRAME_RATE) - 1) / FRAMES_PER_LATENT)
    return 1 + max(0, math.ceil((latents - student.size_of(0)) / student.block))


def _warmup(request: BenchRequest, student: StudentSettings, device: torch.device) -> int:
    """By default, on CUDA, until the window is full and has gone round: then every graph is captured."""
    if request.warmup is not None:
        return request.warmup
    if device.type != "cuda":
        return 2
    return math.ceil(student.window / student.block) + (student.window - student.sink) // student.block


class PixelSink:
    """Where latents end up: decoded as they come, or, without a VAE, counted. The first latent is decoded alone."""

    def __init__(self, vae: "StreamingVAE | None", clock: Clock) -> None:
        self._vae = vae
        self._clock = clock
        self.state: VAEState | None = None
        self.frames = 0  # pixel frames of a stream
        self.first_at: float | None = None

    def put(self, latents: Tensor) -> None:
        """Take the stream's next latents [B, n, C, H, W]."""
        parts = (latents,) if self.frames else (latents[:, :1], latents[:, 1:])
        for part in parts:
            if part.shape[1]:
                self._decode(part)
            if self.first_at is None:
                self.first_at = self._clock()

    def _decode(self, latents: Tensor) -> None:
        if self._vae is None:
            self.frames += FRAMES_PER_LATENT * latents.shape[1] - (0 if self.frames else FRAMES_PER_LATENT - 1)
            return
        with torch.no_grad():
            pixels, self.state = self._vae.decode(latents, self.state)
        self.frames += pixels.shape[1]


@dataclass(frozen=True)
class Stage:
    """What is measured, and with what."""

    plan: BenchPlan
    network: MeasuredTransformer
    vae: "StreamingVAE | None"
    clock: Clock
    memory: MemoryMeter

    def prompts(self) -> TextContext:
        """Random embeddings of one prompt per stream: text encoding is not measured."""
        rows = torch.randn(self.plan.text_rows - 1, self.plan.config.text_dim, device=self.plan.device)
        return TextContext.fold([rows] * self.plan.request.streams)

    def keys(self) -> list[SampleKey]:
        return [SampleKey(0, "bench", index) for index in range(self.plan.request.streams)]


@dataclass(frozen=True)
class Chunk:
    """Seconds of one block: few-step denoising, decoding, the clean pass; and when its pixels were ready."""

    denoise: float
    decode: float
    clean: float
    ready: float


@dataclass(frozen=True)
class StudentTimes:
    """One stream (or batch of streams), from the request on. Bytes are per stream, except the peak."""

    chunks: list[Chunk]
    first_frame: float
    total: float
    frames: int
    cache_bytes: int
    vae_state_bytes: int | None
    peak_memory: int


@dataclass(frozen=True)
class TeacherTimes:
    """One clip (or batch of clips). denoise: of all passes, extrapolated if `forwards_measured` are fewer."""

    denoise: float
    decode: float
    first_frame: float
    frames: int
    forwards_measured: int
    with_vae: bool
    peak_memory: int


def measure_student(stage: Stage) -> StudentTimes:
    """Warm up on a stream, start over in the same memory, and measure the whole stream."""
    plan = stage.plan
    text = stage.prompts()
    size, streams = plan.latent_size, plan.request.streams
    generator = ChunkGenerator(stage.network, plan.student, text, stage.keys(), size, plan.dtype)
    beginning = generator.state_dict()
    if plan.warmup:
        _stream(stage, generator, text, plan.warmup)
        generator.load_state_dict(beginning)
    stage.memory.start()
    chunks, sink, start = _stream(stage, generator, text, plan.blocks)
    end = stage.clock()
    assert sink.first_at is not None
    cache = generator.cache
    return StudentTimes(
        chunks=chunks,
        first_frame=sink.first_at - start,
        total=end - start,
        frames=sink.frames,
        cache_bytes=(cache.keys.nbytes + cache.values.nbytes + cache.sink_keys.nbytes) // streams,
        vae_state_bytes=None if sink.state is None else sink.state.bytes() // streams,
        peak_memory=stage.memory.peak(),
    )


def _stream(
    stage: Stage, generator: ChunkGenerator, text: TextContext, blocks: int
) -> tuple[list[Chunk], PixelSink, float]:
    """Pixels first: a block is decoded before the clean pass that only the next block needs."""
    clock, sink = stage.clock, PixelSink(stage.vae, stage.clock)
    chunks = []
    start = clock()
    generator.switch_prompt(text)
    for _ in range(blocks):
        begun = clock()
        latents = generator.next_block(keep=False)
        made = clock()
        sink.put(latents)
        ready = clock()
        generator.append(latents)
        chunks.append(Chunk(made - begun, ready - made, clock() - ready, ready - start))
    return chunks, sink, start


def measure_teacher(stage: Stage) -> TeacherTimes:
    """The bidirectional teacher: steps × 2 forward passes on the whole clip, then a decode by pieces."""
    plan, clock = stage.plan, stage.clock
    shape = (plan.config.in_channels, *plan.latent_size)
    noise = draw_noise(stage.keys(), range(plan.teacher_latents), shape).to(plan.device)
    stage.memory.start()
    latents, denoise, measured = _teacher_denoise(stage, noise)
    sink = PixelSink(stage.vae, clock)
    start = clock()
    for piece in latents.split(plan.student.block, dim=1):
        sink.put(piece)
    end = clock()
    assert sink.first_at is not None
    first = denoise + sink.first_at - start
    with_vae, peak = stage.vae is not None, stage.memory.peak()
    return TeacherTimes(denoise, end - start, first, sink.frames, measured, with_vae, peak)


def _teacher_denoise(stage: Stage, noise: Tensor) -> tuple[Tensor, float, int]:
    """The clip, the seconds that all passes take, and how many were measured, after one that was not."""
    request, clock, network = stage.plan.request, stage.clock, stage.network
    with torch.no_grad():
        texts = [network.text_keys(stage.prompts()) for _ in range(2)]
        network(noise, uniform_timesteps(noise, 500.0), texts[0])
        start = clock()
        if request.teacher_forwards is not None:
            for index in range(request.teacher_forwards):
                end = network(noise, uniform_timesteps(noise, 500.0), texts[index % 2])
            each = (clock() - start) / request.teacher_forwards
            return end, each * 2 * request.teacher_steps, request.teacher_forwards

        def velocity(latents: Tensor, levels: Tensor) -> Tensor:
            conditional, unconditional = (network(latents, levels, text) for text in texts)
            return guided((conditional, unconditional), GUIDANCE_SCALE)

        end = euler_sample(velocity, noise, timesteps(request.teacher_steps, stage.plan.student.shift))
    return end, clock() - start, 2 * request.teacher_steps


def open_vae(plan: BenchPlan) -> "tuple[StreamingVAE | None, str | None]":
    """The VAE, of the model folder or with random weights; or None, and why it is left out."""
    if not plan.request.vae:
        return None, "--no-vae"
    try:
        from ..kernels.wan.vae import StreamingVAE
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "diffusers":
            raise
        return None, "diffusers is not installed"
    if plan.request.model is not None:
        vae = StreamingVAE.from_pretrained(plan.request.model / "vae", plan.dtype)
    else:
        vae = StreamingVAE.from_config(VAE_CONFIGS.get(plan.name, {}))
    factors = (vae.spatial_factor, vae.temporal_factor)
    if factors != (PIXELS_PER_LATENT, FRAMES_PER_LATENT):
        expected = f"{PIXELS_PER_LATENT} and {FRAMES_PER_LATENT}"
        raise ValueError(f"vae: must compress space and time by {expected}, got {factors[0]} and {factors[1]}")
    return vae.to(plan.device, plan.dtype).requires_grad_(False).eval(), None


def quantise_blocks(network: MeasuredTransformer) -> None:
    """Linear layers of the blocks to float8: weights and inputs row by row, inputs scaled as they come."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    settings = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(network.blocks, settings, filter_fn=lambda module, _: isinstance(module, nn.Linear))


def run(request: BenchRequest, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure and report. tell: receives a line per phase.

    Returns the report (`bench_report.build_report`), which json.dumps takes as it is. Raises ValueError or
    FileNotFoundError, in one line, before anything is measured.
    """
    plan, state = plan_bench(request)
    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)
    torch.manual_seed(0)
    tell("measuring the device's peaks")
    peaks = measure_peaks(plan.device, plan.dtype, fp8=request.acceleration.fp8)
    memory = MemoryMeter(plan.device)
    vae, vae_left_out = open_vae(plan)
    tell(f"building {plan.name}")
    network = build_network(plan.config, state, plan.device, plan.dtype, request.acceleration, plan.student)
    if request.acceleration.fp8:
        quantise_blocks(network)
    stage = Stage(plan, network, vae, Clock(plan.device), memory)
    tell(f"student: {plan.warmup} blocks of warm-up, then {plan.blocks} blocks")
    student = measure_student(stage)
    network.forget_captures()
    gc.collect()
    teacher = None
    if request.teacher:
        tell(f"teacher: {request.teacher_forwards or 2 * request.teacher_steps} forward passes")
        if request.acceleration.compile:
            torch.compiler.reset()  # the teacher gets code for its own shapes, as the student did
        teacher = measure_teacher(stage)
    return build_report(stage, student, teacher, peaks, describe_device(plan.device), vae_left_out)
