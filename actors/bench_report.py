"""The benchmark's report: raw figures, what follows from them, and the physical floor beside them.

One schema, `SCHEMA` and `SCHEMA_VERSION`. Times are in seconds, sizes in bytes, rates per second. What was
not measured is None, never left out. Frames per second count all streams together.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.wan.cost import (
    ForwardShape,
    decode_flops,
    forward_bytes,
    forward_flops,
    text_flops,
    weight_bytes,
)
from .bench_device import Peaks, versions

if TYPE_CHECKING:
    from ..kernels.wan.vae import StreamingVAE
    from .bench import BenchPlan, Stage, StudentTimes, TeacherTimes

SCHEMA, SCHEMA_VERSION = "reelway.bench", 1
FRAME_RATE = 16  # pixel frames per second of video, as Wan2.1 was trained
Report = dict[str, Any]


def build_report(
    stage: "Stage",
    student: "StudentTimes",
    teacher: "TeacherTimes | None",
    peaks: Peaks,
    device: Report,
    vae_left_out: str | None,
) -> Report:
    """Everything, ready for json.dumps. vae_left_out: why the VAE is not in, or None if it is."""
    plan = stage.plan
    of_student = student_section(plan, student)
    of_teacher = None if teacher is None else teacher_section(plan, teacher)
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "setting": setting_section(stage, device, vae_left_out),
        "student": of_student,
        "teacher": of_teacher,
        "student_over_teacher": None if of_teacher is None else ratios(of_student, of_teacher),
        "memory": memory_section(stage, student),
        "floor": floor_section(stage, peaks, of_student),
        "versions": versions(),
    }


def setting_section(stage: "Stage", device: Report, vae_left_out: str | None) -> Report:
    plan, request = stage.plan, stage.plan.request
    height, width = plan.size
    return {
        "device": device,
        "config": plan.name,
        "weights": "random" if request.model is None else str(request.model),
        "layers": plan.config.num_layers,
        "layers_of_config": plan.layers,
        "parameters": sum(parameter.numel() for parameter in stage.network.parameters()),
        "height": height,
        "width": width,
        "tokens_per_latent": plan.tokens,
        "frame_rate": FRAME_RATE,
        "precision": str(plan.dtype).removeprefix("torch."),
        "block": plan.student.block,
        "first_block": plan.student.size_of(0),
        "steps": len(plan.student.timesteps),
        "timesteps": list(plan.student.timesteps),
        "window": plan.student.window,
        "sink": plan.student.sink,
        "streams": request.streams,
        "warmup_blocks": plan.warmup,
        "text_encoding": {"included": False, "rows": plan.text_rows},
        "vae_decoding": {"included": stage.vae is not None, "left_out_because": vae_left_out},
        "compile": request.acceleration.compile,
        "cuda_graphs": request.acceleration.cuda_graphs,
        "fp8": request.acceleration.fp8,
    }


def student_section(plan: "BenchPlan", times: "StudentTimes") -> Report:
    """denoise_only: denoising steps and clean passes. end_to_end: the whole time, None without a VAE."""
    ready = [chunk.ready for chunk in times.chunks]
    gaps = [later - earlier for earlier, later in pairwise(ready)]
    denoise = sum(chunk.denoise for chunk in times.chunks)
    clean = sum(chunk.clean for chunk in times.chunks)
    decode = sum(chunk.decode for chunk in times.chunks)
    forwards = len(plan.student.timesteps) + 1
    with_vae = times.vae_state_bytes is not None
    rates = _rates(plan, times.frames, denoise + clean, times.total if with_vae else None)
    return {
        "blocks": plan.blocks,
        "latents": plan.latents,
        "frames_per_stream": times.frames,
        "forwards": plan.blocks * forwards,
        "forwards_per_latent": forwards,
        "seconds": {
            "total": times.total,
            "denoise": denoise,
            "clean_pass": clean,
            "decode": decode if with_vae else None,
        },
        "frames_per_second": rates,
        "time_to_first_frame": times.first_frame,
        "first_frame_is": _first_frame(with_vae, "the first block's denoising steps"),
        "chunk_gap": percentiles(gaps),
        "peak_memory": times.peak_memory,
    }


def teacher_section(plan: "BenchPlan", times: "TeacherTimes") -> Report:
    """As the student's, for one clip of at most the length that the teacher was trained on."""
    forwards = 2 * plan.request.teacher_steps
    with_vae = times.with_vae
    total = times.denoise + times.decode
    return {
        "latents": plan.teacher_latents,
        "frames_per_stream": times.frames,
        "steps": plan.request.teacher_steps,
        "guidance": True,
        "forwards": forwards,
        "forwards_per_latent": forwards,
        "forwards_measured": times.forwards_measured,
        "extrapolated": times.forwards_measured < forwards,
        "seconds": {
            "total": total,
            "denoise": times.denoise,
            "decode": times.decode if with_vae else None,
        },
        "frames_per_second": _rates(plan, times.frames, times.denoise, total if with_vae else None),
        "time_to_first_frame": times.first_frame,
        "first_frame_is": _first_frame(with_vae, "all denoising steps"),
        "peak_memory": times.peak_memory,
    }


