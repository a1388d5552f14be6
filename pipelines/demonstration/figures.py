"""What the finished stages say together: the figures of the page, and the four lines that matter."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import __version__
from ...actors.judge import SPRITES
from ...kernels.causal.student import StudentSettings
from ..evaluation.page import verdict_of
from ..telemetry import read_curve
from .rollouts import MINUTE, TAKES
from .runner import Record
from .settings import Demo
from .stages import (
    CELLS_FILE,
    DISTILL,
    EVALUATE,
    FRESH_NAME,
    INITIALIZE,
    REPORT_FILE,
    ROLLOUTS,
    SPEED,
    SPEED_FILE,
    STUDENT_NAME,
    TEACHER_NAME,
)

DRIFT_SECONDS = 10  # at the start and at the end of the long stream
MODELS = (TEACHER_NAME, FRESH_NAME, STUDENT_NAME)
Row = dict[str, Any]


@dataclass(frozen=True)
class Figures:
    """All that the page shows. takes: the rollouts, by name. cells: the graded videos. curves: losses by stage.

    origin: what the shipped student says of where it came from.
    scores and differences: {dimension: {model: entry of the evaluation's report}}.
    """

    speed: Row
    takes: dict[str, Row]
    cells: list[Row]
    scores: dict[str, dict[str, Row]]
    differences: dict[str, dict[str, Row]]
    curves: dict[str, list[dict[str, float]]]
    records: dict[str, Record]
    origin: Row
    protocol: Row

    @classmethod
    def gather(cls, demo: Demo, records: Mapping[str, Record]) -> "Figures":
        """Read what the stages left."""
        report = _read(demo, EVALUATE, REPORT_FILE)
        return cls(
            speed=_read(demo, SPEED, SPEED_FILE),
            takes=_read(demo, ROLLOUTS, TAKES),
            cells=_read(demo, EVALUATE, CELLS_FILE)["cells"],
            scores=_by_dimension(report["scores"]),
            differences=_by_dimension(report["baseline"]["differences"]),
            curves={name: read_curve(demo.work(name) / "run" / "curve.jsonl") for name in (INITIALIZE, DISTILL)},
            records=dict(records),
            origin=StudentSettings.read(demo.student).origin,
            protocol={
                "reelway": __version__,
                "python": platform.python_version(),
                "torch": demo.prints["torch"],
                "device": demo.prints["device"],
                "processor": _processor(),
                "cores": os.cpu_count(),
            },
        )

    def drift(self) -> tuple[float, float] | None:
        """The oracle's total over the first and the last ten seconds of the long stream; a shorter one is halved."""
        known = [value for value in self.takes[MINUTE]["drift"].get("total", []) if value is not None]
        part = min(DRIFT_SECONDS, len(known) // 2)
        return (float(np.mean(known[:part])), float(np.mean(known[-part:]))) if part else None


def headlines(figures: Figures) -> dict[str, tuple[str, str]]:
    """The four that matter: {name: (figure, what it is)}."""
    return {
        "speed-up": _speed_up(figures.speed),
        "first frame": _first_frame(figures.speed),
        "quality": _quality(figures),
        "drift": _drift(figures),
    }


def _speed_up(speed: Row) -> tuple[str, str]:
    ratio = speed["student_over_teacher"]["frames_per_second"]
    student, teacher = (speed[name]["frames_per_second"] for name in ("student", "teacher"))
    return f"{ratio['denoise_only']:.1f}x", (
        f"the teacher's frames per second, denoise only ({student['denoise_only']:.0f} against "
        f"{teacher['denoise_only']:.1f}); {ratio['end_to_end']:.1f}x end to end ({student['end_to_end']:.0f} against "
        f"{teacher['end_to_end']:.1f}, VAE included)"
    )


def _first_frame(speed: Row) -> tuple[str, str]:
    student, teacher = speed["student"]["time_to_first_frame"], speed["teacher"]["time_to_first_frame"]
    return (
        f"{student:.3f} s",
        f"to the first frame; the teacher's comes after {teacher:.2f} s, {teacher / student:.0f}x later",
    )


def _quality(figures: Figures) -> tuple[str, str]:
    totals, difference = figures.scores.get("total"), figures.differences.get("total", {}).get(STUDENT_NAME)
    if not totals or difference is None:
        return "-", "the oracle could grade no video"
    words = {name: f"{totals[name]['mean']:.3f}" for name in MODELS}
    semantic = {name: f"{figures.scores['semantic'][name]['mean']:.2f}" for name in MODELS}
    return words[STUDENT_NAME], (
        f"total of the shipped student, {words[TEACHER_NAME]} of its teacher ({verdict_of(difference)[0]}), "
        f"{words[FRESH_NAME]} of the student that was trained just now; semantic {semantic[STUDENT_NAME]}, "
        f"{semantic[TEACHER_NAME]} and {semantic[FRESH_NAME]}, over {totals[STUDENT_NAME]['count']} held-out prompts"
    )


def _drift(figures: Figures) -> tuple[str, str]:
    found, take = figures.drift(), figures.takes[MINUTE]["figures"]
    if found is None:
        return "-", "the oracle could not grade the long stream"
    first, last = found
    return f"{last / first:.3f}", (
        f"of the first ten seconds' total is left in the last ten ({first:.3f} and {last:.3f}) of a stream of "
        f"{take['seconds_of_video']:.0f} s"
    )


def _by_dimension(entries: list[Row]) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = {}
    for entry in entries:
        if entry["judge"] == SPRITES:
            found.setdefault(entry["dimension"], {})[entry["model"]] = entry
    return found


def _read(demo: Demo, stage: str, name: str) -> Row:
    content: Row = json.loads((demo.work(stage) / name).read_text())
    return content


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
