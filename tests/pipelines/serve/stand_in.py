"""A server that speaks the protocol with pictures of the sprites world, and has queues, faults and keys on order."""

import asyncio
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import WSMsgType, web

from reelway.kernels.sprites.captions import parse
from reelway.kernels.sprites.render import render
from reelway.pipelines.serve import protocol
from reelway.pipelines.serve.media import encoder

PAGE = Path(protocol.__file__).parent / "page"
SIDE = 64
PATIENCE = 100.0  # seconds; the machine may be busy
PIECES = (1, 4, 4)  # frames of the pieces of the first chunk; later ones have 4, 4, 4


@dataclass
class Stream:
    """What the server knows of a stream for as long as it lives."""

    name: str
    order: protocol.Start
    turns: list[tuple[int, str]] = field(default_factory=list)  # from which frame on which prompt


@dataclass
class StandIn:
    """Speaks the protocol with pictures of the sprites world, and errs where it is told to.

    making: seconds per chunk. lead: seconds of media ahead of the playback. flush: frames dropped at a new prompt.
    queue: positions told before a start. loses, doubles: the piece with this number is left out, or sent twice.
    full: everybody is told so. fails: every socket is, from now on. key: the one that is known.
    """

    making: float = 0.05
    lead: float = 1.0
    flush: int = 0
    queue: tuple[int, ...] = ()
    full: bool = False
    fails: bool = False
    loses: int | None = None
    doubles: int | None = None
    key: str | None = None
    streams: dict[str, Stream] = field(default_factory=dict)
    sockets: set[web.WebSocketResponse] = field(default_factory=set)
    heard: list[str] = field(default_factory=list)
    first_messages: list[object] = field(default_factory=list)
    source_due: int = 0
    source_frames: int = 0
    url: str = ""

    def __enter__(self) -> "StandIn":
        """Listen in a thread of its own."""
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self._begin(), self.loop).result(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self.loop).result(PATIENCE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        self.loop.close()

    async def __aenter__(self) -> "StandIn":
        """Listen in the loop that runs."""
        await self._begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def _begin(self) -> None:
        self.runner, port = await self._listen()
        self.url = f"http://127.0.0.1:{port}"

    async def _end(self) -> None:
        self._cut()
        await self.runner.cleanup()

    async def _listen(self) -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.router.add_get("/", self._page)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/status", self._status)
        app.router.add_get("/v1/stream", self._socket)
        app.router.add_static("/", PAGE)
        runner = web.AppRunner(app, shutdown_timeout=0.5)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, runner.addresses[0][1]

    def cut_sockets(self) -> None:
        """Every socket is gone, without a word; no test that ends may leave one."""
        self.loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        for socket in list(self.sockets):
            transport = socket._req.transport
            if transport is not None:
                transport.abort()

    def _allows(self, request: web.Request) -> bool:
        offered = request.headers.get("Sec-WebSocket-Protocol", "")
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.key is None or self.key == given or f"{protocol.KEY_PREFIX}{self.key}" in offered.split(", ")

    async def _page(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(PAGE / "index.html")

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"data": [{"id": "tiny-student", "width": SIDE, "height": SIDE}]},
            status=200 if self._allows(request) else 401,
        )

    async def _status(self, request: web.Request) -> web.Response:
        workers = [{"state": "ready", "load": 0.21 * len(self.sockets)} for _ in range(2)]
        status = {"tiny-student": {"workers": workers, "streams": len(self.sockets), "waiting": 0}}
        return web.json_response(status, status=200 if self._allows(request) else 401)

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=(protocol.SUBPROTOCOL,), max_msg_size=64 << 20)
        await socket.prepare(request)
        self.sockets.add(socket)
        try:
            with suppress(ConnectionError, TypeError):
                await self._serve(socket, self._allows(request))
        finally:
            self.sockets.discard(socket)
        return socket

    async def _serve(self, socket: web.WebSocketResponse, allowed: bool) -> None:
        try:
            if not allowed:
                raise protocol.BadMessage("wrong_key", "no such key")
            first = protocol.read_first(await socket.receive_str())
            self.first_messages.append(first)
            stream, frame = self._found(first)
        except protocol.BadMessage as error:
            await self._say(socket, protocol.Error(code=error.code, message=str(error)))
            await socket.close(code=protocol.REFUSED)
            return
        if self.full:
            await self._say(socket, protocol.Busy(reason="2 of 2 sessions are taken"))
            await socket.close(code=protocol.TRY_AGAIN)
            return
        if self.fails:
            await self._say(socket, protocol.Error(code="failed", message="the server failed"))
            await socket.close(code=protocol.BROKEN)
            return
        for position in self.queue:
            await self._say(socket, protocol.Queued(position=position))
            await asyncio.sleep(0.4)
        await Player(self, socket, stream, frame).run()

    def _found(self, first: protocol.Start | protocol.Reconnect) -> tuple[Stream, int]:
        if isinstance(first, protocol.Reconnect):
            if first.stream not in self.streams:
                raise protocol.BadMessage("unknown_stream", f"no stream {first.stream}")
            return self.streams[first.stream], first.frame
        stream = Stream(f"stream-{len(self.streams)}", first, [(0, first.prompt)])
        self.streams[stream.name] = stream
        return stream, 0

    async def _say(self, socket: web.WebSocketResponse, message: protocol.Message) -> None:
        await socket.send_str(message.model_dump_json())


