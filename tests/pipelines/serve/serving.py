"""A whole server in this process, on loopback: real sockets, gateway, pool, workers, student; only Ray is left out."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import uvicorn
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from reelway.actors.orders import StreamOrder
from reelway.actors.timeline import Turn
from reelway.pipelines.serve.config import ServeConfig, fleets
from reelway.pipelines.serve.gateway import create_app
from reelway.pipelines.serve.keys import Keyring
from reelway.pipelines.serve.limits import Limits
from reelway.pipelines.serve.metrics import Metrics
from reelway.pipelines.serve.orders import Services
from reelway.pipelines.serve.placement import FleetSettings, Placed, Refused, Waiting
from reelway.pipelines.serve.pool import Hands as HandsProtocol
from reelway.pipelines.serve.pool import Pool, WorkerGone
from reelway.pipelines.serve.protocol import JPEG, PATH, SUBPROTOCOL, unpack
from reelway.pipelines.serve.state import State
from reelway.pipelines.serve.worker import StreamWorker

SIZE = (32, 32)
PATIENCE = 120.0  # seconds; the machine may be busy
PROMPT = "a small red star drifts left"
# So slow a stream is let in on any machine, however busy; the lead of the servers here makes nobody wait.
START = {"type": "start", "version": 1, "prompt": PROMPT, "frame_rate": 0.1, "media": "jpeg", "quality": 100}


class Hands:
    """Workers as plain objects. One that was killed answers nobody."""

    def __init__(self) -> None:
        self.killed: set[Any] = set()
        self.workers: list[StreamWorker] = []
        self._ending: set[asyncio.Task[None]] = set()
        self._loading = asyncio.Lock()

    def start(self, worker: str, model: str, settings: FleetSettings) -> StreamWorker:
        # To measure more batches takes seconds; larger ones are reckoned with in proportion.
        self.workers.append(StreamWorker(worker, model, replace(settings.worker, batches=(1,))))
        return self.workers[-1]

    async def call(self, handle: Any, method: str, *arguments: Any) -> Any:
        if handle in self.killed:
            raise WorkerGone("killed by the test")
        try:
            async with self._loading if method == "ready" else contextlib.nullcontext():  # transformers: one at a time
                result = await getattr(handle, method)(*arguments)
        except RuntimeError:  # its threads ended in the middle of the call
            if handle not in self.killed:
                raise
            raise WorkerGone("killed by the test") from None
        if handle in self.killed:
            raise WorkerGone("killed by the test")
        return result

    def kill(self, handle: Any) -> None:
        if handle not in self.killed:
            self.killed.add(handle)
            self._ending.add(asyncio.get_running_loop().create_task(handle.stop()))

    async def end(self) -> None:
        for worker in self.workers:
            self.kill(worker)
        await asyncio.gather(*self._ending)


class LocalBackend:
    """The pool, without Serve between."""

    def __init__(self, pool: Pool, hands: HandsProtocol) -> None:
        self.pool, self.hands = pool, hands

    async def place(
        self, model: str, order: StreamOrder, ticket: str | None, turns: Sequence[Turn], frame: int
    ) -> Placed | Waiting | Refused:
        return await self.pool.place(model, order, ticket, turns=turns, frame=frame)

    async def left(self, stream: str) -> None:
        await self.pool.left(stream)

    async def models(self) -> list[dict[str, Any]]:
        return await self.pool.models()

    async def status(self) -> dict[str, Any]:
        return await self.pool.status()

    async def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        return await self.hands.call(worker, method, *arguments)


class LocalServer:
    """A context manager. model: changes to the model's configuration; changes: to the server's."""

    def __init__(
        self,
        student: Path,
        state: Path,
        *,
        keys: Sequence[str] = (),
        model: dict[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        settings = {"path": str(student), "size": SIZE, "threads": 1, "keep_every": 2, "load": 1.0} | (model or {})
        limits = {"unseen_seconds": 10_000, "requests_per_minute": 10_000, "sessions_per_key": 100}
        changes["limits"] = limits | changes.get("limits", {})
        content = {"models": {"small": settings}, "state": str(state), "lead_seconds": 1e6} | changes
        self.config = ServeConfig.model_validate(content)
        self.keys = Keyring(keys)
        self.port = 0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._started = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(PATIENCE)
        wanted = self.config.models["small"].min_workers
        try:
            self.wait_until(lambda: all(row["ready"] >= wanted for row in self.ask(self.pool.models())))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        self.loop, self.hands = asyncio.get_running_loop(), Hands()
        self.pool = Pool(fleets(self.config), self.hands)
        self.pool.begin()
        self.metrics = Metrics("test")
        state, limits = State(self.config.state), Limits(self.config.limits)
        backend = LocalBackend(self.pool, self.hands)
        self.services = Services(self.config, backend, state, limits, self.keys, self.metrics)
        self.app = create_app(self.services)
        # Without pings: who does not read for a while, as the viewers here, does not answer them.
        settings = uvicorn.Config(
            self.app, "127.0.0.1", 0, log_level="error", timeout_graceful_shutdown=5, ws_ping_interval=None
        )
        self._server = uvicorn.Server(settings)
        announcing = asyncio.create_task(self._announce())
        await self._server.serve()
        await announcing
        await self.pool.stop()
        await self.hands.end()

    async def _announce(self) -> None:
        while not self._server.started:
            await asyncio.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self._started.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, work: Any) -> Any:
        """The result of a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def wait_until(self, true: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < until, "it did not come to pass"
            time.sleep(0.02)

    def streams(self) -> int:
        """Streams that are open on workers."""
        return sum(len(self.here(worker)) for worker in self.workers())

    def workers(self) -> list[StreamWorker]:
        """Those that are ready."""
        return [member.handle for member in self.pool.fleets["small"].of("ready")]

    def here(self, worker: StreamWorker) -> list[str]:
        """Streams that are open on a worker."""
        streams: list[str] = self.ask(worker.stats())["here"]
        return streams

    def viewer(self, *, key: str | None = None, subprotocols: Sequence[str] = (SUBPROTOCOL,), **named: Any) -> "Viewer":
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        address = f"ws://127.0.0.1:{self.port}{PATH}"
        socket = connect(
            address,
            subprotocols=list(subprotocols),  # type: ignore[arg-type]
            additional_headers=headers | named.pop("headers", {}),
            max_size=None,
            ping_interval=None,
            close_timeout=0.5,  # a socket with unread messages does not hear the other side's goodbye
            **named,
        )
        return Viewer(socket)


class Viewer:
    """A client that keeps what it gets, and says what it has seen unless it is told not to.

    A stream goes on for ever, so what waits for one message of many has to end by itself.
    """

    def __init__(self, socket: ClientConnection, attentive: bool = True) -> None:
        self.socket, self.attentive = socket, attentive
        self.records: list[dict[str, Any]] = []
        self.media: list[tuple[int, int, bytes]] = []
        self.code: int | None = None

    @property
    def pictures(self) -> dict[int, bytes]:
        """The JPEG frames, by index. Each came once."""
        frames = [(first, payload) for kind, first, payload in self.media if kind == JPEG]
        assert len(frames) == len(dict(frames))
        return dict(frames)

    def say(self, **message: Any) -> None:
        self.socket.send(json.dumps(message))

    def start(self, **changes: Any) -> dict[str, Any]:
        """Start a small stream; returns the `ready` record."""
        self.say(**START | changes)
        return self.until("ready")

    def hear(self, patience: float = PATIENCE) -> dict[str, Any] | None:
        """The next record, past media; None once the socket is closed. TimeoutError, however much media comes."""
        until = time.monotonic() + patience
        while True:
            try:
                message = self.socket.recv(max(0.0, until - time.monotonic()))
            except ConnectionClosed as closed:
                self.code = closed.rcvd.code if closed.rcvd else None
                return None
            if isinstance(message, bytes):
                self.media.append(unpack(message))
                continue
            record = json.loads(message)
            self.records.append(record)
            if record["type"] == "chunk" and self.attentive:
                self.say(type="seen", frame=record["first"] + record["frames"])
            return record

    def more_media(self) -> tuple[int, int, bytes]:
        """The next binary message: kind, first frame, payload."""
        count, until = len(self.media), time.monotonic() + PATIENCE
        while len(self.media) == count:
            assert time.monotonic() < until, self.records[-3:]
            with contextlib.suppress(TimeoutError):
                assert self.hear(0.05) is not None, (self.code, self.records[-3:])
        return self.media[count]

    def linger(self, seconds: float) -> None:
        """Read until nothing has come for so long."""
        until = time.monotonic() + PATIENCE
        with contextlib.suppress(TimeoutError):
            while self.hear(seconds) is not None:
                assert time.monotonic() < until, self.records[-3:]

    def until(self, kind: str) -> dict[str, Any]:
        """The next record of a kind, which must come before the close, and in time."""
        return self.until_any(lambda record: bool(record["type"] == kind))

    def until_any(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next record that is wanted."""
        until = time.monotonic() + PATIENCE
        while True:
            record = self.hear()
            assert record is not None, (self.code, self.records[-3:])
            if wanted(record):
                return record
            assert time.monotonic() < until, self.records[-3:]

    def chunks(self, count: int) -> list[dict[str, Any]]:
        return [self.until("chunk") for _ in range(count)]

    def rest(self) -> list[dict[str, Any]]:
        """All records up to the close, which must come."""
        begin, until = len(self.records), time.monotonic() + PATIENCE
        while self.hear() is not None:
            assert time.monotonic() < until, self.records[begin:][:3]
        return self.records[begin:]

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
