"""A picture of long streams: the oracle's Total second by second, and the memory of the process."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .common import Row

SMOOTH = 10  # seconds of the running mean
INK, FAINT, ACCENT = "#1c1f24", "#b9bec6", "#2f63c8"

matplotlib.use("Agg")


def draw_streams(path: Path, rows: list[Row], notes: list[Row]) -> None:
    """rows: of the streams, with `total` per second. notes: with `seconds` of video and `resident` bytes."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for row in rows:
        upper.plot(_minutes(len(_smooth(row["total"]))), _smooth(row["total"]), color=FAINT, linewidth=1)
    mean = _smooth(np.mean([row["total"] for row in rows], axis=0))
    upper.plot(_minutes(len(mean)), mean, color=ACCENT, linewidth=2)
    upper.set_ylim(0, 1)
    upper.set_ylabel(f"Total, mean over {SMOOTH} s")
    for run in sorted({note["run"] for note in notes}):
        held = [(note["seconds"] / 60, note["resident"] / 1e6) for note in notes if note["run"] == run]
        lower.plot(*zip(*held, strict=True), color=INK, linewidth=1.5)
    lower.set_ylim(0, 1.25 * max(note["resident"] for note in notes) / 1e6)
    lower.set_ylabel("memory, MB")
    lower.set_xlabel("minutes of video")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e1da", linewidth=0.8)
    figure.savefig(path, dpi=110)


def _smooth(values: list[float]) -> np.ndarray:
    width = min(SMOOTH, len(values))
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def _minutes(points: int) -> np.ndarray:
    return np.arange(points) / 60
