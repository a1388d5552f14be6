"""A socket from its first message to its close: who may begin what, and the one clear answer to whatever goes wrong."""

import asyncio
import time
import traceback
from typing import Final

from fastapi import WebSocket

from .backend import NoPlace
from .orders import Services, find_record, open_reconnect, open_start
from .protocol import BROKEN, TRY_AGAIN, BadMessage, Busy, Error, Reconnect, read_first
from .session import LiveSession, take_over
from .wire import Left, Over, Socket

FIRST_SECONDS: Final = 20.0  # for the first message to come


async def serve_socket(services: Services, websocket: WebSocket, owner: str) -> None:
    """A socket that was accepted, from its first message to its close. Raises nothing."""
    socket = Socket(websocket, services.limits, services.metrics)
    how = "left"
    try:
        await _serve(services, socket, owner)
    except BadMessage as error:
        how = "refused"
        await socket.reject(error)
    except NoPlace as error:
        how = "refused" if error.code == "invalid" else "busy"
        await _no_place(socket, error)
    except Over as over:
        how = over.how
        await socket.finish(over.record, over.code)
    except Left:
        pass
    except Exception:  # noqa: BLE001 -- the server's own fault: shown here, and told to the viewer without its details
        how = "failed"
        traceback.print_exc()
        await socket.finish(Error(code="failed", message="the server failed; reconnecting may help"), BROKEN)
    services.metrics.ended.inc(how)


async def _no_place(socket: Socket, error: NoPlace) -> None:
    if error.code == "invalid":
        await socket.reject(BadMessage("bad_order", str(error)))
    else:
        await socket.finish(Busy(reason=str(error)), TRY_AGAIN)


async def _serve(services: Services, socket: Socket, owner: str) -> None:
    came = time.monotonic()
    try:
        async with asyncio.timeout(FIRST_SECONDS):
            text = await socket.receive()
    except TimeoutError:
        raise BadMessage("bad_message", f"no first message within {FIRST_SECONDS:g} s") from None
    if isinstance(text, bytes):
        raise BadMessage("bad_message", "message: the first one is `start` or `reconnect`, got a binary one")
    first = read_first(text)
    services.limits.request(owner, came)
    if isinstance(first, Reconnect):
        await find_record(services, first.stream, owner)  # nobody else may end the session that has the stream
        await take_over(first.stream)
        opened = await open_reconnect(services, first, owner)
    else:
        opened = await open_start(services, first, owner)
    with services.limits.session(owner):
        (services.metrics.resumed if opened.resumed else services.metrics.begun).inc()
        await LiveSession(services, socket, opened, first, came).run()
