"""A stream as its gateway counts it."""

import asyncio
from types import SimpleNamespace
from typing import Any

from reelway.actors.orders import StreamOrder
from reelway.actors.timeline import Turn
from reelway.pipelines.serve.backend import PlacedStream


def test_a_new_prompt_drops_each_frame_once_after_another_socket() -> None:
    """The viewer lacks frames from 40 on; of a switch at 57 it has seen nothing, and now asks for another one."""

    async def call(worker: Any, method: str, stream: str, text: str, frame: int) -> Turn:
        assert (method, frame) == ("prompt", 40)
        return Turn(6, text, 2, 69, 29)

    backend: Any = SimpleNamespace(call=call)
    stream = PlacedStream(
        backend, "tiny", StreamOrder("one", "a"), [Turn(2, "b", 1, 21, 3), Turn(5, "c", 2, 57, 9)], 40
    )
    stream._placed = SimpleNamespace(worker=None, id="first")  # type: ignore[assignment]
    turn = asyncio.run(stream.prompt("d"))
    assert [(one.frame, one.flushed) for one in stream.turns] == [(21, 3), (57, 17), (69, 12)]
    assert (turn, stream.next) == (stream.turns[-1], 69)
    assert sum(one.flushed for one in stream.turns[1:]) == 69 - 40
