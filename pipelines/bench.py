"""The benchmark on the command line: tables for the eye, JSON for the record."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..actors.bench import BenchRequest, run
from ..actors.bench_network import Acceleration

app = typer.Typer(add_completion=False)

Report = dict[str, Any]
COMMIT_DIGITS = 12
UNITS = ("", "k", "M", "G", "T", "P", "E")


@app.command()
def bench(
    config: Annotated[str | None, typer.Option(help="tiny, wan2.1-1.3b or wan2.1-14b, with random weights.")] = None,
    model: Annotated[Path | None, typer.Option(help="A model folder, instead of --config and random weights.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="fp32 (default on the CPU) or bf16 (default on CUDA).")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; 64 for tiny, 480 for Wan.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; 64 for tiny, 832 for Wan.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of the student's video.")] = None,
    blocks: Annotated[int | None, typer.Option(help="The same in blocks; 21 latent frames by default.")] = None,
    block: Annotated[int | None, typer.Option(help="Latent frames per block [3].")] = None,
    window: Annotated[int | None, typer.Option(help="Latent frames that a block attends to [12].")] = None,
    sink: Annotated[int | None, typer.Option(help="First latent frames that stay in the window [3].")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of the student [4].")] = None,
    streams: Annotated[int, typer.Option(help="Videos made at the same time, in one batch.")] = 1,
    warmup: Annotated[int | None, typer.Option(help="Blocks made before the clock runs.")] = None,
    no_vae: Annotated[bool, typer.Option("--no-vae", help="Leave the VAE out.")] = False,
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Leave the teacher out.")] = False,
    teacher_steps: Annotated[int, typer.Option(help="Denoising steps of the teacher.")] = 50,
    teacher_forwards: Annotated[
        int | None, typer.Option(help="Measure so many of the teacher's passes, and extrapolate.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Cut the network to its first blocks.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the transformer.")] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Replay the student's passes as CUDA graphs.")
    ] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="float8 products in the blocks (torchao).")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here too.")] = None,
) -> None:
    """Measure a streaming student and its teacher: frames per second, latency, memory, and their floor.

    The student is the causal network with a KV cache, the teacher the same network over the whole clip with
    guidance. Without --window and the like a model folder's student.json decides.
    """
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json: no such folder: {json_path.absolute().parent}")
    request = BenchRequest(
        config=config,
        model=model,
        device=device,
        dtype=dtype,
        height=height,
        width=width,
        seconds=seconds,
        blocks=blocks,
        block=block,
        window=window,
        sink=sink,
        steps=steps,
        streams=streams,
        warmup=warmup,
        vae=not no_vae,
        teacher=not no_teacher,
        teacher_steps=teacher_steps,
        teacher_forwards=teacher_forwards,
        layers=layers,
        acceleration=Acceleration(compile=compile, cuda_graphs=cuda_graphs, fp8=fp8),
    )
    progress = Console(stderr=True)
    report = run(request, lambda line: progress.print(line, highlight=False))
    console = Console()
    for table in (setting_table(report), speed_table(report), memory_table(report), floor_table(report)):
        console.print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")


def setting_table(report: Report) -> Table:
    """What the figures depend on."""
    table = Table("setting", "value", title="What was measured", title_justify="left")
    for name, value in {**_network_lines(report), **_run_lines(report)}.items():
        table.add_row(name, value)
    return table


def _network_lines(report: Report) -> dict[str, str]:
    setting, device = report["setting"], report["setting"]["device"]
    layers = f"{setting['layers']} layers"
    if setting["layers"] != setting["layers_of_config"]:
        layers = f"CUT to {setting['layers']} of {setting['layers_of_config']} layers"
    size = f"{setting['parameters'] / 1e6:,.1f} M parameters"
    return {
        "device": f"{device['name']} ({device['kind']}, {device['cpu_threads']} CPU threads)",
        "network": f"{setting['config']}, {layers}, {size}, weights: {setting['weights']}",
        "resolution": f"{setting['width']}x{setting['height']}, {setting['tokens_per_latent']} tokens per latent",
        "precision": setting["precision"] + (", float8 linear layers" if setting["fp8"] else ""),
        "compile": _yes(setting["compile"]),
        "CUDA graphs": _yes(setting["cuda_graphs"]),
    }


def _run_lines(report: Report) -> dict[str, str]:
    setting, student = report["setting"], report["student"]
    levels = ", ".join(f"{level:.5g}" for level in setting["timesteps"])
    vae, text = setting["vae_decoding"], setting["text_encoding"]
    versions = {name: version for name, version in report["versions"].items() if version}
    if commit := versions.get("commit"):
        versions["commit"] = commit[:COMMIT_DIGITS] + ("+" if commit.endswith("+") else "")
    return {
        "block": f"{setting['block']} latent frames (the first {setting['first_block']})",
        "steps": f"{setting['steps']} and a clean pass; timesteps {levels}",
        "window and sink": f"{setting['window']} and {setting['sink']} latent frames",
        "video": f"{student['blocks']} blocks, {student['latents']} latent frames, "
        f"{student['frames_per_stream']} frames at {setting['frame_rate']} per second",
        "streams": str(setting["streams"]),
        "warm-up": f"{setting['warmup_blocks']} blocks; the teacher: 1 pass",
        "text encoding": f"not in ({text['rows']} random rows per prompt)",
        "VAE decoding": "in" if vae["included"] else f"not in: {vae['left_out_because']}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def speed_table(report: Report) -> Table:
    """Student, teacher and their ratio."""
    student, teacher, ratio = report["student"], report["teacher"] or {}, report["student_over_teacher"] or {}
    of_teacher = "teacher"
    if teacher.get("extrapolated"):
        of_teacher += f"\nEXTRAPOLATED from {teacher['forwards_measured']} of {teacher['forwards']} passes"
    table = Table("speed", "student", of_teacher, "student / teacher", title="Speed", title_justify="left")
    for label, section, name in (
        ("frames per second, end to end", "frames_per_second", "end_to_end"),
        ("frames per second, denoise only", "frames_per_second", "denoise_only"),
    ):
        columns = (part.get(section, {}).get(name) for part in (student, teacher, ratio))
        table.add_row(label, *(_number(value) for value in columns))
    first = "time to first frame" if student["seconds"]["decode"] is not None else "time to first latents"
    table.add_row(first, *_columns("time_to_first_frame", student, teacher, ratio))
    for name in ("p50", "p95", "p99"):
        label = f"gap between chunks, {name} of {student['chunk_gap']['count']}"
        table.add_row(label, _seconds(student["chunk_gap"][name]), "-", "-")
    forwards = (part.get("forwards_per_latent") for part in (student, teacher, ratio))
    table.add_row("passes per latent frame", *(_number(value) for value in forwards))
    table.add_row("latent frames", str(student["latents"]), str(teacher.get("latents", "-")), "-")
    table.add_row("peak memory", _bytes(student["peak_memory"]), _bytes(teacher.get("peak_memory")), "-")
    table.caption = f"first frame: {student['first_frame_is']}; peak memory: {report['memory']['peak_means']}"
    return table


def _columns(name: str, student: Report, teacher: Report, ratio: Report) -> tuple[str, str, str]:
    return _seconds(student[name]), _seconds(teacher.get(name)), _number(ratio.get(name))


def memory_table(report: Report) -> Table:
    """Bytes known before the run, beside the bytes of the tensors."""
    table = Table("memory", "known before", "measured", title="Memory", title_justify="left")
    for label, name in (
        ("weights", "weights"),
        ("KV cache per stream", "kv_cache_per_stream"),
        ("VAE state per stream", "vae_state_per_stream"),
    ):
        sizes = report["memory"][name]
        table.add_row(label, _bytes(sizes["known"]), _bytes(sizes["measured"]))
    return table


def floor_table(report: Report) -> Table:
    """What the device could do at best."""
    floor, reached = report["floor"], report["student"]["frames_per_second"]
    peaks, block = floor["peaks"], floor["full_window_block"]
    table = Table("physical floor", "value", title="Physical floor", title_justify="left")
    table.add_row("peak of a large matmul", _scaled(peaks["matmul_flops_per_second"], "FLOP/s"))
    if peaks["fp8_matmul_flops_per_second"] is not None:
        table.add_row("peak of a float8 matmul", _scaled(peaks["fp8_matmul_flops_per_second"], "FLOP/s"))
    table.add_row("peak of a large copy", _scaled(peaks["copy_bytes_per_second"], "B/s"))
    for label, name, unit in (
        ("a block of all streams: denoising steps", "denoise_flops", "FLOP"),
        ("a block of all streams: clean pass", "clean_pass_flops", "FLOP"),
        ("a block of all streams: VAE", "decode_flops", "FLOP"),
        ("a block of all streams: weights and cache", "denoise_and_clean_bytes", "B"),
        ("a block of all streams: VAE weights and state", "decode_bytes", "B"),
    ):
        table.add_row(label, _scaled(block[name], unit))
    for label, name in (("end to end", "end_to_end"), ("denoise only", "denoise_only")):
        best, share = floor["frames_per_second"][name], floor["share_reached"][name]
        text = "-" if best is None else f"{_number(best)} at best, {_number(reached[name])} reached: {share:.1%}"
        table.add_row(f"frames per second, {label}", text)
    return table


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} s"


def _bytes(value: int | None) -> str:
    return _scaled(value, "B")


def _scaled(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    power = 0
    while value >= 1000 and power < len(UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.4g} {UNITS[power]}{unit}"
