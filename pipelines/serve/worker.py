"""A worker of the pool: a student, a scheduler in a thread of its own, and the calls that reach it from outside.

A plain class with async methods; the pool makes an actor of it. Nothing that a worker holds is needed to go on after
it: snapshots are in the store, prompts and the next frame are with whoever takes the pictures.
"""

import asyncio
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from ...actors.admission import LIVE_RATE
from ...actors.generator import Student
from ...actors.orders import Piece, StreamOrder, Taken, TooSlow
from ...actors.scheduler import Scheduler
from ...actors.streams import Snapshot
from ...actors.timeline import Layout, Turn
from ...kernels.clips import Pixels
from .snapshots import Keeper, Snapshots, prompts_agree
from .state import Kept
from .terms import Moved, Moving, WorkerInfo, WorkerSettings

T = TypeVar("T")
LONGEST_WAIT: Final = 10.0  # seconds that one `take` may wait
CALLS: Final = 32  # threads, started when needed, for calls that end soon
WAITS: Final = 1024  # and for each `take` that waits
JANITOR_SECONDS: Final = 1.0
MEASURE_AGAIN: Final = 10.0  # seconds between two measurements of a worker that finds itself too slow for any stream
KEEP_RATE: Final = 100e6  # bytes per second of a stream's life that its snapshots may come to, unless told otherwise
KEEP_DISTANCE: Final = 4  # blocks between two snapshots that are small
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class _Here:
    """A stream of this worker. frame: the one last asked for; when: the last call came; turns: blocks and prompts."""

    frame: int
    when: float
    turns: list[tuple[int, str]]


@dataclass
class _Leaving:
    """A stream that was taken out of the scheduler: the pieces that are still to be handed out, and what comes then."""

    pieces: tuple[Piece, ...]
    then: Taken | Moving


def usual_distance(snapshot_bytes: int, block_seconds: float) -> int:
    """Blocks between two snapshots of a stream that plays in real time: a few, or as many as keep the store's writes at
    `KEEP_RATE`. Wan2.1's window at 832x480 is some gigabytes.
    """
    return max(KEEP_DISTANCE, math.ceil(snapshot_bytes / KEEP_RATE / block_seconds))


