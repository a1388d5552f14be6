"""Jobs of the videos API on workers that are played: what becomes of a job when its stream does not go as ordered."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from reelway.actors.scheduler import Piece, StreamOrder, Taken, Turn
from reelway.pipelines.serve.config import ServeConfig
from reelway.pipelines.serve.keys import ANYBODY, Keyring
from reelway.pipelines.serve.limits import Limits
from reelway.pipelines.serve.metrics import Metrics
from reelway.pipelines.serve.orders import Services
from reelway.pipelines.serve.placement import Placed
from reelway.pipelines.serve.pool import WorkerGone
from reelway.pipelines.serve.state import State
from reelway.pipelines.serve.videos import FRAME_RATE, Video, Videos

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


def services_on(backend: Any, folder: Path) -> Services:
    model = {"path": "nowhere", "size": SIZE}
    config = ServeConfig.model_validate({"models": {"small": model}, "state": str(folder)})
    return Services(config, backend, State(folder), Limits(config.limits), Keyring(), Metrics("test"))


def ordered(backend: PlayedBackend, folder: Path) -> tuple[Video, bytes | None]:
    """The video of one second that is ordered, once it is over with, and its file."""

    async def run() -> tuple[Video, bytes | None]:
        videos = Videos(services_on(backend, folder))
        async with asyncio.timeout(120):
            video = await videos.create(ANYBODY, "a red star", None, "1", None, None)
            while video.status in ("queued", "in_progress"):
                await asyncio.sleep(0.01)
                video = await videos.retrieve(ANYBODY, video.id)
        return video, await videos.content(ANYBODY, video.id) if video.status == "completed" else None

    return asyncio.run(run())


def test_a_stream_that_ends_too_early_fails_its_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its worker gives the same answer for ever: who only looks for the last frame would ask for ever."""
    backend = PlayedBackend(ends_at=2 * CHUNK)
    video, _ = ordered(backend, tmp_path)
    assert video.status == "failed"
    assert video.error is not None
    assert video.error.code == "server_error"
    assert len(backend.freed) == 1
    assert f"ended at frame {2 * CHUNK}: nobody knows why" in capsys.readouterr().err


def test_a_job_goes_on_on_another_worker(tmp_path: Path) -> None:
    backend = PlayedBackend(dies_at=CHUNK)
    video, content = ordered(backend, tmp_path)
    assert (video.status, video.progress) == ("completed", 100)
    assert backend.placed == [0, CHUNK]
    assert content is not None
    (path := tmp_path / "video.mp4").write_bytes(content)
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) >= FRAME_RATE
