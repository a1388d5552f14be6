"""`reelway bench`, from the command line's arguments to the tables and the JSON."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from reelway.actors import bench_network
from reelway.actors.bench import VAE_CONFIGS, BenchRequest, open_vae, plan_bench
from reelway.actors.bench_device import MemoryMeter
from reelway.actors.bench_network import Acceleration, MeasuredTransformer, build_network
from reelway.actors.bench_report import percentiles
from reelway.kernels.causal.generator import ChunkGenerator
from reelway.kernels.causal.student import StudentSettings
from reelway.kernels.diffusion.noise import SampleKey
from reelway.kernels.wan.config import CONFIGS, TransformerConfig
from reelway.kernels.wan.context import TextContext
from reelway.kernels.wan.cost import ForwardShape, forward_bytes, forward_flops, text_flops
from reelway.kernels.wan.transformer import VideoTransformer
from reelway.kernels.wan.weights import write_transformer
from reelway.pipelines.cli import main

SMALL = TransformerConfig(
    num_attention_heads=2, attention_head_dim=24, ffn_dim=96, num_layers=2, text_dim=40, freq_dim=32
)
FIELDS = """
setting.device.name setting.device.kind setting.config setting.layers setting.parameters setting.weights
setting.height setting.width setting.block setting.steps setting.timesteps setting.precision setting.window
setting.sink setting.streams setting.warmup_blocks setting.text_encoding.included setting.vae_decoding.included
setting.compile setting.cuda_graphs setting.fp8 versions.torch versions.reelway
student.frames_per_second.end_to_end student.frames_per_second.denoise_only student.time_to_first_frame
student.first_frame_is student.chunk_gap.p50 student.chunk_gap.p95 student.chunk_gap.p99 student.peak_memory
student.seconds.total student.seconds.denoise student.seconds.clean_pass student.seconds.decode
teacher.frames_per_second.end_to_end teacher.frames_per_second.denoise_only teacher.time_to_first_frame
teacher.forwards teacher.extrapolated teacher.peak_memory
memory.kv_cache_per_stream.known memory.vae_state_per_stream.known memory.weights.known
floor.peaks.matmul_flops_per_second floor.peaks.copy_bytes_per_second
floor.full_window_block.denoise_flops floor.full_window_block.clean_pass_flops
floor.full_window_block.decode_flops floor.full_window_block.denoise_and_clean_bytes
floor.frames_per_second.end_to_end floor.share_reached.end_to_end floor.share_reached.denoise_only
"""


class Outcome:
    def __init__(self, code: object, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def reelway_bench(*arguments: object) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["reelway", "bench", *map(str, arguments)])
        patch.setenv("COLUMNS", "180")
        with pytest.raises(SystemExit) as stopped:
            main()
    return Outcome(stopped.value.code or 0, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, dict[str, Any]]:
    """Three blocks of the tiny model, with VAE and teacher; the window is full from the second block on."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    sizes = ("--blocks", 3, "--window", 6, "--sink", 3, "--warmup", 1, "--teacher-steps", 2)
    outcome = reelway_bench("--config", "tiny", "--device", "cpu", *sizes, "--json", path)
    return outcome, json.loads(path.read_text()) if path.exists() else {}


def test_tables_say_what_the_figures_depend_on(tiny: tuple[Outcome, dict[str, Any]]) -> None:
    outcome, report = tiny
    assert outcome.code == 0, outcome.err
    for text in ("tiny, 6 layers", "64x64", "float32", "6 and 3 latent frames", "not in (129 random rows"):
        assert text in outcome.out
    assert f"{report['student']['frames_per_second']['end_to_end']:.4g}" in outcome.out
    assert "EXTRAPOLATED" not in outcome.out
    assert "CUT" not in outcome.out


def test_every_field_is_there(tiny: tuple[Outcome, dict[str, Any]]) -> None:
    report = tiny[1]
    assert (report["schema"], report["schema_version"]) == ("reelway.bench", 1)
    for field in FIELDS.split():
        value: Any = report
        for name in field.split("."):
            value = value[name]
        assert value is not None, field


def test_frames_and_passes_are_counted(tiny: tuple[Outcome, dict[str, Any]]) -> None:
    student, teacher = tiny[1]["student"], tiny[1]["teacher"]
    assert student["latents"] == teacher["latents"] == 9
    assert student["frames_per_stream"] == teacher["frames_per_stream"] == 1 + 4 * (9 - 1)
    assert (student["forwards"], student["forwards_per_latent"]) == (3 * 5, 5)
    assert (teacher["forwards"], teacher["forwards_measured"], teacher["extrapolated"]) == (4, 4, False)
    assert student["chunk_gap"]["count"] == 2