def _rates(plan: "BenchPlan", frames: int, denoise: float, total: float | None) -> Report:
    everything = frames * plan.request.streams
    return {
        "denoise_only": everything / denoise,
        "end_to_end": None if total is None else everything / total,
    }


def _first_frame(with_vae: bool, work: str) -> str:
    if with_vae:
        return f"from the request, through {work}, to the pixels of the first latent frame, decoded alone"
    return f"from the request, through {work}; latents, not pixels: there is no VAE"


def percentiles(gaps: list[float]) -> Report:
    """p50, p95 and p99 of the seconds between chunks, interpolated; None without a gap."""
    if not gaps:
        return {"p50": None, "p95": None, "p99": None, "count": 0}
    levels = torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64)
    p50, p95, p99 = torch.quantile(torch.tensor(gaps, dtype=torch.float64), levels).tolist()
    return {"p50": p50, "p95": p95, "p99": p99, "count": len(gaps)}


def ratios(student: Report, teacher: Report) -> Report:
    """The student's figure divided by the teacher's; None where one of them is."""

    def ratio(of_student: float | None, of_teacher: float | None) -> float | None:
        return None if of_student is None or of_teacher is None else of_student / of_teacher

    fast, slow = student["frames_per_second"], teacher["frames_per_second"]
    return {
        "frames_per_second": {name: ratio(fast[name], slow[name]) for name in fast},
        "time_to_first_frame": ratio(student["time_to_first_frame"], teacher["time_to_first_frame"]),
        "forwards_per_latent": ratio(student["forwards_per_latent"], teacher["forwards_per_latent"]),
    }


def memory_section(stage: "Stage", times: "StudentTimes") -> Report:
    """Known: computed before anything is allocated. Measured: of the tensors. Both per stream."""
    plan = stage.plan
    known_state = None if stage.vae is None else stage.vae.bytes_per_stream(*plan.size)
    return {
        "peak_means": stage.memory.meaning,
        "weights": {
            "known": weight_bytes(plan.config, plan.dtype, _linear_dtype(plan)),
            "measured": sum(map(stored_bytes, stage.network.parameters())),
        },
        "kv_cache_per_stream": {"known": plan.cache_shape.bytes(), "measured": times.cache_bytes},
        "vae_state_per_stream": {"known": known_state, "measured": times.vae_state_bytes},
    }


