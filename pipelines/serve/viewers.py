"""Viewers of a server that keep count of what they see: steady, slow and vanishing ones, and one that sends garbage."""

import asyncio
import json
import random
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from .protocol import FRAGMENT, INIT, KEY_PREFIX, SUBPROTOCOL, VERSION, unpack

Kind = Literal["steady", "slow", "vanishing", "garbage"]
Record = dict[str, Any]

SLOWNESS: Final = 1.0  # seconds that a slow viewer takes to look at one message
ANSWER: Final = 10.0  # seconds within which garbage must be answered
FIRST_DELAY, LONGEST_DELAY = 0.25, 5.0  # seconds before a viewer comes back after its socket was lost
LARGEST_MESSAGE: Final = 64 << 20


@dataclass(frozen=True)
class Plan:
    """What all viewers do. switch_every: seconds between new prompts, 0 for none.

    start_buffer: seconds between the first frame and the beginning of playing.
    """

    url: str
    seconds: float
    prompts: tuple[str, ...]
    switch_every: float = 0.0
    media: str = "mp4"
    frame_rate: float = 16.0
    start_buffer: float = 0.25
    model: str | None = None
    key: str | None = None


def frames_in(fragment: bytes) -> int:
    """How many frames a fragment of MP4 has: the sample counts of its `trun` boxes (ISO/IEC 14496-12, 8.8.8)."""
    frames, places = 0, [(0, len(fragment))]
    while places:
        at, end = places.pop()
        while at + 8 <= end:
            size, kind = int.from_bytes(fragment[at : at + 4], "big"), fragment[at + 4 : at + 8]
            after = at + size if size >= 8 else end
            if kind in (b"moof", b"traf"):
                places.append((at + 8, after))
            if kind == b"trun":
                frames += int.from_bytes(fragment[at + 12 : at + 16], "big")
            at = after
    return frames


@dataclass
class Ledger:
    """What one viewer saw. Times are in seconds; moments are of the monotonic clock.

    next: index of the first frame that is missing. late: pieces that came after their presentation time; stalled: how
    long the playback stood still for them. switches: from each new prompt to its first frame. returns: from each loss
    of a socket to the next frame. waited: in the queue.
    """

    kind: Kind
    rate_wanted: float
    start_buffer: float
    state: Literal["waiting", "queued", "playing", "gone"] = "waiting"
    stream: str | None = None
    asked: float = 0.0
    first: float | None = None
    first_at: float | None = None
    last_at: float | None = None
    next: int = 0
    frames: int = 0
    pieces: int = 0
    late: int = 0
    stalled: float = 0.0
    chunks: int = 0
    late_chunks: int = 0
    lost: int = 0
    doubled: int = 0
    gaps: list[float] = field(default_factory=list)
    switches: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    waited: float | None = None
    refused: str | None = None
    failures: list[str] = field(default_factory=list)
    _shifted: float = 0.0
    _chunk_at: float | None = None
    _late_before: int = 0
    _left_at: float | None = None
    _prompt: tuple[float, str, int | None] | None = None  # when it was sent, what, from which frame on

    def rate(self, now: float | None = None) -> float:
        """Frames per second since the first frame, until now or the last frame."""
        end = self.last_at if now is None else now
        if self.first_at is None or end is None or end <= self.first_at:
            return 0.0
        return self.frames / (end - self.first_at)

    def media(self, first: int, frames: int, now: float) -> None:
        """A piece has come."""
        if self.first_at is None:
            self.first_at, self.first = now, now - self.asked
        if self._left_at is not None:
            self.returns.append(now - self._left_at)
            self._left_at = None
            if self.kind == "vanishing":
                self._shift_clock(now)  # its own absence is not the server's lateness
        self._count_gaps(first, frames)
        self._time(now)
        self.frames += frames
        self.next = max(self.next, first + frames)
        self.last_at = now
        self._count_switch(first, now)

    def _count_gaps(self, first: int, frames: int) -> None:
        self.lost += max(0, first - self.next)
        self.doubled += min(frames, max(0, self.next - first))

    def _time(self, now: float) -> None:
        over = self._shift_clock(now)
        self.pieces += 1
        self.late += over > 0
        self.stalled += over

    def _shift_clock(self, now: float) -> float:
        """How long past its presentation time a piece comes; the clock waits for it, so the next ones are not late."""
        assert self.first_at is not None
        due = self.first_at + self.start_buffer + self._shifted + self.frames / self.rate_wanted
        over = max(0.0, now - due)
        self._shifted += over
        return over

    def _count_switch(self, first: int, now: float) -> None:
        if self._prompt and self._prompt[2] is not None and first >= self._prompt[2]:
            self.switches.append(now - self._prompt[0])
            self._prompt = None

    def chunk(self, now: float) -> None:
        """A chunk is whole. It was late if one of its pieces was."""
        if self._chunk_at is not None:
            self.gaps.append(now - self._chunk_at)
        self._chunk_at = now
        self.chunks += 1
        self.late_chunks += self.late > self._late_before
        self._late_before = self.late

    def asks_prompt(self, text: str, now: float) -> None:
        """One at a time is measured: what was asked before its forerunner was seen is not."""
        self._prompt = (now, text, None)

    def prompt(self, text: str, frame: int, flushed: int) -> None:
        """Frames up to `frame` were dropped by the server; more than it says are lost."""
        if frame > self.next:
            self.lost += max(0, frame - self.next - flushed)
            self.next = frame
        if self._prompt and self._prompt[1] == text:
            self._prompt = (*self._prompt[:2], frame)

    def left(self, now: float) -> None:
        """The socket is gone."""
        self._chunk_at = None
        if self.first_at is not None:
            self._left_at = now if self._left_at is None else self._left_at


