"""Pictures of training curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .loop import read_curve

SMOOTHING = 50  # steps in the running mean


def plot_curve(folder: Path, metric: str = "loss") -> Path:
    """Draw `metric` of `folder/curve.jsonl` and its running mean over the steps; returns the PNG's path."""
    path = folder / f"{metric}.png"
    draw_curve(read_curve(folder / "curve.jsonl"), metric, path)
    return path


def draw_curve(rows: Sequence[Mapping[str, float]], metric: str, path: Path) -> None:
    """Draw `metric` of a curve's rows, one after the other, and its running mean to a PNG file."""
    values = np.array([row[metric] for row in rows])
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(values, color="0.8", linewidth=0.6)
    width = min(SMOOTHING, len(values))
    mean = np.convolve(values, np.full(width, 1 / width), mode="valid")
    axes.plot(np.arange(width - 1, len(values)), mean, color="C0")
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    figure.savefig(path, dpi=110)
