"""Viewers who come and go in every way there is: what they took of the server comes back."""

import asyncio
import gc
import json
import os
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from reelway.pipelines.serve import session as session_module
from reelway.pipelines.serve.protocol import PATH, SUBPROTOCOL

from .serving import PATIENCE, START, LocalServer

WAYS = ("stops", "closes", "vanishes", "vanishes at once", "comes back", "sends garbage", "says nothing")
GROWTH = 48 << 20  # bytes that the process may have grown by: a stream has set aside 0.5 MB or more
MEGABYTE = 1 << 20


@dataclass
class Footprint:
    """What the process holds. memory: resident bytes; files: descriptors; streams: of the students."""

    memory: int
    files: int
    threads: int
    streams: int
    bytes_open: int
    sessions: int
    owners: int

    @classmethod
    def of(cls, server: LocalServer) -> "Footprint":
        gc.collect()
        status = Path("/proc/self/status").read_text()
        [memory] = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
        students = [worker.student for worker in server.hands.workers]
        return cls(
            memory=1024 * memory,
            files=len(os.listdir("/proc/self/fd")),
            threads=threading.active_count(),
            streams=sum(len(student.streams) for student in students),
            bytes_open=sum(student.bytes_open for student in students),
            sessions=len(session_module._live),
            owners=len(server.services.limits._open),
        )


async def come_and_go(server: LocalServer, way: str, seed: int) -> None:
    """One viewer, from its first socket to its last."""
    stream = None
    async with opened(server) as socket:
        if way == "says nothing":
            return
        if way == "sends garbage":
            await socket.send("{" * 50)
            await to_the_end(socket)
            return
        await socket.send(json.dumps(START | {"seed": seed}))
        if way == "vanishes at once":
            socket.transport.abort()
            return
        stream = await first_picture(socket)
        if way == "stops":
            await socket.send(json.dumps({"type": "stop"}))
            await to_the_end(socket)
        elif way in ("vanishes", "comes back"):
            socket.transport.abort()
    if way == "comes back":
        async with opened(server) as socket:
            message = {"type": "reconnect", "version": 1, "stream": stream, "frame": 1, "media": "jpeg"}
            await socket.send(json.dumps(message))
            assert await first_picture(socket) == stream
            await socket.send(json.dumps({"type": "stop"}))
            await to_the_end(socket)


def opened(server: LocalServer) -> Any:
    address = f"ws://127.0.0.1:{server.port}{PATH}"
    names: Any = [SUBPROTOCOL]
    return connect(address, subprotocols=names, max_size=None, close_timeout=PATIENCE, ping_interval=None)


async def first_picture(socket: ClientConnection) -> str:
    """The stream's id, once a picture has come."""
    stream = ""
    while True:
        message = await socket.recv()
        if isinstance(message, bytes):
            assert stream
            return stream
        record = json.loads(message)
        assert record["type"] in ("ready", "queued", "chunk"), record
        stream = record.get("stream", stream)


async def to_the_end(socket: ClientConnection) -> None:
    with suppress(ConnectionClosed):
        async for _ in socket:
            pass


async def crowd(server: LocalServer, first: int, count: int, at_once: int) -> None:
    """So many viewers, never more than `at_once` at the same time, in a mix of ways."""
    dice, room = random.Random(first), asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        way = WAYS[number % len(WAYS)] if number < first + len(WAYS) else dice.choice(WAYS)
        async with room:
            try:
                async with asyncio.timeout(PATIENCE):
                    await come_and_go(server, way, number)
            except Exception as error:
                raise AssertionError(f"viewer {number} {way}: {error!r}") from error

    await asyncio.gather(*(one(number) for number in range(first, first + count)))


@pytest.mark.parametrize(
    ("viewers", "at_once"), [(21, 7), pytest.param(1000, 24, marks=pytest.mark.slow)], ids=["few", "a thousand"]
)
def test_viewers_come_and_go_and_leave_nothing(small_student: Path, tmp_path: Path, viewers: int, at_once: int) -> None:
    """Memory, file descriptors, threads, places and counts are what they were after the first few had been there."""
    with LocalServer(small_student, tmp_path / "state") as server:
        for worker in server.hands.workers:  # nobody sweeps up after a session that does not
            worker.settings = replace(worker.settings, abandoned_seconds=1e9)
        asyncio.run(crowd(server, 0, max(at_once, viewers // 10), at_once))
        server.wait_until(lambda: server.streams() == 0)
        before = Footprint.of(server)
        asyncio.run(crowd(server, 10_000, viewers, at_once))
        server.wait_until(lambda: server.streams() == 0)
        server.wait_until(lambda: not session_module._live and not Footprint.of(server).bytes_open)
        server.wait_until(lambda: Footprint.of(server).files <= before.files + 4)  # closed sockets linger for a moment
        after = Footprint.of(server)
        print(f"{viewers} viewers: {(after.memory - before.memory) / MEGABYTE:+.1f} MB, {before} -> {after}")
        assert (after.streams, after.bytes_open, after.sessions, after.owners) == (0, 0, 0, 0)
        assert after.threads <= before.threads + 32  # executors keep theirs, up to their limits
        assert after.memory - before.memory < GROWTH
        began = time.monotonic()
        asyncio.run(crowd(server, 20_000, 1, 1))  # and somebody is served as ever
        assert time.monotonic() - began < PATIENCE