def stored_bytes(tensor: torch.Tensor) -> int:
    """Memory of a tensor, or of those that a quantised one stands for."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes


def floor_section(stage: "Stage", peaks: Peaks, student: Report) -> Report:
    """The time that the measured stream cannot beat on this device, and the share of that speed it reached.

    A pass takes at least its FLOPs at the matmul peak, and at least its bytes at the copy peak. A network
    that fits the processor's own caches may read its weights faster than the copy peak.
    """
    plan = stage.plan
    network = _network_floor(plan, peaks)
    decode = None if stage.vae is None else _decode_floor(plan, stage.vae, peaks)
    everything = student["frames_per_stream"] * plan.request.streams
    rates = {
        "denoise_only": everything / network,
        "end_to_end": None if decode is None else everything / (network + decode["stream_seconds"]),
    }
    reached = student["frames_per_second"]
    return {
        "peaks": {
            "matmul_flops_per_second": peaks.matmul,
            "fp8_matmul_flops_per_second": peaks.fp8_matmul,
            "copy_bytes_per_second": peaks.copy,
        },
        "full_window_block": _block_cost(plan, decode),
        "frames_per_second": rates,
        "share_reached": {
            name: None if rate is None or reached[name] is None else reached[name] / rate
            for name, rate in rates.items()
        },
    }


def _shape(plan: "BenchPlan", start: int) -> ForwardShape:
    """A pass of the block that begins at latent frame `start`."""
    frames = plan.student.size_of(start)
    context = min(start, plan.student.window - frames)
    return ForwardShape(frames, plan.tokens, plan.text_rows, context, plan.request.streams)


def _linear_dtype(plan: "BenchPlan") -> torch.dtype | None:
    return torch.float8_e4m3fn if plan.request.acceleration.fp8 else None


def _forward_seconds(plan: "BenchPlan", shape: ForwardShape, peaks: Peaks) -> float:
    flops = forward_flops(plan.config, shape)
    linears = flops.block_linears / (peaks.fp8_matmul or peaks.matmul)
    compute = linears + (flops.attention + flops.edges) / peaks.matmul
    return max(compute, forward_bytes(plan.config, shape, plan.dtype, _linear_dtype(plan)) / peaks.copy)


def _network_floor(plan: "BenchPlan", peaks: Peaks) -> float:
    """Seconds of all passes of the measured stream, its text keys included."""
    forwards = len(plan.student.timesteps) + 1
    starts = [0, *range(plan.student.size_of(0), plan.latents, plan.student.block)]
    passes = sum(forwards * _forward_seconds(plan, _shape(plan, start), peaks) for start in starts)
    text = text_flops(plan.config, plan.text_rows, plan.request.streams)
    return passes + text / peaks.matmul


def _decode_floor(plan: "BenchPlan", vae: "StreamingVAE", peaks: Peaks) -> Report:
    """Seconds of all decoder calls of the measured stream; FLOPs and bytes of a later block."""
    first = plan.student.size_of(0)
    calls = [1, first - 1, plan.student.block] if first > 1 else [1, plan.student.block]
    flops = decode_flops(vae, calls, plan.latent_size, plan.request.streams)
    decoder = (*vae.vae.decoder.parameters(), *vae.vae.post_quant_conv.parameters())
    state = plan.request.streams * vae.bytes_per_stream(*plan.size)
    moved = sum(parameter.nbytes for parameter in decoder) + 2 * state
    seconds = [max(count / peaks.matmul, moved / peaks.copy) for count in flops]
    return {
        "stream_seconds": sum(seconds[:-1]) + (plan.blocks - 1) * seconds[-1],
        "block_flops": flops[-1],
        "block_bytes": moved,
    }


def _block_cost(plan: "BenchPlan", decode: Report | None) -> Report:
    """FLOPs and bytes of one block of all streams, once the window is full."""
    shape = _shape(plan, plan.student.window)
    steps = len(plan.student.timesteps)
    flops = forward_flops(plan.config, shape).total
    moved = forward_bytes(plan.config, shape, plan.dtype, _linear_dtype(plan))
    return {
        "context_latents": shape.context,
        "denoise_flops": steps * flops,
        "clean_pass_flops": flops,
        "decode_flops": None if decode is None else decode["block_flops"],
        "denoise_and_clean_bytes": (steps + 1) * moved,
        "decode_bytes": None if decode is None else decode["block_bytes"],
    }