def test_rates_and_ratios_follow_from_the_seconds(tiny: tuple[Outcome, dict[str, Any]]) -> None:
    report = tiny[1]
    student, teacher, ratio = report["student"], report["teacher"], report["student_over_teacher"]
    seconds, rates = student["seconds"], student["frames_per_second"]
    assert rates["end_to_end"] * seconds["total"] == pytest.approx(33)
    assert rates["denoise_only"] * (seconds["denoise"] + seconds["clean_pass"]) == pytest.approx(33)
    assert seconds["denoise"] + seconds["clean_pass"] + seconds["decode"] < seconds["total"]
    assert seconds["clean_pass"] > 0.02 * seconds["denoise"]  # one pass of the network beside four
    assert 0 < student["time_to_first_frame"] < seconds["total"] - student["chunk_gap"]["p50"]
    assert teacher["frames_per_second"]["denoise_only"] * teacher["seconds"]["denoise"] == pytest.approx(33)
    assert teacher["seconds"]["denoise"] < teacher["time_to_first_frame"] < teacher["seconds"]["total"]
    for name in ("end_to_end", "denoise_only"):
        expected = rates[name] / teacher["frames_per_second"][name]
        assert ratio["frames_per_second"][name] == pytest.approx(expected)
    first = student["time_to_first_frame"] / teacher["time_to_first_frame"]
    assert ratio["time_to_first_frame"] == pytest.approx(first)
    assert ratio["forwards_per_latent"] == pytest.approx(5 / 4)


def test_memory_known_beforehand_is_what_is_used(tiny: tuple[Outcome, dict[str, Any]]) -> None:
    memory = tiny[1]["memory"]
    for name in ("weights", "kv_cache_per_stream", "vae_state_per_stream"):
        assert memory[name]["known"] == memory[name]["measured"] > 0


def test_floor_is_that_of_the_measured_stream(tiny: tuple[Outcome, dict[str, Any]]) -> None:
    floor, student = tiny[1]["floor"], tiny[1]["student"]
    peaks, config = floor["peaks"], CONFIGS["tiny"]
    seconds = text_flops(config, 129) / peaks["matmul_flops_per_second"]
    for context in (0, 3, 3):
        shape = ForwardShape(frames=3, tokens=16, text_rows=129, context=context)
        compute = forward_flops(config, shape).total / peaks["matmul_flops_per_second"]
        movement = forward_bytes(config, shape, torch.float32) / peaks["copy_bytes_per_second"]
        seconds += 5 * max(compute, movement)
    assert floor["frames_per_second"]["denoise_only"] == pytest.approx(33 / seconds)
    assert floor["frames_per_second"]["end_to_end"] < floor["frames_per_second"]["denoise_only"]
    assert floor["full_window_block"]["denoise_flops"] == 4 * floor["full_window_block"]["clean_pass_flops"]
    for name, rate in student["frames_per_second"].items():
        assert floor["share_reached"][name] == pytest.approx(rate / floor["frames_per_second"][name])


