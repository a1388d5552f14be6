"""The worker of a sweep: makes a cell's video, has it judged, and stores both. A stored cell is never made again."""

import io
import json
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ... import __version__
from ...actors.judge import Examination, examine
from ...cluster.storage import Storage
from ..video import VideoWriter
from .makers import Clip, Maker, load_maker
from .plan import Cell

CELLS, VIDEOS, STRIPS = "cells", "videos", "strips"
STRIP_FRAMES, STRIP_HEIGHT = 8, 96
SPEED = "speed"
Row = dict[str, Any]


class Examiner:
    """Runs cells one at a time; keeps the model of the last one. A plain class: the pool gives it a process.

    out: where the sweep is kept. threads: of torch. workers: how many may run at once, for the record: they share
    the machine, which its figures of speed should say.
    """

    def __init__(self, out: Storage, threads: int, workers: int) -> None:
        torch.set_num_threads(threads)
        self._storage, self._threads, self._workers = out, threads, workers
        self._loaded: tuple[str, Maker] | None = None

    def process(self, cell: Cell) -> Row:
        """Make, judge and store a cell; {"key", "made"}. made: False where it was stored before."""
        name = f"{CELLS}/{cell.key}.json"
        if self._storage.exists(name):
            return {"key": cell.key, "made": False}
        maker, load = self._maker(cell), os.getloadavg()[0]
        clip = maker.make(cell)
        found = examine(clip.video, clip.shots, fps=cell.frame_rate, level=cell.level, blocks=clip.blocks)
        self._store_pictures(cell, clip)
        row = json.dumps(self._row(cell, clip, found, load), allow_nan=False)
        self._storage.publish(name, row.encode(), replace=True)  # last: a row says that all of its cell is there
        return {"key": cell.key, "made": True}

    def _maker(self, cell: Cell) -> Maker:
        if self._loaded is None or self._loaded[0] != cell.model.fingerprint:
            self._loaded = None  # lets go of the last model before the next one is loaded
            self._loaded = (cell.model.fingerprint, load_maker(cell))
        return self._loaded[1]

    def _store_pictures(self, cell: Cell, clip: Clip) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.mp4"
            with VideoWriter(path, cell.frame_rate) as writer:
                writer.write(clip.video)
            self._storage.publish(f"{VIDEOS}/{cell.key}.mp4", path, replace=True)
        self._storage.publish(f"{STRIPS}/{cell.key}.webp", strip(clip.video), replace=True)

    def _row(self, cell: Cell, clip: Clip, found: Examination, load: float) -> Row:
        return {
            "key": cell.key,
            "scores": {**found.scores, SPEED: clip.speed},
            "drift": found.drift,
            "seen": found.seen,
            "traits": found.traits and asdict(found.traits),
            "ends": found.ends,
            "shots": [{"start": shot.start, "prompt": shot.prompt} for shot in clip.shots],
            "frames": len(clip.video),
            "run": {
                "device": _device_name(cell.device),
                "threads": self._threads,
                "workers": self._workers,
                "cpus": os.cpu_count() or 1,
                "load": load,
                "versions": {"reelway": __version__, "torch": torch.__version__, "python": platform.python_version()},
            },
        }


def strip(video: np.ndarray) -> bytes:
    """A WebP picture of frames evenly spread over a video, uint8 [T, H, W, 3], side by side."""
    chosen = np.linspace(0, len(video) - 1, min(STRIP_FRAMES, len(video))).round().astype(int)
    height, width = video.shape[1:3]
    scale = min(1.0, STRIP_HEIGHT / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    frames = [np.asarray(Image.fromarray(video[index]).resize(size, Image.Resampling.LANCZOS)) for index in chosen]
    picture = io.BytesIO()
    Image.fromarray(np.concatenate(frames, axis=1)).save(picture, "WEBP", quality=82)
    return picture.getvalue()


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()})"