class Player:
    """One socket's stream."""

    def __init__(self, server: StandIn, socket: web.WebSocketResponse, stream: Stream, frame: int) -> None:
        self.server, self.socket, self.stream, self.frame = server, socket, stream, frame
        order = stream.order
        self.encoder = encoder(order.media, SIDE, SIDE, order.frame_rate, order.quality)
        self.paused = self.stopped = False
        self.asked: str | None = None
        self.seen, self.pieces, self.sent = frame, 0, 0
        self.source = 0

    async def run(self) -> None:
        order = self.stream.order
        ready = protocol.Ready(
            stream=self.stream.name, model="tiny-student", width=SIDE, height=SIDE, frame_rate=order.frame_rate,
            media=order.media, mime=self.encoder.mime, frames_per_chunk=12, first=self.frame, seen_within=4.0,
        )  # fmt: skip
        await self.say(ready)
        for part in self.encoder.begin(self.frame):
            await self.socket.send_bytes(protocol.pack(part.kind, part.first, part.payload))
        listening = asyncio.ensure_future(self.listen())
        try:
            await self.play()
        finally:
            listening.cancel()
        await self.say(protocol.End(reason="stopped", frames=self.frame))
        await self.socket.close()

    async def say(self, message: protocol.Message) -> None:
        await self.server._say(self.socket, message)

    async def listen(self) -> None:
        async for message in self.socket:
            if message.type == WSMsgType.BINARY:
                self.server.source_frames += 1
                self.source += 1
            elif message.type == WSMsgType.TEXT:
                await self.obey(protocol.read_later(message.data))
        self.stopped = True

    async def obey(self, message: object) -> None:
        self.server.heard.append(type(message).__name__.lower())
        if isinstance(message, protocol.Prompt):
            self.asked = message.text
        elif isinstance(message, protocol.Seen):
            self.seen = message.frame
        elif isinstance(message, protocol.Stop):
            self.stopped = True
        else:
            self.paused = isinstance(message, protocol.Pause)
            await self.say(protocol.Paused() if self.paused else protocol.Resumed())

    async def play(self) -> None:
        began = time.monotonic()
        if self.stream.order.seconds:
            asyncio.get_running_loop().call_later(self.stream.order.seconds, setattr, self, "stopped", True)
        while not self.stopped:
            await asyncio.sleep(self.server.making)
            rate = self.stream.order.frame_rate
            ahead = self.sent / rate - (time.monotonic() - began)
            if self.paused or ahead > self.server.lead or self.frame - self.seen > 4 * rate:
                await asyncio.sleep(0.02)
                began += 0.02 + self.server.making if self.paused else 0
                continue
            if self.stream.order.source:
                await self.await_source()
            if self.asked is not None:
                await self.turn()
            await self.chunk()

    async def await_source(self) -> None:
        self.server.source_due += 12
        await self.say(protocol.Due(frames=12, first=self.frame))
        self.source = 0
        while self.source < 12 and not self.stopped:
            await asyncio.sleep(0.01)

    async def turn(self) -> None:
        assert self.asked is not None
        text, self.asked = self.asked, None
        self.frame += self.server.flush
        self.stream.turns.append((self.frame, text))
        index = len(self.stream.turns) - 1
        shown = protocol.PromptShown(
            index=index, text=text, block=1, frame=self.frame, flushed=self.server.flush, replaced=0, seconds=0.1
        )
        await self.say(shown)

    async def chunk(self) -> None:
        first, size = self.frame, 0
        for place, frames in enumerate(PIECES if self.frame == 0 else (4, 4, 4)):
            size += await self.piece(frames, key=place == 0)
        record = protocol.Chunk(
            index=first // 12, first=first, frames=self.frame - first, prompt=len(self.stream.turns) - 1,
            seconds=self.server.making, late=-0.2, media_bytes=size,
        )  # fmt: skip
        await self.say(record)

    async def piece(self, frames: int, key: bool) -> int:
        scene, _ = parse(self.stream.turns[-1][1])
        pixels = render(scene, self.stream.order.seed, frames, size=SIDE, start=self.frame, level=0)
        parts = self.encoder.encode(pixels, self.frame, key)
        repeats = {self.server.loses: 0, self.server.doubles: 2}.get(self.pieces, 1)
        for _ in range(repeats):
            for part in parts:
                await self.socket.send_bytes(protocol.pack(part.kind, part.first, part.payload))
        self.frame += frames
        self.sent += frames
        self.pieces += 1
        return sum(len(part.payload) for part in parts)