class Viewer:
    """One stream over as many sockets as it takes. `run` ends when the plan's seconds are over, or without a place."""

    def __init__(self, plan: Plan, kind: Kind, dice: random.Random, delay: float = 0.0) -> None:
        self._plan, self._dice, self._delay = plan, dice, delay
        self.ledger = Ledger(kind, plan.frame_rate, plan.start_buffer)
        self._over = False
        self._end = 0.0
        self._vanish_at = float("inf")
        self._tries = 0

    async def run(self) -> None:
        self._end = time.monotonic() + self._plan.seconds
        await asyncio.sleep(self._delay)
        self.ledger.asked = time.monotonic()
        while not self._over and time.monotonic() < self._end:
            try:
                async with asyncio.timeout_at(self._loop_time(self._end + 5)), _connect(self._plan) as socket:
                    await self._session(socket)
            except (ConnectionClosed, TimeoutError):
                self.ledger.left(time.monotonic())
            except (OSError, WebSocketException) as error:
                self._note_unreachable(error)
            if not self._over:
                await self._wait()
        self.ledger.state = "gone"

    def _loop_time(self, moment: float) -> float:
        return asyncio.get_running_loop().time() + moment - time.monotonic()

    def _note_unreachable(self, error: Exception) -> None:
        if isinstance(error, InvalidStatus):
            reason = f"the server answers {error.response.status_code}"
        else:
            reason = f"cannot be reached: {error}"
        self.ledger.failures.append(reason)
        self._over = self.ledger.stream is None  # never seen: it is no use
        self.ledger.left(time.monotonic())

    async def _wait(self) -> None:
        self._tries += 1
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (self._tries - 1)) * self._dice.uniform(0.8, 1.2)
        await asyncio.sleep(min(delay, max(0.0, self._end - time.monotonic())))

    async def _session(self, socket: ClientConnection) -> None:
        with suppress(ConnectionClosed):  # by a refusal that has come already, and is read below
            await socket.send(json.dumps(self._first_message()))
        switching = asyncio.ensure_future(self._switch(socket))
        try:
            while not self._over:
                await self._receive(socket)
        finally:
            switching.cancel()

    async def _receive(self, socket: ClientConnection) -> None:
        """The next message, or what is due at this moment: to vanish, or to say goodbye."""
        left = min(self._end, self._vanish_at) - time.monotonic()
        if left <= 0:  # even where messages wait
            await self._leave(socket)
            return
        try:
            async with asyncio.timeout(left):
                message = await socket.recv()
        except TimeoutError:
            return
        if isinstance(message, bytes):
            self._media(message)
        else:
            await self._record(socket, json.loads(message))
        if self.ledger.kind == "slow":
            await asyncio.sleep(min(SLOWNESS, max(0.0, self._end - time.monotonic())))

    async def _leave(self, socket: ClientConnection) -> None:
        if self.ledger.kind == "vanishing":
            self._vanish_at = float("inf")
            self._over = time.monotonic() >= self._end
            socket.transport.abort()
            await socket.wait_closed()
            return
        self._over = True
        await socket.send(json.dumps({"type": "stop"}))
        await socket.close()

    def _first_message(self) -> Record:
        if self.ledger.stream is not None:
            place = {"stream": self.ledger.stream, "frame": self.ledger.next, "media": self._plan.media}
            return {"type": "reconnect", "version": VERSION, **place}
        order: Record = {"type": "start", "version": VERSION, "prompt": self._dice.choice(self._plan.prompts)}
        order |= {"seed": self._dice.randrange(2**31), "media": self._plan.media, "frame_rate": self._plan.frame_rate}
        return order | ({"model": self._plan.model} if self._plan.model else {})

    async def _switch(self, socket: ClientConnection) -> None:
        """New prompts at times around the plan's, while the stream plays."""
        while self._plan.switch_every:
            await asyncio.sleep(self._plan.switch_every * self._dice.uniform(0.75, 1.25))
            if self.ledger.state == "playing":
                text = self._dice.choice(self._plan.prompts)
                self.ledger.asks_prompt(text, time.monotonic())
                await socket.send(json.dumps({"type": "prompt", "text": text}))

    def _media(self, message: bytes) -> None:
        kind, first, payload = unpack(message)
        if kind != INIT:
            self.ledger.media(first, frames_in(payload) if kind == FRAGMENT else 1, time.monotonic())

    async def _record(self, socket: ClientConnection, record: Record) -> None:
        ledger, now = self.ledger, time.monotonic()
        match record["type"]:
            case "ready":
                self._ready(record, now)
            case "queued":
                ledger.state, ledger.waited = "queued", now - ledger.asked
            case "chunk":
                ledger.chunk(now)
                await socket.send(json.dumps({"type": "seen", "frame": ledger.next}))
            case "prompt":
                ledger.prompt(record["text"], record["frame"], record["flushed"])
            case "busy":
                ledger.refused = record["reason"]
                self._over = ledger.stream is None
            case "error":
                ledger.failures.append(f"{record['code']}: {record['message']}")
                self._over = not record["recoverable"] and record["code"] != "failed"
            case "end":
                self._over = True

    def _ready(self, record: Record, now: float) -> None:
        ledger = self.ledger
        if ledger.state == "queued":
            ledger.waited = now - ledger.asked
            ledger.asked = now if ledger.stream is None else ledger.asked  # first frames are timed from the place on
        ledger.state, ledger.stream = "playing", record["stream"]
        self._tries = 0
        if ledger.kind == "vanishing":
            self._vanish_at = now + self._dice.uniform(0.1, 0.4) * self._plan.seconds


