"""Student against teacher, in one run on one device: frames per second, time to the first frame, real time."""

import time
from functools import partial

import numpy as np

from reelway.actors.bench import BenchRequest, run
from reelway.actors.streams import overlapped
from reelway.pipelines.evaluation.makers import Maker, load_maker
from reelway.pipelines.evaluation.plan import make_plan
from reelway.pipelines.evaluation.sweep import ClipSettings, PromptSet, Sweep, TeacherSweep

from .common import FRAME_RATE, Bench, Figure, Result, Row

ROUNDS = 3  # the median of which counts
BLOCKS = 28  # of the student's stream: 20 seconds
WARM = 4  # blocks before the clock: then the window is full
PROMPTS = 3  # of the runs that hold the text encoder


def speed(bench: Bench) -> Result:
    """The benchmark of `reelway bench`, and the same from the prompt on, as `reelway evaluate` measures it."""
    ledger = bench.ledger("speed", models=("student", "teacher"), blocks=BLOCKS, threads=bench.threads)
    rounds = [ledger.row(f"round-{at}", partial(_round, bench)) for at in range(ROUNDS)]
    whole = ledger.row("from-the-prompt", partial(_from_the_prompt, bench))
    overlap = ledger.row("overlap", partial(_overlap, bench))
    result = _figures(rounds, whole)
    gain = Figure(
        "decoding a block in one thread while the next is made in another, on this processor",
        f"{overlap['overlapped'] / overlap['in_turn']:.2f} times the frames per second of one after the other "
        f"({overlap['overlapped']:.1f} against {overlap['in_turn']:.1f})",
        "as measured",
    )
    return Result([*result.figures, gain], {**result.details, "overlap": overlap})


def _overlap(bench: Bench) -> Row:
    """Frames per second of the same stream, made in turn and made ahead; medians of rounds that alternate."""
    rates: dict[str, list[float]] = {"in_turn": [], "overlapped": []}
    for _ in range(ROUNDS):
        for name, found in rates.items():
            with bench.model.open("a red star", height=bench.size, width=bench.size) as stream:
                for _ in range(WARM):
                    stream.next_chunk()
                began, before = time.perf_counter(), stream.frames_out
                if name == "in_turn":
                    for _ in range(BLOCKS):
                        stream.next_chunk()
                else:
                    for _ in overlapped(stream, BLOCKS):
                        pass
                found.append((stream.frames_out - before) / (time.perf_counter() - began))
    return {name: _median(found) for name, found in rates.items()}


def _round(bench: Bench) -> Row:
    request = BenchRequest(model=bench.student, height=bench.size, width=bench.size, blocks=BLOCKS)
    return run(request, lambda _: None)


def _from_the_prompt(bench: Bench) -> Row:
    """Text encoder, network and VAE: medians over prompts of both models, warm."""
    plan = make_plan(
        Sweep(
            models={"teacher": bench.teacher, "student": bench.student},
            prompts=[PromptSet(source="sprites:heldout", count=PROMPTS, level=bench.level, seed=bench.seed)],
            clip=ClipSettings(height=bench.size, width=bench.size, frame_rate=FRAME_RATE),
            teacher=TeacherSweep(steps=(50,), guidance=(3.0,)),
        ),
        "cpu",
    )
    found: dict[str, list[Row]] = {"teacher": [], "student": []}
    makers: dict[str, Maker] = {}
    for cell in plan.cells:
        name = cell.model.name
        if name not in makers:
            makers[name] = load_maker(cell)
        found[name].append(makers[name].make(cell).speed)
    names = ("frames_per_second", "denoise_frames_per_second", "time_to_first_frame")
    return {model: {name: _median([row[name] for row in rows]) for name in names} for model, rows in found.items()}


def _median(values: list[float]) -> float:
    return float(np.median(values))


def _figures(rounds: list[Row], whole: Row) -> Result:
    fast, slow = (_rates(rounds, model) for model in ("student", "teacher"))
    ratios = [row["student_over_teacher"] for row in rounds]
    denoise = _median([row["frames_per_second"]["denoise_only"] for row in ratios])
    sooner = _median([1 / row["time_to_first_frame"] for row in ratios])
    gap = _median([row["student"]["chunk_gap"]["p99"] for row in rounds])
    first = rounds[0]
    passes = first["teacher"]["forwards_per_latent"] / first["student"]["forwards_per_latent"]
    student, teacher = whole["student"], whole["teacher"]
    figures = [
        Figure(
            "frames per second, denoise only, student over teacher",
            f"{denoise:.1f} ({fast['denoise_only']:.0f} against {slow['denoise_only']:.1f})",
            ">= 10",
            denoise >= 10,
        ),
        Figure(
            "where the rest of the passes' share goes",
            f"{passes:.0f} times fewer passes; a token of a student's pass costs {passes / denoise:.2f} times a "
            f"teacher's: {_tokens(first)}",
        ),
        Figure(
            "end to end, VAE in, text encoder not",
            _against(fast["end_to_end"], slow["end_to_end"]),
            "as measured",
        ),
        Figure(
            "end to end, VAE and text encoder in, 81 frames",
            _against(student["frames_per_second"], teacher["frames_per_second"]),
            "as measured",
        ),
        Figure(
            "first frame sooner, VAE in, text encoder not",
            f"{sooner:.0f} times ({_median([row['student']['time_to_first_frame'] for row in rounds]):.3f} s against "
            f"{_median([row['teacher']['time_to_first_frame'] for row in rounds]):.2f} s)",
            ">= 30",
            sooner >= 30,
        ),
        Figure(
            "first frame sooner, text encoder in",
            f"{teacher['time_to_first_frame'] / student['time_to_first_frame']:.0f} times "
            f"({student['time_to_first_frame']:.3f} s against {teacher['time_to_first_frame']:.2f} s)",
        ),
        Figure(
            "the student in real time, VAE in",
            f"{fast['end_to_end']:.1f} frames per second; chunks of 12 frames at most {gap:.3f} s apart (p99)",
            f">= {FRAME_RATE}",
            fast["end_to_end"] >= FRAME_RATE and gap <= 12 / FRAME_RATE,
        ),
        Figure("share of what this machine's peaks allow", _reached(first)),
    ]
    return Result(figures, {"rounds": rounds, "from_the_prompt": whole})


def _against(student: float, teacher: float) -> str:
    return f"{student / teacher:.2f} ({student:.1f} against {teacher:.1f})"


def _rates(rounds: list[Row], model: str) -> dict[str, float]:
    return {
        name: _median([row[model]["frames_per_second"][name] for row in rounds])
        for name in ("denoise_only", "end_to_end")
    }


def _tokens(report: Row) -> str:
    setting = report["setting"]
    block = setting["block"] * setting["tokens_per_latent"]
    clip = report["teacher"]["latents"] * setting["tokens_per_latent"]
    return f"{block} tokens a pass against {clip}"


def _reached(report: Row) -> str:
    reached = report["floor"]["share_reached"]
    return f"{100 * reached['denoise_only']:.0f} % denoise only, {100 * reached['end_to_end']:.0f} % end to end"