class StreamWorker:
    """All methods are for one event loop. `ready` must have been awaited before the others are called."""

    def __init__(self, worker: str, model: str, settings: WorkerSettings) -> None:
        self.id, self.model, self.settings = worker, model, settings
        self.state = Snapshots(settings.state) if settings.state else None
        self.draining = False
        self.broken = ""  # why the scheduler's thread ended
        self._info: WorkerInfo | None = None
        self._here: dict[str, _Here] = {}
        self._leaving: dict[str, _Leaving] = {}
        self._calls = ThreadPoolExecutor(CALLS, thread_name_prefix="call")
        self._waits = ThreadPoolExecutor(WAITS, thread_name_prefix="wait")
        self._loading = asyncio.Lock()
        self._janitor: asyncio.Task[None] | None = None

    # --- Its life --------------------------------------------------------------------------------------------------

    async def ready(self) -> WorkerInfo:
        """Load the student and measure its speed, once; ValueError or FileNotFoundError says what is wrong."""
        async with self._loading:
            if self._info is None:
                self._info = await self._call(self._load)
                self._janitor = asyncio.create_task(self._close_abandoned())
        return self._info

    async def drain(self) -> int:
        """Take no more streams and let go of those that are here; returns how many.

        Each is snapshot at its next block edge. Pieces made before that are handed out; after them, `take` answers
        "moved".
        """
        self.draining = True
        streams = [stream for stream in self._here if stream not in self._leaving]
        await asyncio.gather(*(self._release(stream) for stream in streams))
        return len(streams)

    async def stop(self) -> None:
        """End the threads; what was kept is in the store afterwards."""
        self.draining = True
        if self._janitor is not None:
            self._janitor.cancel()
            self._janitor = None
            await self._call(self._stop)
        self._calls.shutdown(wait=False)
        self._waits.shutdown(wait=False)

    async def stats(self) -> dict[str, Any]:
        """Figures for the pool and for metrics: `capacity` and `scheduler` are the scheduler's, `kept` the keeper's."""
        assert self._info is not None
        return {
            "worker": self.id,
            "pid": self._info.pid,
            "draining": self.draining,
            "broken": self.broken,
            "here": sorted(self._here),
            "leaving": len(self._leaving),
            "capacity": await self._call(self.scheduler.capacity),
            "scheduler": await self._call(self.scheduler.stats),
            "kept": self._keeper.stats() if self._keeper else {},
        }

    # --- Streams ---------------------------------------------------------------------------------------------------

    async def open(self, order: StreamOrder, turns: Sequence[Turn] = (), frame: int = 0) -> int:
        """Begin a stream, or go on with one so that frame `frame` is the next.

        Returns the index of the first frame that is computed (a snapshot's, or 0): a stream that redraws a video needs
        its source from there on. A stream that runs here, and has these prompts and the frame, goes on as it is. Moved
        where the worker takes none, Busy where it has no room, ValueError.
        """
        log = [(turn.block, turn.text) for turn in turns]
        if await self._is_here(order, log, frame):
            return frame
        self._check_admits()
        await self._check_room(order)
        snapshot = await self._call(self._newest, order, tuple(turns), frame) if frame else None
        self._check_admits()
        await self._call(lambda: self.scheduler.open(order, snapshot=snapshot, turns=turns, frame=frame))
        self._here[order.stream] = _Here(frame, time.monotonic(), log)
        if self.draining:  # it began meanwhile, and does not know of this stream
            await self.close(order.stream)
            self._check_admits()
        return 0 if snapshot is None else int(snapshot.info["frames_out"])

    async def take(self, stream: str, frame: int, wait: float = 0.0) -> Taken | Moving:
        """The pieces from frame `frame` on, waiting up to `wait` seconds for one; those before are acknowledged."""
        if stream not in self._here and self.draining:
            return Moving(reason=f"worker {self.id} is being drained")  # said before, and the answer was lost
        self._touch(stream)
        if stream not in self._leaving and not self.broken:
            taken = await self._take(stream, frame, min(wait, LONGEST_WAIT))
            if taken is not None and (taken.pieces or stream not in self._leaving) and not self.broken:
                return taken
        return self._last_of(stream, frame)

    async def prompt(self, stream: str, text: str, frame: int | None = None) -> Turn:
        """Switch the prompt from the next block edge on. Moved where the stream has left.

        frame: the first one that was taken and will not be shown.
        """
        turn = await self._control(stream, lambda: self.scheduler.prompt(stream, text, frame))
        if stream in self._here:
            log = self._here[stream].turns
            log[:] = [*(entry for entry in log if entry[0] != turn.block), (turn.block, text)]
        return turn

    async def pause(self, stream: str) -> None:
        await self._control(stream, lambda: self.scheduler.pause(stream))

    async def resume(self, stream: str) -> None:
        await self._control(stream, lambda: self.scheduler.resume(stream))

    async def feed(self, stream: str, frames: Pixels) -> None:
        """Source frames of a stream that redraws a video, uint8 [T, H, W, 3]."""
        await self._control(stream, lambda: self.scheduler.feed(stream, frames))

    async def hold(self, stream: str) -> None:
        """Say that the stream is still wanted, where nothing is taken for a while."""
        await self._control(stream, lambda: None)

    async def close(self, stream: str) -> None:
        """Free the stream; one that is gone already is no error."""
        gone = self._here.pop(stream, None) is None
        if self._leaving.pop(stream, None) is None and not gone:
            await self._call(self.scheduler.close_stream, stream)
        if self._keeper and not gone:
            self._keeper.drop(stream)

    # --- Loading and the scheduler's thread ------------------------------------------------------------------------

    def _load(self) -> WorkerInfo:
        settings = self.settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        dtype = None if settings.dtype is None else DTYPES[settings.dtype]
        self.student = Student.from_pretrained(
            Path(settings.path), settings.device, dtype=dtype, budget=settings.budget
        )
        self._layout = Layout.of(self.student.settings, self.student.vae.temporal_factor)
        self._keeper = None if self.state is None else Keeper(self.state, self._layout)
        size = settings.size or self.student.default_size
        snapshot_bytes = self._snapshot_bytes(*size)
        keep_every = settings.keep_every or usual_distance(snapshot_bytes, self._layout.size(1) / LIVE_RATE)
        self.scheduler = Scheduler(
            self.student,
            sessions=settings.sessions,
            ahead=settings.ahead,
            keep_every=keep_every,
            keep=self._keeper.put if self._keeper else None,
            load=settings.load,
            size=size,
        )
        self.scheduler.measure(*size, settings.batches)
        self._measured = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()
        return WorkerInfo(
            id=self.id,
            node=os.uname().nodename,
            pid=os.getpid(),
            model=self.model,
            device=str(self.student.device),
            fingerprint=self.student.fingerprint,
            capacity=self.scheduler.capacity(),
            size=size,
            block=self.student.settings.block,
            first_block=self.student.settings.size_of(0),
            temporal=self.student.vae.temporal_factor,
            keep_every=keep_every,
            snapshot_bytes=snapshot_bytes,
        )

    def _snapshot_bytes(self, height: int, width: int) -> int:
        """Of a stream whose window is full."""
        parts = self.student.bytes_per_stream(height, width)
        return parts.kv_cache + parts.vae_states + parts.history

    def _run(self) -> None:
        try:
            self.scheduler.run()
        except Exception as error:  # noqa: BLE001 -- whatever it is: the pool replaces the worker, its streams move
            traceback.print_exc()
            self.broken = f"{type(error).__name__}: {error}"

    def _stop(self) -> None:
        self.scheduler.stop()
        self._thread.join()
        if self._keeper:
            self._keeper.stop()

    async def _check_room(self, order: StreamOrder) -> None:
        """Busy where there is no room. A worker without streams that is too slow is measured once more: it may have
        been so for a while only, and would not learn of better times."""
        refusal = await self._call(self.scheduler.refusal, order)
        if isinstance(refusal, TooSlow) and not self._here and time.monotonic() - self._measured > MEASURE_AGAIN:
            self._measured = time.monotonic()
            await self._call(self.scheduler.measure_again)
            refusal = await self._call(self.scheduler.refusal, order)
        if refusal is not None:
            raise refusal

    def _newest(self, order: StreamOrder, turns: Sequence[Turn], frame: int) -> Snapshot | None:
        """The newest snapshot that a stream of this order, prompts and student would have made."""
        fingerprint = self.student.fingerprint

        def fits(kept: Kept) -> bool:
            return kept.info["student"] == fingerprint and prompts_agree(kept, order.prompt, turns, self._layout)

        return self.state.newest(order.stream, frame, fits) if self.state else None

    # --- Inside ----------------------------------------------------------------------------------------------------

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run what may block in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._calls, function, *arguments)

    async def _control(self, stream: str, call: Callable[[], T]) -> T:
        self._touch(stream)
        if stream in self._leaving or self.broken:
            raise Moved(f"stream {stream}: it has left worker {self.id}")
        return await self._call(call)

    async def _take(self, stream: str, frame: int, wait: float) -> Taken | None:
        """None where the stream left the scheduler meanwhile."""
        here, loop = self._here[stream], asyncio.get_running_loop()
        before, here.frame = here.frame, frame
        try:
            return await loop.run_in_executor(self._waits, self.scheduler.take, stream, frame, wait)
        except ValueError:
            if stream in self._leaving:
                return None
            here.frame = before
            raise

    def _last_of(self, stream: str, frame: int) -> Taken | Moving:
        """What is left of a stream that has left the scheduler."""
        if self.broken:
            return Moving(reason=f"worker {self.id} broke down")
        leaving = self._leaving[stream]
        pieces = tuple(piece for piece in leaving.pieces if piece.first + len(piece.frames) > frame)
        if pieces:
            return Taken(pieces, "running", "", 0)
        del self._leaving[stream], self._here[stream]
        return leaving.then

    async def _is_here(self, order: StreamOrder, turns: list[tuple[int, str]], frame: int) -> bool:
        """Whether a stream runs here and can give this frame; if it cannot, it is closed, to be opened anew.

        One that redraws a video is always opened anew: nobody else knows how far its source was used.
        """
        here = self._here.get(order.stream)
        if here is None:
            return False
        is_whole = order.stream not in self._leaving and not self.broken and order.redraw is None
        if is_whole and frame >= here.frame and turns == here.turns:
            self._touch(order.stream)
            return True
        await self.close(order.stream)
        return False

    async def _release(self, stream: str) -> None:
        """Take a stream out of the scheduler, at a block edge."""
        snapshot = await self._call(self._snapshot, stream)
        if stream not in self._here:  # closed meanwhile
            return
        try:
            taken = await self._call(self.scheduler.take, stream, self._here[stream].frame, 0.0)
        except ValueError:  # closed meanwhile
            return
        pieces, then = tuple(taken.pieces), replace(taken, pieces=())
        leaving = _Leaving(pieces, then)
        if taken.state == "running":
            leaving.then = Moving(reason=f"worker {self.id} is being drained")
            if snapshot is not None:  # what was made after it would be made again
                end = snapshot.info["frames_out"]
                leaving.pieces = tuple(piece for piece in pieces if piece.first < end)
        self._leaving[stream] = leaving
        await self._call(self.scheduler.close_stream, stream)

    def _snapshot(self, stream: str) -> Snapshot | None:
        """Snapshot a stream and store it; None where it has ended or failed."""
        try:
            snapshot = self.scheduler.snapshot(stream)
        except (ValueError, RuntimeError):  # the latter where the scheduler has broken down
            return None
        if self._keeper:
            self._keeper.drop(stream)
            self._keeper.write(stream, snapshot)
        return snapshot

    async def _close_abandoned(self) -> None:
        while True:
            await asyncio.sleep(min(JANITOR_SECONDS, self.settings.abandoned_seconds / 4))
            before = time.monotonic() - self.settings.abandoned_seconds
            for stream in [stream for stream, here in self._here.items() if here.when < before]:
                await self.close(stream)

    def _touch(self, stream: str) -> None:
        if stream not in self._here:
            raise ValueError(f"stream {stream}: not on worker {self.id}")
        self._here[stream].when = time.monotonic()

    def _check_admits(self) -> None:
        if self._info is None or self.draining or self.broken:
            raise Moved(f"worker {self.id} takes no streams")
