"""Pictures of training curves."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .loop import read_curve

SMOOTHING = 50  # steps in the running mean


def plot_curve(folder: Path, metric: str = "loss") -> Path:
    """Draw `metric` of `folder/curve.jsonl` and its running mean over the steps; returns the PNG's path."""
    rows = read_curve(folder / "curve.jsonl")
    steps, values = (np.array([row[key] for row in rows]) for key in ("step", metric))
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color="0.8", linewidth=0.6)
    width = min(SMOOTHING, len(values))
    axes.plot(steps[width - 1 :], np.convolve(values, np.full(width, 1 / width), mode="valid"), color="C0")
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    path = folder / f"{metric}.png"
    figure.savefig(path, dpi=110)
    return path
