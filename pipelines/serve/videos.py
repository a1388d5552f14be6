"""Whole videos by HTTP, in the form of OpenAI's videos API. A job's record and file are kept beside the streams' state,
so that any gateway can tell of it, and another one goes on with it when its gateway is lost.
"""

import asyncio
import io
import json
import math
import secrets
import tempfile
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from ...actors.orders import StreamOrder
from ...kernels.clips import Pixels
from ..video import VideoWriter
from .backend import Gone, NoPlace, PlacedStream
from .media import read_picture
from .orders import Services, choose_model, model_size
from .protocol import BadMessage
from .state import STREAM_ID

FOLDER: Final = "videos"
FRAME_RATE: Final = 16
HEARTBEAT: Final = 10.0  # seconds between two records of a job that is being made
ABANDONED: Final = 60.0  # since the last record: its gateway is lost
SWEEP_SECONDS: Final = 30.0
PROGRESS_STEP: Final = 5  # per cent between two records
WAIT: Final = 5.0
SECONDS: Final = "4"  # OpenAI's default

Status = Literal["queued", "in_progress", "completed", "failed"]


class VideoError(BaseModel):
    """Why a video could not be made."""

    code: str
    message: str


class Video(BaseModel):
    """A job, as clients see it. Times are seconds since 1970, progress is per cent."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status = "queued"
    progress: int = 0
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str
    seconds: str
    size: str
    error: VideoError | None = None
    remixed_from_video_id: str | None = None


class Job(BaseModel):
    """A job as it is kept. touched: when its gateway last wrote that it is at work."""

    model_config = ConfigDict(extra="forbid")
    version: int = 1
    video: Video
    owner: str
    order: dict[str, Any]
    touched: float

    @property
    def is_open(self) -> bool:
        return self.video.status in ("queued", "in_progress")


class NoVideo(ValueError):
    """There is no such video, or it is another key's."""