def test_streams_without_vae_and_an_extrapolated_teacher(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    cut = ("--layers", 1, "--no-vae", "--teacher-forwards", 1, "--warmup", 0)
    outcome = reelway_bench("--config", "tiny", "--streams", 2, "--seconds", 1, *cut, "--json", path)
    assert outcome.code == 0, outcome.err
    for text in ("CUT to 1 of 6 layers", "EXTRAPOLATED from 1 of 100 passes", "not in: --no-vae"):
        assert text in outcome.out
    report = json.loads(path.read_text())
    student, teacher = report["student"], report["teacher"]
    # 16 frames want 1 + 15/4 latent frames, so two blocks of 3.
    assert (student["blocks"], student["frames_per_stream"]) == (2, 21)
    assert student["frames_per_second"]["end_to_end"] is None
    assert report["memory"]["vae_state_per_stream"] == {"known": None, "measured": None}
    seconds = student["seconds"]["denoise"] + student["seconds"]["clean_pass"]
    assert student["frames_per_second"]["denoise_only"] == pytest.approx(2 * 21 / seconds)
    assert (teacher["forwards"], teacher["forwards_measured"], teacher["extrapolated"]) == (100, 1, True)


def test_a_model_folder_brings_its_weights_and_its_student(tmp_path: Path) -> None:
    state = VideoTransformer(SMALL).state_dict()
    write_transformer(tmp_path, SMALL, state)
    StudentSettings(block=2, first_block=1, window=5, sink=1, timesteps=(1000.0, 500.0)).write(tmp_path)
    request = BenchRequest(model=tmp_path, blocks=3, height=32, width=48, window=7)
    plan, loaded = plan_bench(request)
    assert (plan.config, plan.name, plan.latents, plan.latent_size) == (SMALL, "custom", 5, (4, 6))
    assert (plan.student.block, plan.student.window, plan.student.timesteps) == (2, 7, (1000.0, 500.0))
    network = build_network(plan.config, loaded, plan.device, plan.dtype, Acceleration(), plan.student)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_without_diffusers_the_vae_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = plan_bench(BenchRequest(config="tiny"))
    monkeypatch.delitem(sys.modules, "reelway.kernels.wan.vae", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"] or ["diffusers"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert open_vae(plan) == (None, "diffusers is not installed")


def test_random_tiny_vae_is_that_of_the_tiny_recipe() -> None:
    recipe = yaml.safe_load((Path(__file__).parents[2] / "configs" / "tiny.yaml").read_text())
    assert VAE_CONFIGS["tiny"] == recipe["pretrain"]["vae"]["network"]


def test_percentiles() -> None:
    assert percentiles([float(gap) for gap in range(101)]) == {
        "p50": 50.0,
        "p95": 95.0,
        "p99": 99.0,
        "count": 101,
    }
    assert percentiles([])["p99"] is None


def test_peak_memory_is_that_of_what_was_held() -> None:
    meter = MemoryMeter(torch.device("cpu"))
    meter.start()
    held = torch.ones(2**26, dtype=torch.uint8)
    del held
    assert meter.peak() >= 2**26 * 0.9


class Replayed:
    """Stands in for a CUDA graph: what was captured first runs again, on the memory that it was captured with."""

    def __init__(self, work: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self.work, self.inputs = work, tuple(tensor.clone() for tensor in inputs)

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        return self.work(*self.inputs)


def stream(network: VideoTransformer, student: StudentSettings, device: str = "cpu") -> Iterator[torch.Tensor]:
    """Two streams of one generator, under different prompts, one after the other."""
    torch.manual_seed(1)
    prompts = [TextContext.fold([torch.randn(6, SMALL.text_dim)]).to(device) for _ in range(2)]
    generator = ChunkGenerator(network, student, prompts[0], [SampleKey(0, "a", 0)], (4, 6))
    beginning = generator.state_dict()
    for prompt in prompts:
        generator.load_state_dict(beginning)
        generator.switch_prompt(prompt)
        for _ in range(9):
            latents = generator.next_block(keep=False)
            generator.append(latents)
            yield latents


@pytest.mark.parametrize(("window", "sink"), [(8, 2), (6, 0), (4, 2)])
def test_captured_passes_make_the_same_video(monkeypatch: pytest.MonkeyPatch, window: int, sink: int) -> None:
    monkeypatch.setattr(bench_network, "CapturedPass", Replayed)
    student = StudentSettings(block=2, window=window, sink=sink, timesteps=(1000.0, 500.0))
    torch.manual_seed(0)
    network = MeasuredTransformer(SMALL).requires_grad_(False)
    plain = list(stream(network, student))
    network.capture_blocks_of(student)
    captured = list(stream(network, student))
    assert len(network._passes) == (window - sink) // 2
    assert all(torch.equal(one, other) for one, other in zip(plain, captured, strict=True))
    assert not torch.equal(plain[0], plain[9])  # the second prompt is another one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_make_the_same_video() -> None:
    student = StudentSettings(block=2, window=8, sink=2, timesteps=(1000.0, 500.0))
    torch.manual_seed(0)
    network = MeasuredTransformer(SMALL).requires_grad_(False).to("cuda")
    plain = list(stream(network, student, "cuda"))
    network.capture_blocks_of(student)
    captured = list(stream(network, student, "cuda"))
    assert len(network._passes) == 3
    for one, other in zip(plain, captured, strict=True):
        torch.testing.assert_close(one, other)


WRONG = [
    (("--config", "wan9"), "--config: must be one of tiny, wan2.1-1.3b, wan2.1-14b, got wan9"),
    ((), "--config, --model: give one of them"),
    (("--config", "tiny", "--window", 5), "window: must hold the sink (3) and a block (3), got 5"),
    (("--config", "tiny", "--height", 100), "--height: must be a multiple of 16 pixels, got 100"),
    (("--config", "tiny", "--width", 0), "--width: must be a multiple of 16 pixels, got 0"),
    (("--config", "tiny", "--blocks", 0), "--blocks: must be at least 1, got 0"),
    (("--config", "tiny", "--seconds", 0), "--seconds: must be above 0, got 0"),
    (("--config", "tiny", "--seconds", 1, "--blocks", 1), "give at most one"),
    (("--config", "tiny", "--layers", 7), "--layers: must be 1 to 6, got 7"),
    (("--config", "tiny", "--dtype", "fp16"), "--dtype: must be fp32 or bf16, got fp16"),
    (("--config", "tiny", "--device", "tpu"), "--device: must be cpu, cuda or cuda:N, got tpu"),
    (("--config", "tiny", "--cuda-graphs"), "--cuda-graphs: needs a CUDA device, got cpu"),
    (("--config", "tiny", "--fp8"), "--fp8: needs a CUDA device, got cpu"),
    (("--model", "nowhere"), "nowhere/transformer/config.json: no such file"),
    (("--config", "tiny", "--json", "/no/such/folder/a.json"), "--json: no such folder: /no/such/folder"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_input_is_one_line(arguments: tuple[object, ...], message: str) -> None:
    outcome = reelway_bench(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_cuda_where_there_is_none_is_one_line() -> None:
    outcome = reelway_bench("--config", "tiny", "--device", "cuda")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "--device: torch" in outcome.err
    assert "sees 0 CUDA devices here, got cuda" in outcome.err
