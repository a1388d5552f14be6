"""One live stream and its viewer: what the worker makes goes out at the pace of the playback, what comes in is obeyed.

Two tasks: one listens to the socket, the other alone talks to the worker. A viewer that does not keep up makes its own
stream stand still. When the worker is lost or let go, the stream goes on on another one.

Waits are bounded by `asyncio.timeout`, here and in all of the server: Python 3.11's `asyncio.wait_for` loses a
cancellation that comes together with what it waits for, and a session whose tasks do not end never frees its stream.
"""

import asyncio
import time
import traceback
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

from ...actors.orders import Piece
from .backend import Gone
from .media import Encoder, encoder
from .orders import RECORD_CHUNKS, Opened, Services, describe
from .pace import ChunkLog, Pace, PromptLog, Unseen
from .protocol import (
    BROKEN,
    GOING_AWAY,
    NORMAL,
    BadMessage,
    Due,
    End,
    Error,
    Message,
    Moved,
    Pause,
    Paused,
    Prompt,
    Queued,
    Ready,
    Reconnect,
    Resume,
    Resumed,
    Seen,
    Start,
    read_later,
)
from .source import Camera, SourceLost
from .wire import Over, Socket

T = TypeVar("T")
WAIT: Final = 2.0  # seconds that one call waits for pictures
SOURCE_WAIT: Final = 0.05  # the same where the worker waits for source frames
HOLD: Final = 15.0  # seconds between two calls for a stream that stands still
REFUSALS: Final = 100  # messages that are not obeyed, before the socket is closed
GOING_ON: Final = {"prompt_too_long", "too_many_prompts", "too_many_frames", "not_now"}  # codes that end nothing
LEAVE_SECONDS: Final = 10.0
_live: Final[dict[str, "LiveSession"]] = {}  # this gateway's, by stream


async def take_over(stream: str) -> None:
    """End the session that has the stream now: its socket is dead, and nobody has noticed."""
    old = _live.get(stream)
    if old is not None:
        old.give_up("the stream goes on on another socket", NORMAL, "replaced")
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await old.left.wait()


async def go_away() -> None:
    """Close all sockets of this gateway, so that their viewers reconnect to another one."""
    sessions = list(_live.values())
    for session in sessions:
        session.give_up("the server goes away; reconnect", GOING_AWAY, "going away")
    with suppress(TimeoutError):
        async with asyncio.timeout(LEAVE_SECONDS):
            await asyncio.gather(*(session.left.wait() for session in sessions))