class Troll:
    """Opens sockets and sends what no server wants; each has to be answered with an error or a close."""

    def __init__(self, plan: Plan, dice: random.Random, delay: float = 0.0) -> None:
        self._plan, self._dice, self._delay = plan, dice, delay
        self.sent = self.answered = 0
        self.unanswered: list[str] = []

    async def run(self) -> None:
        end = time.monotonic() + self._plan.seconds
        await asyncio.sleep(self._delay)
        while time.monotonic() < end:
            name, message = self._garbage()
            self.sent += 1
            if await self._is_answered(message):
                self.answered += 1
            else:
                self.unanswered.append(name)
            await asyncio.sleep(self._dice.uniform(0.2, 1.0))

    async def _is_answered(self, message: str | bytes) -> bool:
        """Whether an `error`, a close or a refusal of the socket comes in time."""
        try:
            async with asyncio.timeout(ANSWER), _connect(self._plan) as socket:
                await socket.send(message)
                while True:
                    answer = await socket.recv()
                    if isinstance(answer, str) and json.loads(answer)["type"] in ("error", "busy"):
                        return True
        except TimeoutError:
            return False
        except (ConnectionClosed, InvalidStatus):
            return True
        except (OSError, WebSocketException):
            return False

    def _garbage(self) -> tuple[str, str | bytes]:
        dice = self._dice
        start: Record = {"type": "start", "version": VERSION, "prompt": "a red circle on black"}
        guess = "".join(dice.choices("abcdefghijkmnpqrstuvwxyz23456789", k=22))
        kinds: dict[str, str | bytes] = {
            "noise": dice.randbytes(dice.randrange(1, 5000)),
            "no JSON": "{" * dice.randrange(1, 2000),
            "no object": json.dumps([1, 2, 3]),
            "no type": json.dumps({"prompt": "a red circle"}),
            "another version": json.dumps(start | {"version": 99}),
            "another type of field": json.dumps(start | {"seed": "seven"}),
            "a field too many": json.dumps(start | {"colour": "red"}),
            "a broken image": json.dumps(start | {"image": "bm90IGFuIGltYWdl"}),
            "another's stream": json.dumps({"type": "reconnect", "version": VERSION, "stream": guess, "frame": 0}),
            "a later message first": json.dumps({"type": "prompt", "text": "a red circle"}),
        }
        name = dice.choice(sorted(kinds))
        return name, kinds[name]


def _connect(plan: Plan) -> connect:
    names = [SUBPROTOCOL, *([KEY_PREFIX + plan.key] if plan.key else [])]
    return connect(
        plan.url,
        subprotocols=names,  # type: ignore[arg-type]  # a NewType of str
        compression=None,
        proxy=None,
        open_timeout=20,
        close_timeout=5,
        max_size=LARGEST_MESSAGE,
        max_queue=4,  # what is not looked at stays with the server
    )
