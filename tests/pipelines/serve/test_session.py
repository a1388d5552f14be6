"""A session's waits: each ends when it is told to, at whatever moment that is."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from reelway.actors.orders import StreamOrder
from reelway.pipelines.serve.backend import PlacedStream
from reelway.pipelines.serve.placement import Placed
from reelway.pipelines.serve.session import LiveSession


class Answering:
    """Workers of which each call is answered when `answer` is set."""

    def __init__(self) -> None:
        self.answer = asyncio.Event()

    async def call(self, worker: Any, method: str, *arguments: Any) -> None:
        await self.answer.wait()


async def cancelled_at_the_moment_of(answer: asyncio.Event, work: Coroutine[Any, Any, Any]) -> bool:
    """Whether work ends that is cancelled when what it waits for has just come."""

    async def forever() -> None:
        await work
        await asyncio.sleep(60)

    task = asyncio.create_task(forever())
    await asyncio.sleep(0.01)
    answer.set()
    await asyncio.sleep(0)  # whoever waits for the event itself has heard
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=50)
    return bool(done) and task.cancelled()


@pytest.mark.parametrize("wait", ["for the viewer", "for the worker"])
def test_a_session_ends_even_if_something_comes_at_that_moment(wait: str) -> None:
    """Else its stream is never freed: `asyncio.wait_for` of Python 3.11 loses such a cancellation."""

    async def run() -> bool:
        if wait == "for the viewer":
            session = LiveSession.__new__(LiveSession)
            session._changed = asyncio.Event()
            return await cancelled_at_the_moment_of(session._changed, session._change(50))
        backend: Any = Answering()
        stream = PlacedStream(backend, "tiny", StreamOrder("one", "a red star"))
        info: Any = None
        stream._placed = Placed(None, "worker", info, 0)
        return await cancelled_at_the_moment_of(backend.answer, stream.call("hold"))

    assert asyncio.run(run())
