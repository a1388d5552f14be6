"""A gateway without Ray and without a student: its one worker is played."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reelway.actors.orders import Piece, StreamOrder, Taken
from reelway.actors.timeline import Turn
from reelway.pipelines.serve.config import ServeConfig
from reelway.pipelines.serve.keys import Keyring
from reelway.pipelines.serve.limits import Limits
from reelway.pipelines.serve.metrics import Metrics
from reelway.pipelines.serve.orders import Services
from reelway.pipelines.serve.placement import Placed
from reelway.pipelines.serve.pool import WorkerGone
from reelway.pipelines.serve.state import State

SIZE = (32, 32)
CHUNK = 5  # frames of a piece


class PlayedBackend:
    """One worker at a time. ends_at: its streams end there; dies_at: the first worker is lost there."""

    def __init__(self, ends_at: int = 10_000, dies_at: int = 10_000) -> None:
        self.ends_at, self.dies_at = ends_at, dies_at
        self.placed: list[int] = []  # from which frame on
        self.freed: list[str] = []

    async def place(
        self, model: str, order: StreamOrder, ticket: str | None, turns: Sequence[Turn], frame: int
    ) -> Placed:
        self.placed.append(frame)
        info: Any = None
        return Placed(len(self.placed), "worker", info, 0)

    async def call(self, worker: int, method: str, stream: str, frame: int, wait: float) -> Taken:
        assert method == "take"
        if worker == 1 and frame >= self.dies_at:
            raise WorkerGone("killed by the test")
        if frame >= self.ends_at:
            await asyncio.sleep(0)  # else a loop that does not end would never let the test's clock be asked
            return Taken((), "ended", "nobody knows why")
        frames = np.full((CHUNK, *SIZE, 3), frame, np.uint8)
        return Taken((Piece(frame, frames, 0, True, 0, 0.1, 0.0),), "running")

    async def left(self, stream: str) -> None:
        self.freed.append(stream)

    async def models(self) -> list[dict[str, Any]]:
        return [{"id": "small", "ready": 1, "info": None}]

    async def status(self) -> dict[str, Any]:
        return {}


def services_on(backend: Any, folder: Path, **changes: Any) -> Services:
    """changes: to the server's configuration."""
    content = {"models": {"small": {"path": "nowhere", "size": SIZE}}, "state": str(folder)} | changes
    config = ServeConfig.model_validate(content)
    return Services(config, backend, State(folder), Limits(config.limits), Keyring(), Metrics("test"))