class LiveSession:
    """Made for one socket; `run` is its whole life."""

    def __init__(
        self, services: Services, socket: Socket, opened: Opened, first: Start | Reconnect, came: float
    ) -> None:
        """first: the message that the socket began with; came: when that was."""
        self._services, self._socket, self._opened, self._came = services, socket, opened, came
        self._media, self._quality = first.media, first.quality
        self._stream, self._source = opened.stream, opened.source
        self._metrics, self._config = services.metrics, services.config
        self._first = self._stream.next
        self._buffer: deque[Piece] = deque()
        self._changed = asyncio.Event()
        self._paused = self._greeted = self._is_slow = False
        self._given_up: Over | None = None
        self._unseen = Unseen(0.0)
        self._asked = -1  # the frame from which the worker was last asked for pictures
        self._still_since: float | None = None
        self._held_at = 0.0  # when the worker last heard that the stream is wanted, while it stands still
        missed = [turn for turn in self._stream.turns if turn.frame > self._first]
        self._prompts = PromptLog(services.limits.prompts(), missed, came)
        self._refusals = 0
        self._fed = 0
        self._due_said = -1
        self._chunk: ChunkLog | None = None
        self._chunks = 0
        self._encoder: Encoder | None = None
        self._ended = ""
        self.left = asyncio.Event()

    async def run(self) -> None:
        """Raises what ended it."""
        _live[self._opened.record.stream] = self
        self._metrics.sessions.inc()
        tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._play())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Over as over:
            self._ended = over.record.reason if over.ended and isinstance(over.record, End) else ""
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.shield(self._leave())

    def give_up(self, reason: str, code: int, how: str) -> None:
        """Close the socket; the stream may go on on another one."""
        self._given_up = Over(End(reason=reason, frames=self._stream.next), code, how=how)
        self._changed.set()

    # --- Listening -------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            content = await self._socket.receive()
            try:
                await self._hear(content)
            except BadMessage as error:
                self._refusals += error.code != "too_many_frames"  # a camera knows no better
                if error.code not in GOING_ON or self._refusals > REFUSALS:
                    raise
                await self._socket.refuse(error, recoverable=True)

    async def _hear(self, content: str | bytes) -> None:
        if isinstance(content, bytes):
            if not isinstance(self._source, Camera):
                raise BadMessage("bad_message", "message: binary ones are source frames, which this stream has not")
            self._source.add(content)
            self._changed.set()
            return
        message = read_later(content)
        match message:
            case Prompt():
                self._services.limits.check_prompt(message.text)
                self._prompts.want(message.text, time.monotonic())
            case Pause():
                await self._pause(True, Paused())
            case Resume():
                await self._pause(False, Resumed())
            case Seen():
                self._unseen.note(message.frame)
            case _:
                raise self._end("stopped by the viewer", "stopped")
        self._changed.set()

    async def _pause(self, wanted: bool, answer: Message) -> None:
        if self._paused == wanted:
            raise BadMessage(
                "not_now", f"{'pause' if wanted else 'resume'}: the stream is {'' if wanted else 'not '}paused"
            )
        self._paused = wanted
        await self._socket.send(answer)

    # --- Playing ---------------------------------------------------------------------------------------------------

    async def _play(self) -> None:
        await self._prepare()
        while True:
            try:
                await self._step()
            except Gone as gone:
                await self._move(gone)

    async def _prepare(self) -> None:
        """Place the stream, record it, and greet."""
        stream, opened = self._stream, self._opened
        await self._place()
        rate = stream.order.frame_rate
        assert rate is not None
        # No farther than snapshots reach back; and so far that a viewer may say `seen` once per chunk.
        reach = stream.info.keep_every * stream.frames_per_chunk
        wanted = min(self._config.limits.unseen_seconds * rate, reach)
        self._unseen.most = max(2 * stream.frames_per_chunk, wanted)
        self._pace = Pace(rate, self._config.lead_seconds)
        height, width = stream.size
        self._encoder = await asyncio.to_thread(encoder, self._media, height, width, rate, self._quality)
        await asyncio.to_thread(self._services.state.write_session, opened.record, opened.image, opened.video)
        opened.image = opened.video = None
        await self._socket.send(
            Ready(
                stream=opened.record.stream,
                model=stream.model,
                width=width,
                height=height,
                frame_rate=rate,
                media=self._media,
                mime=self._encoder.mime,
                frames_per_chunk=stream.frames_per_chunk,
                first=self._first,
                seen_within=self._unseen.most / rate,
            )
        )
        for part in self._encoder.begin(self._first):
            await self._socket.send_media(part)

    async def _step(self) -> None:
        """One piece, or whatever has to be done before it."""
        await self._obey()
        self._check_time()
        if self._stands_still:
            await self._stand_still()
            return
        if self._still_since is not None:
            await self._go_on()
        at_edge = self._chunk is None or not self._buffer or self._buffer[0].chunk != self._chunk.index
        if not self._buffer or (at_edge and self._asked != self._stream.next):
            await self._fetch()  # at a chunk's end too: the worker may then make another one
        if not self._buffer:
            return
        delay = self._pace.delay(time.monotonic())
        if delay > 0:
            await self._change(delay)
        elif not self._changed.is_set():
            await self._show(self._buffer.popleft())

    @property
    def _stands_still(self) -> bool:
        return self._paused or self._unseen.is_too_much

    async def _change(self, seconds: float) -> None:
        """Wait until something was heard, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def _attentively(self, work: Coroutine[Any, Any, T]) -> T:
        """The work's result; what is heard meanwhile is obeyed."""
        task = asyncio.ensure_future(work)
        change = asyncio.ensure_future(self._changed.wait())
        try:
            while not task.done():
                await asyncio.wait({task, change}, return_when=asyncio.FIRST_COMPLETED)
                await self._obey()
                if change.done():
                    change = asyncio.ensure_future(self._changed.wait())
            return task.result()
        finally:
            task.cancel()
            change.cancel()

    async def _obey(self) -> None:
        """Pass on what the viewer wants."""
        self._changed.clear()
        if self._given_up is not None:
            raise self._given_up
        while self._prompts.wanted is not None:
            wanted = self._prompts.wanted
            before = self._stream.next
            try:
                turn = await self._stream.prompt(wanted.text)
            except ValueError:  # the stream has just ended: the next pictures that are asked for say why
                self._prompts.wanted = None
                return
            self._prompts.took(wanted, turn, before)
            self._metrics.flushed.inc(max(0, turn.frame - before))
            self._buffer = deque(self._stream.fresh(self._buffer))
            self._chunk = None
            await self._record()

    async def _fetch(self) -> None:
        """Get what is there; waits for it only where nothing is left to show."""
        self._asked = self._stream.next
        wait = 0.0 if self._buffer else SOURCE_WAIT if self._source else WAIT
        taken = await self._attentively(self._stream.take(wait))
        self._buffer = deque(self._stream.fresh(taken.pieces))
        if taken.due and self._source is not None:
            await self._feed(taken.due)
        if self._buffer or taken.state == "running":
            return
        if taken.state == "failed":
            raise Over(Error(code="failed", message="the stream failed on its worker"), BROKEN, how="failed")
        raise self._end(taken.reason, "ended")

    async def _show(self, piece: Piece) -> None:
        """Send a piece's media, and the records that go with it."""
        assert self._encoder is not None
        first = max(piece.first, self._stream.next)
        frames = piece.frames[first - piece.first :][: self._room()]
        assert len(frames), "pieces that the viewer has, or that a prompt made void, were dropped before"
        key = False
        if self._chunk is None or self._chunk.index != piece.chunk:
            self._chunk, key = ChunkLog(piece, first), True
        parts = await asyncio.to_thread(self._encoder.encode, frames, first, key)
        await self._tell_prompt(piece, first)
        sent = sum([await self._socket.send_media(part) for part in parts])
        self._note_sent(first, len(frames), sent)
        ends = self._room() == 0
        if piece.ends_chunk or ends:
            await self._end_chunk(piece)
        if ends:
            raise self._end("all seconds that were ordered have been made", "ended")

    def _room(self) -> int | None:
        """How many frames the stream may still show. Those that were dropped do not count."""
        if self._opened.frames is None:
            return None
        flushed = sum(turn.flushed for turn in self._stream.turns)
        return self._opened.frames - (self._stream.next - flushed)

    def _note_sent(self, first: int, frames: int, size: int) -> None:
        now = time.monotonic()
        if not self._greeted:
            self._greeted = True
            self._metrics.first_frame.observe(now - self._came)
        if self._pace.sent(frames, now) > 0:
            self._metrics.underruns.inc()
        self._metrics.frames.inc(frames)
        self._stream.next = first + frames
        self._unseen.sent(first, frames)
        assert self._chunk is not None
        self._chunk.add(frames, size)

    async def _tell_prompt(self, piece: Piece, first: int) -> None:
        shown = self._prompts.shown(first, piece.chunk, time.monotonic())
        if shown is not None:
            self._metrics.changed_frame.observe(shown.seconds)
            await self._socket.send(shown)

    async def _end_chunk(self, piece: Piece) -> None:
        assert self._chunk is not None
        await self._socket.send(self._chunk.record(piece))
        self._metrics.note_chunk(late=self._chunk.late > 0)
        gap = self._pace.gap(time.monotonic())
        if gap is not None:
            self._metrics.note_gap(gap)
        self._chunks += 1
        if self._chunks % RECORD_CHUNKS == 0:
            await self._record()

    # --- Source frames ---------------------------------------------------------------------------------------------

    async def _feed(self, due: int) -> None:
        """Give the worker the frames that it waits for, or ask the viewer for them."""
        assert self._source is not None
        height, width = self._stream.size
        try:
            frames = await asyncio.to_thread(self._source.read, self._fed, due, height, width)
        except SourceLost as error:
            raise Over(Error(code="failed", message=str(error)), BROKEN, how="failed") from None
        if frames is not None:
            await self._stream.call("feed", frames)
            self._fed += due
            self._source_came = time.monotonic()
        elif self._source.ended:
            if self._stream.next >= self._fed:
                raise self._end("the source video has ended", "ended")
            if not self._buffer:
                await self._change(SOURCE_WAIT)
        else:
            await self._ask_for_source(due)

    async def _ask_for_source(self, due: int) -> None:
        if self._due_said != self._fed:
            self._due_said = self._fed
            await self._socket.send(Due(frames=due, first=self._fed))
        if not self._buffer:
            await self._change(SOURCE_WAIT)
        if time.monotonic() - self._source_came > self._config.limits.idle_seconds:
            raise self._end(f"idle: no source frame for {self._config.limits.idle_seconds:g} s", "idle")

    # --- Standing still --------------------------------------------------------------------------------------------

    async def _stand_still(self) -> None:
        """The viewer has paused, or does not keep up: no frame is made until that ends."""
        now = time.monotonic()
        if self._still_since is None:
            self._still_since = now
            self._held_at = 0.0
            self._pace.stop(now)
            if not self._paused:
                self._metrics.slow.inc()
                self._is_slow = True
        if not self._held_at:
            await self._stream.call("pause")
            self._held_at = now
        elif now - self._held_at >= HOLD:
            await self._stream.call("hold")
            self._held_at = now
        limit = self._config.limits.idle_seconds
        if now - self._still_since > limit:
            why = "paused" if self._paused else "nothing was seen"
            raise self._end(f"idle: {why} for {limit:g} s", "idle")
        left = self._config.limits.session_seconds - (time.time() - self._opened.record.begun)
        await self._change(max(0.0, min(HOLD, left, limit - (now - self._still_since))) + 0.01)

    async def _go_on(self) -> None:
        await self._stream.call("resume")
        self._still_since = None
        self._pace.go_on(time.monotonic())
        if self._is_slow:
            self._is_slow = False
            self._metrics.slow.dec()

    def _check_time(self) -> None:
        limit = self._config.limits.session_seconds
        if time.time() - self._opened.record.begun > limit:
            raise self._end(f"over-long: a stream may run for {limit:g} s", "over-long")

    def _end(self, reason: str, how: str) -> Over:
        return Over(End(reason=reason, frames=self._stream.next), how=how, ended=True)

    # --- Places ----------------------------------------------------------------------------------------------------

    async def _place(self) -> None:
        said = -1

        async def waiting(ahead: int) -> None:
            nonlocal said
            if said == -1:
                self._metrics.queued.inc()
            if ahead != said:
                said = ahead
                await self._socket.send(Queued(position=ahead + 1))

        try:
            await self._stream.place(waiting)
        finally:
            if said != -1:
                self._metrics.queued.dec()
        self._fed, self._due_said, self._source_came = self._stream.begins, -1, time.monotonic()
        if self._opened.resumed and isinstance(self._source, Camera) and not self._greeted:
            self._source = Camera(self._fed)

    async def _move(self, gone: Gone) -> None:
        """Go on on another worker, at the next frame that the viewer does not have."""
        began = time.monotonic()
        self._buffer.clear()
        self._held_at = 0.0  # it is not paused there
        await self._place()
        seconds = time.monotonic() - began
        self._metrics.moved.inc()
        self._metrics.standstill.observe(seconds)
        await self._socket.send(Moved(reason=str(gone), seconds=seconds))

    async def _record(self) -> None:
        record = describe(self._opened.record, self._stream)
        await asyncio.to_thread(self._services.state.write_session, record)

    async def _leave(self) -> None:
        """Free the place. What may go on is kept for a while; what has ended is forgotten."""
        self._metrics.sessions.dec()
        if self._is_slow:
            self._metrics.slow.dec()
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                if self._source is not None:
                    self._source.close()
                await self._stream.free()
                if self._encoder is not None:
                    await self._keep_or_forget()
        except (OSError, TimeoutError):
            traceback.print_exc()
        finally:  # until now `take_over` waits: who comes back would else be freed with this session
            if _live.get(self._opened.record.stream) is self:
                del _live[self._opened.record.stream]
            self.left.set()

    async def _keep_or_forget(self) -> None:
        if not self._ended:
            await self._record()
            return
        state, stream = self._services.state, self._opened.record.stream
        record = describe(self._opened.record, self._stream, ended=time.time(), reason=self._ended)
        await asyncio.to_thread(state.forget, stream)
        await asyncio.to_thread(state.write_session, record)
