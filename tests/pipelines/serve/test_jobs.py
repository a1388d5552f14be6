"""Jobs of the videos API on workers that are played: what becomes of a job when its stream does not go as ordered."""

import asyncio
from pathlib import Path

import av
import pytest

from reelway.pipelines.serve.keys import ANYBODY
from reelway.pipelines.serve.videos import FRAME_RATE, Video, Videos

from .played import CHUNK, PlayedBackend, services_on


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