class Videos:
    """All methods are for one event loop."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._storage = services.state.storage
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._jobs: dict[str, Job] = {}  # those that are made here

    # --- What clients ask ------------------------------------------------------------------------------------------

    async def create(
        self, owner: str, prompt: str, model: str | None, seconds: str, size: str | None, image: bytes | None
    ) -> Video:
        """Begin a job. BadMessage says what is wrong."""
        limits = self._services.limits
        limits.check_prompt(prompt)
        limits.request(owner, time.monotonic())
        name = await choose_model(self._services, model)
        length = self._length(seconds)
        await self._check_room(owner)
        height, width = _read_size(size) if size else await model_size(self._services, name)
        picture = await self._picture(image, height, width)
        now = time.time()
        video = Video(
            id=f"video_{secrets.token_hex(16)}",
            model=name,
            created_at=int(now),
            prompt=prompt,
            seconds=seconds,
            size=f"{width}x{height}",
        )
        order = StreamOrder(
            video.id, prompt, height=height, width=width, frame_rate=None, frames=round(length * FRAME_RATE)
        )
        job = Job(video=video, owner=owner, order=order.to_json(), touched=now)
        if picture is not None:
            await asyncio.to_thread(self._write_image, job, picture)
        await self._write(job)
        self._begin(job)
        return video.model_copy()

    async def retrieve(self, owner: str, video: str) -> Video:
        return (await self._find(owner, video)).video

    async def content(self, owner: str, video: str) -> bytes:
        """The file's bytes. BadMessage where it is not finished."""
        job = await self._find(owner, video)
        if job.video.status != "completed":
            raise BadMessage("not_now", f"video {video}: is {job.video.status}, not completed")
        return await asyncio.to_thread(self._storage.read, _name(video, "mp4"))

    async def page(self, owner: str, after: str | None, limit: int, descending: bool) -> tuple[list[Video], bool]:
        """Some of the owner's videos by time, and whether there are more."""
        jobs = [job for job in await self._all() if job.owner == owner]
        jobs.sort(key=lambda job: (job.video.created_at, job.video.id), reverse=descending)
        ids = [job.video.id for job in jobs]
        if after is not None and after not in ids:
            raise NoVideo(f"after: no video {after:.80}")
        begin = 0 if after is None else ids.index(after) + 1
        return [job.video for job in jobs[begin : begin + limit]], begin + limit < len(jobs)

    async def delete(self, owner: str, video: str) -> None:
        """Remove a video; one that is being made is given up."""
        await self._find(owner, video)
        task = self._tasks.get(video)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(self._remove, video)

    # --- Jobs ------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Within: jobs of gateways that are lost are taken over, and what is too old is removed."""
        keeper = asyncio.create_task(self._look_after())
        try:
            yield
        finally:
            tasks = [keeper, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look_after(self) -> None:
        while True:
            try:
                await self._adopt()
                await asyncio.to_thread(self._services.state.sweep, self._services.config.resume_seconds)
            except OSError:
                traceback.print_exc()  # the store is away: tried again
            await asyncio.sleep(SWEEP_SECONDS)

    async def _adopt(self) -> None:
        now = time.time()
        for job in await self._all():
            if job.video.id in self._tasks:
                continue
            if job.is_open and job.touched < now - ABANDONED:
                job.touched = now
                await self._write(job)
                self._begin(job)
            elif not job.is_open and (job.video.expires_at or now) < now:
                await asyncio.to_thread(self._remove, job.video.id)

    def _begin(self, job: Job) -> None:
        self._jobs[job.video.id] = job
        task = asyncio.create_task(self._carry_out(job))
        self._tasks[job.video.id] = task
        task.add_done_callback(lambda _: self._forget(job.video.id))

    def _forget(self, video: str) -> None:
        self._tasks.pop(video, None)
        self._jobs.pop(video, None)

    async def _carry_out(self, job: Job) -> None:
        beat = asyncio.create_task(self._beat(job))
        try:
            await self._make(job)
        except asyncio.CancelledError:  # the gateway ends, and another one takes over; or the video was deleted
            raise
        except NoPlace as error:
            await self._fail(job, "invalid_order" if error.code == "invalid" else "unavailable", str(error))
        except Exception as error:  # noqa: BLE001 -- shown here; the client learns that it failed
            traceback.print_exception(error)
            await self._fail(job, "server_error", "the server failed to make this video")
        finally:
            beat.cancel()

    async def _beat(self, job: Job) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT)
            job.touched = time.time()
            await self._write(job)

    async def _make(self, job: Job) -> None:
        image = await asyncio.to_thread(self._read_image, job.video.id)
        # Two gateways may take over the same job: each has a stream of its own, and both make the same file.
        order = replace(StreamOrder.from_json(job.order, image), stream=f"{job.video.id}-{secrets.token_hex(4)}")
        stream = PlacedStream(self._services.backend, job.video.model, order)
        with tempfile.TemporaryDirectory(prefix="reelway-video-") as folder:
            path = Path(folder) / "video.mp4"
            try:
                with VideoWriter(path, FRAME_RATE, threads=1) as writer:
                    await self._write_frames(job, stream, writer)
            finally:
                await asyncio.shield(stream.free())
            await asyncio.to_thread(self._storage.publish, _name(job.video.id, "mp4"), path, True)
        now = time.time()
        expires = int(now + 86400 * self._services.config.limits.video_days)
        await self._change(job, status="completed", progress=100, completed_at=int(now), expires_at=expires)
        await asyncio.to_thread(self._services.state.forget, order.stream)
        self._services.metrics.videos.inc("completed")

    async def _write_frames(self, job: Job, stream: PlacedStream, writer: VideoWriter) -> None:
        """Take frames until the stream ends; on another worker where it must."""
        frames = stream.order.frames
        assert frames is not None
        placed = False
        while True:
            try:
                if not placed:
                    await stream.place(_patiently)
                    placed = True
                    await self._change(job, status="in_progress")
                taken = await stream.take(WAIT)
            except Gone:
                placed = False
                continue
            for piece in stream.fresh(taken.pieces):
                await asyncio.to_thread(writer.write, piece.frames[stream.next - piece.first :])
                stream.next = piece.end
            await self._note_progress(job, math.floor(100 * stream.next / frames))
            if stream.next >= frames:
                return
            if taken.state != "running":  # a stream that has ended gives the same answer for ever
                raise RuntimeError(f"video {job.video.id}: {taken.state} at frame {stream.next}: {taken.reason}")

    async def _note_progress(self, job: Job, progress: int) -> None:
        if progress >= job.video.progress + PROGRESS_STEP:
            await self._change(job, progress=min(99, progress))

    async def _fail(self, job: Job, code: str, message: str) -> None:
        now = time.time()
        expires = int(now + 86400 * self._services.config.limits.video_days)
        error = VideoError(code=code, message=message)
        await self._change(job, status="failed", completed_at=int(now), expires_at=expires, error=error)
        self._services.metrics.videos.inc("failed")

    async def _change(self, job: Job, **fields: Any) -> None:
        job.video = job.video.model_copy(update=fields)
        job.touched = time.time()
        await self._write(job)

    # --- Checks ----------------------------------------------------------------------------------------------------

    def _length(self, seconds: str) -> float:
        most = self._services.config.limits.video_seconds
        try:
            length = float(seconds)
        except ValueError:
            length = math.nan
        if not 0 < length <= most:
            raise BadMessage("bad_order", f"seconds: must lie in (0, {most}], got {seconds!r:.40}")
        return max(length, 1 / FRAME_RATE)

    async def _check_room(self, owner: str) -> None:
        most = self._services.config.limits.videos_per_key
        if sum(job.is_open and job.owner == owner for job in await self._all()) >= most:
            raise BadMessage("too_many_sessions", f"videos: at most {most} unfinished ones for one key")

    async def _picture(self, image: bytes | None, height: int, width: int) -> Pixels | None:
        if image is None:
            return None
        self._services.limits.check_size("input_reference", len(image))
        return await asyncio.to_thread(read_picture, "input_reference", image, height, width)

    # --- The store -------------------------------------------------------------------------------------------------

    async def _find(self, owner: str, video: str) -> Job:
        """The same answer for a video that never was and for another key's."""
        unknown = NoVideo(f"video: no video {video:.80}")
        if not STREAM_ID.fullmatch(video):
            raise unknown
        job = self._jobs.get(video) or await asyncio.to_thread(self._read, f"{video}.json")
        if job is None or job.owner != owner:
            raise unknown
        return job

    async def _all(self) -> list[Job]:
        return await asyncio.to_thread(self._read_all)

    def _read_all(self) -> list[Job]:
        names = [entry.name for entry in self._storage.entries(FOLDER) if entry.name.endswith(".json")]
        return [job for job in map(self._read, names) if job is not None]

    def _read(self, name: str) -> Job | None:
        try:
            return Job.model_validate_json(self._storage.read(f"{FOLDER}/{name}"))
        except FileNotFoundError:
            return None
        except ValidationError:
            print(json.dumps({"unreadable": self._storage.where(f"{FOLDER}/{name}")}))
            return None

    async def _write(self, job: Job) -> None:
        content = job.model_dump_json(indent=1).encode()
        await asyncio.to_thread(self._storage.publish, _name(job.video.id, "json"), content, True)

    def _write_image(self, job: Job, picture: Pixels) -> None:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        self._storage.publish(_name(job.video.id, "png"), file.getvalue(), True)

    def _read_image(self, video: str) -> Pixels | None:
        name = _name(video, "png")
        if not self._storage.exists(name):
            return None
        return np.array(Image.open(io.BytesIO(self._storage.read(name))).convert("RGB"))

    def _remove(self, video: str) -> None:
        for suffix in ("mp4", "png", "json"):
            self._storage.delete(_name(video, suffix))


def _name(video: str, suffix: str) -> str:
    return f"{FOLDER}/{video}.{suffix}"


async def _patiently(ahead: int) -> None:
    """A job waits for its place without telling anybody."""


def _read_size(size: str) -> tuple[int, int]:
    """Height and width of "WIDTHxHEIGHT"."""
    width, cross, height = size.partition("x")
    if not cross or not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise BadMessage("bad_order", f"size: must be WIDTHxHEIGHT in pixels, got {size!r:.40}")
    if not (16 <= int(width[:9]) <= 4096 and 16 <= int(height[:9]) <= 4096):
        raise BadMessage("bad_order", f"size: sides must lie in [16, 4096], got {size!r:.40}")
    return int(height), int(width)
